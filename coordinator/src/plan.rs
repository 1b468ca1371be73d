//! `coordinator plan`: what a model takes of each rank, by workload type, and which is the smallest that it fits.
//!
//! Looks at the cluster as cluster.toml describes it, every worker there and nothing deployed. Starts nothing, writes
//! nothing and reads no weight.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use common::config::{Cluster, ServingDefaults, WorkloadType};
use common::model_ref::ModelRef;
use common::wire::message::{DeviceKind, Quantization};

use crate::check::{Models, places};
use crate::policy::bytes_text;
use crate::policy::fit::{self, Fit, NoFit, Wish};
use crate::policy::memory_plan::{self, RankNeed};
use crate::policy::placement::Place;
use crate::registry::files::Folder;
use crate::registry::form::Form;
use crate::registry::{self, Context, ModelFacts, RegistryError};
use crate::table;

/// What is asked beside the model.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// Of this workload type alone.
    pub workload_type: Option<String>,
    /// These numbers of shards, on devices of the first workload type's kind, instead of cluster.toml's types.
    pub ranks: Vec<u32>,
    /// Requests at a time.
    pub concurrency: u32,
    /// A shorter context than the model's own.
    pub context: Option<u32>,
    /// Sizes in bytes instead of rounded ones.
    pub bytes: bool,
}

/// The facts of a model: registered under a name, or at a path. Blocks: reads headers.
///
/// # Errors
/// [`RegistryError`].
pub fn facts(
    cluster: &Cluster,
    model: &str,
    version: Option<&str>,
) -> Result<ModelFacts, RegistryError> {
    let path = Path::new(model);
    if version.is_none() && path.exists() {
        return facts_at(path);
    }
    let newest = || {
        let entries = cluster.models.iter().map(|entry| &entry.model);
        let versions = entries.filter(|known| known.name == model);
        versions
            .filter_map(|known| known.version.parse::<u32>().ok())
            .max()
            .map_or_else(|| "1".to_owned(), |version| version.to_string())
    };
    let version = version.map_or_else(newest, str::to_owned);
    let model =
        ModelRef::new(model, &version).map_err(|e| RegistryError::Unknown(e.to_string()))?;
    let models = Models::new(cluster)
        .map_err(|e| RegistryError::Unavailable(format!("no registry can be asked: {e}")))?;
    models.facts(&model).map(Arc::unwrap_or_clone)
}

/// The facts of a model that lies at a path: a folder, of which the weights may be missing, a GGUF file, or a `config.json`
/// alone.
///
/// # Errors
/// [`RegistryError::Broken`].
fn facts_at(path: &Path) -> Result<ModelFacts, RegistryError> {
    let named = if path.is_file() {
        path.file_stem()
    } else {
        path.file_name()
    };
    let stem = named.unwrap_or_default().to_string_lossy().into_owned();
    let plain = stem.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "-");
    let model = ModelRef::new(&plain, "1")
        .map_err(|e| RegistryError::Broken(format!("{}: {e}", path.display())))?;
    let is_gguf = path
        .extension()
        .is_some_and(|extension| extension == "gguf");
    if path.is_file() && !is_gguf {
        return registry::read_config_facts(&model, path);
    }
    let files = Folder::open(path)?;
    match registry::mlmodel::layout(&files) {
        // Weights may come later; their headers, when they are there, must be right.
        Ok(layout)
            if layout.gguf.is_none()
                && !registry::tensors::has_weights(&files, &layout.weights) =>
        {
            let file = path.join(layout.weights).join("config.json");
            registry::read_config_facts(&model, &file)
        }
        _ => registry::read_facts(&Context::exact(&model, ServingDefaults::default()), path),
    }
}

/// The report, and whether the model fits what was asked for.
///
/// # Errors
/// A question that has no answer: an unknown workload type, a context beyond the model's own.
pub fn report(
    cluster: &Cluster,
    mut facts: ModelFacts,
    question: &Question,
) -> Result<(String, bool)> {
    if let Some(context) = question.context {
        let own = facts.shape.context_max;
        if context == 0 || context > own {
            bail!("--context {context} must be 1 to the model's own {own}");
        }
        facts.context_max = context;
    }
    let types = types(cluster, question)?;
    let places = places(cluster);
    let mut text = String::new();
    head(&facts, &mut text)?;
    let fits = rows(&facts, &types, &places, question, &mut text)?;
    if question.ranks.is_empty() {
        smallest(cluster, &facts, &places, question, &mut text)?;
    }
    Ok((text, fits))
}

fn types(cluster: &Cluster, question: &Question) -> Result<Vec<WorkloadType>> {
    let known = || -> Vec<&str> {
        let types = cluster.workload_types.iter();
        types.map(|entry| entry.name.as_str()).collect()
    };
    let asked = question.workload_type.as_ref();
    let chosen: Vec<WorkloadType> = cluster
        .workload_types
        .iter()
        .filter(|entry| asked.is_none_or(|name| entry.name == *name))
        .cloned()
        .collect();
    let Some(first) = chosen.first() else {
        match asked {
            Some(name) => bail!(
                "workload type '{name}' is not in cluster.toml, which has {}",
                known().join(", ")
            ),
            None => bail!("cluster.toml has no [[workload_types]]"),
        }
    };
    if question.ranks.is_empty() {
        return Ok(chosen);
    }
    let of_ranks = |&shards: &u32| WorkloadType {
        name: format!("{} x {shards}", first.name),
        shards,
        ..first.clone()
    };
    Ok(question.ranks.iter().map(of_ranks).collect())
}

fn head(facts: &ModelFacts, text: &mut String) -> Result<()> {
    let shape = &facts.shape;
    let parameters: u64 = facts
        .tensors
        .iter()
        .map(|tensor| tensor.dims.iter().product::<u64>())
        .sum();
    writeln!(
        text,
        "{}: {}, {} parameters in {}; {} layers, {} query and {} KV heads of {}; context {}, KV in {}",
        facts.model,
        shape.architecture,
        count_text(parameters),
        form_text(facts),
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.head_width,
        facts.context_max,
        facts.kv_dtype.name()
    )?;
    Ok(())
}

/// How weights are kept, as a number format: what is asked for, or what the files have.
fn form_text(facts: &ModelFacts) -> &'static str {
    let kept = facts.tensors.iter().find_map(|tensor| match tensor.form {
        Form::Grouped(form) if !tensor.is_end() => Some(form.name()),
        _ => None,
    });
    match facts.quantization {
        Quantization::None => kept.unwrap_or("bf16"),
        quantised => quantised.name(),
    }
}

/// A count for people: `6.74 billion`, `1.3 million`.
fn count_text(count: u64) -> String {
    let count = count as f64;
    if count >= 1e9 {
        format!("{:.2} billion", count / 1e9)
    } else {
        format!("{:.1} million", count / 1e6)
    }
}

/// A row per type and form of the weights. Says whether the model, as it is served, fits one of them.
fn rows(
    facts: &ModelFacts,
    types: &[WorkloadType],
    places: &[Place],
    question: &Question,
    text: &mut String,
) -> Result<bool> {
    let head = [
        "type",
        "ranks",
        "weights in",
        "weights",
        "workspace",
        "scratch",
        "overhead",
        "sum",
        "KV/token",
        "KV/sequence",
        "device",
        "left for KV",
        "sequences",
        "fits",
    ];
    let mut table = vec![head.map(str::to_owned)];
    let mut notes = Vec::new();
    let mut any = false;
    let served = facts.quantization;
    for workload in types {
        let budget = device_bytes(workload, places);
        for facts in &forms(facts) {
            let wish = Wish {
                facts,
                workload,
                concurrency: question.concurrency,
            };
            match memory_plan::need(facts, workload.device, workload.shards, wish.concurrency) {
                Ok(need) => {
                    let fit = fit::fit(wish, places, types);
                    table.push(row(wish, &need, budget, fit.is_ok(), question.bytes));
                    if facts.quantization == served {
                        any |= fit.is_ok();
                        notes.extend(note(wish, &need, budget, fit));
                    }
                }
                Err(error) if facts.quantization == served => {
                    notes.push(format!("{}: {error}", workload.name));
                }
                // Said of the form that is served.
                Err(_) => {}
            }
        }
    }
    writeln!(text, "\nBytes on each rank\n")?;
    table::write(&table, text)?;
    writeln!(text)?;
    for note in notes {
        writeln!(text, "{note}")?;
    }
    Ok(any)
}

/// The model with its weights in each form that can be asked for.
fn forms(facts: &ModelFacts) -> Vec<ModelFacts> {
    let of = |quantization| ModelFacts {
        quantization,
        ..facts.clone()
    };
    Quantization::ALL.map(of).into()
}

fn row(
    wish: Wish<'_>,
    need: &RankNeed,
    budget: Option<u64>,
    fits: bool,
    exact: bool,
) -> [String; 14] {
    let size = |bytes: u64| {
        if exact {
            bytes.to_string()
        } else {
            bytes_text(bytes)
        }
    };
    let known = |text: &dyn Fn(u64) -> String| budget.map_or("?".to_owned(), text);
    [
        wish.workload.name.clone(),
        need.ranks.to_string(),
        form_text(wish.facts).to_owned(),
        size(need.weight_bytes),
        size(need.workspace_bytes),
        size(need.scratch_bytes),
        size(need.overhead_bytes),
        size(need.fixed_bytes()),
        size(need.token_bytes()),
        size(need.sequence_blocks() * need.block_bytes),
        known(&size),
        known(&|budget| size(need.kv_left(budget))),
        known(&|budget| need.sequences_within(budget).to_string()),
        if fits { "yes" } else { "no" }.to_owned(),
    ]
}

/// Why the model does not fit, or what is scarce where it does.
fn note(
    wish: Wish<'_>,
    need: &RankNeed,
    budget: Option<u64>,
    fit: Result<Fit, NoFit>,
) -> Option<String> {
    let name = &wish.workload.name;
    match (fit, budget) {
        (Err(NoFit::Never(why) | NoFit::Waiting(why)), _) => Some(format!("{name}: {why}")),
        (Ok(_), Some(budget)) => shortage(wish, need, budget),
        (Ok(_), None) => Some(format!(
            "{name}: cluster.toml does not say how much memory its devices have; it fits where each has {} free",
            bytes_text(need.least_bytes())
        )),
    }
}

/// Bytes on each of the devices that such a replica would take.
fn device_bytes(workload: &WorkloadType, places: &[Place]) -> Option<u64> {
    let mut free: Vec<u64> = places
        .iter()
        .filter(|place| place.kind == workload.device)
        .filter_map(|place| place.free_bytes)
        .collect();
    free.sort_unstable_by(|a, b| b.cmp(a));
    let device = free.get(workload.shards as usize - 1).copied();
    match (device, workload.memory_bytes) {
        (Some(device), Some(given)) => Some(device.min(given)),
        (device, given) => device.or(given),
    }
}

/// That the KV cache has room for fewer sequences than were asked for, or that weights leave little for it.
fn shortage(wish: Wish<'_>, need: &RankNeed, budget: u64) -> Option<String> {
    /// Less than this part of a device for KV is little.
    const LITTLE: u64 = 5;
    let (left, sequences) = (need.kv_left(budget), need.sequences_within(budget));
    let few = sequences < u64::from(wish.concurrency);
    (few || left < budget / LITTLE).then(|| {
        format!(
            "{}: little is left for KV: {} of {}, room for {sequences} sequence{} of {} tokens{}",
            wish.workload.name,
            bytes_text(left),
            bytes_text(budget),
            if sequences == 1 { "" } else { "s" },
            need.context_max,
            if few {
                format!(
                    " where {} were asked for; a smaller context_max makes room for more",
                    wish.concurrency
                )
            } else {
                String::new()
            }
        )
    })
}

fn smallest(
    cluster: &Cluster,
    facts: &ModelFacts,
    places: &[Place],
    question: &Question,
    text: &mut String,
) -> Result<()> {
    let types = &cluster.workload_types;
    if let Some((workload, _)) = fit::smallest(facts, question.concurrency, places, types) {
        writeln!(
            text,
            "The smallest workload type that fits: {}",
            workload.name
        )?;
        return Ok(());
    }
    writeln!(text, "No workload type of cluster.toml fits. What would:")?;
    let served = facts.quantization;
    let mut kinds: Vec<DeviceKind> = types.iter().map(|entry| entry.device).collect();
    kinds.dedup();
    for kind in kinds {
        let largest = places
            .iter()
            .filter(|place| place.kind == kind)
            .filter_map(|place| place.free_bytes)
            .max();
        let Some(largest) = largest else { continue };
        let given = bytes_text(largest);
        if let Some(shards) = fit::shards_within(facts, kind, largest) {
            writeln!(text, "  {shards} shards, on devices of {given} each")?;
        }
        let one = memory_plan::need(facts, kind, 1, 1);
        let context = one.as_ref().map_or(0, |need| need.context_within(largest));
        if context > 0 {
            writeln!(text, "  context_max = {context}, on one device of {given}")?;
        }
        if let Ok(need) = one {
            writeln!(text, "  one device of {}", bytes_text(need.least_bytes()))?;
        }
    }
    for facts in forms(facts) {
        if facts.quantization != served
            && let Some((workload, _)) = fit::smallest(&facts, question.concurrency, places, types)
        {
            let form = facts.quantization.name();
            writeln!(text, "  quantization = \"{form}\", on {}", workload.name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod document;
#[cfg(test)]
mod tests;
