//! `[[models]]` and `[worker]` of cluster.toml: models registered here, and the caches of fetched models and packed weights.

use std::path::Path;

use super::check::model_ref;
use super::cluster::{
    CacheConfig, ModelEntry, ModelOrigin, PackedConfig, RegistryEntry, RegistryKind,
    ServingDefaults,
};
use super::raw::{RawModel, RawWorker};
use super::reader::Reader;
use crate::model_ref::ModelRef;
use crate::wire::message::{KvDtype, Quantization};

/// What the hub's registry is called when models name the hub and no registry is one.
const HUB: &str = "huggingface";
/// Where workers keep fetched models unless told.
const CACHE_FOLDER_DEFAULT: &str = "var/cache/models";
/// Where workers keep packed weights unless told.
const PACKED_FOLDER_DEFAULT: &str = "var/cache/packed";
/// How many bytes of them unless told: some models of 7B in bf16. What was fetched cannot be had again without the network
/// and is kept without a limit; what was packed costs a minute to make again.
const PACKED_BYTES_DEFAULT: u64 = 64 << 30;

/// The Hugging Face hub with its defaults, when models need it and cluster.toml has no registry of that kind.
pub(super) fn hub_registry(
    models: &[RawModel],
    registries: &[RegistryEntry],
) -> Option<RegistryEntry> {
    let needed = models
        .iter()
        .any(|model| model.hub.is_some() && model.registry.is_none());
    let there = registries
        .iter()
        .any(|registry| registry.kind == RegistryKind::HuggingFace || registry.name == HUB);
    (needed && !there).then(|| RegistryEntry::new(HUB, RegistryKind::HuggingFace))
}

pub(super) fn model(
    raw: RawModel,
    root: &Path,
    registries: &[RegistryEntry],
    seen: &mut Vec<ModelRef>,
    r: &mut Reader<'_>,
) -> Option<ModelEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let keys = [at("name"), at("version")];
    let model = model_ref(
        raw.name.clone(),
        raw.version.clone(),
        keys.each_ref().map(String::as_str),
        r,
    );
    if let Some(model) = &model {
        if seen.contains(model) {
            r.mistake(&raw.path, format!("{model} is registered twice"));
        }
        seen.push(model.clone());
    }
    let said = Said {
        kv_dtype: raw.kv_dtype.as_deref(),
        quantization: raw.quantization.as_deref(),
        context_max: raw.context_max,
    };
    let serving = serving(said, &raw.path, r);
    let origin = origin(&raw, root, registries, r);
    Some(ModelEntry {
        model: model?,
        origin: origin?,
        serving,
    })
}

/// Where a model's files are: exactly one of `path`, `hub` and `uri` says it.
fn origin(
    raw: &RawModel,
    root: &Path,
    registries: &[RegistryEntry],
    r: &mut Reader<'_>,
) -> Option<ModelOrigin> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    if ["path", "hub", "uri"].iter().any(|key| r.noted(&at(key))) {
        return None;
    }
    let origin = match (&raw.folder, &raw.hub, &raw.uri) {
        (Some(folder), None, None) => Some(ModelOrigin::Folder(root.join(folder))),
        (None, Some(hub), None) => {
            if !is_hub_id(hub) {
                r.mistake(
                    &at("hub"),
                    format!("must be a model's id on the hub such as \"org/name\", got \"{hub}\""),
                );
                return None;
            }
            let revision = raw.revision.as_deref().unwrap_or("main");
            let is_hub = |registry: &RegistryEntry| registry.kind == RegistryKind::HuggingFace;
            let registry = registry_of(raw, registries, is_hub, "huggingface", r)?;
            let uri = format!("hf://{hub}@{revision}");
            Some(ModelOrigin::Registry { registry, uri })
        }
        (None, None, Some(uri)) => {
            let takes_uris = |registry: &RegistryEntry| registry.kind == RegistryKind::Mlflow;
            let registry = registry_of(raw, registries, takes_uris, "mlflow", r)?;
            let uri = uri.clone();
            Some(ModelOrigin::Registry { registry, uri })
        }
        _ => {
            r.mistake(
                &raw.path,
                "needs one of path (a folder or a .gguf file), hub (an id on the Hugging Face hub) and uri (runs:/RUN/model, \
                 models:/NAME@ALIAS, models:/m-ID of an MLflow registry)",
            );
            None
        }
    };
    if raw.revision.is_some() && raw.hub.is_none() {
        r.mistake(&at("revision"), "belongs to hub, which is not given");
    }
    if raw.registry.is_some() && raw.folder.is_some() {
        r.mistake(&at("registry"), "belongs to hub or uri, not to path");
    }
    origin
}

/// The registry that a model names, or the first one that `suits`.
fn registry_of(
    raw: &RawModel,
    registries: &[RegistryEntry],
    suits: impl Fn(&RegistryEntry) -> bool,
    kind: &str,
    r: &mut Reader<'_>,
) -> Option<String> {
    let key = format!("{}.registry", raw.path);
    let found = registries.iter().find(|registry| {
        suits(registry)
            && raw
                .registry
                .as_ref()
                .is_none_or(|name| *name == registry.name)
    });
    if found.is_none() && !r.noted(&key) {
        let message = match &raw.registry {
            Some(name) => format!("\"{name}\" is not a [[registries]] of kind \"{kind}\""),
            None => format!("needs a [[registries]] of kind \"{kind}\""),
        };
        r.mistake(&key, message);
    }
    found.map(|registry| registry.name.clone())
}

/// `name` or `org/name`, as the hub has them.
fn is_hub_id(text: &str) -> bool {
    const CHARS_MAX: usize = 96;
    let parts: Vec<&str> = text.split('/').collect();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let part_ok =
        |part: &&str| !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed);
    text.len() <= CHARS_MAX && (1..=2).contains(&parts.len()) && parts.iter().all(part_ok)
}

/// What a model or a registry says of how it is served.
pub(super) struct Said<'a> {
    pub kv_dtype: Option<&'a str>,
    pub quantization: Option<&'a str>,
    pub context_max: Option<u64>,
}

/// How the models of an entry are served.
pub(super) fn serving(said: Said<'_>, path: &str, r: &mut Reader<'_>) -> ServingDefaults {
    let Said {
        kv_dtype,
        quantization: weights,
        context_max,
    } = said;
    let kv_dtype = match kv_dtype {
        None | Some("bf16") => KvDtype::Bf16,
        Some("f32") => KvDtype::F32,
        Some("int8") => KvDtype::Int8,
        Some(other) => {
            r.mistake(
                &format!("{path}.kv_dtype"),
                format!("must be \"bf16\", \"int8\" or \"f32\", got \"{other}\""),
            );
            KvDtype::Bf16
        }
    };
    let context_max = context_max.and_then(|n| match u32::try_from(n) {
        Ok(n) if n > 0 => Some(n),
        _ => {
            r.mistake(
                &format!("{path}.context_max"),
                format!("must be a number of tokens above 0, got {n}"),
            );
            None
        }
    });
    ServingDefaults {
        kv_dtype,
        quantization: quantization(weights, path, r).unwrap_or_default(),
        context_max,
    }
}

/// `quantization` of a model, a registry or a served entity, where it is given.
pub(super) fn quantization(
    text: Option<&str>,
    path: &str,
    r: &mut Reader<'_>,
) -> Option<Quantization> {
    let found = Quantization::parse(text?);
    if found.is_none() {
        r.mistake(
            &format!("{path}.quantization"),
            format!(
                "must be \"none\", \"int8\" or \"int4\", got \"{}\"",
                text.unwrap_or_default()
            ),
        );
    }
    found
}

pub(super) fn cache(raw: &RawWorker, root: &Path, r: &mut Reader<'_>) -> CacheConfig {
    if raw.cache_bytes_max == Some(0) {
        r.mistake(
            "worker.cache_bytes_max",
            "must be above 0; leave it out to keep everything that was fetched",
        );
    }
    CacheConfig {
        folder: root.join(raw.cache_dir.as_deref().unwrap_or(CACHE_FOLDER_DEFAULT)),
        bytes_max: raw.cache_bytes_max,
    }
}

/// A limit of 0 is no cache.
pub(super) fn packed(raw: &RawWorker, root: &Path) -> Option<PackedConfig> {
    let bytes_max = raw.packed_bytes_max.unwrap_or(PACKED_BYTES_DEFAULT);
    (bytes_max > 0).then(|| PackedConfig {
        folder: root.join(raw.packed_dir.as_deref().unwrap_or(PACKED_FOLDER_DEFAULT)),
        bytes_max,
    })
}
