//! A worker played by the test: it speaks the true protocol, and says what the test tells it to.
//!
//! Answers pings by itself while it is not frozen; everything else is the test's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::ids::{BootId, Generation, ReplicaId, RequestId, WorkerId};
use common::request::{Delta, End, Failure};
use common::wire::link::{Receiver, Sender, split};
use common::wire::message::{
    Command, Device, DeviceKind, Health, Hello, Output, PROTOCOL_MAX, PROTOCOL_MIN, ReadyShard,
    Report, ShardSpec, ShardState, Start,
};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::cluster::Cluster;
use crate::until::{PATIENCE, until};

/// Memory a fake worker claims to have.
const MEMORY_BYTES: u64 = 1 << 30;

/// A joined worker.
pub struct FakeWorker {
    reports: mpsc::UnboundedSender<Report>,
    commands: mpsc::UnboundedReceiver<Command>,
    frozen: Arc<AtomicBool>,
    tasks: [JoinHandle<()>; 2],
}

/// A shard the fake worker holds.
#[derive(Debug, Clone)]
pub struct FakeShard {
    /// What it was told to hold.
    pub spec: ShardSpec,
}

impl FakeWorker {
    /// Joins as the worker at `index` in cluster.toml. Dials again, as a worker does, when the link is closed on it.
    pub async fn join(cluster: &Cluster, index: usize) -> FakeWorker {
        let (name, secret) = (cluster.worker_name(index), cluster.worker_secret());
        until(
            "the coordinator to welcome a worker",
            PATIENCE,
            async || {
                let hello = hello(name.clone(), secret.clone());
                let mut worker = FakeWorker::dial(&cluster.worker_address, hello).await;
                match worker.commands.recv().await {
                    Some(Command::Welcome {
                        protocol: PROTOCOL_MAX,
                        ..
                    }) => Ok(worker),
                    Some(other) => panic!("expected Welcome, got {other:?}"),
                    None => Err("the link was closed".into()),
                }
            },
        )
        .await
    }

    /// Dials and says Hello; what comes back is for the test to read.
    pub async fn dial(address: &str, hello: Hello) -> FakeWorker {
        let stream = TcpStream::connect(address)
            .await
            .unwrap_or_else(|e| panic!("{address}: {e}"));
        let (mut sender, mut receiver): (Sender<Report>, Receiver<Command>) = split(stream);
        let (reports, mut to_send) = mpsc::unbounded_channel();
        let (received, commands) = mpsc::unbounded_channel();
        let frozen = Arc::new(AtomicBool::new(false));
        let sending = tokio::spawn(async move {
            while let Some(report) = to_send.recv().await {
                if sender.send(&report).await.is_err() {
                    return;
                }
            }
        });
        let (pongs, silent) = (reports.clone(), frozen.clone());
        let receiving = tokio::spawn(async move {
            while let Ok(Some(command)) = receiver.receive().await {
                match command {
                    Command::Ping { nonce } if !silent.load(Ordering::Relaxed) => {
                        let _ = pongs.send(Report::Pong { nonce });
                    }
                    Command::Ping { .. } => {}
                    other => {
                        if received.send(other).is_err() {
                            return;
                        }
                    }
                }
            }
        });
        let worker = FakeWorker {
            reports,
            commands,
            frozen,
            tasks: [sending, receiving],
        };
        worker.report(Report::Hello(Box::new(hello)));
        worker
    }

    /// Says something.
    pub fn report(&self, report: Report) {
        // A closed link shows when the test waits for its next command.
        let _ = self.reports.send(report);
    }

    /// Stops answering pings, as a frozen process does.
    pub fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    /// The next command.
    ///
    /// # Panics
    /// When none comes, or the link is closed.
    pub async fn next(&mut self) -> Command {
        let command = tokio::time::timeout(PATIENCE, self.commands.recv()).await;
        command.expect("a command in time").expect("an open link")
    }

    /// Waits until the coordinator has closed the link.
    pub async fn closed(&mut self) {
        let closed = tokio::time::timeout(PATIENCE, async {
            while self.commands.recv().await.is_some() {}
        })
        .await;
        assert!(closed.is_ok(), "the link was left open");
    }

    /// Takes the next Load and says that the shard is ready.
    pub async fn hold(&mut self) -> FakeShard {
        let spec = self.load().await;
        self.ready(&spec);
        FakeShard { spec }
    }

    /// The next Load.
    pub async fn load(&mut self) -> ShardSpec {
        match self.next().await {
            Command::Load { shard, .. } => *shard,
            other => panic!("expected Load, got {other:?}"),
        }
    }

    /// Says that a shard is ready, and how it stands.
    pub fn ready(&self, spec: &ShardSpec) {
        self.state(
            spec,
            ShardState::Ready(Box::new(ReadyShard {
                numerics_id: 1,
                task: None,
                chat: true,
                context_max: spec.options.context_max,
                kv_blocks: spec.options.kv_blocks,
                weight_bytes: 1,
                load_ms: 1,
            })),
        );
        self.report(Report::Health {
            replica: spec.replica,
            generation: spec.generation,
            health: Health {
                kv_blocks_total: spec.options.kv_blocks,
                ..Health::default()
            },
        });
    }

    /// Says how a shard stands.
    pub fn state(&self, spec: &ShardSpec, state: ShardState) {
        let (replica, generation, rank): (ReplicaId, Generation, u32) =
            (spec.replica, spec.generation, spec.rank);
        self.report(Report::Shard {
            replica,
            generation,
            rank,
            state,
        });
    }

    /// The next Start.
    pub async fn start(&mut self) -> Start {
        match self.next().await {
            Command::Start { start, .. } => *start,
            other => panic!("expected Start, got {other:?}"),
        }
    }

    /// The next Cancel's request.
    pub async fn cancelled(&mut self) -> RequestId {
        match self.next().await {
            Command::Cancel { request } => request,
            other => panic!("expected Cancel, got {other:?}"),
        }
    }

    /// The next Start, accepted.
    pub async fn accept(&mut self) -> Start {
        let start = self.start().await;
        self.accepted(&start);
        start
    }

    /// Accepts a Start.
    pub fn accepted(&self, start: &Start) {
        self.report(Report::Accepted {
            request: start.request,
            attempt: start.attempt,
            prompt_tokens: 4,
        });
    }

    /// Rejects a Start.
    pub fn rejected(&self, start: &Start, failure: Failure) {
        self.report(Report::Rejected {
            request: start.request,
            attempt: start.attempt,
            failure,
        });
    }

    /// Emits text of candidate 0 as one token.
    pub fn say(&self, start: &Start, text: &str) {
        let delta = Delta {
            candidate: 0,
            ids: vec![7],
            text: text.to_owned(),
            ..Delta::default()
        };
        let output = Output::Delta {
            request: start.request,
            delta,
        };
        self.report(Report::Step {
            replica: start.replica,
            generation: start.generation,
            outputs: vec![output],
        });
    }

    /// Ends candidate 0.
    pub fn end(&self, start: &Start, output_tokens: u32, end: End) {
        let output = Output::End {
            request: start.request,
            candidate: 0,
            output_tokens,
            cached_tokens: 0,
            end,
        };
        self.report(Report::Step {
            replica: start.replica,
            generation: start.generation,
            outputs: vec![output],
        });
    }
}

impl Drop for FakeWorker {
    /// Cuts the link.
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The Hello of a CPU worker.
pub fn hello(worker: WorkerId, secret: String) -> Hello {
    Hello {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        secret,
        worker,
        boot: BootId::random(),
        device: Device {
            kind: DeviceKind::Cpu,
            name: "played by a test".into(),
            memory_bytes: MEMORY_BYTES,
            threads: 1,
            rates: None,
        },
        group_address: "127.0.0.1:1".into(),
        shards: Vec::new(),
    }
}
