//! A cluster of real processes in a folder of its own: one coordinator, one worker per device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::ids::WorkerId;
use tempfile::TempDir;

use crate::binaries;
use crate::client::Client;
use crate::process::Process;
use crate::settings::Settings;
use crate::until::{PATIENCE, until};

/// A running cluster. Everything ends when it is dropped.
pub struct Cluster {
    // Declared first, dropped first: processes end before their folder goes.
    /// The coordinator.
    pub coordinator: Process,
    /// The workers, in the order of cluster.toml; `None` where none was started.
    pub workers: Vec<Option<Process>>,
    /// The administrator.
    pub client: Client,
    /// Where the API listens.
    pub http_address: String,
    /// Where workers dial.
    pub worker_address: String,
    settings: Settings,
    folder: TempDir,
}

impl Cluster {
    /// Starts the coordinator and all workers, and waits until they have met.
    pub async fn start(settings: Settings) -> Cluster {
        let mut cluster = Cluster::coordinator_only(settings).await;
        for index in 0..cluster.workers.len() {
            cluster.start_worker(index);
        }
        for worker in cluster.workers.iter_mut().flatten() {
            worker.line("worker ready", PATIENCE).await;
        }
        cluster.wait_workers(cluster.workers.len()).await;
        cluster
    }

    /// Starts the coordinator alone, for tests that play the workers.
    pub async fn coordinator_only(settings: Settings) -> Cluster {
        let folder = tempfile::tempdir().expect("a folder for the cluster");
        fs::write(folder.path().join("cluster.toml"), settings.toml())
            .expect("cluster.toml can be written");
        let mut coordinator = run(
            folder.path(),
            "coordinator",
            coordinator_command(folder.path()),
        );
        let line = coordinator.line("coordinator ready", PATIENCE).await;
        let (http_address, worker_address) = (field(&line, "http="), field(&line, "workers="));
        // The ports are known now: workers and later lives of the coordinator take them from the local override.
        let local = format!(
            "[coordinator]\nlisten = \"{http_address}\"\nworker_listen = \"{worker_address}\"\n"
        );
        fs::write(folder.path().join("cluster.local.toml"), local)
            .expect("cluster.local.toml can be written");
        let token = read_secret(&folder.path().join("var/admin.token"));
        Cluster {
            coordinator,
            workers: settings.worker_names().iter().map(|_| None).collect(),
            client: Client::new(&http_address, Some(&token)),
            http_address,
            worker_address,
            settings,
            folder,
        }
    }

    /// The cluster's folder: cluster.toml and `var`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The secret workers join with.
    pub fn worker_secret(&self) -> String {
        read_secret(&self.folder().join("var/worker.secret"))
    }

    /// The administrator's token.
    pub fn admin_token(&self) -> String {
        read_secret(&self.folder().join("var/admin.token"))
    }

    /// The name of a worker by its place in cluster.toml.
    pub fn worker_name(&self, index: usize) -> WorkerId {
        WorkerId(self.settings.worker_names()[index].clone())
    }

    /// Starts a worker and does not wait for it.
    pub fn start_worker(&mut self, index: usize) {
        let name = self.worker_name(index).0;
        let mut command = Command::new(binaries::worker());
        command
            .arg("--config")
            .arg(self.folder().join("cluster.toml"))
            .args(["--device", &name])
            .envs(self.settings.worker_env.iter().cloned());
        self.workers[index] = Some(run(self.folder(), &name, command));
    }

    /// A started worker.
    pub fn worker(&mut self, index: usize) -> &mut Process {
        self.workers[index]
            .as_mut()
            .expect("the worker was started")
    }

    /// `kill -9` of a worker.
    pub fn kill_worker(&mut self, index: usize) {
        self.worker(index).kill();
    }

    /// `kill -9` of the coordinator.
    pub fn kill_coordinator(&mut self) {
        self.coordinator.kill();
    }

    /// Starts the coordinator again, on the same ports and data, and waits until it answers.
    pub async fn restart_coordinator(&mut self) {
        self.coordinator = run(
            self.folder(),
            "coordinator",
            coordinator_command(self.folder()),
        );
        self.coordinator.line("coordinator ready", PATIENCE).await;
    }

    /// Waits until the coordinator counts this many workers.
    pub async fn wait_workers(&self, count: usize) {
        until(
            &format!("{count} workers to have joined"),
            PATIENCE,
            async || {
                let health = self.client.get("/health").await.json();
                if health["workers"].as_u64() == Some(count as u64) {
                    Ok(())
                } else {
                    Err(health.to_string())
                }
            },
        )
        .await;
    }

    /// Waits until no request is anywhere: nothing running or waiting, and all KV blocks free, also in a report that
    /// workers made afterwards.
    pub async fn wait_idle(&self) {
        let mut idle_since = None;
        until(
            "all requests to be gone and all KV blocks free",
            PATIENCE,
            async || {
                let metrics = self.client.metrics().await;
                let busy: Vec<String> = IDLE_GAUGES
                    .iter()
                    .filter_map(|name| match metrics.sum(name, "") {
                        Some(0.0) => None,
                        value => Some(format!("{name} = {value:?}")),
                    })
                    .collect();
                if !busy.is_empty() {
                    idle_since = None;
                    return Err(busy.join(", "));
                }
                let since = idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() > REPORT_AGE_MAX {
                    Ok(())
                } else {
                    Err("idle, but not for long enough".into())
                }
            },
        )
        .await;
    }
}

/// Workers report their counters once a second: what is older than this has been reported.
const REPORT_AGE_MAX: Duration = Duration::from_millis(1200);

/// Gauges that are 0 when the cluster does nothing.
const IDLE_GAUGES: [&str; 3] = [
    "tandem_requests_running",
    "tandem_requests_waiting",
    "tandem_kv_blocks_used",
];

/// A command line that runs the coordinator of a folder.
pub fn coordinator_command(folder: &Path) -> Command {
    let mut command = Command::new(binaries::coordinator());
    command.arg("--config").arg(folder.join("cluster.toml"));
    command
}

/// Starts a program with its logs in the folder's `logs`.
pub fn run(folder: &Path, name: &str, command: Command) -> Process {
    let logs: PathBuf = folder.join("logs");
    fs::create_dir_all(&logs).expect("a folder for logs");
    Process::start(name, command, &logs)
}

fn read_secret(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.trim().to_owned()
}

fn field(line: &str, name: &str) -> String {
    let found = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name));
    found
        .unwrap_or_else(|| panic!("no {name} in {line:?}"))
        .to_owned()
}
