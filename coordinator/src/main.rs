//! The coordinator's process: reads arguments and configuration, opens the ports and runs until a signal.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use common::config::{self, Cluster, ModelOrigin};
use coordinator::plan::{self, Question};
use coordinator::{Listeners, check, facts, http};

/// Exit status for mistakes in arguments or configuration.
const BAD_CONFIGURATION: u8 = 2;

/// tandem's coordinator: the HTTP API, endpoints, placement and request scheduling.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The cluster's configuration.
    #[arg(
        long,
        global = true,
        default_value = "cluster.toml",
        env = "TANDEM_CONFIG"
    )]
    config: PathBuf,
    /// Log one JSON object per line.
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Says what is wrong with a configuration, or what would be placed where.
    Check {
        /// The configuration; that of --config unless given.
        file: Option<PathBuf>,
    },
    /// Says how much memory a model takes on each rank, by workload type, and which is the smallest that it fits.
    Plan(PlanArguments),
    /// Prints addresses, tokens' files and workers of a configuration, tab-separated: for scripts.
    Facts,
}

#[derive(Debug, clap::Args)]
struct PlanArguments {
    /// A registered name, or the path of a model's folder or of its config.json alone.
    model: String,
    /// The registered version; the newest of cluster.toml unless given.
    version: Option<String>,
    /// Of this workload type alone.
    #[arg(long)]
    workload_type: Option<String>,
    /// Requests at a time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65536))]
    concurrency: u32,
    /// Longest sequence in tokens; the model's own unless given.
    #[arg(long)]
    context: Option<u32>,
    /// These numbers of shards instead of cluster.toml's workload types: 1,2,4.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: Vec<u32>,
    /// Sizes in bytes instead of rounded ones.
    #[arg(long)]
    bytes: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let checked = match &arguments.command {
        Some(Verb::Check { file }) => file.clone().unwrap_or_else(|| arguments.config.clone()),
        Some(Verb::Facts | Verb::Plan(_)) | None => arguments.config.clone(),
    };
    let cluster = match config::load(&checked) {
        Ok(cluster) => cluster,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    let outcome = match arguments.command {
        Some(Verb::Check { .. }) => print_check(&cluster),
        Some(Verb::Plan(asked)) => print_plan(&cluster, asked),
        Some(Verb::Facts) => {
            print!("{}", facts::lines(&cluster));
            Ok(ExitCode::SUCCESS)
        }
        None => {
            common::telemetry::init(arguments.log_json);
            warn_of_missing_models(&cluster);
            run(cluster)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("coordinator: {error:#}");
        ExitCode::FAILURE
    })
}

fn print_check(cluster: &Cluster) -> anyhow::Result<ExitCode> {
    let report = check::report(cluster)?;
    print!("{}", report.text);
    Ok(if report.well {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(BAD_CONFIGURATION)
    })
}

fn print_plan(cluster: &Cluster, asked: PlanArguments) -> anyhow::Result<ExitCode> {
    let question = Question {
        workload_type: asked.workload_type,
        ranks: asked.ranks,
        concurrency: asked.concurrency,
        context: asked.context,
        bytes: asked.bytes,
    };
    let facts = plan::facts(cluster, &asked.model, asked.version.as_deref())?;
    let (text, fits) = plan::report(cluster, facts, &question)?;
    print!("{text}");
    Ok(if fits {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Not an error: a folder may come later, and endpoints of other models can be served.
fn warn_of_missing_models(cluster: &Cluster) {
    for entry in &cluster.models {
        if let ModelOrigin::Folder(path) = &entry.origin
            && !path.is_dir()
        {
            tracing::warn!(
                model = %entry.model,
                path = %path.display(),
                "a registered model's folder is not there; nothing can be served from it"
            );
        }
    }
}

fn run(cluster: Cluster) -> anyhow::Result<ExitCode> {
    let listeners = Listeners::open(&cluster)?;
    let (http_address, workers_address) = listeners.addresses()?;
    let recorder = http::build_recorder()?;
    let metrics = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    // Actors live on the system's own thread; links and timers on the runtime's.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let system = actix_rt::System::with_tokio_rt(|| runtime);
    system.block_on(async {
        let shutdown = common::shutdown::on_signal()?;
        let up = || println!("coordinator ready http={http_address} workers={workers_address}");
        coordinator::run(Arc::new(cluster), listeners, metrics, shutdown, up).await
    })?;
    Ok(ExitCode::SUCCESS)
}
