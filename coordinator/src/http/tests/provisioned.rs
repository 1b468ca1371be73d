//! Provisioned throughput through its paths.

use std::sync::Arc;

use actix_web::test::TestRequest;
use serde_json::{Value, json};

use super::fake::{FakeGateway, endpoint_view, with_state};
use super::{authorized, call, get, post};
use crate::api::{DeploymentState, Provisioned};

const PATH: &str = "/api/2.0/serving-endpoints";

fn entity(fields: &Value) -> Value {
    let mut entity = json!({"entity_name": "ml.llm.llama", "entity_version": "3"});
    let given = fields.as_object().unwrap().clone();
    entity.as_object_mut().unwrap().extend(given);
    entity
}

fn body(fields: &Value) -> Value {
    json!({"name": "e", "config": {"served_entities": [entity(fields)]}})
}

fn asked(gateway: &FakeGateway) -> Provisioned {
    let created = gateway.created.lock().unwrap();
    let entity = &created.last().unwrap().1.config.entities[0];
    assert_eq!(entity.workload_type, "", "the cluster chooses");
    entity.provisioned.unwrap()
}

#[actix_web::test]
async fn the_ordinary_create_takes_throughput_and_then_needs_no_scale_to_zero() {
    for (fields, min, max) in [
        (
            json!({"min_provisioned_throughput": 970, "max_provisioned_throughput": 1940}),
            970,
            1940,
        ),
        (
            json!({"min_provisioned_throughput": 0, "max_provisioned_throughput": 970}),
            0,
            970,
        ),
        (
            json!({"max_provisioned_throughput": 970, "scale_to_zero_enabled": false}),
            0,
            970,
        ),
        (json!({"min_provisioned_throughput": 970}), 970, 970),
    ] {
        let gateway = Arc::new(FakeGateway::default());
        call(&gateway, post(PATH, &body(&fields))).await.ok();
        let got = asked(&gateway);
        assert_eq!(
            (got.min_tokens_per_s, got.max_tokens_per_s),
            (min, max),
            "{fields}"
        );
    }
}

#[actix_web::test]
async fn throughput_that_contradicts_itself_or_something_else_is_refused() {
    let both = json!({"min_provisioned_throughput": 10, "max_provisioned_throughput": 20});
    let with = |key: &str, value: Value| {
        let mut fields = both.clone();
        fields[key] = value;
        fields
    };
    for (fields, says) in [
        (
            with("workload_size", json!("Small")),
            "workload_size and config.served_entities[0].max_provisioned_throughput cannot stand together",
        ),
        (
            with("max_provisioned_concurrency", json!(4)),
            "max_provisioned_concurrency",
        ),
        (
            with("scale_to_zero_enabled", json!(true)),
            "must be false beside provisioned throughput",
        ),
        (
            with("provisioned_model_units", json!(1)),
            "say the same thing",
        ),
        (
            with("max_provisioned_throughput", json!(5)),
            "at least min_provisioned_throughput, 10, got 5",
        ),
        (
            with("max_provisioned_throughput", json!(0)),
            "between 1 and",
        ),
        (
            with("max_provisioned_throughput", json!("fast")),
            "a whole number",
        ),
        (
            with("min_provisioned_throughput", json!(-1)),
            "between 0 and",
        ),
        (
            with("burst_scaling_enabled", json!(true)),
            "must be false: bursts",
        ),
        (
            with("workload_type", json!("GPU_MEDIUM")),
            "Workload type 'GPU_MEDIUM'",
        ),
        (json!({"min_provisioned_throughput": 0}), "between 1 and"),
        (json!({"provisioned_model_units": 0}), "between 1 and"),
    ] {
        let gateway = Arc::new(FakeGateway::default());
        let refused = call(&gateway, post(PATH, &body(&fields))).await;
        refused.refused(400, "INVALID_PARAMETER_VALUE", says);
        assert!(gateway.created.lock().unwrap().is_empty(), "{fields}");
    }
}

#[actix_web::test]
async fn the_path_of_provisioned_throughput_creates_and_demands_it() {
    let gateway = Arc::new(FakeGateway::default());
    let units = json!({"provisioned_model_units": 2, "burst_scaling_enabled": false});
    let pt = format!("{PATH}/pt");
    let created = call(&gateway, post(&pt, &body(&units))).await.ok();
    assert_eq!(created["name"], "e");
    assert_eq!(asked(&gateway).model_units, Some(2));
    let plain = json!({"workload_type": "CPU", "scale_to_zero_enabled": false});
    let refused = call(&gateway, post(&format!("{pt}/"), &body(&plain))).await;
    refused.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        "config.served_entities[0].provisioned_model_units is missing",
    );
}

#[actix_web::test]
async fn its_configuration_is_replaced_in_a_wrapper() {
    let gateway = Arc::new(FakeGateway::default());
    let ready = with_state(endpoint_view("e"), DeploymentState::Ready);
    gateway.endpoints.lock().unwrap().push(ready);
    let path = format!("{PATH}/pt/e/config");
    let put =
        |body: &Value| authorized(TestRequest::put().uri(&path)).set_payload(body.to_string());
    let config = json!({"served_entities": [entity(&json!({"provisioned_model_units": 1}))]});
    let replaced = call(&gateway, put(&json!({"config": config}))).await.ok();
    assert_eq!(replaced["name"], "e");
    let updated = gateway.updated.lock().unwrap()[0].clone();
    assert_eq!(updated.1, "e");
    assert_eq!(
        updated.2.entities[0].provisioned.unwrap().model_units,
        Some(1)
    );
    let bare = call(&gateway, put(&config)).await;
    bare.refused(400, "INVALID_PARAMETER_VALUE", "config is missing");
}

#[actix_web::test]
async fn throughput_is_shown_back_under_both_names() {
    let gateway = Arc::new(FakeGateway::default());
    let mut view = endpoint_view("e");
    view.pending.as_mut().unwrap().entities[0].spec.provisioned = Some(Provisioned {
        min_tokens_per_s: 0,
        max_tokens_per_s: 970,
        model_units: None,
    });
    gateway.endpoints.lock().unwrap().push(view);
    let shown = call(&gateway, get(&format!("{PATH}/e"))).await.ok();
    for list in ["served_models", "served_entities"] {
        let entity = &shown["pending_config"][list][0];
        assert_eq!(entity["min_provisioned_throughput"], 0, "{entity}");
        assert_eq!(entity["max_provisioned_throughput"], 970);
        assert_eq!(entity["workload_type"], "GPU_LARGE");
        assert!(entity.get("provisioned_model_units").is_none());
    }
}

#[actix_web::test]
async fn what_a_model_gives_is_told_before_it_is_deployed() {
    let gateway = Arc::new(FakeGateway::default());
    let info = |model: &str| get(&format!("{PATH}/get-model-optimization-info/{model}"));
    assert_eq!(
        call(&gateway, info("ml.llm-catalog.llama-13b/3"))
            .await
            .ok(),
        json!({"optimizable": true, "model_type": "llama", "throughput_chunk_size": 970, "dbus": 0.0})
    );
    assert_eq!(
        call(&gateway, info("odd/1/")).await.ok(),
        json!({"optimizable": false})
    );
    let gone = call(&gateway, info("gone/1")).await;
    gone.refused(404, "RESOURCE_DOES_NOT_EXIST", "'gone' does not exist");
    let wrong = call(&gateway, info("a.b/1")).await;
    wrong.refused(400, "INVALID_PARAMETER_VALUE", "one level or three");
    let wrong = call(&gateway, info("a/latest")).await;
    wrong.refused(400, "INVALID_PARAMETER_VALUE", "positive whole number");
}
