//! The control plane: what is asked of endpoints, and how they are shown.

use common::config::ENTITIES_MAX;
use common::names::NAME_CHARS_MAX;
use common::wire::message::Quantization;
use serde_json::{Value, json};
use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::errors;
use super::operation::Operation;
use super::parameters::{ENDPOINT, MODEL, endpoint_name, model_name};
use super::permissions;
use super::schema::{
    Field, Shape, any_of, at_least, flag, formed, list, list_of, map, may, multiple, named, need,
    object, text, text_of, whole, words,
};
use super::settings;
use crate::http::settings::TEXT_BYTES_MAX;
use crate::http::spec::{CONCURRENCY_MAX, CONCURRENCY_UNIT, VARIABLES_MAX};
use crate::http::throughput::RATE_MAX;

const TAG: &str = "Endpoints";

/// Puts the paths of the control plane among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let operation =
        |method, path: &str, id, summary| Operation::new(method, path, TAG, id, summary);
    let all = "/api/2.0/serving-endpoints";
    let one = "/api/2.0/serving-endpoints/{name}";
    let config = "/api/2.0/serving-endpoints/{name}/config";
    let paths = operation(HttpMethod::Post, all, "create", "Creates an endpoint")
        .about(
            "Answers as soon as the wish is stored; `state` of the endpoint tells how its deployment goes on. What cannot \
             be served is refused here: the message says what would.",
        )
        .body(
            named("CreateRequest"),
            [
                (
                    "entities",
                    "One served entity",
                    json!({"name": ENDPOINT, "config": {"served_entities": [entity_example()]}}),
                ),
                (
                    "models",
                    "The same in the older spelling, as the first notebooks send it",
                    json!({"name": "hello-older", "config": {"served_models": [model_example()]}}),
                ),
                (
                    "range",
                    "A range of requests at a time in place of a size, and settings",
                    json!({
                        "name": "hello-range",
                        "config": {"served_entities": [{
                            "entity_name": MODEL, "entity_version": "1", "min_provisioned_concurrency": 4,
                            "max_provisioned_concurrency": 8, "scale_to_zero_enabled": true,
                        }]},
                        "tags": [{"key": "team", "value": "search"}],
                        "description": "Says hello",
                        "ai_gateway": {"usage_tracking_config": {"enabled": true}},
                    }),
                ),
            ],
        )
        .refuses(&[&errors::NOT_FOUND])
        .gives(named("Endpoint"), "The endpoint, being deployed.")
        .put(paths);
    let paths = operation(HttpMethod::Get, all, "list", "Lists all endpoints")
        .gives(
            object([need(
                "endpoints",
                list(named("EndpointSummary")),
                "By name.",
            )]),
            "The endpoints, in short.",
        )
        .put(paths);
    let paths = operation(HttpMethod::Get, one, "get", "Shows an endpoint")
        .gives(named("Endpoint"), "The endpoint.")
        .put(paths);
    let paths = operation(HttpMethod::Delete, one, "delete", "Deletes an endpoint")
        .about("In any state. Requests in flight end as unavailable.")
        .gives(object([]), "An empty object.")
        .put(paths);
    let paths = operation(
        HttpMethod::Get,
        config,
        "getConfig",
        "Shows the configuration that serves",
    )
    .gives(named("Config"), "The active configuration.")
    .put(paths);
    let entity = "/api/2.0/serving-endpoints/{name}/served-models/{served}";
    let logs = [
        ("logs", "getLogs", "Shows how a served entity runs"),
        (
            "build-logs",
            "getBuildLogs",
            "Shows how a served entity was deployed",
        ),
    ];
    let paths = logs.into_iter().fold(paths, |paths, (last, id, summary)| {
        operation(HttpMethod::Get, &format!("{entity}/{last}"), id, summary)
            .about("The newest lines of all its replicas, also of those that are gone. No text of prompts or answers stands in them.")
            .gives(object([need("logs", text(), "The lines.")]), "The log.")
            .put(paths)
    });
    let paths = operation(
        HttpMethod::Get,
        "/api/2.0/serving-endpoints/{name}/metrics",
        "exportMetrics",
        "Shows an endpoint's metrics",
    )
    .gives_as(
        200,
        "text/plain",
        text(),
        "Prometheus text: the endpoint's part of `/metrics`.",
    )
    .put(paths);
    operation(
        HttpMethod::Put,
        config,
        "updateConfig",
        "Deploys another configuration",
    )
    .about("The old one serves until the new one is ready, and goes on when that fails.")
    .body(
        named("ConfigRequest"),
        [
            (
                "two",
                "Two served entities that share the traffic",
                json!({
                    "served_entities": [entity_named("first"), entity_named("second")],
                    "traffic_config": {"routes": [
                        {"served_entity_name": "first", "traffic_percentage": 90},
                        {"served_entity_name": "second", "traffic_percentage": 10},
                    ]},
                }),
            ),
            (
                "named",
                "One served entity with a name of its own",
                json!({"served_entities": [entity_named("first")]}),
            ),
            (
                "one",
                "One served entity, in the older spelling",
                json!({"served_models": [model_example()]}),
            ),
        ],
    )
    .refuses(&[&errors::CONFLICT])
    .gives(
        named("Endpoint"),
        "The endpoint with its pending configuration.",
    )
    .put(paths)
}

fn entity_example() -> Value {
    json!({
        "entity_name": MODEL, "entity_version": "1", "workload_type": "CPU", "workload_size": "Small",
        "scale_to_zero_enabled": false,
    })
}

fn entity_named(name: &str) -> Value {
    let mut entity = entity_example();
    entity["name"] = name.into();
    entity
}

/// As the first notebooks write it: a number, and a word in quotes.
fn model_example() -> Value {
    json!({
        "model_name": MODEL, "model_version": 1, "workload_type": "CPU", "workload_size": "Small",
        "scale_to_zero_enabled": "False",
    })
}

/// Puts the schemas of the control plane among the components. Which workload types there are is configured.
pub(super) fn schemas(
    components: ComponentsBuilder,
    workload_types: &[String],
) -> ComponentsBuilder {
    components
        .schema("CreateRequest", create())
        .schema("ConfigRequest", config_request())
        .schema(
            "EntityRequest",
            entity(["entity_name", "entity_version"], workload_types),
        )
        .schema(
            "ModelRequest",
            entity(["model_name", "model_version"], workload_types),
        )
        .schema("RouteRequest", route_request())
        .schema("Endpoint", endpoint())
        .schema("EndpointSummary", summary())
        .schema("EndpointState", state())
        .schema("Config", object(config()))
        .schema("PendingConfig", pending_config())
        .schema("ServedEntity", served(["entity_name", "entity_version"]))
        .schema("ServedModel", served(["model_name", "model_version"]))
        .schema("Traffic", traffic())
}

fn create() -> Shape {
    let mut fields = vec![
        need(
            "name",
            endpoint_name(),
            "Not taken, not a reserved word, and not beginning with `databricks-`.",
        ),
        need("config", named("ConfigRequest"), "What it shall serve."),
    ];
    fields.extend(settings::at_creation());
    object(fields)
}

fn config_request() -> Shape {
    object([
        may(
            "served_entities",
            list_of(named("EntityRequest"), 1..=ENTITIES_MAX),
            "What it serves: this or `served_models`.",
        ),
        may(
            "served_models",
            list_of(named("ModelRequest"), 1..=ENTITIES_MAX),
            "The older spelling of `served_entities`.",
        ),
        may(
            "traffic_config",
            traffic_request(),
            "Who gets how much of the traffic.",
        ),
        may(
            "auto_capture_config",
            named("TableRequest"),
            "Whether requests and answers are kept.",
        ),
    ])
}

fn entity(keys: [&'static str; 2], workload_types: &[String]) -> Shape {
    object([
        need(
            keys[0],
            model_name(),
            "The registered model: one level, or `catalog.schema.model`.",
        ),
        need(keys[1], version(), "Its version."),
        may(
            "name",
            entity_name(),
            "Unique in the endpoint; the model's last name and version unless given.",
        ),
        may(
            "workload_size",
            words(&["Small", "Medium", "Large"]),
            "Requests at a time: 4, 16 or 64. Small unless given.",
        ),
        may(
            "workload_type",
            words(workload_types),
            "On what it runs: one of cluster.toml's types. CPU unless given.",
        ),
        may(
            "scale_to_zero_enabled",
            any_of([
                flag(),
                formed("^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])$", 5),
            ]),
            "Whether it may be put away while nobody asks; only CPU types may. Needed unless throughput is provisioned.",
        ),
        may(
            "environment_vars",
            map(text_of(0..=TEXT_BYTES_MAX), Some(VARIABLES_MAX)),
            "Shown back; nothing reads them.",
        ),
        may(
            "min_provisioned_concurrency",
            multiple(0..=CONCURRENCY_MAX, CONCURRENCY_UNIT),
            "Fewest requests at a time, in place of a size; 0 only with `scale_to_zero_enabled`.",
        ),
        may(
            "max_provisioned_concurrency",
            multiple(CONCURRENCY_UNIT..=CONCURRENCY_MAX, CONCURRENCY_UNIT),
            "Most requests at a time, in place of a size.",
        ),
        may(
            "min_provisioned_throughput",
            whole(0..=RATE_MAX),
            "Fewest tokens per second, in place of a size.",
        ),
        may(
            "max_provisioned_throughput",
            whole(1..=RATE_MAX),
            "Most tokens per second, in place of a size; a multiple of the model's chunk.",
        ),
        may(
            "provisioned_model_units",
            whole(1..=RATE_MAX),
            "The same as so many chunks.",
        ),
        may(
            "instance_profile_arn",
            text_of(0..=TEXT_BYTES_MAX),
            "Shown back.",
        ),
        may(
            "quantization",
            words(&Quantization::ALL.map(Quantization::name)),
            "How weights are kept; as cluster.toml says of the model unless given. Weights that are quantised in the model's files are kept as they are.",
        ),
    ])
}

/// A model's version as requests write it.
pub(super) fn version() -> Shape {
    any_of([
        formed("^0*[1-9][0-9]{0,8}$", 16),
        whole(1..=i128::from(u32::MAX)),
    ])
}

pub(super) fn entity_name() -> Shape {
    formed("^[A-Za-z0-9][A-Za-z0-9_-]*$", NAME_CHARS_MAX)
}

/// How much of the traffic each served entity gets.
pub(super) fn traffic_request() -> Shape {
    object([may(
        "routes",
        list_of(named("RouteRequest"), 0..=ENTITIES_MAX),
        "Percentages that sum to 100; needed with two or more served entities.",
    )])
}

fn route_request() -> Shape {
    object([
        may(
            "served_entity_name",
            entity_name(),
            "Which served entity: this or `served_model_name`.",
        ),
        may("served_model_name", entity_name(), "The older spelling."),
        need(
            "traffic_percentage",
            whole(0..=100),
            "Its share of the requests.",
        ),
    ])
}

fn timestamp() -> Shape {
    at_least(0)
}

fn state() -> Shape {
    object([
        need(
            "ready",
            words(&["READY", "NOT_READY"]),
            "Whether all served entities of the active configuration are up.",
        ),
        need(
            "config_update",
            words(&[
                "NOT_UPDATING",
                "IN_PROGRESS",
                "UPDATE_FAILED",
                "UPDATE_CANCELED",
            ]),
            "How the last change of the configuration stands.",
        ),
    ])
}

/// What the list and the detailed object have in common.
fn head() -> Vec<Field> {
    vec![
        need("name", endpoint_name(), "Its name."),
        need("creator", text(), "Who made it."),
        need(
            "creation_timestamp",
            timestamp(),
            "When, in milliseconds since 1970.",
        ),
        need(
            "last_updated_timestamp",
            timestamp(),
            "When its configuration last changed.",
        ),
        need("state", named("EndpointState"), "How it is."),
        need("id", formed("^[0-9a-f]{32}$", 32), "32 hexadecimal digits."),
        may(
            "task",
            text(),
            "What its models are for, once that is known.",
        ),
        may("tags", list(named("Tag")), "Free labels."),
    ]
}

fn endpoint() -> Shape {
    let mut fields = head();
    fields.extend([
        may(
            "config",
            named("Config"),
            "What serves; missing until the first deployment is ready.",
        ),
        may(
            "pending_config",
            named("PendingConfig"),
            "What is being deployed, or could not be.",
        ),
        need(
            "permission_level",
            permissions::level(),
            "What the caller may do with it.",
        ),
        need("route_optimized", flag(), "As given."),
        may("description", text(), "For people."),
        may(
            "ai_gateway",
            named("AiGateway"),
            "Limits, accounts and fallback.",
        ),
        may(
            "rate_limits",
            list(named("RateLimit")),
            "Limits of calls, in the older form.",
        ),
        may(
            "email_notifications",
            named("Emails"),
            "Who is to be told of updates.",
        ),
        may("budget_policy_id", text(), "As given."),
    ]);
    object(fields)
}

fn summary() -> Shape {
    let named_version = |keys: [&'static str; 2]| {
        object([
            need("name", entity_name(), "Its name in the endpoint."),
            need(keys[0], model_name(), "The registered model."),
            need(keys[1], text(), "Its version."),
        ])
    };
    let config = object([
        need(
            "served_entities",
            list(named_version(["entity_name", "entity_version"])),
            "What it serves.",
        ),
        need(
            "served_models",
            list(named_version(["model_name", "model_version"])),
            "The same in the older spelling.",
        ),
    ]);
    let mut fields = head();
    fields.push(may("config", config, "What it serves, or shall serve."));
    object(fields)
}

fn config() -> Vec<Field> {
    vec![
        need(
            "served_models",
            list(named("ServedModel")),
            "What is served, in the older spelling.",
        ),
        need(
            "served_entities",
            list(named("ServedEntity")),
            "What is served.",
        ),
        need("config_version", at_least(1), "Counts from 1."),
        need("traffic_config", named("Traffic"), "Who gets how much."),
        may(
            "auto_capture_config",
            named("Table"),
            "Whether requests and answers are kept.",
        ),
    ]
}

fn pending_config() -> Shape {
    let mut fields = config();
    fields.push(need(
        "start_time",
        timestamp(),
        "When its deployment began.",
    ));
    object(fields)
}

fn served(keys: [&'static str; 2]) -> Shape {
    let state = object([
        need(
            "deployment",
            words(&[
                "DEPLOYMENT_CREATING",
                "DEPLOYMENT_READY",
                "DEPLOYMENT_RECOVERING",
                "DEPLOYMENT_FAILED",
                "DEPLOYMENT_ABORTED",
            ]),
            "Where in its life it is.",
        ),
        need(
            "deployment_state_message",
            text(),
            "The same in words: how far it is, what stands in for what, why it failed and what would help.",
        ),
    ]);
    object([
        need("name", entity_name(), "Its name in the endpoint."),
        need(keys[0], model_name(), "The registered model."),
        need(keys[1], text(), "Its version."),
        may(
            "workload_size",
            words(&["Small", "Medium", "Large"]),
            "Requests at a time: 4, 16 or 64.",
        ),
        may(
            "min_provisioned_concurrency",
            at_least(0),
            "Fewest requests at a time, when given in place of a size.",
        ),
        may(
            "max_provisioned_concurrency",
            at_least(0),
            "Most requests at a time, when given in place of a size.",
        ),
        need("workload_type", text(), "On what it runs."),
        need(
            "scale_to_zero_enabled",
            flag(),
            "Whether it may be put away while nobody asks.",
        ),
        may(
            "min_provisioned_throughput",
            at_least(0),
            "Fewest tokens per second, when given in place of a size.",
        ),
        may(
            "max_provisioned_throughput",
            at_least(0),
            "Most tokens per second, when given in place of a size.",
        ),
        may("provisioned_model_units", at_least(0), "The same in units."),
        may("instance_profile_arn", text(), "As given."),
        may(
            "quantization",
            words(&Quantization::ALL.map(Quantization::name)),
            "As given.",
        ),
        may("environment_vars", map(text(), None), "As given."),
        need("state", state, "How it is."),
        need("creator", text(), "Who asked for it."),
        need("creation_timestamp", timestamp(), "When."),
    ])
}

fn traffic() -> Shape {
    let route = object([
        need("served_model_name", entity_name(), "Which served entity."),
        need("served_entity_name", entity_name(), "The same."),
        need(
            "traffic_percentage",
            whole(0..=100),
            "Its share of the requests.",
        ),
    ]);
    object([need("routes", list(route), "They sum to 100.")])
}
