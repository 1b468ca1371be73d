//! A coordinator played by the test, for a worker alone: it speaks the true protocol, and commands what the test says.

use std::fs;
use std::path::Path;
use std::process::Command as Program;
use std::time::Duration;

use common::ids::{Generation, ReplicaId, RequestId, Term, WorkerId};
use common::request::{Delta, End, Generate};
use common::wire::link::{Receiver, Sender, split};
use common::wire::message::{
    Command, GroupMember, Hello, KvDtype, ModelSource, Output, PROTOCOL_MAX, Quantization, Report,
    ShardOptions, ShardSpec, ShardState, Start,
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};

use crate::binaries;
use crate::cluster::run;
use crate::process::Process;
use crate::settings::Settings;
use crate::until::PATIENCE;

const SECRET: &str = "the-tests-secret";

/// How often a played coordinator pings while it waits.
const PING_EVERY: Duration = Duration::from_secs(1);

/// A place that workers dial, and the folder with their cluster.toml.
pub struct FakeCoordinator {
    listener: TcpListener,
    folder: TempDir,
    settings: Settings,
}

/// A worker's link.
pub struct Link {
    /// What the worker said first.
    pub hello: Hello,
    sender: Sender<Command>,
    receiver: Receiver<Report>,
}

impl FakeCoordinator {
    /// Listens.
    pub async fn listen(settings: Settings) -> FakeCoordinator {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let folder = tempfile::tempdir().expect("a folder");
        let address = listener.local_addr().expect("a bound address");
        let local = format!("[coordinator]\nworker_listen = \"{address}\"\n");
        write(folder.path(), "cluster.toml", &settings.toml());
        write(folder.path(), "cluster.local.toml", &local);
        fs::create_dir(folder.path().join("var")).expect("a folder for the secret");
        write(folder.path(), "var/worker.secret", SECRET);
        FakeCoordinator {
            listener,
            folder,
            settings,
        }
    }

    /// Starts a real worker.
    pub fn start_worker(&self, index: usize) -> Process {
        let name = &self.settings.worker_names()[index];
        let mut program = Program::new(binaries::worker());
        program
            .arg("--config")
            .arg(self.folder.path().join("cluster.toml"))
            .args(["--device", name])
            .envs(self.settings.worker_env.iter().cloned());
        run(self.folder.path(), name, program)
    }

    /// The next worker that dials, not yet welcomed.
    pub async fn greeted(&self) -> Link {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await;
        let (stream, _): (TcpStream, _) = accepted.expect("a worker dials").expect("a connection");
        let (sender, mut receiver) = split(stream);
        match receiver.receive().await {
            Ok(Some(Report::Hello(hello))) => {
                assert_eq!(hello.secret, SECRET);
                Link {
                    hello: *hello,
                    sender,
                    receiver,
                }
            }
            other => panic!("expected Hello, got {other:?}"),
        }
    }

    /// The next worker that dials, welcomed under this term.
    pub async fn welcomed(&self, term: u64) -> Link {
        let mut link = self.greeted().await;
        link.send(Command::Welcome {
            protocol: PROTOCOL_MAX,
            term: Term(term),
        })
        .await;
        link
    }

    /// The next raw connection.
    pub async fn connection(&self) -> TcpStream {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await;
        accepted.expect("a worker dials").expect("a connection").0
    }
}

impl Link {
    /// Commands.
    pub async fn send(&mut self, command: Command) {
        self.sender
            .send(&command)
            .await
            .unwrap_or_else(|e| panic!("the worker is gone: {e}"));
    }

    /// The next report that `take` wants; others are passed over.
    ///
    /// # Panics
    /// When none comes, or the link is closed.
    pub async fn wait<T>(&mut self, what: &str, mut take: impl FnMut(Report) -> Option<T>) -> T {
        let waiting = async {
            let mut pings = tokio::time::interval(PING_EVERY);
            loop {
                let report = tokio::select! {
                    report = self.receiver.receive() => report,
                    // A worker gives up a coordinator that is silent.
                    _ = pings.tick() => {
                        self.send(Command::Ping { nonce: 0 }).await;
                        continue;
                    }
                };
                match report {
                    Ok(Some(report)) => {
                        if let Some(found) = take(report) {
                            return found;
                        }
                    }
                    other => panic!("waited for {what}, and the link ended: {other:?}"),
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, waiting).await;
        found.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
    }

    /// Waits until a shard is loaded or has failed.
    pub async fn loaded(&mut self, spec: &ShardSpec) -> ShardState {
        let wanted = (spec.replica, spec.generation);
        self.wait("a shard's state", |report| match report {
            Report::Shard {
                replica,
                generation,
                state,
                ..
            } if (replica, generation) == wanted => {
                (!matches!(state, ShardState::Loading { .. })).then_some(state)
            }
            _ => None,
        })
        .await
    }

    /// Reads a request's whole answer: its text, and why it ended.
    pub async fn answer(&mut self, request: RequestId) -> (String, End) {
        self.answers(&[request]).await.remove(0)
    }

    /// Reads the whole answers of requests that run side by side.
    pub async fn answers(&mut self, requests: &[RequestId]) -> Vec<(String, End)> {
        let mut texts = vec![String::new(); requests.len()];
        let mut ends = vec![None; requests.len()];
        self.wait("the answers' ends", |report| {
            let Report::Step { outputs, .. } = report else {
                return None;
            };
            for output in outputs {
                let of = output.request();
                let Some(i) = requests.iter().position(|request| *request == of) else {
                    continue;
                };
                match output {
                    Output::Delta {
                        delta: Delta { text: more, .. },
                        ..
                    } => texts[i].push_str(&more),
                    Output::End { end, .. } => ends[i] = Some(end),
                    Output::Prompt { .. } | Output::Embedding { .. } => {}
                }
            }
            ends.iter().all(Option::is_some).then_some(())
        })
        .await;
        texts.into_iter().zip(ends.into_iter().flatten()).collect()
    }

    /// A shard of a group with these members, for the worker of this link at `rank`.
    pub fn shard(model: &Path, members: Vec<GroupMember>, rank: u32) -> ShardSpec {
        ShardSpec {
            replica: ReplicaId(1),
            generation: Generation(1),
            rank,
            members,
            group_key: [7; 32],
            source: ModelSource::Folder(model.display().to_string()),
            options: ShardOptions {
                kv_dtype: KvDtype::Bf16,
                quantization: Quantization::None,
                kv_blocks: 257,
                step_tokens_max: 512,
                sequences_max: 64,
                context_max: 1024,
                memory_bytes: 128 << 20,
            },
        }
    }

    /// This worker as a member of a group.
    pub fn member(&self) -> GroupMember {
        GroupMember {
            worker: self.hello.worker.clone(),
            group_address: self.hello.group_address.clone(),
        }
    }
}

/// A member that will never come: nothing listens at its address.
pub fn absent_member() -> GroupMember {
    GroupMember {
        worker: WorkerId("local/absent".into()),
        group_address: "127.0.0.1:1".into(),
    }
}

/// A first attempt at a prompt.
pub fn start(spec: &ShardSpec, request: u64, generate: Generate) -> Start {
    Start {
        request: RequestId(request),
        replica: spec.replica,
        generation: spec.generation,
        attempt: 0,
        generate,
        resume: Vec::new(),
        deadline_ms: None,
    }
}

fn write(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).unwrap_or_else(|e| panic!("{name} cannot be written: {e}"));
}
