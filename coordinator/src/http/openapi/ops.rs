//! What the machine's operators ask, and the documents about the API. None of it needs a token.

use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::operation::Operation;
use super::schema::{Shape, anything, at_least, flag, map, named, need, object, text};

const TAG: &str = "Operations";

/// Puts the paths of operators among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let get = |path, id, summary| Operation::new(HttpMethod::Get, path, TAG, id, summary).open();
    let healths = [
        (
            "/health",
            "health",
            "Whether the process answers and can serve",
        ),
        (
            "/health/ready",
            "ready",
            "The same under the name that probes ask",
        ),
        ("/health/live", "live", "Whether the process answers"),
    ];
    let paths = healths
        .into_iter()
        .fold(paths, |paths, (path, id, summary)| {
            get(path, id, summary)
                .gives(named("Health"), "It does.")
                .gives_as(503, "application/json", named("Health"), "It does not.")
                .put(paths)
        });
    let paths = get("/metrics", "metrics", "The process's metrics")
        .gives_as(200, "text/plain", text(), "Prometheus text.")
        .put(paths);
    let documents = [
        ("/api/2.0/openapi.json", "openapi", "This document"),
        ("/openapi.json", "openapiAtRoot", "This document"),
    ];
    let paths = documents
        .into_iter()
        .fold(paths, |paths, (path, id, summary)| {
            get(path, id, summary)
                .gives(document(), "An OpenAPI 3.1 document.")
                .put(paths)
        });
    let paths = get(
        "/.well-known/databricks-config",
        "hostConfig",
        "What Databricks' clients ask before they have a token",
    )
    .gives(
        object([]),
        "Nothing: they go on with what their user told them.",
    )
    .put(paths);
    get(
        "/docs",
        "explorer",
        "A page that shows this document and sends its requests",
    )
    .gives_as(200, "text/html", text(), "The page.")
    .put(paths)
}

/// Puts the schemas of operators among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    components.schema("Health", health())
}

fn health() -> Shape {
    object([
        need("live", flag(), "The process answers."),
        need("ready", flag(), "The store answers, and workers can join."),
        need("workers", at_least(0), "Workers with a link."),
        need(
            "workers_expected",
            at_least(0),
            "Workers that cluster.toml names.",
        ),
        need("endpoints_ready", at_least(0), "Endpoints that are ready."),
        need("endpoints", at_least(0), "Endpoints in all."),
        need(
            "stalled",
            at_least(0),
            "Replicas that have work and make no progress.",
        ),
    ])
}

/// An OpenAPI document.
pub(super) fn document() -> Shape {
    map(anything(), None)
}
