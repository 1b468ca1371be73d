//! `[[endpoints]]` of cluster.toml: names, shares and references, by the same rules as the API's.

use super::check::{model_ref, unique};
use super::cluster::{ENTITIES_MAX, EndpointEntry, RegistryEntry, RegistryKind, ServedEntityEntry};
use super::models::quantization;
use super::raw::{RawEndpoint, RawServedEntity};
use super::reader::Reader;
use crate::model_ref::ModelRef;
use crate::names;

/// What endpoints may refer to, in the order of the file.
#[derive(Clone, Copy)]
pub(super) struct Known<'a> {
    pub workload_types: &'a [String],
    pub models: &'a [ModelRef],
    pub registries: &'a [RegistryEntry],
}

impl Known<'_> {
    /// A registry may know it, as far as one can say without asking. The hub knows none by such names.
    fn may_have(&self, model: &ModelRef) -> bool {
        self.models.contains(model)
            || self
                .registries
                .iter()
                .any(|registry| registry.kind != RegistryKind::HuggingFace)
    }
}

pub(super) fn endpoint(
    raw: RawEndpoint,
    known: Known<'_>,
    seen: &mut Vec<String>,
    r: &mut Reader<'_>,
) -> Option<EndpointEntry> {
    if let Some(name) = &raw.name {
        let key = format!("{}.name", raw.path);
        if let Err(e) = names::check_endpoint(name) {
            r.mistake(&key, e.to_string());
        }
        unique(seen, name, &key, "endpoint", r);
    }
    let list = format!("{}.served_entities", raw.path);
    let count = raw.served_entities.len();
    if count == 0 && !r.noted(&list) {
        r.mistake(
            &raw.path,
            "needs at least one [[endpoints.served_entities]]",
        );
    }
    if count > ENTITIES_MAX {
        r.mistake(
            &list,
            format!("must have 1 to {ENTITIES_MAX} entries, got {count}"),
        );
    }
    let shares = shares(&raw.served_entities, &list, r);
    let mut entity_names = Vec::new();
    let mut served_entities = Vec::new();
    for (entity, share) in raw.served_entities.into_iter().zip(shares) {
        served_entities.extend(served_entity(entity, share, known, &mut entity_names, r));
    }
    Some(EndpointEntry {
        name: raw.name?,
        served_entities,
    })
}

/// The percentages, which sum to 100; 0 stands in for one that is wrong.
fn shares(entities: &[RawServedEntity], list: &str, r: &mut Reader<'_>) -> Vec<u32> {
    let mut shares = Vec::new();
    let mut all_known = !entities.is_empty();
    for entity in entities {
        let key = format!("{}.traffic_percentage", entity.path);
        let share = match entity.traffic_percentage {
            Some(n @ 0..=100) => Some(n as u32),
            Some(n) => {
                r.mistake(&key, format!("must be between 0 and 100, got {n}"));
                None
            }
            None if r.noted(&key) => None,
            None if entities.len() == 1 => Some(100),
            None => {
                r.mistake(
                    &key,
                    "is missing: with several served entities say how much traffic each one gets",
                );
                None
            }
        };
        all_known &= share.is_some();
        shares.push(share.unwrap_or(0));
    }
    let sum: u32 = shares.iter().sum();
    if all_known && sum != 100 {
        r.mistake(
            list,
            format!("must have traffic_percentage values that sum to 100, got {sum}"),
        );
    }
    shares
}

fn served_entity(
    raw: RawServedEntity,
    traffic_percentage: u32,
    known: Known<'_>,
    seen: &mut Vec<String>,
    r: &mut Reader<'_>,
) -> Option<ServedEntityEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let keys = [at("entity_name"), at("entity_version")];
    let model = model_ref(
        raw.entity_name,
        raw.entity_version,
        keys.each_ref().map(String::as_str),
        r,
    );
    if let Some(model) = &model
        && !known.may_have(model)
    {
        r.mistake(&keys[0], format!("{model} is not among [[models]]"));
    }
    let workload_type = raw.workload_type.unwrap_or_else(|| "CPU".into());
    if !known.workload_types.contains(&workload_type) && !r.noted(&at("workload_type")) {
        r.mistake(
            &at("workload_type"),
            format!(
                "\"{workload_type}\" is not mapped; mapped: {}",
                known.workload_types.join(", ")
            ),
        );
    }
    let workload_size = raw.workload_size.unwrap_or_else(|| "Small".into());
    if !matches!(workload_size.as_str(), "Small" | "Medium" | "Large") {
        r.mistake(
            &at("workload_size"),
            format!("must be Small, Medium or Large, got \"{workload_size}\""),
        );
    }
    let quantization = quantization(raw.quantization.as_deref(), &raw.path, r);
    let name_key = at("name");
    let name = match raw.name {
        Some(name) => {
            if let Err(e) = names::check_entity(&name) {
                r.mistake(&name_key, e.to_string());
            }
            Some(name)
        }
        None if r.noted(&name_key) => None,
        None => model.as_ref().map(ModelRef::entity_name),
    };
    if let Some(name) = &name {
        unique(seen, name, &name_key, "served entity of this endpoint", r);
    }
    Some(ServedEntityEntry {
        name: name?,
        model: model?,
        workload_type,
        workload_size,
        quantization,
        traffic_percentage,
    })
}
