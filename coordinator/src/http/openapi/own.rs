//! One endpoint's own document: how to ask it, with the formats that its models' task allows.

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource};
use utoipa::openapi::{HttpMethod, OpenApi, PathsBuilder};

use super::operation::Operation;
use super::{components, frame, generation, ops};
use crate::api::{EndpointView, Level};
use crate::http::HttpState;
use crate::http::auth::Caller;
use crate::http::endpoints::PATHS;
use crate::http::error::Fault;
use crate::http::permissions::allowed;

pub(super) fn routes(config: &mut ServiceConfig) {
    for path in PATHS {
        config.service(resource(format!("{path}/{{name}}/openapi")).get(show));
    }
}

/// Clients ask for text here and read JSON.
async fn show(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::Query)?;
    let view = state.gateway.get(name.into_inner()).await?;
    Ok(HttpResponse::Ok().json(of(&view)))
}

fn of(view: &EndpointView) -> OpenApi {
    let path = format!("/serving-endpoints/{}/invocations", view.name);
    let about = match &view.settings.description {
        Some(description) => description.as_str(),
        None => {
            "How to ask this endpoint. The document of the whole API is at /api/2.0/openapi.json."
        }
    };
    let embeds = |task: &str| task == "llm/v1/embeddings";
    let formats: Vec<_> = generation::FORMATS
        .into_iter()
        .filter(|(_, key)| match view.task.as_deref() {
            Some(task) => embeds(task) == (*key == "input"),
            None => true,
        })
        .collect();
    frame(&view.name, about)
        .paths(generation::invocations(&path, &formats).put(PathsBuilder::new()))
        .components(Some(components().build()))
        .build()
}

/// Puts the path of these documents among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    Operation::new(
        HttpMethod::Get,
        "/api/2.0/serving-endpoints/{name}/openapi",
        "Endpoints",
        "getOpenApi",
        "How to ask this endpoint",
    )
    .gives(
        ops::document(),
        "An OpenAPI 3.1 document of its invocations, whatever `Accept` says.",
    )
    .put(paths)
}
