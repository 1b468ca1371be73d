//! Accepts workers' links: TLS, Hello, Welcome, then a reader and a writer until either side is gone.
//!
//! Owns the check at the door and the heartbeat. Tokens go from the reader straight into the requests' channels; the
//! rest goes to the coordinator. A bad frame closes its link and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use common::config::Cluster;
use common::ids::Term;
use common::wire::codec::CodecError;
use common::wire::frame::BODY_BYTES_MAX;
use common::wire::link::{self, LinkError, Receiver, Sender, Stream};
use common::wire::message::{Command, Hello, PROTOCOL_MAX, PROTOCOL_MIN, Report};
use subtle::ConstantTimeEq;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::actors::directory::Directory;
use crate::actors::link::Link;
use crate::actors::messages::{Joined, Left, ShardNews, ShardReport};
use crate::logs::Logs;
use crate::strangers::Strangers;
use common::request::{Failure, FailureKind};

/// Time for TLS and Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that have not said Hello yet.
const STRANGERS_MAX: usize = 64;
/// Longest Hello: a stranger's lists take many times their bytes in memory. Hundreds of held shards fit.
const HELLO_BYTES_MAX: usize = 64 << 10;
/// How often a link is pinged.
const PING: Duration = Duration::from_secs(1);
/// A link that is silent for so long is cut.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// What links need of the coordinator.
pub struct Doorkeeper {
    /// The configuration: which workers there are.
    pub cluster: Arc<Cluster>,
    /// The cluster's shared secret.
    pub secret: String,
    /// This start's number.
    pub term: Term,
    /// Where the coordinator is.
    pub directory: Arc<Directory>,
    /// Where shards' lines go.
    logs: Arc<Logs>,
    /// Between machines.
    tls: Option<TlsAcceptor>,
    strangers: Arc<Strangers>,
}

impl Doorkeeper {
    /// Who lets workers in that know `secret`.
    ///
    /// # Errors
    /// When the certificates of `[tls]` cannot be used.
    pub fn new(
        cluster: Arc<Cluster>,
        secret: String,
        term: Term,
        directory: Arc<Directory>,
        logs: Arc<Logs>,
    ) -> Result<Self> {
        let tls = match &cluster.tls {
            Some(files) => Some(TlsAcceptor::from(
                common::tls::server(files).context("[tls]")?,
            )),
            None => None,
        };
        Ok(Doorkeeper {
            cluster,
            secret,
            term,
            directory,
            logs,
            tls,
            strangers: Strangers::new(STRANGERS_MAX),
        })
    }

    /// Accepts links until `stop`.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => return,
            };
            let (socket, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a worker's connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (me, place) = (self.clone(), self.strangers.take());
            tokio::spawn(async move {
                let peer = peer.to_string();
                let _ = link::prepare(&socket);
                let met = tokio::select! {
                    met = tokio::time::timeout(HELLO_TIMEOUT, me.meet(socket)) => met,
                    () = place.lost() => {
                        return tracing::warn!(peer, "a silent connection is closed: others wait");
                    }
                };
                drop(place);
                match met {
                    Ok(Ok(met)) => me.run(met, &peer).await,
                    Ok(Err(error)) => tracing::warn!(peer, %error, "a link is closed"),
                    Err(_) => tracing::warn!(peer, "a link said no Hello; it is closed"),
                }
            });
        }
    }

    /// TLS, where it is configured, and the first message.
    async fn meet(&self, socket: TcpStream) -> Result<Met> {
        let stream: Box<dyn Stream> = match &self.tls {
            Some(tls) => Box::new(tls.accept(socket).await.context("TLS")?),
            None => Box::new(socket),
        };
        Met::hear(stream).await
    }

    /// One link from Hello to its end.
    pub async fn run(&self, met: Met, peer: &str) {
        let Met {
            hello,
            mut sender,
            mut receiver,
        } = met;
        let protocol = match check(&hello, &self.cluster, &self.secret) {
            Ok(protocol) => protocol,
            Err(reason) => {
                tracing::warn!(peer, worker = %hello.worker, reason, "a worker is refused");
                let _ =
                    tokio::time::timeout(HELLO_TIMEOUT, sender.send(&Command::Refused { reason }))
                        .await;
                return;
            }
        };
        receiver.limit(BODY_BYTES_MAX);
        let Some((coordinator, incarnation)) = self.directory.incarnation() else {
            return tracing::info!(
                peer,
                "a worker comes while the coordinator is being started; it dials again"
            );
        };
        let (link, commands) = Link::new(
            hello.worker.clone(),
            hello.boot,
            self.term,
            incarnation.child_token(),
        );
        link.command(Command::Welcome {
            protocol,
            term: self.term,
        });
        if coordinator
            .send(Joined {
                hello,
                link: link.clone(),
            })
            .await
            .is_err()
        {
            return;
        }
        let idle = Duration::from_millis(self.cluster.limits.idle_stream_ms);
        let reason = tokio::select! {
            reason = read(&link, receiver, &coordinator, &self.logs) => reason,
            reason = write(&link, sender, commands, idle) => reason,
            () = link.cut_token().cancelled() => "the link was cut".to_owned(),
        };
        link.cut();
        link.flights
            .close(&format!("worker {}: {reason}", link.worker));
        let _ = coordinator.send(Left { link, reason }).await;
    }
}

/// A peer that has said Hello; nothing of it is checked yet.
pub struct Met {
    hello: Box<Hello>,
    sender: Sender<Command>,
    receiver: Receiver<Report>,
}

impl Met {
    /// Waits for Hello, the first words of every link.
    ///
    /// # Errors
    /// When something else comes, or the link ends.
    pub async fn hear(stream: impl Stream + 'static) -> Result<Met> {
        let (sender, mut receiver) = link::split::<Command, Report>(stream);
        receiver.limit(HELLO_BYTES_MAX);
        match receiver.receive().await? {
            Some(Report::Hello(hello)) => Ok(Met {
                hello,
                sender,
                receiver,
            }),
            Some(_) => bail!("it did not begin with Hello"),
            None => bail!("it was closed before Hello"),
        }
    }
}

/// Whether a worker may join, and the protocol to speak with it.
fn check(hello: &Hello, cluster: &Cluster, secret: &str) -> Result<u32, String> {
    // The secret first: a stranger learns nothing else.
    if !bool::from(hello.secret.as_bytes().ct_eq(secret.as_bytes())) {
        return Err("the worker's secret is not the coordinator's: give both the same auth.worker_secret_file".into());
    }
    if hello.protocol_min > PROTOCOL_MAX || hello.protocol_max < PROTOCOL_MIN {
        return Err(format!(
            "the worker speaks protocol {} to {}, the coordinator {PROTOCOL_MIN} to {PROTOCOL_MAX}: run one version of tandem on all machines",
            hello.protocol_min, hello.protocol_max
        ));
    }
    let Some((_, device)) = cluster.device(&hello.worker.0) else {
        let known: Vec<&str> = cluster.workers().map(|worker| worker.0.as_str()).collect();
        return Err(format!(
            "cluster.toml has no device {}; it has {}",
            hello.worker,
            known.join(", ")
        ));
    };
    if device.kind != hello.device.kind {
        return Err(format!(
            "cluster.toml says that {} is of kind {:?}; the worker has {:?}",
            hello.worker, device.kind, hello.device.kind
        ));
    }
    Ok(hello.protocol_max.min(PROTOCOL_MAX))
}

/// Reads until the link is over; says why it is.
async fn read(
    link: &Arc<Link>,
    mut receiver: Receiver<Report>,
    coordinator: &actix::Addr<crate::actors::coordinator::CoordinatorActor>,
    logs: &Logs,
) -> String {
    loop {
        let report = match tokio::time::timeout(SILENCE_MAX, receiver.receive()).await {
            Ok(Ok(Some(report))) => report,
            Ok(Ok(None)) => return "the worker closed the link".into(),
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return format!("the worker was silent for {} s", SILENCE_MAX.as_secs()),
        };
        let (replica, generation, news) = match report {
            Report::Step {
                replica,
                generation,
                outputs,
            } => {
                link.step(replica, generation, outputs, Instant::now());
                continue;
            }
            Report::Accepted {
                request,
                attempt,
                prompt_tokens,
            } => {
                link.flights.accepted(request, attempt, prompt_tokens);
                continue;
            }
            Report::Rejected {
                request,
                attempt,
                failure,
            } => {
                link.flights.rejected(request, attempt, failure);
                continue;
            }
            Report::Pong { .. } => continue,
            // Read before the state that it led to.
            Report::Log {
                replica,
                generation,
                rank,
                lines,
            } => {
                logs.take(&link.worker, (replica, generation), rank, &lines);
                continue;
            }
            Report::Hello(_) => return "the worker said Hello twice".into(),
            Report::Shard {
                replica,
                generation,
                state,
                ..
            } => (replica, generation, ShardNews::State(state)),
            Report::Health {
                replica,
                generation,
                health,
            } => (replica, generation, ShardNews::Health(Box::new(health))),
        };
        let report = ShardReport {
            link: link.clone(),
            replica,
            generation,
            news,
        };
        match report.news {
            // Counters: the next ones come in a second.
            ShardNews::Health(_) => drop(coordinator.try_send(report)),
            // States must arrive; a busy coordinator holds up this link alone.
            ShardNews::State(_) => {
                if coordinator.send(report).await.is_err() {
                    return "the coordinator is being started again".into();
                }
            }
        }
    }
}

/// Writes commands, pings and sweeps until the link is over; says why it is.
async fn write(
    link: &Arc<Link>,
    mut sender: Sender<Command>,
    mut commands: mpsc::Receiver<Command>,
    idle: Duration,
) -> String {
    let mut ping = tokio::time::interval(PING);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut nonce = 0;
    loop {
        let mut next = tokio::select! {
            command = commands.recv() => command,
            _ = ping.tick() => {
                link.sweep(Instant::now(), idle);
                nonce += 1;
                Some(Command::Ping { nonce })
            }
        };
        let mut refused = false;
        while let Some(command) = next {
            refused |= matches!(command, Command::Refused { .. });
            match tokio::time::timeout(SILENCE_MAX, sender.feed(&command)).await {
                Ok(Ok(())) => {}
                Ok(Err(LinkError::Codec(CodecError::Encode(reason)))) => {
                    too_long(link, &command, &reason)
                }
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return "the worker reads nothing".into(),
            }
            next = commands.try_recv().ok();
        }
        match tokio::time::timeout(SILENCE_MAX, sender.flush()).await {
            Ok(Ok(())) if refused => return "the worker was refused".into(),
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return "the worker reads nothing".into(),
        }
    }
}

/// A command that no frame can carry: its request alone fails.
fn too_long(link: &Link, command: &Command, reason: &str) {
    tracing::error!(worker = %link.worker, reason, "a command cannot be sent");
    if let Command::Start { start, .. } = command {
        let message = format!("the request is too long to be sent to a worker: {reason}");
        let failure = Failure::new(FailureKind::TooLarge, message);
        link.flights.rejected(start.request, start.attempt, failure);
    }
}

#[cfg(test)]
mod tests;
