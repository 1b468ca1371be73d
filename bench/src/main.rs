//! `tandem-bench`: sends a load and reports; compares reports; draws them. `scripts/bench` calls it.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bench::client::{Api, Client, Target};
use bench::length::Length;
use bench::load::{Load, Loop};
use bench::prompt::{PromptForm, Prompts};
use bench::report::Report;
use bench::{compare, plot, process};
use clap::{Args, Parser, Subcommand};

/// Tokens of a warm-up's answer: the first ones touch all that later ones do.
const WARMUP_OUTPUT_MAX: u32 = 8;

/// Load on a serving HTTP API, and what came of it.
#[derive(Debug, Parser)]
#[command(name = "tandem-bench")]
enum Command {
    /// Sends requests and reports rates, latencies, failures and processor time.
    Load(Box<LoadArgs>),
    #[command(flatten)]
    Reports(Reports),
}

/// What is done with reports that were written before.
#[derive(Debug, Subcommand)]
enum Reports {
    /// Prints ratios of two systems' runs, medians of ours divided by medians of theirs, in Markdown.
    Compare {
        /// What was compared: the rows' names begin with it.
        #[arg(long, default_value = "load")]
        label: String,
        /// Our reports.
        #[arg(long, required = true, num_args = 1..)]
        ours: Vec<PathBuf>,
        /// The other system's.
        #[arg(long, required = true, num_args = 1..)]
        theirs: Vec<PathBuf>,
    },
    /// Draws reports as an SVG.
    Plot {
        /// The picture.
        svg: PathBuf,
        /// Reports.
        #[arg(required = true)]
        reports: Vec<PathBuf>,
    },
}

/// The last of an option given twice counts: scripts put their own before those that they are given.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
struct LoadArgs {
    /// The route that completes prompts: http://127.0.0.1:8470/serving-endpoints/completions.
    #[arg(long)]
    url: String,
    /// How the server is asked.
    #[arg(long, value_enum, default_value_t = Api::Openai)]
    api: Api,
    /// Name of the model or endpoint, where the server wants one.
    #[arg(long)]
    model: Option<String>,
    /// A bearer token.
    #[arg(long, env = "TANDEM_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Closed loop: so many clients, each sends its next request when the last one is answered.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    clients: u32,
    /// Open loop instead: so many requests a second, at the moments of a Poisson process.
    #[arg(long, conflicts_with = "clients")]
    rate: Option<f64>,
    /// Requests in all; left out: 4 for each client of a closed loop, 64 in an open one.
    #[arg(long)]
    requests: Option<u64>,
    /// No request begins later than this.
    #[arg(long)]
    seconds: Option<u64>,
    /// Tokens of prompts: 128, uniform:64-256 or lognormal:128,0.6,1024 (median, sigma, most).
    #[arg(long, default_value = "128")]
    prompt: Length,
    /// Tokens of answers, likewise.
    #[arg(long, default_value = "32")]
    output: Length,
    /// The share of each prompt, from its beginning, that all have in common: 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    shared_prefix: f64,
    /// How prompts are written; left out: token ids, and texts for an API that takes no ids.
    #[arg(long, value_enum)]
    prompts: Option<PromptForm>,
    /// Everything drawn by chance follows from it.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Requests that are sent before the load, one after the other, and not counted.
    #[arg(long, default_value_t = 1)]
    warmup: u64,
    /// How long a request may take.
    #[arg(long, default_value_t = 300)]
    timeout_s: u64,
    /// A process of the server, with all that it started: its processor time is reported. May be given several times.
    #[arg(long)]
    pid: Vec<u32>,
    /// What the report calls this load.
    #[arg(long, default_value = "load")]
    label: String,
    /// Where the report is written as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where it is drawn.
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    match Command::parse() {
        Command::Load(args) => send(*args).await,
        Command::Reports(Reports::Compare {
            label,
            ours,
            theirs,
        }) => {
            println!("| | ours | theirs | ratio |\n|---|---|---|---|");
            for ratio in compare::ratios(&read(&ours)?, &read(&theirs)?) {
                println!("| {label}: {ratio}");
            }
            Ok(())
        }
        Command::Reports(Reports::Plot { svg, reports }) => {
            write(&svg, &plot::svg(&read(&reports)?))
        }
    }
}

async fn send(args: LoadArgs) -> Result<()> {
    let load = args.load()?;
    let client = Client::new(args.target())?;
    for number in 0..args.warmup {
        // A number that no request of the load has, so that no prompt of it is known already.
        let mut ask = load.ask(u64::MAX / 2 + number);
        ask.output_tokens = ask.output_tokens.min(WARMUP_OUTPUT_MAX);
        if let Err(failure) = client.ask(&ask).await {
            eprintln!("a warm-up request failed: {failure}");
        }
    }
    let before = process::cpu_seconds(&args.pid);
    let records = load.run(&client).await;
    let used = process::cpu_seconds(&args.pid) - before;
    let report = Report::of(
        &args.label,
        &records,
        (!args.pid.is_empty()).then_some(used),
    );
    print!("{report}");
    if let Some(path) = &args.json {
        write(path, &serde_json::to_string_pretty(&report)?)?;
    }
    if let Some(path) = &args.svg {
        write(path, &plot::svg(std::slice::from_ref(&report)))?;
    }
    ensure!(report.answered > 0, "no request was answered");
    Ok(())
}

impl LoadArgs {
    fn target(&self) -> Target {
        Target {
            url: self.url.clone(),
            api: self.api,
            model: self.model.clone(),
            token: self.token.clone(),
            timeout: Duration::from_secs(self.timeout_s),
        }
    }

    fn load(&self) -> Result<Load> {
        ensure!(
            (0.0..=1.0).contains(&self.shared_prefix),
            "--shared-prefix is a share: 0 to 1"
        );
        let (loop_, requests) = match self.rate {
            Some(rate) => (Loop::Open(rate), 64),
            None => (Loop::Closed(self.clients), 4 * u64::from(self.clients)),
        };
        if let Loop::Open(rate) = loop_ {
            ensure!(
                rate > 0.0 && rate.is_finite(),
                "--rate is requests a second: more than 0"
            );
        }
        let form = self.prompts.unwrap_or(match self.api {
            Api::Openai => PromptForm::Ids,
            Api::Mlflow => PromptForm::Text,
        });
        Ok(Load {
            loop_,
            // With a limit of time alone, requests go on until it.
            requests: self.requests.unwrap_or(if self.seconds.is_some() {
                u64::MAX / 2
            } else {
                requests
            }),
            time_max: self.seconds.map(Duration::from_secs),
            prompt: self.prompt,
            output: self.output,
            prompts: Prompts {
                form,
                shared: self.shared_prefix,
                seed: self.seed,
            },
        })
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<Report>> {
    let report = |path: &PathBuf| {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| format!("{}: no report", path.display()))
    };
    paths.iter().map(report).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}
