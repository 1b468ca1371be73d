//! `coordinator check`: what would be placed where, from cluster.toml and the models' headers (in their registries) alone.
//!
//! Takes every worker to be there. Starts nothing and writes nothing.

use std::fmt::Write;
use std::sync::Arc;

use anyhow::Result;
use common::config::Cluster;
use common::model_ref::ModelRef;
use common::tls;
use common::wire::message::DeviceKind;

use crate::api::WorkloadSize;
use crate::policy::bytes_text;
use crate::policy::fit::{self, Fit, Wish};
use crate::policy::memory_plan;
use crate::policy::placement::Place;
use crate::policy::workload;
use crate::registry::{ModelFacts, Registry, RegistryError};
use crate::seed;
use crate::table;

/// The report, and whether everything in it is well.
#[derive(Debug)]
pub struct Report {
    /// Lines for people.
    pub text: String,
    /// No model is broken and every endpoint has a place.
    pub well: bool,
}

/// Checks certificates, models, workload types and endpoints. Blocks: reads headers.
///
/// # Errors
/// Never for what is wrong with the cluster: that is in the report.
pub fn report(cluster: &Cluster) -> Result<Report> {
    let registry = Models::new(cluster)?;
    let mut report = Report {
        text: String::new(),
        well: true,
    };
    certificates(cluster, &mut report)?;
    devices(cluster, &mut report)?;
    registries(&registry.registry, &mut report)?;
    models(cluster, &registry, &mut report)?;
    endpoints(cluster, &registry, &mut report)?;
    Ok(report)
}

/// The registries, for programs that ask one question at a time. Blocks.
pub(crate) struct Models {
    registry: Registry,
    runtime: tokio::runtime::Runtime,
}

impl Models {
    /// The registries of cluster.toml.
    pub(crate) fn new(cluster: &Cluster) -> std::io::Result<Models> {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        Ok(Models {
            registry: Registry::new(cluster, &::registry::environment),
            runtime: runtime.enable_all().build()?,
        })
    }

    /// What is known of a model without its weights.
    pub(crate) fn facts(&self, model: &ModelRef) -> Result<Arc<ModelFacts>, RegistryError> {
        self.runtime.block_on(self.registry.facts(model))
    }
}

/// The devices of cluster.toml, all there and with nothing on them.
pub(crate) fn places(cluster: &Cluster) -> Vec<Place> {
    let mut places = Vec::new();
    for node in &cluster.nodes {
        for device in &node.devices {
            places.push(Place {
                worker: device.worker.0.clone(),
                node: node.name.clone(),
                kind: device.kind,
                free_bytes: device.memory_bytes,
                rank_before: None,
                linked: true,
            });
        }
    }
    places
}

/// Says nothing of certificates that are well.
fn certificates(cluster: &Cluster, report: &mut Report) -> Result<()> {
    let Some(files) = &cluster.tls else {
        return Ok(());
    };
    let usable = tls::server(files).and_then(|_| tls::client(files));
    if let Err(error) = usable {
        report.well = false;
        writeln!(report.text, "Certificates ([tls])\n  {error:#}\n")?;
    }
    Ok(())
}

fn devices(cluster: &Cluster, report: &mut Report) -> Result<()> {
    writeln!(report.text, "Devices")?;
    if cluster.workers().next().is_none() {
        report.well = false;
        writeln!(
            report.text,
            "  none: nothing can be served, give a node some [[nodes.devices]]"
        )?;
    }
    for node in &cluster.nodes {
        for device in &node.devices {
            let kind = match device.kind {
                DeviceKind::Cpu => "cpu".to_owned(),
                DeviceKind::Cuda => format!("cuda:{}", device.ordinal),
            };
            let memory = device
                .memory_bytes
                .map_or("as the device says".into(), bytes_text);
            writeln!(
                report.text,
                "  {:<24} {kind:<8} {memory:<20} at {}",
                device.worker.0, node.address
            )?;
        }
    }
    writeln!(report.text)?;
    Ok(())
}

/// Says nothing where there are none.
fn registries(registry: &Registry, report: &mut Report) -> Result<()> {
    let mut lines = Vec::new();
    for (name, address) in registry.registries() {
        match address {
            Ok(address) => lines.push(format!("  {name:<24} {address}")),
            Err(error) => {
                report.well = false;
                lines.push(format!("  {name:<24} {error}"));
            }
        }
    }
    if !lines.is_empty() {
        writeln!(report.text, "Registries\n{}\n", lines.join("\n"))?;
    }
    Ok(())
}

/// One line per model and workload type: bytes per rank, and how many sequences at the longest context then fit.
fn models(cluster: &Cluster, registry: &Models, report: &mut Report) -> Result<()> {
    writeln!(
        report.text,
        "Models by workload type, bytes on each rank (KV sized for workload size Large where there is room)"
    )?;
    let head = [
        "model",
        "type",
        "ranks",
        "weights",
        "workspace",
        "KV pool",
        "sum",
        "context",
        "concurrency",
    ];
    let mut rows: Vec<[String; 9]> = vec![head.map(str::to_owned)];
    let mut notes = Vec::new();
    let places = places(cluster);
    for (i, model) in registry.registry.models().enumerate() {
        let name = format!("{} v{}", model.name, model.version);
        let facts = match registry.facts(model) {
            Ok(facts) => facts,
            Err(error) => {
                report.well = false;
                notes.push(format!("  models[{i}] {name}: {error}"));
                continue;
            }
        };
        for workload in &cluster.workload_types {
            let concurrency = WorkloadSize::Large.concurrency();
            let need =
                match memory_plan::need(&facts, workload.device, workload.shards, concurrency) {
                    Ok(need) => need,
                    Err(error) => {
                        notes.push(format!("  {name} on {}: {error}", workload.name));
                        continue;
                    }
                };
            let fitted = fit::fit(
                Wish {
                    facts: &facts,
                    workload,
                    concurrency,
                },
                &places,
                &cluster.workload_types,
            );
            let plan = fitted.map(|fit| fit.plan);
            if let Err(error) = &plan
                && !places.is_empty()
            {
                notes.push(format!("  {name} on {}: {error}", workload.name));
            }
            let planned = |text: &dyn Fn(&memory_plan::MemoryPlan) -> String| {
                plan.as_ref().map_or("-".to_owned(), text)
            };
            rows.push([
                name.clone(),
                workload.name.clone(),
                workload.shards.to_string(),
                bytes_text(need.weight_bytes),
                bytes_text(need.fixed_bytes() - need.weight_bytes),
                planned(&|plan| bytes_text(plan.kv_bytes())),
                planned(&|plan| bytes_text(plan.bytes())),
                need.context_max.to_string(),
                planned(&|plan| plan.concurrency().to_string()),
            ]);
        }
    }
    table::write(&rows, &mut report.text)?;
    for note in notes {
        writeln!(report.text, "{note}")?;
    }
    writeln!(report.text)?;
    Ok(())
}

/// The endpoints of cluster.toml, placed one after another.
fn endpoints(cluster: &Cluster, registry: &Models, report: &mut Report) -> Result<()> {
    if cluster.endpoints.is_empty() {
        writeln!(
            report.text,
            "No endpoints in cluster.toml; the API creates them."
        )?;
        return Ok(());
    }
    writeln!(report.text, "Endpoints")?;
    let mut places = places(cluster);
    for entry in &cluster.endpoints {
        for entity in seed::config(entry).entities {
            let placed = registry
                .facts(&entity.model)
                .map_err(|e| e.to_string())
                .and_then(|facts: Arc<ModelFacts>| {
                    let facts = facts.kept_as(entity.quantization);
                    let workload = workload::resolve(
                        &cluster.workload_types,
                        &entity.workload_type,
                        entity.workload_size,
                    )
                    .map_err(|e| e.message)?;
                    let wish = Wish {
                        facts: &facts,
                        workload,
                        concurrency: entity.admitted(),
                    };
                    let fit = fit::fit(wish, &places, &cluster.workload_types)
                        .map_err(|e| e.to_string())?;
                    Ok((fit, workload::stand_in(workload)))
                });
            let label = format!(
                "  {} / {} ({}, {})",
                entry.name,
                entity.name,
                entity.workload_type,
                entity.workload_size.name()
            );
            match placed {
                Ok((Fit { devices, plan }, stand_in)) => {
                    let mut workers = Vec::new();
                    for device in devices {
                        let place = &mut places[device];
                        workers.push(place.worker.clone());
                        place.free_bytes = place
                            .free_bytes
                            .map(|free| free.saturating_sub(plan.bytes()));
                    }
                    let stand_in = stand_in
                        .map(|words| format!("; {words}"))
                        .unwrap_or_default();
                    writeln!(
                        report.text,
                        "{label}: on {}, {} each{stand_in}",
                        workers.join(", "),
                        bytes_text(plan.bytes())
                    )?;
                }
                Err(error) => {
                    report.well = false;
                    writeln!(report.text, "{label}: {error}")?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn check(change: impl FnOnce(String) -> String) -> Report {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let models = root.join("tests/models").canonicalize().unwrap();
        let text = std::fs::read_to_string(root.join("cluster.toml")).unwrap();
        let text = text.replace(
            "path = \"tests/models",
            &format!("path = \"{}", models.display()),
        );
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("cluster.toml"), change(text)).unwrap();
        let cluster = common::config::load(&folder.path().join("cluster.toml")).unwrap();
        report(&cluster).unwrap()
    }

    const ENDPOINT: &str = "\n[[endpoints]]\nname = \"e\"\n[[endpoints.served_entities]]\n\
        entity_name = \"ml.demo.tiny-llama\"\nentity_version = 1\nworkload_type = \"GPU_LARGE_2\"\n";

    #[test]
    fn the_committed_cluster_is_well_and_every_model_fits_every_type() {
        let report = check(|text| text);
        assert!(report.well, "{}", report.text);
        for words in [
            "local/cpu0",
            "ml.demo.tiny-mpt v1",
            "GPU_LARGE_2",
            "concurrency",
            "No endpoints",
        ] {
            assert!(
                report.text.contains(words),
                "no {words} in\n{}",
                report.text
            );
        }
    }

    #[test]
    fn an_endpoint_is_placed_and_one_that_cannot_be_is_not_well() {
        let report = check(|text| text + ENDPOINT);
        assert!(
            report.well
                && report
                    .text
                    .contains("e / tiny-llama-1 (GPU_LARGE_2, Small): on local/cpu0, local/cpu1"),
            "{}",
            report.text
        );
        assert!(
            report
                .text
                .contains("2 CPU shards stand in for 2 x A100 80 GB"),
            "{}",
            report.text
        );
        let tight = check(|text| text.replace("memory = \"4GiB\"", "memory = \"8MiB\"") + ENDPOINT);
        assert!(
            !tight.well
                && tight
                    .text
                    .contains("does not fit workload type GPU_LARGE_2"),
            "{}",
            tight.text
        );
    }

    #[test]
    fn a_cluster_without_devices_is_told_once() {
        let report = check(|text| {
            let (before, rest) = text.split_once("[[nodes]]").unwrap();
            before.to_owned() + &rest[rest.find("[[workload_types]]").unwrap()..]
        });
        assert!(!report.well, "{}", report.text);
        assert!(
            report.text.contains("none: nothing can be served")
                && !report.text.contains("does not fit"),
            "{}",
            report.text
        );
    }

    #[test]
    fn certificates_that_cannot_be_used_are_told_with_their_file() {
        let files = "\n[tls]\nca = \"ca.pem\"\ncert = \"/dev/null\"\nkey = \"/dev/null\"\n";
        let missing = check(|text| text + files);
        assert!(
            !missing.well
                && missing.text.contains("Certificates ([tls])")
                && missing.text.contains("ca.pem")
                && missing.text.contains("No such file"),
            "{}",
            missing.text
        );
        let empty = check(|text| text + &files.replace("ca.pem", "/dev/null"));
        assert!(
            !empty.well && empty.text.contains("/dev/null: holds no PEM certificate"),
            "{}",
            empty.text
        );
    }

    #[test]
    fn a_context_beyond_the_models_own_is_told_with_its_key() {
        let report = check(|text| {
            let first = text.find("[[models]]").unwrap();
            let (before, models) = text.split_at(first);
            before.to_owned()
                + &models.replacen("[[models]]", "[[models]]\ncontext_max = 999999", 1)
        });
        assert!(
            !report.well
                && report.text.contains("models[0] ")
                && report
                    .text
                    .contains("context_max = 999999 in cluster.toml is beyond the model's own"),
            "{}",
            report.text
        );
    }

    #[test]
    fn a_model_whose_folder_is_gone_is_named() {
        let report = check(|text| text.replace("tiny-mpt\"\n", "tiny-gone\"\n"));
        assert!(
            !report.well && report.text.contains("is not a folder"),
            "{}",
            report.text
        );
    }
}
