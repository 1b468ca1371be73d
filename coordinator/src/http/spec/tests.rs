use serde_json::json;

use super::*;

fn types() -> Vec<String> {
    ["CPU", "GPU_LARGE"].map(String::from).to_vec()
}

fn entity(name: &str) -> Value {
    json!({"name": name, "entity_name": "m", "entity_version": "1", "scale_to_zero_enabled": false})
}

fn with(mut base: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    base.pointer_mut(parent).unwrap()[key] = value;
    base
}

fn one() -> Value {
    json!({"name": "e", "config": {"served_entities": [entity("a")]}})
}

fn two() -> Value {
    json!({"name": "e", "config": {"served_entities": [entity("a"), entity("b")]}})
}

fn parse(body: &Value) -> Result<CreateEndpoint, FieldError> {
    create(body.as_object().unwrap(), &types())
}

#[test]
fn the_seeds_own_request_is_taken() {
    let body = json!({
        "name": "llama2-3b-chat",
        "config": {"served_models": [{
            "model_name": "ml.llm-catalog.llama-13b", "model_version": 3, "workload_size": "Small",
            "scale_to_zero_enabled": false, "workload_type": "GPU_LARGE"}]},
    });
    let endpoint = parse(&body).unwrap();
    let entity = &endpoint.config.entities[0];
    assert_eq!(endpoint.name, "llama2-3b-chat");
    assert_eq!(entity.name, "llama-13b-3");
    assert_eq!(
        entity.model,
        ModelRef::new("ml.llm-catalog.llama-13b", "3").unwrap()
    );
    assert_eq!(
        (entity.workload_size, entity.workload_type.as_str()),
        (WorkloadSize::Small, "GPU_LARGE")
    );
    assert_eq!(
        endpoint.config.routes,
        [Route {
            entity: "llama-13b-3".into(),
            percentage: 100
        }]
    );
}

#[test]
fn old_and_new_spellings_and_types_mean_the_same() {
    let old = json!({"name": "e", "task": "llm", "config": {"served_models": [{
        "model_name": "m", "model_version": 1, "scale_to_zero_enabled": "False"}]}});
    let new = json!({"name": "e", "tags": null, "config": {"traffic_config": {}, "served_entities": [{
        "entity_name": "m", "entity_version": "01", "scale_to_zero_enabled": false, "workload_type": "CPU"}]}});
    assert_eq!(parse(&old).unwrap(), parse(&new).unwrap());
    let true_text = with(
        one(),
        "/config/served_entities/0/scale_to_zero_enabled",
        json!("True"),
    );
    assert!(parse(&true_text).unwrap().config.entities[0].scale_to_zero);
}

#[test]
fn routes_tags_and_variables_are_taken() {
    let routes = json!({"routes": [
        {"served_model_name": "a", "traffic_percentage": 30},
        {"served_entity_name": "b", "traffic_percentage": 70.0}]});
    let body = with(two(), "/config/traffic_config", routes);
    let body = with(
        body,
        "/tags",
        json!([{"key": "team", "value": "x"}, {"key": "bare"}]),
    );
    let vars = json!({"KEY": "{{secrets/scope/key}}"});
    let body = with(body, "/config/served_entities/0/environment_vars", vars);
    let endpoint = parse(&body).unwrap();
    let shares: Vec<_> = endpoint
        .config
        .routes
        .iter()
        .map(|r| (r.entity.as_str(), r.percentage))
        .collect();
    assert_eq!(shares, [("a", 30), ("b", 70)]);
    assert_eq!(
        endpoint.settings.tags,
        [("team".into(), "x".into()), ("bare".into(), String::new())]
    );
    let vars = &endpoint.config.entities[0].environment_vars;
    assert_eq!(
        *vars,
        [("KEY".to_owned(), "{{secrets/scope/key}}".to_owned())]
    );
}

#[test]
fn how_weights_are_kept_may_be_asked_for() {
    let kept = |value: serde_json::Value| {
        let body = with(one(), "/config/served_entities/0/quantization", value);
        parse(&body).unwrap().config.entities[0].quantization
    };
    assert_eq!(kept(json!(null)), None);
    assert_eq!(kept(json!("none")), Some(Quantization::None));
    assert_eq!(kept(json!("int4")), Some(Quantization::Int4));
}

#[test]
fn every_mistake_is_told_with_its_field() {
    let e = "/config/served_entities/0";
    let at = |key: &str, value: Value| with(one(), &format!("{e}/{key}"), value);
    let range = |min: Value, max: Value| {
        let body = at("min_provisioned_concurrency", min);
        with(body, &format!("{e}/max_provisioned_concurrency"), max)
    };
    let routes = |value: Value| with(two(), "/config/traffic_config", json!({"routes": value}));
    let route =
        |name: &str, share: i64| json!({"served_model_name": name, "traffic_percentage": share});
    let many: Vec<Value> = (0..11).map(|i| entity(&format!("e{i}"))).collect();
    let table: Vec<(Value, &str)> = vec![
        (with(one(), "/name", json!(null)), "name is missing"),
        (
            with(one(), "/name", json!(5)),
            "name must be a string, got 5",
        ),
        (
            with(one(), "/name", json!("")),
            "name must be 1 to 63 letters",
        ),
        (
            with(one(), "/name", json!("-x")),
            "beginning with a letter or digit, got \"-x\"",
        ),
        (with(one(), "/name", json!("a.b")), "name must be 1 to 63"),
        (
            with(one(), "/name", json!("x".repeat(64))),
            "name must be 1 to 63",
        ),
        (with(one(), "/name", json!("v1")), "name 'v1' is reserved"),
        (
            with(one(), "/name", json!("databricks-x")),
            "name 'databricks-x' is reserved",
        ),
        (with(one(), "/config", json!(null)), "config is missing"),
        (
            with(one(), "/config", json!([])),
            "config must be an object, got a list",
        ),
        (
            with(one(), "/config/served_models", json!([])),
            "config.served_models and served_entities",
        ),
        (
            with(one(), "/config/served_entities", json!(null)),
            "config.served_entities is missing",
        ),
        (
            with(one(), "/config/served_entities", json!([])),
            "must have 1 to 10 entries, got 0",
        ),
        (
            with(one(), "/config/served_entities", json!(many)),
            "must have 1 to 10 entries, got 11",
        ),
        (
            with(two(), "/config/served_entities/1/name", json!("a")),
            "the second named 'a'",
        ),
        (
            at("entity_name", json!(null)),
            "config.served_entities[0].entity_name is missing",
        ),
        (
            at("entity_name", json!("a.b")),
            "entity_name must be one level or three",
        ),
        (
            at("entity_version", json!(null)),
            "config.served_entities[0].entity_version is missing",
        ),
        (
            at("entity_version", json!(1.5)),
            "entity_version must be a positive whole number, got 1.5",
        ),
        (
            at("entity_version", json!(true)),
            "entity_version must be a positive whole number, got true",
        ),
        (
            at("workload_size", json!("Huge")),
            "must be Small, Medium or Large, got \"Huge\"",
        ),
        (
            at("quantization", json!("fp8")),
            "served_entities[0].quantization must be none, int8 or int4, got \"fp8\"",
        ),
        (
            at("workload_type", json!("GPU_MEDIUM")),
            "Workload type 'GPU_MEDIUM' with size 'Small' is not supported. \
             Please choose a node type from CPU, GPU_LARGE.",
        ),
        (
            at("scale_to_zero_enabled", json!(null)),
            SCALE_TO_ZERO_UNDEFINED,
        ),
        (
            at("scale_to_zero_enabled", json!("yes")),
            "must be true or false, got \"yes\"",
        ),
        (
            with(
                at("workload_type", json!("GPU_LARGE")),
                &format!("{e}/scale_to_zero_enabled"),
                json!(true),
            ),
            "scale_to_zero_enabled must be false for workload type GPU_LARGE",
        ),
        (
            at("environment_vars", json!({"A": 1})),
            "environment_vars.A must be a string, got 1",
        ),
        (
            at("external_model", json!({"name": "x"})),
            "external_model is not supported",
        ),
        (
            at("min_provisioned_throughput", json!(0)),
            "min_provisioned_throughput must be a whole number between 1",
        ),
        (
            at("foundation_model", json!({"name": "x"})),
            "foundation_model is not supported",
        ),
        (
            at("provisioned_model_units", json!(1.5)),
            "provisioned_model_units must be a whole number",
        ),
        (
            range(json!(4), json!(null)),
            "max_provisioned_concurrency is missing",
        ),
        (
            range(json!(null), json!(4)),
            "min_provisioned_concurrency is missing",
        ),
        (
            range(json!(4), json!(6)),
            "max_provisioned_concurrency must be a multiple of 4, got 6",
        ),
        (
            range(json!(8), json!(4)),
            "min_provisioned_concurrency must be at most max_provisioned_concurrency (4), got 8",
        ),
        (
            range(json!(4), json!(0)),
            "max_provisioned_concurrency must be a whole number between 4 and 1024, got 0",
        ),
        (
            range(json!(0), json!(4)),
            "min_provisioned_concurrency must be above 0 unless scale_to_zero_enabled is true",
        ),
        (
            with(
                range(json!(4), json!(8)),
                &format!("{e}/workload_size"),
                json!("Small"),
            ),
            "min_provisioned_concurrency and workload_size say the same thing",
        ),
        (
            with(one(), "/config/auto_capture_config", json!({"enabled": 5})),
            "config.auto_capture_config.enabled must be true or false, got 5",
        ),
        (
            with(one(), "/rate_limits", json!([{"calls": 1}])),
            "rate_limits[0].renewal_period is missing",
        ),
        (two(), "traffic_config.routes is missing"),
        (
            routes(json!([route("a", 50), route("b", 49)])),
            "sum to 100, got 99",
        ),
        (
            routes(json!([route("c", 100)])),
            "'c' is not a served entity; these are: a, b",
        ),
        (
            routes(json!([route("a", 50), route("a", 50)])),
            "'a' already has a route",
        ),
        (
            routes(json!([route("a", 101)])),
            "traffic_percentage must be a whole number between 0 and 100, got 101",
        ),
        (
            routes(json!([{"served_model_name": "a", "served_entity_name": "b",
                "traffic_percentage": 100}])),
            "routes[0].served_entity_name must be the same as served_model_name ('a')",
        ),
        (
            routes(json!([{"traffic_percentage": 1}])),
            "routes[0].served_model_name is missing",
        ),
    ];
    for (body, expected) in table {
        let error = parse(&body).expect_err(expected);
        assert!(
            error.message.contains(expected),
            "expected {expected:?}, got {:?}",
            error.message
        );
    }
}

#[test]
fn an_update_has_no_wrapper() {
    let body = json!({"name": "e", "served_models": [{"model_name": "m", "model_version": 2,
        "scale_to_zero_enabled": true}]});
    let config = update(body.as_object().unwrap(), &types()).unwrap();
    assert_eq!(config.entities[0].name, "m-2");
}

#[test]
fn concurrency_may_stand_in_place_of_a_size() {
    let e = "/config/served_entities/0";
    let set = |body, key: &str, value| with(body, &format!("{e}/{key}"), value);
    let body = set(one(), "min_provisioned_concurrency", json!(0));
    let body = set(body, "max_provisioned_concurrency", json!(12));
    let body = set(body, "scale_to_zero_enabled", json!(true));
    let body = set(body, "instance_profile_arn", json!("arn:x"));
    let entity = &parse(&body).unwrap().config.entities[0];
    let range = ConcurrencyRange { min: 0, max: 12 };
    assert_eq!((entity.concurrency, entity.admitted()), (Some(range), 12));
    assert_eq!(entity.instance_profile_arn.as_deref(), Some("arn:x"));
    let sized = set(one(), "workload_size", json!("Medium"));
    let sized = &parse(&sized).unwrap().config.entities[0];
    assert_eq!((sized.concurrency, sized.admitted()), (None, 16));
}

#[test]
fn the_older_switch_of_the_inference_table_stands_in_the_configuration() {
    let table = json!({"enabled": true, "catalog_name": "c", "schema_name": "s"});
    let body = with(one(), "/config/auto_capture_config", table);
    let config = parse(&body).unwrap().config;
    assert!(config.auto_capture.is_some_and(|table| table.enabled));
    let empty = with(one(), "/config/auto_capture_config", json!({}));
    assert_eq!(parse(&empty).unwrap().config.auto_capture, None);
}
