//! The control plane: endpoints are created, shown, changed and deleted.
//!
//! A new path under an endpoint is a `resource` of its own for each of [`PATHS`], here or in a file of its own. One
//! that stands where endpoints' names stand must be configured before these.

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource};

use super::HttpState;
use super::auth::Caller;
use super::error::Fault;
use super::json::{JsonBody, Object};
use super::permissions::allowed;
use super::spec;
use super::view::{Config, Detailed, List};
use crate::api::{ApiError, ErrorKind, Level};

/// Where the control plane is; the older path is that of the first preview.
pub(super) const PATHS: [&str; 2] = [
    "/api/2.0/serving-endpoints",
    "/api/2.0/preview/serving-endpoints",
];

pub(super) fn routes(config: &mut ServiceConfig) {
    for path in PATHS {
        config
            .service(resource(path).get(list).post(create))
            .service(
                resource(format!("{path}/{{name}}"))
                    .get(show)
                    .delete(delete),
            )
            .service(
                resource(format!("{path}/{{name}}/config"))
                    .get(show_config)
                    .put(update),
            );
    }
}

async fn create(
    state: Data<HttpState>,
    caller: Caller,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let types = state.gateway.workload_types();
    let endpoint = spec::create(&body.0, &types).map_err(Fault::invalid_parameter)?;
    let view = state.gateway.create(caller.user, endpoint).await?;
    Ok(HttpResponse::Ok().json(Detailed::of(&view, Level::Manage)))
}

/// Those that the caller may see.
async fn list(state: Data<HttpState>, caller: Caller) -> Result<HttpResponse, Fault> {
    let mut views = state.gateway.list().await?;
    views.retain(|view| view.level(&caller).is_some());
    Ok(HttpResponse::Ok().json(List::of(&views)))
}

async fn show(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    let access = allowed(&state, &caller, &name, Level::View)?;
    let view = state.gateway.get(name.into_inner()).await?;
    let level = access.level(&caller).unwrap_or(Level::View);
    Ok(HttpResponse::Ok().json(Detailed::of(&view, level)))
}

async fn show_config(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::View)?;
    let view = state.gateway.get(name.into_inner()).await?;
    match &view.active {
        Some(config) => Ok(HttpResponse::Ok().json(Config::of(config, None))),
        None => {
            let message = format!(
                "endpoint '{}' has no configuration that serves yet",
                view.name
            );
            Err(ApiError::new(ErrorKind::NotFound, message).into())
        }
    }
}

async fn update(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::Manage)?;
    let types = state.gateway.workload_types();
    let config = spec::update(&body.0, &types).map_err(Fault::invalid_parameter)?;
    let view = state
        .gateway
        .update(caller.user, name.into_inner(), config)
        .await?;
    Ok(HttpResponse::Ok().json(Detailed::of(&view, Level::Manage)))
}

/// Clients parse the answer as JSON.
async fn delete(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::Manage)?;
    state.gateway.delete(name.into_inner()).await?;
    Ok(HttpResponse::Ok().json(Object::new()))
}
