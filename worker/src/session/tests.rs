//! A fake coordinator over loopback that speaks the true protocol, and real engines behind the session.

use std::future::Future;
use std::path::Path;

use common::config::{CacheConfig, CudaSwitches, DeviceEntry, Node, TlsFiles};
use common::ids::RequestId;
use common::request::{End, Generate, Prompt, Resume};
use common::wire::message::{
    DeviceKind, GroupMember, KvDtype, ModelSource, Output, Quantization, ReadyShard, ShardOptions,
};
use tokio::net::TcpListener;
use tokio::sync::Mutex;

use super::*;
use crate::text::tests::{golden, model_folder};

const SECRET: &str = "open sesame";
/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

struct FakeCoordinator {
    listener: TcpListener,
}

/// The coordinator's end of a link; pings until it is dropped.
struct WorkerLink {
    hello: Hello,
    sender: Arc<Mutex<Sender<Command>>>,
    receiver: Receiver<Report>,
    /// Lines of the shards' logs so far.
    log: Vec<String>,
    pings: actix_rt::task::JoinHandle<()>,
}

/// Marks the pings that no test asked for.
const PULSE: u64 = 0;

impl FakeCoordinator {
    async fn new() -> FakeCoordinator {
        let socket = TcpSocket::new_v4().unwrap();
        // A coordinator that does not read is noticed after few bytes.
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        FakeCoordinator {
            listener: socket.listen(8).unwrap(),
        }
    }

    fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// The next worker that dials, with its Hello read.
    async fn accept(&self) -> WorkerLink {
        let (socket, _) = timeout(PATIENCE, self.listener.accept())
            .await
            .expect("a worker dials")
            .unwrap();
        let (sender, mut receiver) = link::split::<Command, Report>(socket);
        let Some(Report::Hello(hello)) = receiver.receive().await.unwrap() else {
            panic!("Hello comes first")
        };
        assert_eq!(hello.secret, SECRET);
        WorkerLink {
            hello: *hello,
            sender: Arc::new(Mutex::new(sender)),
            receiver,
            log: Vec::new(),
            pings: actix_rt::spawn(async {}),
        }
    }

    async fn welcome(&self) -> WorkerLink {
        self.welcome_in(1).await
    }

    async fn welcome_in(&self, term: u64) -> WorkerLink {
        let mut link = self.accept().await;
        let term = Term(term);
        link.send(Command::Welcome { protocol: 1, term }).await;
        let sender = link.sender.clone();
        link.pings = actix_rt::spawn(async move {
            let mut second = tokio::time::interval(Duration::from_secs(1));
            let ping = Command::Ping { nonce: PULSE };
            while sender.lock().await.send(&ping).await.is_ok() {
                second.tick().await;
            }
        });
        link
    }
}

impl Drop for WorkerLink {
    fn drop(&mut self) {
        self.pings.abort();
    }
}

impl WorkerLink {
    async fn send(&mut self, command: Command) {
        self.sender.lock().await.send(&command).await.unwrap();
    }

    async fn next(&mut self) -> Report {
        loop {
            let report = timeout(PATIENCE, self.receiver.receive()).await;
            match report
                .expect("a report comes")
                .unwrap()
                .expect("the link is open")
            {
                Report::Pong { nonce: PULSE } => {}
                Report::Log { lines, .. } => {
                    self.log.extend(lines.into_iter().map(|line| line.text));
                }
                report => return report,
            }
        }
    }

    async fn load(&mut self, spec: ShardSpec) {
        self.send(Command::Load {
            term: Term(1),
            shard: Box::new(spec),
        })
        .await;
    }

    /// The next state of a shard that is not on the way to another.
    async fn settled(&mut self) -> ShardState {
        loop {
            match self.next().await {
                Report::Shard {
                    state: ShardState::Loading { .. },
                    ..
                }
                | Report::Health { .. } => {}
                Report::Shard { state, .. } => return state,
                other => panic!("{other:?} while a shard settles"),
            }
        }
    }

    async fn ready(&mut self) -> ReadyShard {
        match self.settled().await {
            ShardState::Ready(ready) => *ready,
            other => panic!("{other:?}"),
        }
    }

    async fn start(&mut self, start: Start) {
        self.send(Command::Start {
            term: Term(1),
            start: Box::new(start),
        })
        .await;
    }

    /// The next report about requests.
    async fn answer(&mut self) -> Report {
        loop {
            let report = self.next().await;
            if !matches!(report, Report::Health { .. }) {
                return report;
            }
        }
    }

    async fn rejection(&mut self) -> Failure {
        match self.answer().await {
            Report::Rejected { failure, .. } => failure,
            other => panic!("{other:?} instead of a rejection"),
        }
    }

    /// Reads a whole answer of one candidate: the prompt's tokens, the output ids, the text, the end.
    async fn collect(&mut self) -> (u32, Vec<u32>, String, End) {
        let Report::Accepted { prompt_tokens, .. } = self.answer().await else {
            panic!("Accepted comes first")
        };
        let (mut ids, mut text) = (Vec::new(), String::new());
        loop {
            let Report::Step { outputs, .. } = self.answer().await else {
                panic!("steps follow")
            };
            for output in outputs {
                match output {
                    Output::Delta { delta, .. } => {
                        ids.extend(delta.ids);
                        text.push_str(&delta.text);
                    }
                    Output::End {
                        end, output_tokens, ..
                    } => {
                        assert_eq!(output_tokens as usize, ids.len());
                        return (prompt_tokens, ids, text, end);
                    }
                    Output::Prompt { .. } | Output::Embedding { .. } => {
                        panic!("only text is expected")
                    }
                }
            }
        }
    }
}

fn device(name: &str) -> Device {
    let entry = DeviceEntry {
        worker: WorkerId(format!("local/{name}")),
        kind: DeviceKind::Cpu,
        ordinal: 0,
        memory_bytes: Some(1 << 30),
        threads: Some(1),
        cores: Vec::new(),
        group_port: 0,
        cuda: CudaSwitches::default(),
    };
    Device::open(
        &Node {
            name: "local".into(),
            address: "127.0.0.1".into(),
            devices: Vec::new(),
        },
        &entry,
    )
    .unwrap()
}

/// A library without registries.
fn library() -> Arc<Library> {
    let cache = CacheConfig {
        folder: "/no/such/cache".into(),
        bytes_max: None,
    };
    Arc::new(Library::new(&[], &cache, None, &|_| None))
}

/// A worker's session, running until the token is cancelled.
fn worker(
    name: &str,
    coordinator: &str,
) -> (
    CancellationToken,
    actix_rt::task::JoinHandle<Result<(), RefusedByCoordinator>>,
) {
    let config = SessionConfig {
        worker: WorkerId(format!("local/{name}")),
        addresses: vec![coordinator.to_owned()],
        tls: None,
        secret: SECRET.into(),
        library: library(),
    };
    let shutdown = CancellationToken::new();
    let session = Session::new(config, device(name), || ());
    (shutdown.clone(), actix_rt::spawn(session.run(shutdown)))
}

fn spec(model: &str, generation: u64, rank: u32, addresses: &[&str]) -> ShardSpec {
    let member = |address: &&str| GroupMember {
        worker: WorkerId("w".into()),
        group_address: (*address).to_owned(),
    };
    ShardSpec {
        replica: ReplicaId(1),
        generation: Generation(generation),
        rank,
        members: addresses.iter().map(member).collect(),
        group_key: [3; 32],
        source: ModelSource::Folder(model_folder(model).to_str().unwrap().to_owned()),
        options: ShardOptions {
            kv_dtype: KvDtype::F32,
            quantization: Quantization::None,
            kv_blocks: 129,
            step_tokens_max: 64,
            sequences_max: 8,
            context_max: 512,
            memory_bytes: 256 << 20,
        },
    }
}

fn start(request: u64, generate: Generate) -> Start {
    Start {
        request: RequestId(request),
        replica: ReplicaId(1),
        generation: Generation(1),
        attempt: 0,
        generate,
        resume: Vec::new(),
        deadline_ms: None,
    }
}

fn long(request: u64) -> Start {
    let mut generate = Generate::new(Prompt::Text("Once upon a time".into()));
    generate.stop.ignore_eos = true;
    start(request, generate)
}

fn system<F: Future<Output = ()>>(test: F) {
    actix::System::new().block_on(test);
}

/// The goldens whose greedy ids are certain: prompt, output ids without the end token, text, whether it stopped.
fn certain_goldens(model: &str) -> Vec<(String, Vec<u32>, String, End)> {
    let golden = golden(model, "golden.json");
    let end = golden["eos_token_id"].as_u64().unwrap() as u32;
    let cases = golden["float32"].as_array().unwrap().iter();
    let certain = cases.filter(|case| case["min_margin"].as_f64().unwrap() > 0.02);
    certain
        .map(|case| {
            let mut ids: Vec<u32> = serde_json::from_value(case["output_ids"].clone()).unwrap();
            ids.pop_if(|id| *id == end);
            let text = |key: &str| case[key].as_str().unwrap().to_owned();
            let stopped = if text("finish_reason") == "stop" {
                End::Stop
            } else {
                End::Length
            };
            (text("prompt"), ids, text("text"), stopped)
        })
        .collect()
}

async fn asks_all_goldens(leader: &mut WorkerLink, model: &str) {
    let goldens = certain_goldens(model);
    assert!(goldens.len() > 8);
    for (request, (prompt, ids, text, end)) in (0..).zip(goldens) {
        let mut generate = Generate::new(Prompt::Text(prompt));
        generate.stop.tokens_max = Some(64);
        leader.start(start(request, generate)).await;
        let (_, got_ids, got_text, got_end) = leader.collect().await;
        assert_eq!((got_ids, got_text, got_end), (ids, text, end), "{model}");
    }
}

#[test]
fn one_shard_answers_as_the_goldens_do() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.welcome().await;
        assert_eq!(link.hello.shards, []);
        for (generation, model) in (1..).zip(["tiny-llama", "tiny-mistral", "tiny-mpt"]) {
            link.load(spec(model, generation, 0, &["-"])).await;
            if generation > 1 {
                assert_eq!(
                    link.settled().await,
                    ShardState::Unloaded,
                    "the generation before"
                );
            }
            let ready = link.ready().await;
            assert_eq!(
                (ready.context_max, ready.kv_blocks, ready.chat, ready.task),
                (512, 128, true, None)
            );
            if generation == 1 {
                asks_all_goldens(&mut link, model).await;
            } else {
                let (prompt, ids, text, end) = certain_goldens(model).swap_remove(0);
                let generate = Generate::new(Prompt::Text(prompt));
                link.start(Start {
                    generation: Generation(generation),
                    ..start(99, generate)
                })
                .await;
                let (_, got_ids, got_text, got_end) = link.collect().await;
                assert_eq!((got_ids, got_text, got_end), (ids, text, end), "{model}");
            }
        }
        shutdown.cancel();
        session.await.unwrap().unwrap();
    });
}

#[test]
fn two_shards_answer_as_the_goldens_do_and_the_group_ends_with_its_leader() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (stop_leader, leading) = worker("cpu0", &coordinator.address());
        let mut leader = coordinator.welcome().await;
        let (stop_follower, following) = worker("cpu1", &coordinator.address());
        let mut follower = coordinator.welcome().await;
        let addresses = [
            leader.hello.group_address.clone(),
            follower.hello.group_address.clone(),
        ];
        let addresses = addresses.each_ref().map(String::as_str);
        follower.load(spec("tiny-llama", 1, 1, &addresses)).await;
        leader.load(spec("tiny-llama", 1, 0, &addresses)).await;
        let (first, second) = (leader.ready().await, follower.ready().await);
        assert_eq!(first.numerics_id, second.numerics_id);
        asks_all_goldens(&mut leader, "tiny-llama").await;

        stop_leader.cancel();
        leading.await.unwrap().unwrap();
        let state = follower.settled().await;
        assert!(
            matches!(&state, ShardState::Failed(failure) if failure.kind.retryable()),
            "{state:?}"
        );
        follower
            .send(Command::Unload {
                term: Term(1),
                replica: ReplicaId(1),
                generation: Generation(1),
                keep: false,
            })
            .await;
        assert_eq!(follower.settled().await, ShardState::Unloaded);
        stop_follower.cancel();
        following.await.unwrap().unwrap();
    });
}

#[test]
fn a_group_that_is_formed_again_finds_the_weights_of_the_ranks_that_are_left() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (stop_follower, following) = worker("cpu1", &coordinator.address());
        let mut follower = coordinator.welcome().await;
        let mut numerics = Vec::new();
        for generation in 1..=3 {
            let (stop_leader, leading) = worker("cpu0", &coordinator.address());
            let mut leader = coordinator.welcome().await;
            let addresses = [
                leader.hello.group_address.clone(),
                follower.hello.group_address.clone(),
            ];
            let addresses = addresses.each_ref().map(String::as_str);
            follower
                .load(spec("tiny-llama", generation, 1, &addresses))
                .await;
            leader
                .load(spec("tiny-llama", generation, 0, &addresses))
                .await;
            numerics.push(leader.ready().await.numerics_id);
            follower.ready().await;
            let (prompt, ids, text, end) = certain_goldens("tiny-llama").swap_remove(0);
            let asked = Start {
                generation: Generation(generation),
                ..start(generation, Generate::new(Prompt::Text(prompt)))
            };
            leader.start(asked).await;
            let (_, got_ids, got_text, got_end) = leader.collect().await;
            assert_eq!(
                (got_ids, got_text, got_end),
                (ids, text, end),
                "{generation}"
            );
            stop_leader.cancel();
            leading.await.unwrap().unwrap();
            assert!(matches!(follower.settled().await, ShardState::Failed(_)));
            // What is kept for the second life is gone before the third.
            follower
                .send(Command::Unload {
                    term: Term(1),
                    replica: ReplicaId(1),
                    generation: Generation(generation),
                    keep: generation == 1,
                })
                .await;
            assert_eq!(follower.settled().await, ShardState::Unloaded);
        }
        assert!(numerics.iter().all(|id| *id == numerics[0]));
        let how: Vec<&str> = follower
            .log
            .iter()
            .filter_map(|line| line.strip_prefix("weights ")?.split(" in ").next())
            .collect();
        let kept = "kept on the device for the shard's next life";
        assert_eq!(
            how,
            ["read", kept, "kept, taken over", kept, "read", kept],
            "{:#?}",
            follower.log
        );
        stop_follower.cancel();
        following.await.unwrap().unwrap();
    });
}

#[test]
fn requests_are_cancelled_refused_stopped_and_resumed_one_by_one() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.welcome().await;
        link.start(long(1)).await;
        assert_eq!(
            link.rejection().await.kind,
            FailureKind::Unavailable,
            "nothing is loaded"
        );
        link.load(spec("tiny-llama", 1, 0, &["-"])).await;
        link.ready().await;

        link.start(long(2)).await;
        assert!(matches!(
            link.answer().await,
            Report::Accepted {
                request: RequestId(2),
                ..
            }
        ));
        assert!(
            matches!(link.answer().await, Report::Step { .. }),
            "it runs"
        );
        link.send(Command::Cancel {
            request: RequestId(2),
        })
        .await;
        let end = loop {
            let Report::Step { outputs, .. } = link.answer().await else {
                panic!("a step")
            };
            if let Some(Output::End { end, .. }) = outputs.last() {
                break end.clone();
            }
        };
        assert_eq!(end, End::Cancelled);

        link.start(start(3, Generate::new(Prompt::Tokens(vec![7; 600]))))
            .await;
        let failure = link.rejection().await;
        assert_eq!(failure.kind, FailureKind::BadRequest);
        assert!(failure.message.contains("600 tokens"), "{failure}");
        link.start(Start {
            generation: Generation(9),
            ..long(4)
        })
        .await;
        assert!(link.rejection().await.message.contains("generation"));
        link.send(Command::Start {
            term: Term(0),
            start: Box::new(long(5)),
        })
        .await;
        assert!(link.rejection().await.message.contains("older term"));

        let (prompt, ids, text, _) = certain_goldens("tiny-llama").swap_remove(0);
        let mut generate = Generate::new(Prompt::Text(prompt));
        generate.stop.strings = vec!["source engine".into()];
        link.start(start(6, generate.clone())).await;
        let (_, _, stopped, end) = link.collect().await;
        assert_eq!(
            (stopped.as_str(), end),
            (text.split("source engine").next().unwrap(), End::Stop)
        );

        generate.stop.strings.clear();
        let resume = vec![Resume {
            candidate: 0,
            emitted: ids[..5].to_vec(),
            delivered_bytes: 4,
        }];
        link.start(Start {
            attempt: 1,
            resume,
            ..start(7, generate)
        })
        .await;
        let Report::Accepted { .. } = link.answer().await else {
            panic!("accepted")
        };
        let mut rest = String::new();
        let end = loop {
            let Report::Step { outputs, .. } = link.answer().await else {
                panic!("a step")
            };
            for output in &outputs {
                if let Output::Delta { delta, .. } = output {
                    rest.push_str(&delta.text);
                }
            }
            if let Some(Output::End {
                end, output_tokens, ..
            }) = outputs.last()
            {
                assert_eq!(*output_tokens as usize, ids.len());
                break end.clone();
            }
        };
        assert_eq!((rest.as_str(), end), (&text[4..], End::Stop));
        shutdown.cancel();
        session.await.unwrap().unwrap();
    });
}

#[test]
fn shards_outlive_a_link_and_requests_do_not() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.welcome().await;
        let boot = link.hello.boot;
        link.load(spec("tiny-llama", 1, 0, &["-"])).await;
        let ready = link.ready().await;
        link.start(long(1)).await;
        assert!(matches!(link.answer().await, Report::Accepted { .. }));
        drop(link);

        let mut link = coordinator.welcome().await;
        assert_eq!(link.hello.boot, boot);
        let state = ShardState::Ready(Box::new(ready));
        let held = HeldShard {
            replica: ReplicaId(1),
            generation: Generation(1),
            rank: 0,
            state,
        };
        assert_eq!(link.hello.shards, [held]);
        // The same request again: the one before is gone, and nothing of it comes on this link.
        let (prompt, ids, text, end) = certain_goldens("tiny-llama").swap_remove(0);
        link.start(Start {
            attempt: 1,
            ..start(1, Generate::new(Prompt::Text(prompt)))
        })
        .await;
        let (_, got_ids, got_text, got_end) = link.collect().await;
        assert_eq!((got_ids, got_text, got_end), (ids, text, end));
        loop {
            // The engine drops the request of the old link before its next step.
            let Report::Health { health, .. } = link.next().await else {
                panic!("only health is left")
            };
            if health.running == 0 && health.waiting == 0 {
                break;
            }
        }

        link.start(long(2)).await;
        assert!(matches!(link.answer().await, Report::Accepted { .. }));
        link.send(Command::Unload {
            term: Term(1),
            replica: ReplicaId(1),
            generation: Generation(1),
            keep: false,
        })
        .await;
        let (mut ended, mut unloaded) = (None, false);
        while ended.is_none() || !unloaded {
            match link.answer().await {
                Report::Step { outputs, .. } => {
                    if let Some(Output::End {
                        end: End::Error(failure),
                        ..
                    }) = outputs.last()
                    {
                        ended = Some(failure.kind);
                    }
                }
                Report::Shard { state, .. } => unloaded = state == ShardState::Unloaded,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(ended, Some(FailureKind::Unavailable));
        shutdown.cancel();
        session.await.unwrap().unwrap();
    });
}

#[test]
fn what_cannot_be_loaded_says_why_and_others_can_be_after_it() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.welcome().await;
        async fn failed(link: &mut WorkerLink) -> Failure {
            match link.settled().await {
                ShardState::Failed(failure) => failure,
                other => panic!("{other:?}"),
            }
        }
        let nowhere = ShardSpec {
            source: ModelSource::Folder("/nowhere".into()),
            ..spec("tiny-llama", 1, 0, &["-"])
        };
        link.load(nowhere).await;
        let failure = failed(&mut link).await;
        assert_eq!(failure.kind, FailureKind::BadRequest);
        assert!(
            failure.message.contains("cannot read /nowhere"),
            "{failure}"
        );

        let mut small = spec("tiny-llama", 2, 0, &["-"]);
        small.options.memory_bytes = 1 << 20;
        link.load(small).await;
        assert_eq!(
            link.settled().await,
            ShardState::Unloaded,
            "the failed one is forgotten"
        );
        let failure = failed(&mut link).await;
        assert_eq!(failure.kind, FailureKind::TooLarge);
        assert!(
            failure.message.contains("129 KV blocks")
                && failure.message.ends_with("may use 1.0 MiB"),
            "{failure}"
        );

        let mut large = spec("tiny-llama", 3, 0, &["-"]);
        large.options.memory_bytes = 1 << 40;
        large.options.kv_blocks = 1 << 20;
        link.load(large).await;
        assert_eq!(link.settled().await, ShardState::Unloaded);
        let failure = failed(&mut link).await;
        assert!(failure.message.contains("free of 1.00 GiB"), "{failure}");

        link.load(spec("tiny-llama", 4, 0, &["-"])).await;
        assert_eq!(link.settled().await, ShardState::Unloaded);
        link.ready().await;
        link.load(spec("tiny-llama", 3, 0, &["-"])).await;
        link.send(Command::Load {
            term: Term(0),
            shard: Box::new(spec("tiny-llama", 5, 0, &["-"])),
        })
        .await;
        link.send(Command::Ping { nonce: 7 }).await;
        assert_eq!(
            link.answer().await,
            Report::Pong { nonce: 7 },
            "older generations and terms do nothing"
        );
        shutdown.cancel();
        session.await.unwrap().unwrap();
    });
}

#[test]
fn a_coordinator_that_does_not_read_loses_the_link_and_the_engine_goes_on() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.welcome().await;
        link.load(spec("tiny-llama", 1, 0, &["-"])).await;
        link.ready().await;
        for request in 0..64 {
            let mut start = long(request);
            start.generate.logprobs = Some(20);
            link.start(start).await;
        }
        // The unread link is kept open: the worker itself must give it up.
        let mut next = coordinator.welcome().await;
        assert!(matches!(next.hello.shards[0].state, ShardState::Ready(_)));
        let (prompt, ids, text, end) = certain_goldens("tiny-llama").swap_remove(0);
        next.start(start(100, Generate::new(Prompt::Text(prompt))))
            .await;
        let (_, got_ids, got_text, got_end) = next.collect().await;
        assert_eq!((got_ids, got_text, got_end), (ids, text, end));
        drop(link);
        shutdown.cancel();
        session.await.unwrap().unwrap();
    });
}

/// Files of an authority and of one process that may be either side.
fn certificates(folder: &Path) -> TlsFiles {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate().unwrap();
    let ca = authority.self_signed(&authority_key).unwrap();
    let process = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let cert = process.signed_by(&key, &issuer).unwrap();
    let file = |name: &str, text: String| {
        std::fs::write(folder.join(name), text).unwrap();
        folder.join(name)
    };
    TlsFiles {
        ca: file("ca.pem", ca.pem()),
        cert: file("cert.pem", cert.pem()),
        key: file("key.pem", key.serialize_pem()),
    }
}

#[test]
fn a_link_with_certificates_is_encrypted_and_checks_both_sides() {
    system(async {
        let folder = tempfile::tempdir().unwrap();
        let files = certificates(folder.path());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acceptor = tokio_rustls::TlsAcceptor::from(common::tls::server(&files).unwrap());
        let accept = async || acceptor.accept(listener.accept().await.unwrap().0).await;

        let own = common::tls::client(&files).unwrap();
        let (dialled, accepted) = tokio::join!(dial(&address, Some(own)), accept());
        let accepted = accepted.unwrap();
        assert!(accepted.get_ref().1.peer_certificates().is_some());
        let (mut report, _commands) = link::split::<Report, Command>(dialled.unwrap());
        let (_command, mut reports) = link::split::<Command, Report>(accepted);
        report.send(&Report::Pong { nonce: 4 }).await.unwrap();
        assert_eq!(
            reports.receive().await.unwrap(),
            Some(Report::Pong { nonce: 4 })
        );

        let elsewhere = tempfile::tempdir().unwrap();
        let stranger = common::tls::client(&certificates(elsewhere.path())).unwrap();
        let (dialled, accepted) = tokio::join!(dial(&address, Some(stranger)), accept());
        assert!(
            dialled.is_err() && accepted.is_err(),
            "another authority's worker is let in"
        );
    });
}

#[test]
fn a_refused_worker_ends_with_the_reason() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (_shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.accept().await;
        link.send(Command::Refused {
            reason: "the secret is wrong".into(),
        })
        .await;
        let error = session.await.unwrap().unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("refused this worker: the secret is wrong"),
            "{error}"
        );
    });
}

#[test]
fn a_coordinator_of_an_older_term_is_left_for_the_next_one() {
    system(async {
        let coordinator = FakeCoordinator::new().await;
        let (shutdown, session) = worker("cpu0", &coordinator.address());
        let mut link = coordinator.welcome_in(5).await;
        link.send(Command::Ping { nonce: 1 }).await;
        assert_eq!(link.next().await, Report::Pong { nonce: 1 });
        drop(link);
        let mut old = coordinator.welcome_in(4).await;
        assert!(
            timeout(PATIENCE, old.receiver.receive())
                .await
                .unwrap()
                .unwrap()
                .is_none(),
            "the worker hangs up"
        );
        let mut link = coordinator.welcome_in(6).await;
        link.send(Command::Ping { nonce: 2 }).await;
        assert_eq!(link.next().await, Report::Pong { nonce: 2 });
        shutdown.cancel();
        session.await.unwrap().unwrap();
    });
}
