//! The link to the coordinator: dialled, kept, dialled again. Commands go to the shards, their reports to the link.
//!
//! Owns the list of shards and the term. Shards stay loaded while the coordinator is away; requests do not.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use anyhow::{Context, Result, bail};
use common::ids::{BootId, Generation, ReplicaId, Term, WorkerId};
use common::request::{Failure, FailureKind};
use common::wire::link::{self, Receiver, Sender, Stream};
use common::wire::message::{
    Command, HeldShard, Hello, PROTOCOL_MAX, PROTOCOL_MIN, Report, ShardSpec, ShardState, Start,
};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;

use crate::actors::messages::{CancelRequest, LinkLost, Serve, Unload};
use crate::actors::shard::ShardActor;
use crate::artifacts::library::Library;
use crate::device::Device;
use crate::memory::Memory;
use crate::outbox::{Outbox, Queue};

/// First pause between dials; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause between dials.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Dialling, TLS and Welcome each take no longer.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// The coordinator pings every second: a link that is silent for so long is dead.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Bytes the system holds for the socket. Its own choice would be megabytes: that many of stale answers would go out
/// before the answer to a cancel.
const SEND_BUFFER_BYTES: u32 = 256 << 10;
/// What was kept of shards is looked at for its age so often.
const AGE_CHECK_PERIOD: Duration = Duration::from_secs(10);
/// Shards get this long to end when the process stops.
const STOP_MAX: Duration = Duration::from_secs(8);

/// Who this worker is and whom it dials.
pub struct SessionConfig {
    /// Its name.
    pub worker: WorkerId,
    /// Coordinators, `host:port`, in the order they are tried.
    pub addresses: Vec<String>,
    /// Certificates, off loopback.
    pub tls: Option<Arc<ClientConfig>>,
    /// The cluster's shared secret.
    pub secret: String,
    /// Where models come from.
    pub library: Arc<Library>,
}

/// A worker's side of the cluster.
pub struct Session {
    config: SessionConfig,
    boot: BootId,
    device: Arc<Device>,
    outbox: Arc<Outbox>,
    shards: HashMap<ReplicaId, (Generation, Addr<ShardActor>)>,
    /// The newest seen; commands of older ones are refused.
    term: Term,
    /// Called at the first Welcome.
    on_ready: Option<Box<dyn FnOnce()>>,
}

/// Why a link ended, when the worker shall dial again.
type LinkEnd = String;

/// The coordinator refused this worker.
#[derive(Debug, thiserror::Error)]
#[error("the coordinator at {address} refused this worker: {reason}")]
pub struct RefusedByCoordinator {
    /// Where.
    pub address: String,
    /// Its reason.
    pub reason: String,
}

impl Session {
    /// A session that has not dialled yet. `on_ready` is called when a coordinator first welcomes it.
    pub fn new(
        config: SessionConfig,
        device: Device,
        on_ready: impl FnOnce() + 'static,
    ) -> Session {
        Session {
            config,
            boot: BootId::random(),
            device: Arc::new(device),
            outbox: Arc::default(),
            shards: HashMap::new(),
            term: Term::default(),
            on_ready: Some(Box::new(on_ready)),
        }
    }

    /// Serves until `shutdown`. Needs an actix system around it.
    ///
    /// # Errors
    /// [`RefusedByCoordinator`]: dialling again would not help.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), RefusedByCoordinator> {
        let memory = self.device.memory.clone();
        tokio::select! {
            end = self.serve(shutdown) => end,
            never = forget_old(memory) => match never {},
        }
    }

    /// Links to one coordinator after the other until `shutdown`.
    async fn serve(mut self, shutdown: CancellationToken) -> Result<(), RefusedByCoordinator> {
        let mut pause = PAUSE_MIN;
        let mut turn = 0;
        loop {
            let address = self.config.addresses[turn % self.config.addresses.len()].clone();
            let welcomed = tokio::select! {
                () = shutdown.cancelled() => break,
                serving = self.serve_link(&address, &shutdown) => serving?,
            };
            self.lose_link().await;
            if shutdown.is_cancelled() {
                break;
            }
            pause = if welcomed {
                PAUSE_MIN
            } else {
                (pause * 2).min(PAUSE_MAX)
            };
            turn += 1;
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))) => {}
            }
        }
        self.stop().await;
        Ok(())
    }

    /// One link from dialling to its end. True if it was welcomed.
    async fn serve_link(
        &mut self,
        address: &str,
        shutdown: &CancellationToken,
    ) -> Result<bool, RefusedByCoordinator> {
        let welcome = timeout(HANDSHAKE_MAX, self.greet(address)).await;
        let (sender, receiver, queue) = match welcome.unwrap_or_else(|_| bail_timeout()) {
            Ok(Greeting::Welcome(link)) => *link,
            Ok(Greeting::Refused(reason)) => {
                return Err(RefusedByCoordinator {
                    address: address.to_owned(),
                    reason,
                });
            }
            Err(e) => {
                tracing::warn!(
                    address,
                    reason = format!("{e:#}"),
                    "no link to the coordinator"
                );
                return Ok(false);
            }
        };
        tracing::info!(address, term = self.term.0, "linked to the coordinator");
        if let Some(on_ready) = self.on_ready.take() {
            on_ready();
        }
        let broken = queue.broken.clone();
        let end = tokio::select! {
            end = send_reports(sender, queue) => end,
            end = self.take_commands(receiver) => end?,
            () = broken.cancelled() => "the coordinator does not read".to_owned(),
            () = shutdown.cancelled() => "this worker stops".to_owned(),
        };
        tracing::warn!(address, reason = end, "link to the coordinator ended");
        Ok(true)
    }

    /// Dials and says Hello.
    async fn greet(&mut self, address: &str) -> Result<Greeting> {
        let stream = dial(address, self.config.tls.clone()).await?;
        let (mut sender, mut receiver) = link::split::<Report, Command>(stream);
        let queue = self.outbox.attach();
        sender
            .send(&Report::Hello(Box::new(self.hello(&queue.shards))))
            .await?;
        match receiver.receive().await? {
            Some(Command::Welcome { protocol, term }) => {
                if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&protocol) {
                    bail!(
                        "it speaks protocol {protocol}; this worker speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}"
                    );
                }
                if term < self.term {
                    bail!(
                        "its term {} is older than {}, which this worker has seen",
                        term.0,
                        self.term.0
                    );
                }
                self.term = term;
                Ok(Greeting::Welcome(Box::new((sender, receiver, queue))))
            }
            Some(Command::Refused { reason }) => Ok(Greeting::Refused(reason)),
            Some(_) => bail!("it sent a command before its welcome"),
            None => bail!("it closed the link before its welcome"),
        }
    }

    fn hello(&self, shards: &[HeldShard]) -> Hello {
        Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            secret: self.config.secret.clone(),
            worker: self.config.worker.clone(),
            boot: self.boot,
            device: self.device.facts.clone(),
            group_address: self.device.group_address.clone(),
            shards: shards.to_vec(),
        }
    }

    /// Forwards commands until the link ends.
    async fn take_commands(
        &mut self,
        mut receiver: Receiver<Command>,
    ) -> Result<LinkEnd, RefusedByCoordinator> {
        loop {
            let command = match timeout(SILENCE_MAX, receiver.receive()).await {
                Ok(Ok(Some(Command::Refused { reason }))) => {
                    return Err(RefusedByCoordinator {
                        address: "the other end of the link".into(),
                        reason,
                    });
                }
                Ok(Ok(Some(command))) => command,
                Ok(Ok(None)) => return Ok("the coordinator closed it".into()),
                Ok(Err(e)) => return Ok(e.to_string()),
                Err(_) => return Ok(format!("nothing came for {} s", SILENCE_MAX.as_secs())),
            };
            self.take(command).await;
        }
    }

    async fn take(&mut self, command: Command) {
        match command {
            Command::Load { term, .. } | Command::Unload { term, .. } if term < self.term => {
                tracing::warn!(
                    term = term.0,
                    newest = self.term.0,
                    "command of an older term ignored"
                );
            }
            Command::Load { term, shard } => {
                self.term = term;
                self.load(*shard).await;
            }
            Command::Unload {
                term,
                replica,
                generation,
                keep,
            } => {
                self.term = term;
                self.unload(replica, generation, keep).await;
            }
            Command::Start { term, start } => self.start(term, start).await,
            Command::Cancel { request } => {
                for (_, shard) in self.shards.values() {
                    // Fails when the shard is over, and its requests with it.
                    let _ = shard.send(CancelRequest(request)).await;
                }
            }
            Command::Ping { nonce } => {
                self.outbox.send(Report::Pong { nonce });
                self.outbox.flush_logs();
            }
            Command::Welcome { term, .. } => self.term = self.term.max(term),
            // Ends the link before it gets here.
            Command::Refused { .. } => {}
        }
    }

    async fn load(&mut self, spec: ShardSpec) {
        let ShardSpec {
            replica,
            generation,
            rank,
            ref members,
            ..
        } = spec;
        let held = self
            .shards
            .get(&replica)
            .filter(|(_, shard)| shard.connected());
        if let Some((newest, _)) = held.filter(|(newest, _)| *newest >= generation) {
            tracing::warn!(%replica, %generation, held = %newest, "load of a generation that is not newer ignored");
            return;
        }
        if rank as usize >= members.len() {
            let message = format!("rank {rank} of a group of {} does not exist", members.len());
            let state = ShardState::Failed(Failure::new(FailureKind::Internal, message));
            return self.outbox.send_shard(HeldShard {
                replica,
                generation,
                rank,
                state,
            });
        }
        // An older generation's memory is needed by the newer one, best with the weights that are there already.
        self.unload(replica, generation, true).await;
        let shard = ShardActor::load(
            spec,
            self.device.clone(),
            self.config.library.clone(),
            self.outbox.clone(),
        );
        self.shards.insert(replica, (generation, shard));
    }

    /// Lets go of a replica's shard of this generation or an older one, and of what was kept of it unless it shall `keep`.
    async fn unload(&mut self, replica: ReplicaId, generation: Generation, keep: bool) {
        if let Some((_, shard)) = self
            .shards
            .get(&replica)
            .filter(|(held, _)| *held <= generation)
            && shard.send(Unload { keep }).await.is_ok()
        {
            self.shards.remove(&replica);
            return self.forget(replica, generation, keep).await;
        }
        self.shards
            .retain(|held, (_, shard)| *held != replica || shard.connected());
        // Shards that failed are held by name only.
        for shard in self.outbox.held(replica, generation) {
            if matches!(shard.state, ShardState::Failed(_)) {
                self.outbox.send_last(HeldShard {
                    state: ShardState::Unloaded,
                    ..shard
                });
            }
        }
        self.forget(replica, generation, keep).await;
    }

    /// Frees what was kept of a replica that is not wanted any more.
    async fn forget(&self, replica: ReplicaId, generation: Generation, keep: bool) {
        if !keep {
            let memory = self.device.memory.clone();
            // Freeing weights may take its time.
            let freed = tokio::task::spawn_blocking(move || memory.forget(replica, generation));
            drop(freed.await);
        }
    }

    async fn start(&mut self, term: Term, start: Box<Start>) {
        let arrival = Instant::now();
        let (request, attempt, replica) = (start.request, start.attempt, start.replica);
        let refused = if term < self.term {
            Some("the command is of an older term")
        } else {
            self.term = term;
            match self.shards.get(&replica) {
                Some((_, shard)) => shard
                    .send(Serve { start, arrival })
                    .await
                    .err()
                    .map(|_| "the replica has ended on this worker"),
                None => Some("the replica is not on this worker"),
            }
        };
        if let Some(message) = refused {
            let failure = Failure::new(FailureKind::Unavailable, message);
            self.outbox.send(Report::Rejected {
                request,
                attempt,
                failure,
            });
        }
    }

    /// The link is gone: nobody waits for answers any more.
    async fn lose_link(&mut self) {
        self.outbox.detach();
        for (_, shard) in self.shards.values() {
            let _ = shard.send(LinkLost).await;
        }
    }

    /// Lets go of all shards and waits for them.
    async fn stop(&mut self) {
        tracing::info!(shards = self.shards.len(), "letting go of all shards");
        for (_, shard) in self.shards.values() {
            let _ = shard.send(Unload { keep: false }).await;
        }
        let ended = async {
            while self.shards.values().any(|(_, shard)| shard.connected()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(STOP_MAX, ended).await.is_err() {
            tracing::warn!(waited_s = STOP_MAX.as_secs(), "a shard did not end in time");
        }
    }
}

/// The coordinator's first word.
enum Greeting {
    Welcome(Box<(Sender<Report>, Receiver<Command>, Queue)>),
    Refused(String),
}

fn bail_timeout<T>() -> Result<T> {
    bail!("no welcome within {} s", HANDSHAKE_MAX.as_secs())
}

/// Frees what was kept for too long, also while no coordinator is there to say so.
async fn forget_old(memory: Arc<Memory>) -> Infallible {
    loop {
        tokio::time::sleep(AGE_CHECK_PERIOD).await;
        let memory = memory.clone();
        // Freeing weights may take its time.
        let freed = tokio::task::spawn_blocking(move || memory.forget_old(Instant::now()));
        drop(freed.await);
    }
}

/// Sends what is queued, as much as there is at a time.
async fn send_reports(mut sender: Sender<Report>, mut queue: Queue) -> LinkEnd {
    let Err(end) = async {
        loop {
            let Some(report) = queue.reports.recv().await else {
                return Err::<(), _>("its queue is over".to_owned());
            };
            sender.feed(&report).await.map_err(|e| e.to_string())?;
            while let Ok(report) = queue.reports.try_recv() {
                sender.feed(&report).await.map_err(|e| e.to_string())?;
            }
            sender.flush().await.map_err(|e| e.to_string())?;
        }
    }
    .await
    else {
        return String::new();
    };
    end
}

async fn dial(address: &str, tls: Option<Arc<ClientConfig>>) -> Result<Box<dyn Stream>> {
    let socket = connect(address)
        .await
        .with_context(|| format!("cannot connect to {address}"))?;
    link::prepare(&socket)?;
    let Some(tls) = tls else {
        return Ok(Box::new(socket));
    };
    let host = address
        .rsplit_once(':')
        .map_or(address, |(host, _)| host)
        .trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned())
        .with_context(|| format!("{host} is not a name TLS can check"))?;
    let stream = TlsConnector::from(tls).connect(name, socket).await;
    Ok(Box::new(
        stream.with_context(|| format!("no TLS with {address}"))?,
    ))
}

/// Tries all addresses of a name.
async fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host(address).await? {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests;
