//! Provisioned throughput: endpoints sized by tokens per second, and what a model gives of them here.

use common::config::ENTITIES_MAX;
use serde_json::json;
use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::endpoints::{entity_name, traffic_request, version};
use super::errors;
use super::operation::Operation;
use super::parameters::{MODEL, endpoint_name, model_name};
use super::schema::{
    Shape, any_number, at_least, flag, list_of, may, named, need, object, text, whole,
};
use super::settings;
use crate::http::throughput::RATE_MAX;

const TAG: &str = "Provisioned throughput";

/// Puts the paths of provisioned throughput among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let operation = |method, path, id, summary| Operation::new(method, path, TAG, id, summary);
    let entity =
        || json!({"entity_name": MODEL, "entity_version": "1", "provisioned_model_units": 1});
    let config = || json!({"served_entities": [entity()]});
    let paths = operation(
        HttpMethod::Post,
        "/api/2.0/serving-endpoints/pt",
        "createProvisioned",
        "Creates an endpoint that is sized by tokens per second",
    )
    .about(
        "Each served entity has `provisioned_model_units`, or `max_provisioned_throughput`. The server chooses the smallest \
         workload type that fits, and shows it.",
    )
    .body(
        named("ProvisionedRequest"),
        [("units", "One unit", json!({"name": "hello-provisioned", "config": config()}))],
    )
    .refuses(&[&errors::NOT_FOUND])
    .gives(named("Endpoint"), "The endpoint, being deployed.")
    .put(paths);
    let paths = operation(
        HttpMethod::Put,
        "/api/2.0/serving-endpoints/pt/{name}/config",
        "updateProvisioned",
        "Deploys another configuration that is sized by tokens per second",
    )
    .body(
        object([need(
            "config",
            named("ProvisionedConfig"),
            "What it shall serve.",
        )]),
        [("units", "One unit", json!({"config": config()}))],
    )
    .refuses(&[&errors::CONFLICT])
    .gives(
        named("Endpoint"),
        "The endpoint with its pending configuration.",
    )
    .put(paths);
    operation(
        HttpMethod::Get,
        "/api/2.0/serving-endpoints/get-model-optimization-info/{model}/{version}",
        "getModelOptimizationInfo",
        "Says whether a model can be served, and how fast here",
    )
    .refuses(&[&errors::BAD_REQUEST])
    .gives(named("OptimizationInfo"), "What is known of the model.")
    .put(paths)
}

/// Puts the schemas of provisioned throughput among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    let entity = object([
        need("entity_name", model_name(), "The registered model."),
        need("entity_version", version(), "Its version."),
        may(
            "name",
            entity_name(),
            "Unique in the endpoint; the model's last name and version unless given.",
        ),
        may(
            "provisioned_model_units",
            whole(1..=RATE_MAX),
            "So many of the model's chunks: this, or the next two.",
        ),
        may(
            "min_provisioned_throughput",
            whole(0..=RATE_MAX),
            "Fewest tokens per second.",
        ),
        may(
            "max_provisioned_throughput",
            whole(1..=RATE_MAX),
            "Most tokens per second; a multiple of the model's chunk.",
        ),
        may("burst_scaling_enabled", flag(), "Must be false."),
        may(
            "workload_type",
            text(),
            "On what it runs; the smallest that fits unless given.",
        ),
    ]);
    let config = object([
        need(
            "served_entities",
            list_of(named("ProvisionedEntity"), 1..=ENTITIES_MAX),
            "What it serves.",
        ),
        may(
            "traffic_config",
            traffic_request(),
            "Who gets how much of the traffic.",
        ),
    ]);
    let mut request = vec![
        need(
            "name",
            endpoint_name(),
            "Not taken, and not a reserved word.",
        ),
        need("config", named("ProvisionedConfig"), "What it shall serve."),
    ];
    request.extend(settings::at_creation());
    components
        .schema("ProvisionedEntity", entity)
        .schema("ProvisionedConfig", config)
        .schema("ProvisionedRequest", object(request))
        .schema("OptimizationInfo", info())
}

fn info() -> Shape {
    object([
        need("optimizable", flag(), "Whether it can be served."),
        may("model_type", text(), "Its family."),
        may(
            "throughput_chunk_size",
            at_least(1),
            "Tokens per second of one unit of it on this hardware.",
        ),
        may("dbus", any_number(), "The cloud's price; 0 here."),
    ])
}
