//! A served entity's logs: of its deployment, and of its serving.

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource};
use common::wire::message::LogPhase;
use serde::Serialize;

use super::HttpState;
use super::auth::Caller;
use super::error::Fault;
use super::permissions::allowed;
use crate::api::{ApiError, ErrorKind, Level};
use crate::logs::Place;

pub(super) fn routes(config: &mut ServiceConfig) {
    for path in super::endpoints::PATHS {
        let entity = format!("{path}/{{name}}/served-models/{{served}}");
        config
            .service(resource(format!("{entity}/logs")).get(run))
            .service(resource(format!("{entity}/build-logs")).get(build));
    }
}

/// What clients read of a log.
#[derive(Serialize)]
struct Text {
    logs: String,
}

async fn run(
    state: Data<HttpState>,
    caller: Caller,
    path: Path<(String, String)>,
) -> Result<HttpResponse, Fault> {
    show(&state, &caller, path.into_inner(), LogPhase::Run).await
}

async fn build(
    state: Data<HttpState>,
    caller: Caller,
    path: Path<(String, String)>,
) -> Result<HttpResponse, Fault> {
    show(&state, &caller, path.into_inner(), LogPhase::Build).await
}

async fn show(
    state: &HttpState,
    caller: &Caller,
    (endpoint, entity): (String, String),
    phase: LogPhase,
) -> Result<HttpResponse, Fault> {
    allowed(state, caller, &endpoint, Level::View)?;
    let view = state.gateway.get(endpoint.clone()).await?;
    let configs = || view.active.iter().chain(&view.pending);
    let mut names = configs().flat_map(|config| config.entities.iter().map(|e| &e.spec.name));
    if !names.any(|name| *name == entity) {
        let message = format!("Endpoint '{endpoint}' has no served model '{entity}'.");
        return Err(ApiError::new(ErrorKind::NotFound, message).into());
    }
    let logs = state.logs.read(Place { endpoint, entity }, phase).await;
    let logs = logs.map_err(|error| {
        ApiError::new(
            ErrorKind::Unavailable,
            format!("the logs cannot be read now: {error}"),
        )
    })?;
    Ok(HttpResponse::Ok().json(Text { logs }))
}
