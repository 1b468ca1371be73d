//! The coordinator: the HTTP API, the endpoints' desired state, placement and request scheduling.
//!
//! Knows no tensors, tokenizers or weights; text and token ids pass through it unopened.
#![forbid(unsafe_code)]

pub mod actors;
pub mod api;
pub mod calendar;
pub mod check;
pub mod facts;
pub mod http;
pub mod logs;
pub mod plan;
pub mod policy;
pub mod registry;
pub mod secrets;
pub mod seed;
pub mod store;
pub mod strangers;
mod table;
pub mod tables;
pub mod workers;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Weak};
use std::time::Duration;

use actix::{Actor, Message, Recipient};
use anyhow::{Context, Result, anyhow};
use common::config::Cluster;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use actors::coordinator::{CoordinatorActor, Means, Restored};
use actors::death::DeathNotice;
use actors::directory::Directory;
use actors::gateway::ActorGateway;
use actors::messages::{Died, Who};
use actors::record;
use http::{HttpState, TokenTable};
use logs::Logs;
use registry::Registry;
use store::{EmbeddedStore, SharedStore, Store};
use tables::Tables;
use workers::Doorkeeper;

/// Pause before the coordinator's actor is started again after a panic.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// The two open ports of a coordinator.
#[derive(Debug)]
pub struct Listeners {
    http: TcpListener,
    workers: TcpListener,
}

impl Listeners {
    /// Opens the ports that the configuration names; port 0 lets the system choose.
    ///
    /// # Errors
    /// One line with the address and the key that sets it.
    pub fn open(cluster: &Cluster) -> Result<Self> {
        let open = |address: SocketAddr, key: &str| {
            let listener = TcpListener::bind(address).map_err(|e| {
                let why = if e.kind() == std::io::ErrorKind::AddrInUse { "the port is in use".to_owned() } else { e.to_string() };
                anyhow!("cannot listen on {address} ({key}): {why}; stop what uses it or set another {key}")
            })?;
            listener
                .set_nonblocking(true)
                .with_context(|| format!("{key} {address}"))?;
            anyhow::Ok(listener)
        };
        let http = open(cluster.coordinator.listen, "coordinator.listen")?;
        let workers = open(
            cluster.coordinator.worker_listen,
            "coordinator.worker_listen",
        )?;
        Ok(Listeners { http, workers })
    }

    /// The addresses in use: HTTP, workers.
    ///
    /// # Errors
    /// When a socket is gone.
    pub fn addresses(&self) -> std::io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.http.local_addr()?, self.workers.local_addr()?))
    }
}

/// Runs a coordinator until `shutdown`, inside an actix system. `metrics` is what `/metrics` shows; its recorder is the
/// caller's to install. `up` is called once requests and workers are taken.
///
/// # Errors
/// What keeps it from starting: store, secrets, certificates. Names the file or the setting.
pub async fn run(
    cluster: Arc<Cluster>,
    listeners: Listeners,
    metrics: PrometheusHandle,
    shutdown: CancellationToken,
    up: impl FnOnce(),
) -> Result<()> {
    let mut core = Core::start(cluster.clone()).await?;
    let workers = tokio::net::TcpListener::from_std(listeners.workers)?;
    let doors = tokio::spawn(core.doorkeeper.clone().serve(workers, core.links.clone()));
    let state = HttpState {
        gateway: Arc::new(core.gateway.clone()),
        tokens: TokenTable::new(
            core.tokens
                .iter()
                .map(|token| (token.caller.clone(), token.digest))
                .collect(),
        ),
        limits: cluster.limits.clone(),
        metrics,
        observer: core.tables.clone(),
        logs: core.logs.clone(),
        tables: core.tables.clone(),
    };
    let server = http::serve(listeners.http, state, shutdown)?;
    tracing::info!(workers = cluster.workers().count(), "coordinator is up");
    up();
    let ended = tokio::select! {
        ended = server => ended.context("http"),
        ended = doors => ended.context("workers"),
        ended = &mut core.coordinator => ended.context("coordinator")?,
    };
    // Links outlive HTTP: streams finish over them.
    core.links.cancel();
    let (tables, logs) = (core.tables.clone(), core.logs.clone());
    let closed = tokio::task::spawn_blocking(move || {
        tables.close();
        logs.flush();
    });
    closed.await.context("tables")?;
    ended
}

/// The cluster without its ports: store, actors, and the doors for HTTP and for workers.
pub struct Core {
    /// What HTTP calls.
    pub gateway: ActorGateway,
    /// Who lets workers in.
    pub doorkeeper: Arc<Doorkeeper>,
    /// The callers' tokens.
    pub tokens: Vec<secrets::Token>,
    /// The served entities' logs.
    pub logs: Arc<Logs>,
    /// What calls came to.
    pub tables: Arc<Tables>,
    /// Ends all links and the actors.
    pub links: CancellationToken,
    coordinator: actix_rt::task::JoinHandle<Result<()>>,
    store: Weak<dyn Store>,
}

impl Core {
    /// Opens the store and starts the actors, inside an actix system.
    ///
    /// # Errors
    /// Store or secrets; names the file.
    pub async fn start(cluster: Arc<Cluster>) -> Result<Self> {
        let (auth, data_dir) = (cluster.auth.clone(), cluster.coordinator.data_dir.clone());
        let tables = cluster.tables.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let secret = secrets::read_or_create(&auth.worker_secret_file)?;
            let tokens = secrets::tokens(&auth)?;
            // Its lock says that nobody else writes in this folder.
            let store = EmbeddedStore::open(&data_dir)?;
            let tables = Tables::open(tables, &data_dir)
                .with_context(|| format!("{}", data_dir.join("tables").display()))?;
            let logs = Logs::open(&data_dir).context("logs")?;
            anyhow::Ok((secret, tokens, store, tables, logs))
        });
        let (secret, tokens, store, tables, logs) = opened.await.context("start")??;
        let store: SharedStore = Arc::new(store);
        let term = record::next_term(store.as_ref()).await?;
        tracing::info!(term = term.0, "the store is open");
        seed::endpoints(&cluster, &store).await?;
        actors::meters::describe();
        let opened = Arc::downgrade(&store);
        let registry = Arc::new(Registry::new(&cluster, &::registry::environment));
        for (name, address) in registry.registries() {
            match address {
                Ok(address) => tracing::info!(registry = name, address, "models are looked for"),
                Err(error) => tracing::warn!(registry = name, %error, "a registry cannot be used"),
            }
        }
        let directory = Arc::new(Directory::default());
        let means = Means {
            logs: logs.clone(),
            tables: tables.clone(),
            cluster: cluster.clone(),
            registry,
            store,
            directory: directory.clone(),
            term,
        };
        let links = CancellationToken::new();
        let died = start_coordinator(&means, Restored::read(&means.store).await?, &links);
        let coordinator = actix_rt::spawn(keep_coordinator(means.clone(), died, links.clone()));
        let doorkeeper = Arc::new(Doorkeeper::new(
            cluster,
            secret,
            term,
            directory,
            logs.clone(),
        )?);
        Ok(Core {
            gateway: ActorGateway::new(means),
            doorkeeper,
            tokens,
            logs,
            tables,
            links,
            coordinator,
            store: opened,
        })
    }

    /// Ends links and actors, and waits until the store is closed.
    ///
    /// # Errors
    /// What had ended the coordinator before.
    pub async fn stop(self) -> Result<()> {
        self.links.cancel();
        let ended = self.coordinator.await.context("coordinator")?;
        drop((self.gateway, self.doorkeeper));
        // Work that began before the end holds the store until it is done.
        while self.store.strong_count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ended
    }
}

/// Starts the coordinator's actor; it is published when this returns. The receiver is told of its death.
fn start_coordinator(
    means: &Means,
    restored: Restored,
    links: &CancellationToken,
) -> mpsc::Receiver<Died> {
    let (tell, died) = mpsc::channel(1);
    let watcher: Recipient<Died> = Watcher(tell).start().recipient();
    let death = DeathNotice::new(watcher, Who::Coordinator);
    CoordinatorActor::create(|ctx| {
        CoordinatorActor::new(means.clone(), restored, links.child_token(), death, ctx)
    });
    died
}

/// Starts the coordinator's actor again from the store when it panics: links are cut, workers come back and are found
/// to hold their shards.
async fn keep_coordinator(
    means: Means,
    mut died: mpsc::Receiver<Died>,
    links: CancellationToken,
) -> Result<()> {
    loop {
        let _ = died.recv().await;
        means.directory.set_coordinator(None);
        if links.is_cancelled() {
            return Ok(());
        }
        tracing::error!(
            "the coordinator's actor ended unexpectedly; it is started again from the store"
        );
        tokio::time::sleep(RESTART_PAUSE).await;
        died = start_coordinator(&means, Restored::read(&means.store).await?, &links);
    }
}

/// Passes a death on to a task.
struct Watcher(mpsc::Sender<Died>);

impl Actor for Watcher {
    type Context = actix::Context<Self>;
}

impl actix::Handler<Died> for Watcher {
    type Result = <Died as Message>::Result;
    fn handle(&mut self, message: Died, _: &mut Self::Context) {
        let _ = self.0.try_send(message);
    }
}
