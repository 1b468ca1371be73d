//! The worker's program: arguments, configuration, exit codes.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use common::config::Cluster;
use tokio_util::sync::CancellationToken;
use worker::artifacts::library::Library;
use worker::device::Device;
use worker::session::{Session, SessionConfig};
use worker::text::{sandbox, trial};

/// The exit code for wrong arguments or configuration, as clap's own.
const WRONG_USE: u8 = 2;

/// Runs shards of models on one device, for the coordinator.
#[derive(Parser)]
#[command(name = "worker", version)]
struct Arguments {
    /// The cluster's configuration.
    #[arg(long, global = true, default_value = "cluster.toml")]
    config: PathBuf,
    /// The device to run, as node/device in the configuration (local/cpu0).
    #[arg(long)]
    device: Option<String>,
    /// Log one JSON object per line.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Option<Task>,
}

#[derive(Subcommand)]
enum Task {
    /// Print what this machine offers: cores, instruction paths, memory, CUDA and NCCL.
    Doctor,
    /// Render a chat template, for the worker that starts this process.
    #[command(name = sandbox::TASK, hide = true)]
    RenderTemplate,
    /// Compile grammars, for the worker that starts this process.
    #[command(name = trial::TASK, hide = true)]
    TryGrammar,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let served = match arguments.command {
        Some(Task::RenderTemplate) => Some(sandbox::serve()),
        Some(Task::TryGrammar) => Some(trial::serve()),
        _ => None,
    };
    match served {
        Some(Ok(())) => return ExitCode::SUCCESS,
        Some(Err(_)) => return ExitCode::FAILURE,
        None => {}
    }
    common::telemetry::init(arguments.log_json);
    if let Some(Task::Doctor) = arguments.command {
        println!("{}", worker::doctor::report());
        return ExitCode::SUCCESS;
    }
    let cluster = match common::config::load(&arguments.config) {
        Ok(cluster) => cluster,
        Err(e) => return wrong(&e),
    };
    let name = match device_name(&cluster, arguments.device) {
        Ok(name) => name,
        Err(e) => return wrong(&e),
    };
    let system = actix::System::new();
    let code = match system.block_on(run(cluster, name)) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("worker: {e:#}");
            1
        }
    };
    // The runtime's own end would wait for prompts that are still being tokenized, for nobody.
    std::process::exit(code)
}

fn wrong(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(WRONG_USE)
}

/// The device asked for, if the configuration has it.
fn device_name(cluster: &Cluster, asked: Option<String>) -> Result<String> {
    let known: Vec<String> = cluster.workers().map(ToString::to_string).collect();
    if known.is_empty() {
        bail!("the configuration has no [[nodes.devices]]: a worker runs one of them");
    }
    let Some(name) = asked else {
        bail!(
            "--device is missing; the configuration has {}",
            known.join(", ")
        )
    };
    if cluster.device(&name).is_none() {
        bail!(
            "--device {name} is not in the configuration; it has {}",
            known.join(", ")
        );
    }
    Ok(name)
}

async fn run(cluster: Cluster, name: String) -> Result<()> {
    let shutdown = common::shutdown::on_signal()?;
    let (node, entry) = cluster
        .device(&name)
        .context("the device is gone from the configuration")?;
    let device = Device::open(node, entry)?;
    // This thread runs the session and starts all others: tokenizers, answers, the engines' own (which then take the
    // compute cores).
    device.keep_off();
    let lost = device.lost.clone();
    let tls = cluster.tls.as_ref().map(common::tls::client).transpose()?;
    let Some(secret) = secret(&cluster.auth.worker_secret_file, &shutdown).await? else {
        return Ok(());
    };
    let library = Library::new(
        &cluster.registries,
        &cluster.cache,
        cluster.packed.as_ref(),
        &registry::environment,
    );
    let worker = entry.worker.clone();
    let ready = format!("worker ready {worker}\n");
    let config = SessionConfig {
        worker,
        addresses: cluster.coordinator.addresses.clone(),
        tls,
        secret,
        library: Arc::new(library),
    };
    // Whoever started this process may not listen any more.
    let on_ready = move || drop(std::io::stdout().write_all(ready.as_bytes()));
    let session = Session::new(config, device, on_ready);
    let stopping = shutdown.clone();
    let serve = session.run(stopping);
    let watch = async {
        lost.cancelled().await;
        shutdown.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = serve => served?,
        () = watch => {}
    }
    if lost.is_cancelled() {
        bail!(
            "device {name} has failed and cannot be used again by this process: start the worker again"
        );
    }
    Ok(())
}

/// The cluster's secret; waits for the coordinator to make it. `None` when the process shall stop.
async fn secret(file: &std::path::Path, shutdown: &CancellationToken) -> Result<Option<String>> {
    const LOOK_AGAIN: Duration = Duration::from_millis(200);
    let mut told = false;
    loop {
        match std::fs::read_to_string(file) {
            Ok(secret) if !secret.trim().is_empty() => return Ok(Some(secret.trim().to_owned())),
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| {
                    format!("cannot read the cluster's secret in {}", file.display())
                });
            }
            _ if told => {}
            _ => {
                tracing::warn!(file = %file.display(), "waiting for the cluster's secret; the coordinator makes it at its start");
                told = true;
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(None),
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}
