//! Control-plane bodies as checked types: what an endpoint shall be called and serve.
//!
//! Pure: whether models, versions and memory exist is the cluster's matter, and what stands beside the configuration
//! is read in `settings`. Both spellings of fields are taken
//! (`served_models` with `model_name`, `served_entities` with `entity_name`).

use std::collections::HashSet;

use common::config::ENTITIES_MAX;
use common::model_ref::{ModelRef, ModelRefError};
use common::names::{self, NameError};
use common::wire::message::Quantization;
use serde_json::Value;

use super::json::{Field, FieldError, Fields, Object};
use super::settings::{inference_table, refuse_unsupported, settings, short_text};
use super::throughput;
use crate::api::{ConcurrencyRange, ConfigSpec, CreateEndpoint, EntitySpec, Route, WorkloadSize};

/// Most environment variables of a served entity.
pub(super) const VARIABLES_MAX: usize = 64;
/// Concurrency is provisioned in units of so many requests at a time, as in the cloud.
pub(super) const CONCURRENCY_UNIT: u32 = 4;
/// Highest provisioned concurrency; what memory has room for is the plan's matter.
pub(super) const CONCURRENCY_MAX: u32 = 1024;
/// The vendor's own text, which notebooks show.
const SCALE_TO_ZERO_UNDEFINED: &str =
    "scaleToZeroEnabled is undefined. Please set it to either true or false.";

/// The body of a create.
pub(super) fn create(
    body: &Object,
    workload_types: &[String],
) -> Result<CreateEndpoint, FieldError> {
    let fields = Fields::of("", body);
    let name = checked_name(&fields.need("name")?, names::check_endpoint)?;
    let config = config(&fields.need("config")?.fields()?, workload_types)?;
    let settings = settings(&fields)?;
    Ok(CreateEndpoint {
        name,
        config,
        settings,
    })
}

/// The body of an update of the configuration.
pub(super) fn update(body: &Object, workload_types: &[String]) -> Result<ConfigSpec, FieldError> {
    config(&Fields::of("", body), workload_types)
}

fn checked_name(
    field: &Field<'_>,
    check: fn(&str) -> Result<(), NameError>,
) -> Result<String, FieldError> {
    let name = field.text()?;
    check(name).map_err(|error| field.refuse(error))?;
    Ok(name.to_owned())
}

/// What an endpoint shall serve.
pub(super) fn config(
    fields: &Fields<'_>,
    workload_types: &[String],
) -> Result<ConfigSpec, FieldError> {
    let (list, spelling) = match (fields.get("served_entities"), fields.get("served_models")) {
        (Some(_), Some(models)) => {
            return Err(models.refuse("and served_entities say the same thing: give one of them"));
        }
        (None, Some(models)) => (models, Spelling::Model),
        (Some(entities), None) => (entities, Spelling::Entity),
        (None, None) => (fields.need("served_entities")?, Spelling::Entity),
    };
    let values = list.list()?;
    if values.is_empty() || values.len() > ENTITIES_MAX {
        return Err(list.refuse(format!(
            "must have 1 to {ENTITIES_MAX} entries, got {}",
            values.len()
        )));
    }
    let mut names = HashSet::new();
    let mut entities = Vec::with_capacity(values.len());
    for (i, value) in values.iter().enumerate() {
        let item = list.item(i, value);
        let entity = entity(&item.fields()?, spelling, workload_types)?;
        if !names.insert(entity.name.clone()) {
            return Err(item.refuse(format!(
                "would be the second named '{}': give each its own name",
                entity.name
            )));
        }
        entities.push(entity);
    }
    let routes = routes(fields, &entities)?;
    let table = fields.get("auto_capture_config");
    let table = table.filter(|field| field.value.as_object().is_none_or(|o| !o.is_empty()));
    let auto_capture = table.map(|field| inference_table(&field)).transpose()?;
    Ok(ConfigSpec {
        entities,
        routes,
        auto_capture,
    })
}

/// How the fields of served entities are called.
#[derive(Clone, Copy)]
enum Spelling {
    Entity,
    Model,
}

impl Spelling {
    fn name_keys(self) -> [&'static str; 2] {
        match self {
            Spelling::Entity => ["entity_name", "model_name"],
            Spelling::Model => ["model_name", "entity_name"],
        }
    }

    fn version_keys(self) -> [&'static str; 2] {
        match self {
            Spelling::Entity => ["entity_version", "model_version"],
            Spelling::Model => ["model_version", "entity_version"],
        }
    }
}

fn entity(
    fields: &Fields<'_>,
    spelling: Spelling,
    workload_types: &[String],
) -> Result<EntitySpec, FieldError> {
    refuse_unsupported(fields, &["external_model", "foundation_model"])?;
    let model = model(
        &fields.need_any(spelling.name_keys())?,
        &fields.need_any(spelling.version_keys())?,
    )?;
    let name = match fields.get("name") {
        Some(field) => checked_name(&field, names::check_entity)?,
        None => model.entity_name(),
    };
    let workload_size = fields
        .get("workload_size")
        .map_or(Ok(WorkloadSize::Small), |field| workload_size(&field))?;
    let provisioned = throughput::of(fields)?;
    let range = concurrency_range(fields)?;
    // The cluster chooses the type of what is sized by throughput.
    let default_type = if provisioned.is_some() { "" } else { "CPU" };
    let workload_type = fields
        .get("workload_type")
        .map_or(Ok(default_type), |field| field.text())?
        .to_owned();
    let chosen = provisioned.is_some() && fields.get("workload_type").is_none();
    if !chosen && !workload_types.contains(&workload_type) {
        return Err(FieldError {
            field: fields.get("workload_type").map(|field| field.path),
            message: format!(
                "Workload type '{workload_type}' with size '{workload_size:?}' is not supported. \
                 Please choose a node type from {}.",
                workload_types.join(", ")
            ),
        });
    }
    let scale_to_zero = provisioned.is_none() && scale_to_zero(fields, &workload_type)?;
    let least = fields.get("min_provisioned_concurrency");
    if let (Some(range), Some(least)) = (range, least)
        && range.min == 0
        && !scale_to_zero
    {
        return Err(least.refuse("must be above 0 unless scale_to_zero_enabled is true"));
    }
    let environment_vars = fields
        .get("environment_vars")
        .map_or(Ok(Vec::new()), |field| environment_vars(&field))?;
    let profile = fields.get("instance_profile_arn");
    Ok(EntitySpec {
        name,
        model,
        workload_type,
        workload_size,
        scale_to_zero,
        environment_vars,
        provisioned,
        concurrency: range,
        instance_profile_arn: profile.map(|field| short_text(&field)).transpose()?,
        quantization: fields
            .get("quantization")
            .map(|field| quantization(&field))
            .transpose()?,
    })
}

/// Versions come as numbers (the seed) and as strings (the SDK).
fn model(name: &Field<'_>, version: &Field<'_>) -> Result<ModelRef, FieldError> {
    let digits = match version.value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return Err(version.wrong("a positive whole number")),
    };
    ModelRef::new(name.text()?, &digits).map_err(|error| match error {
        ModelRefError::Name(_) => name.wrong(
            "one level or three (catalog.schema.model) of letters, digits, '-' and '_', at most 255 characters",
        ),
        ModelRefError::Version(_) => version.wrong("a positive whole number"),
    })
}

fn workload_size(field: &Field<'_>) -> Result<WorkloadSize, FieldError> {
    match field.text()? {
        "Small" => Ok(WorkloadSize::Small),
        "Medium" => Ok(WorkloadSize::Medium),
        "Large" => Ok(WorkloadSize::Large),
        _ => Err(field.wrong("Small, Medium or Large")),
    }
}

/// How weights are kept, in the words of cluster.toml.
fn quantization(field: &Field<'_>) -> Result<Quantization, FieldError> {
    Quantization::parse(field.text()?).ok_or_else(|| field.wrong("none, int8 or int4"))
}

/// Requests at a time in place of a size.
fn concurrency_range(fields: &Fields<'_>) -> Result<Option<ConcurrencyRange>, FieldError> {
    const KEYS: [&str; 2] = ["min_provisioned_concurrency", "max_provisioned_concurrency"];
    let Some(given) = KEYS.iter().find_map(|key| fields.get(key)) else {
        return Ok(None);
    };
    if fields.get("workload_size").is_some() {
        return Err(given.refuse("and workload_size say the same thing: give one of them"));
    }
    let number = |key: &str, least: u32| {
        let field = fields.need(key)?;
        let number = field.whole(i128::from(least)..=i128::from(CONCURRENCY_MAX))? as u32;
        if !number.is_multiple_of(CONCURRENCY_UNIT) {
            return Err(field.wrong(&format!("a multiple of {CONCURRENCY_UNIT}")));
        }
        Ok(number)
    };
    let (min, max) = (number(KEYS[0], 0)?, number(KEYS[1], CONCURRENCY_UNIT)?);
    if min > max {
        return Err(given.refuse(format!("must be at most {} ({max}), got {min}", KEYS[1])));
    }
    Ok(Some(ConcurrencyRange { min, max }))
}

fn scale_to_zero(fields: &Fields<'_>, workload_type: &str) -> Result<bool, FieldError> {
    let Ok(field) = fields.need("scale_to_zero_enabled") else {
        return Err(FieldError::whole(SCALE_TO_ZERO_UNDEFINED));
    };
    let enabled = field.flag()?;
    let is_cpu = workload_type == "CPU" || workload_type.starts_with("CPU_");
    if enabled && !is_cpu {
        return Err(field.refuse(format!(
            "must be false for workload type {workload_type}: only CPU types scale to zero"
        )));
    }
    Ok(enabled)
}

fn environment_vars(field: &Field<'_>) -> Result<Vec<(String, String)>, FieldError> {
    let object = field.object()?;
    if object.len() > VARIABLES_MAX {
        return Err(field.refuse(format!(
            "must have at most {VARIABLES_MAX} entries, got {}",
            object.len()
        )));
    }
    let fields = field.fields()?;
    object
        .keys()
        .map(|key| Ok((key.clone(), short_text(&fields.need(key)?)?)))
        .collect()
}

fn routes(fields: &Fields<'_>, entities: &[EntitySpec]) -> Result<Vec<Route>, FieldError> {
    let traffic = fields
        .get("traffic_config")
        .map(|field| field.fields())
        .transpose()?;
    let field = traffic.and_then(|traffic| traffic.get("routes"));
    let values = field.as_ref().map_or(Ok(&[][..]), Field::list)?;
    let Some(field) = field.filter(|_| !values.is_empty()) else {
        return match entities {
            [only] => Ok(vec![Route {
                entity: only.name.clone(),
                percentage: 100,
            }]),
            _ => Err(FieldError::at(
                "traffic_config.routes",
                "is missing: with several served entities say how much traffic each one gets",
            )),
        };
    };
    let mut routes: Vec<Route> = Vec::with_capacity(values.len());
    for (i, value) in values.iter().enumerate() {
        let route = field.item(i, value).fields()?;
        let name_field = route.need_any(["served_model_name", "served_entity_name"])?;
        let name = name_field.text()?;
        // Replies carry both names, and clients send them back.
        if let Some(other) = route.get("served_entity_name")
            && other.text()? != name
        {
            return Err(other.refuse(format!(
                "must be the same as served_model_name ('{name}'), or be left out"
            )));
        }
        if !entities.iter().any(|entity| entity.name == name) {
            let names: Vec<&str> = entities.iter().map(|entity| entity.name.as_str()).collect();
            return Err(name_field.refuse(format!(
                "'{name}' is not a served entity; these are: {}",
                names.join(", ")
            )));
        }
        if routes.iter().any(|route| route.entity == name) {
            return Err(name_field.refuse(format!("'{name}' already has a route")));
        }
        let percentage = route.need("traffic_percentage")?.whole(0..=100)? as u32;
        routes.push(Route {
            entity: name.to_owned(),
            percentage,
        });
    }
    let sum: u32 = routes.iter().map(|route| route.percentage).sum();
    if sum != 100 {
        return Err(field.refuse(format!(
            "must have traffic percentages that sum to 100, got {sum}"
        )));
    }
    Ok(routes)
}

#[cfg(test)]
mod tests;
