//! Provisioned throughput: endpoints sized by tokens per second, and what a model gives of them here.
//!
//! The ordinary create and update take throughput as well; these paths are those that clients use for it, and demand it.

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource};
use common::model_ref::ModelRef;
use serde::Serialize;

use super::HttpState;
use super::auth::Caller;
use super::endpoints::PATHS;
use super::error::Fault;
use super::json::{FieldError, Fields, JsonBody};
use super::permissions::allowed;
use super::spec;
use super::view::Detailed;
use crate::api::{ConfigSpec, Level, OptimizationInfo};

/// To be configured before the paths of endpoints, whose names stand where these words do.
pub(super) fn routes(config: &mut ServiceConfig) {
    for path in PATHS {
        let info = format!("{path}/get-model-optimization-info/{{model}}/{{version}}");
        config
            .service(resource(format!("{path}/pt")).post(create))
            .service(resource(format!("{path}/pt/{{name}}/config")).put(update))
            .service(resource(info).get(optimization_info));
    }
}

async fn create(
    state: Data<HttpState>,
    caller: Caller,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let types = state.gateway.workload_types();
    let endpoint = spec::create(&body.0, &types).map_err(Fault::invalid_parameter)?;
    all_provisioned(&endpoint.config).map_err(Fault::invalid_parameter)?;
    let view = state.gateway.create(caller.user, endpoint).await?;
    Ok(HttpResponse::Ok().json(Detailed::of(&view, Level::Manage)))
}

/// Unlike the ordinary update, the configuration stands in a `config` of its own.
async fn update(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::Manage)?;
    let types = state.gateway.workload_types();
    let config = Fields::of("", &body.0)
        .need("config")
        .and_then(|field| spec::config(&field.fields()?, &types))
        .and_then(|config| all_provisioned(&config).map(|()| config))
        .map_err(Fault::invalid_parameter)?;
    let view = state
        .gateway
        .update(caller.user, name.into_inner(), config)
        .await?;
    Ok(HttpResponse::Ok().json(Detailed::of(&view, Level::Manage)))
}

fn all_provisioned(config: &ConfigSpec) -> Result<(), FieldError> {
    match config
        .entities
        .iter()
        .position(|entity| entity.provisioned.is_none())
    {
        Some(i) => Err(FieldError::at(
            &format!("config.served_entities[{i}].provisioned_model_units"),
            "is missing: this path creates provisioned throughput; max_provisioned_throughput would do as well",
        )),
        None => Ok(()),
    }
}

async fn optimization_info(
    state: Data<HttpState>,
    path: Path<(String, String)>,
) -> Result<HttpResponse, Fault> {
    let (name, version) = path.into_inner();
    let model = ModelRef::new(&name, &version)
        .map_err(|error| Fault::invalid_parameter(FieldError::whole(error.to_string())))?;
    let info = state.gateway.optimization_info(model).await?;
    Ok(HttpResponse::Ok().json(Info::of(&info)))
}

#[derive(Serialize)]
struct Info<'a> {
    optimizable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    model_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    throughput_chunk_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dbus: Option<f64>,
}

impl<'a> Info<'a> {
    fn of(info: &'a OptimizationInfo) -> Self {
        match info {
            OptimizationInfo::NotServable => Info {
                optimizable: false,
                model_type: None,
                throughput_chunk_size: None,
                dbus: None,
            },
            OptimizationInfo::Servable {
                model_type,
                chunk_tokens_per_s,
            } => Info {
                optimizable: true,
                model_type: Some(model_type),
                throughput_chunk_size: Some(*chunk_tokens_per_s),
                // The vendor's price; one's own machines bill nothing.
                dbus: Some(0.0),
            },
        }
    }
}
