//! The control plane: endpoints are created, shown, changed and deleted.

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource, scope};

use super::HttpState;
use super::auth::Caller;
use super::error::Fault;
use super::json::{JsonBody, Object};
use super::spec;
use super::view::{Config, Detailed, List};
use crate::api::{ApiError, ErrorKind};

/// Where the control plane is; the older path is that of the first preview.
const PATHS: [&str; 2] = [
    "/api/2.0/serving-endpoints",
    "/api/2.0/preview/serving-endpoints",
];

pub(super) fn routes(config: &mut ServiceConfig) {
    for path in PATHS {
        config.service(
            scope(path)
                .service(resource("").get(list).post(create))
                .service(resource("/{name}").get(show).delete(delete))
                .service(resource("/{name}/config").get(show_config).put(update)),
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
    Ok(HttpResponse::Ok().json(Detailed::of(&view)))
}

async fn list(state: Data<HttpState>) -> Result<HttpResponse, Fault> {
    let views = state.gateway.list().await?;
    Ok(HttpResponse::Ok().json(List::of(&views)))
}

async fn show(state: Data<HttpState>, name: Path<String>) -> Result<HttpResponse, Fault> {
    let view = state.gateway.get(name.into_inner()).await?;
    Ok(HttpResponse::Ok().json(Detailed::of(&view)))
}

async fn show_config(state: Data<HttpState>, name: Path<String>) -> Result<HttpResponse, Fault> {
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
    let types = state.gateway.workload_types();
    let config = spec::update(&body.0, &types).map_err(Fault::invalid_parameter)?;
    let view = state
        .gateway
        .update(caller.user, name.into_inner(), config)
        .await?;
    Ok(HttpResponse::Ok().json(Detailed::of(&view)))
}

/// Clients parse the answer as JSON.
async fn delete(state: Data<HttpState>, name: Path<String>) -> Result<HttpResponse, Fault> {
    state.gateway.delete(name.into_inner()).await?;
    Ok(HttpResponse::Ok().json(Object::new()))
}
