//! Endpoints as JSON: the shapes that Databricks' clients read.

mod settings;

pub(super) use settings::{AiGatewayJson, EmailsJson, RateLimitJson, Tag, rate_limits, tags};

use common::wire::message::Quantization;
use serde::Serialize;

use self::settings::TableJson;
use crate::api::{
    ConfigView, DeploymentState, EndpointView, EntityView, Level, Route, UpdateState,
};

/// One endpoint with everything known of it.
#[derive(Serialize)]
pub(super) struct Detailed<'a> {
    #[serde(flatten)]
    head: Head<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<Config<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pending_config: Option<Config<'a>>,
    permission_level: &'static str,
    route_optimized: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ai_gateway: Option<AiGatewayJson<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rate_limits: Vec<RateLimitJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    email_notifications: Option<EmailsJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_policy_id: Option<&'a str>,
}

impl<'a> Detailed<'a> {
    /// The endpoint for somebody who may do this with it.
    pub fn of(view: &'a EndpointView, level: Level) -> Self {
        let settings = &view.settings;
        Detailed {
            head: Head::of(view),
            config: view.active.as_ref().map(|config| Config::of(config, None)),
            pending_config: view
                .pending
                .as_ref()
                .map(|config| Config::of(config, Some(config.started_ms))),
            permission_level: level.name(),
            route_optimized: settings.route_optimized,
            description: settings.description.as_deref(),
            ai_gateway: settings.ai_gateway.as_ref().map(AiGatewayJson::of),
            rate_limits: rate_limits(&settings.rate_limits),
            email_notifications: settings.email_notifications.as_ref().map(EmailsJson::of),
            budget_policy_id: settings.budget_policy_id.as_deref(),
        }
    }
}

/// All endpoints, in short.
#[derive(Serialize)]
pub(super) struct List<'a> {
    endpoints: Vec<Summary<'a>>,
}

impl<'a> List<'a> {
    pub fn of(views: &'a [EndpointView]) -> Self {
        List {
            endpoints: views.iter().map(Summary::of).collect(),
        }
    }
}

/// All endpoints as OpenAI's clients list models.
#[derive(Serialize)]
pub(super) struct Models<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

impl<'a> Models<'a> {
    pub fn of(views: &'a [EndpointView]) -> Self {
        Models {
            object: "list",
            data: views.iter().map(Model::of).collect(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
}

impl<'a> Model<'a> {
    pub fn of(view: &'a EndpointView) -> Self {
        Model {
            id: &view.name,
            object: "model",
            created: view.created_ms / 1000,
            owned_by: &view.creator,
        }
    }
}

#[derive(Serialize)]
struct Head<'a> {
    name: &'a str,
    creator: &'a str,
    creation_timestamp: u64,
    last_updated_timestamp: u64,
    state: State,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tags: Vec<Tag<'a>>,
}

impl<'a> Head<'a> {
    fn of(view: &'a EndpointView) -> Self {
        Head {
            name: &view.name,
            creator: &view.creator,
            creation_timestamp: view.created_ms,
            last_updated_timestamp: view.updated_ms,
            state: State {
                ready: if view.ready { "READY" } else { "NOT_READY" },
                config_update: match view.update {
                    UpdateState::NotUpdating => "NOT_UPDATING",
                    UpdateState::InProgress => "IN_PROGRESS",
                    UpdateState::Failed => "UPDATE_FAILED",
                    UpdateState::Cancelled => "UPDATE_CANCELED",
                },
            },
            id: &view.id,
            task: view.task.as_deref(),
            tags: tags(&view.settings.tags),
        }
    }
}

#[derive(Serialize)]
struct State {
    ready: &'static str,
    config_update: &'static str,
}

/// A configuration; every served entity stands in it under its old and its new name.
#[derive(Serialize)]
pub(super) struct Config<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    start_time: Option<u64>,
    served_models: Vec<ServedModel<'a>>,
    served_entities: Vec<ServedEntity<'a>>,
    config_version: u64,
    traffic_config: Traffic<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    auto_capture_config: Option<TableJson<'a>>,
}

impl<'a> Config<'a> {
    pub fn of(view: &'a ConfigView, start_time: Option<u64>) -> Self {
        let route = |route: &'a Route| RouteJson {
            served_model_name: &route.entity,
            traffic_percentage: route.percentage,
            served_entity_name: &route.entity,
        };
        Config {
            start_time,
            served_models: view.entities.iter().map(ServedModel::of).collect(),
            served_entities: view.entities.iter().map(ServedEntity::of).collect(),
            config_version: view.version,
            traffic_config: Traffic {
                routes: view.routes.iter().map(route).collect(),
            },
            auto_capture_config: view.auto_capture.as_ref().map(TableJson::of),
        }
    }
}

#[derive(Serialize)]
struct Traffic<'a> {
    routes: Vec<RouteJson<'a>>,
}

#[derive(Serialize)]
struct RouteJson<'a> {
    served_model_name: &'a str,
    traffic_percentage: u32,
    served_entity_name: &'a str,
}

#[derive(Serialize)]
struct ServedModel<'a> {
    name: &'a str,
    model_name: &'a str,
    model_version: &'a str,
    #[serde(flatten)]
    rest: ServedRest<'a>,
}

impl<'a> ServedModel<'a> {
    fn of(view: &'a EntityView) -> Self {
        let model = &view.spec.model;
        let (name, rest) = (&view.spec.name, ServedRest::of(view));
        ServedModel {
            name,
            model_name: &model.name,
            model_version: &model.version,
            rest,
        }
    }
}

#[derive(Serialize)]
struct ServedEntity<'a> {
    name: &'a str,
    entity_name: &'a str,
    entity_version: &'a str,
    #[serde(flatten)]
    rest: ServedRest<'a>,
}

impl<'a> ServedEntity<'a> {
    fn of(view: &'a EntityView) -> Self {
        let model = &view.spec.model;
        let (name, rest) = (&view.spec.name, ServedRest::of(view));
        ServedEntity {
            name,
            entity_name: &model.name,
            entity_version: &model.version,
            rest,
        }
    }
}

#[derive(Serialize)]
struct ServedRest<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    workload_size: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_provisioned_concurrency: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_provisioned_concurrency: Option<u32>,
    workload_type: &'a str,
    scale_to_zero_enabled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_provisioned_throughput: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_provisioned_throughput: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    provisioned_model_units: Option<u64>,
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    environment_vars: serde_json::Map<String, serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_profile_arn: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization: Option<&'static str>,
    state: Deployment<'a>,
    creator: &'a str,
    creation_timestamp: u64,
}

impl<'a> ServedRest<'a> {
    fn of(view: &'a EntityView) -> Self {
        let spec = &view.spec;
        ServedRest {
            workload_size: spec
                .concurrency
                .is_none()
                .then(|| spec.workload_size.name()),
            min_provisioned_concurrency: spec.concurrency.map(|range| range.min),
            max_provisioned_concurrency: spec.concurrency.map(|range| range.max),
            workload_type: &spec.workload_type,
            scale_to_zero_enabled: spec.scale_to_zero,
            min_provisioned_throughput: spec.provisioned.map(|asked| asked.min_tokens_per_s),
            max_provisioned_throughput: spec.provisioned.map(|asked| asked.max_tokens_per_s),
            provisioned_model_units: spec.provisioned.and_then(|asked| asked.model_units),
            environment_vars: spec
                .environment_vars
                .iter()
                .map(|(k, v)| (k.clone(), v.as_str().into()))
                .collect(),
            instance_profile_arn: spec.instance_profile_arn.as_deref(),
            quantization: spec.quantization.map(Quantization::name),
            state: Deployment {
                deployment: match view.state {
                    DeploymentState::Creating => "DEPLOYMENT_CREATING",
                    DeploymentState::Ready => "DEPLOYMENT_READY",
                    DeploymentState::Recovering => "DEPLOYMENT_RECOVERING",
                    DeploymentState::Failed => "DEPLOYMENT_FAILED",
                    DeploymentState::Aborted => "DEPLOYMENT_ABORTED",
                },
                deployment_state_message: &view.message,
            },
            creator: &view.creator,
            creation_timestamp: view.created_ms,
        }
    }
}

#[derive(Serialize)]
struct Deployment<'a> {
    deployment: &'static str,
    deployment_state_message: &'a str,
}

#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    head: Head<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ShortConfig<'a>>,
}

impl<'a> Summary<'a> {
    fn of(view: &'a EndpointView) -> Self {
        let config = view.active.as_ref().or(view.pending.as_ref());
        Summary {
            head: Head::of(view),
            config: config.map(ShortConfig::of),
        }
    }
}

#[derive(Serialize)]
struct ShortConfig<'a> {
    served_entities: Vec<ShortEntity<'a>>,
    served_models: Vec<ShortModel<'a>>,
}

impl<'a> ShortConfig<'a> {
    fn of(view: &'a ConfigView) -> Self {
        let specs = || view.entities.iter().map(|entity| &entity.spec);
        ShortConfig {
            served_entities: specs()
                .map(|s| ShortEntity {
                    name: &s.name,
                    entity_name: &s.model.name,
                    entity_version: &s.model.version,
                })
                .collect(),
            served_models: specs()
                .map(|s| ShortModel {
                    name: &s.name,
                    model_name: &s.model.name,
                    model_version: &s.model.version,
                })
                .collect(),
        }
    }
}

#[derive(Serialize)]
struct ShortEntity<'a> {
    name: &'a str,
    entity_name: &'a str,
    entity_version: &'a str,
}

#[derive(Serialize)]
struct ShortModel<'a> {
    name: &'a str,
    model_name: &'a str,
    model_version: &'a str,
}

#[cfg(test)]
mod tests;
