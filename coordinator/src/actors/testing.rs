//! For tests: a cluster without ports, and a worker that speaks the true protocol over an in-memory stream.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ids::{BootId, ReplicaId, RequestId, WorkerId};
use common::request::{Delta, End, Failure, Generate, Prompt};
use common::wire::link::{self, Receiver, Sender, Stream};
use common::wire::message::{
    Command, Device, DeviceKind, DeviceRates, HeldShard, Hello, Output, PROTOCOL_MAX, PROTOCOL_MIN,
    ReadyShard, Report, ShardSpec, ShardState, Start,
};

use crate::Core;
use crate::api::{
    Answer, ApiError, Call, Caller, ConfigSpec, CreateEndpoint, EndpointView, EntitySpec, Gateway,
    GenerationEvent, Route, Settings, WorkloadSize,
};
use crate::workers::{Doorkeeper, Met};

/// Longer than anything takes, shorter than a test's patience.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what must come.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Starts a cluster of two 1 GiB CPU devices whose store is in `folder`. `change` edits cluster.toml.
pub(crate) async fn cluster(folder: &Path, change: impl FnOnce(String) -> String) -> Core {
    let models = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/models")
        .canonicalize()
        .unwrap();
    let text = format!(
        r#"
[[auth.tokens]]
user = "admin"
file = "admin.token"
[limits]
queue_requests_max = 4
idle_stream_ms = 1500
[[nodes]]
name = "n"
[[nodes.devices]]
name = "0"
kind = "cpu"
memory = "1GiB"
[[nodes.devices]]
name = "1"
kind = "cpu"
memory = "1GiB"
[[workload_types]]
name = "CPU"
device = "cpu"
[[workload_types]]
name = "PAIR"
device = "cpu"
shards = 2
stands_in_for = "2 x A100 80 GB"
[[models]]
name = "tiny"
version = 1
path = "{0}/tiny-llama"
[[models]]
name = "other"
version = 1
path = "{0}/tiny-mpt"
"#,
        models.display()
    );
    std::fs::write(folder.join("cluster.toml"), change(text)).unwrap();
    let cluster = common::config::load(&folder.join("cluster.toml")).unwrap();
    Core::start(Arc::new(cluster)).await.unwrap()
}

/// One served entity with all the traffic.
pub(crate) fn config(model: &str, workload_type: &str) -> ConfigSpec {
    let name = format!("{model}-1");
    let entity = EntitySpec {
        name: name.clone(),
        model: common::model_ref::ModelRef::new(model, "1").unwrap(),
        workload_type: workload_type.into(),
        workload_size: WorkloadSize::Small,
        scale_to_zero: false,
        environment_vars: vec![],
        provisioned: None,
        concurrency: None,
        instance_profile_arn: None,
        quantization: None,
    };
    ConfigSpec {
        entities: vec![entity],
        routes: vec![Route {
            entity: name,
            percentage: 100,
        }],
        auto_capture: None,
    }
}

impl Core {
    /// Creates an endpoint.
    pub(crate) async fn create(
        &self,
        name: &str,
        config: ConfigSpec,
    ) -> Result<EndpointView, ApiError> {
        let endpoint = CreateEndpoint {
            name: name.into(),
            config,
            settings: Settings::default(),
        };
        Gateway::create(&self.gateway, "user".into(), endpoint).await
    }

    /// Waits until an endpoint is as asked.
    pub(crate) async fn until(
        &self,
        name: &str,
        what: &str,
        is: impl Fn(&EndpointView) -> bool,
    ) -> EndpointView {
        let started = Instant::now();
        loop {
            let view = self.gateway.get(name.into()).await.unwrap();
            if is(&view) {
                return view;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "{name} is not {what}: {view:#?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until an endpoint is ready.
    pub(crate) async fn until_ready(&self, name: &str) -> EndpointView {
        self.until(name, "ready", |view| view.ready).await
    }

    /// A call with one prompt.
    pub(crate) async fn ask(&self, endpoint: &str, prompt: &str) -> Result<Answer, ApiError> {
        self.gateway.generate(call(endpoint, &[prompt])).await
    }
}

/// A call of these prompts that has a minute.
pub(crate) fn call(endpoint: &str, prompts: &[&str]) -> Call {
    let prompts = prompts
        .iter()
        .map(|prompt| Generate::new(Prompt::Text((*prompt).into())))
        .collect();
    Call {
        endpoint: endpoint.into(),
        caller: Caller::admin("user"),
        request_id: "test".into(),
        prompts,
        deadline: Instant::now() + Duration::from_secs(60),
    }
}

/// The text of an answer, and how its only candidate ended.
pub(crate) async fn whole(mut answer: Answer) -> (String, End) {
    let mut text = String::new();
    let generation = &mut answer.generations[0];
    while let Some(event) = soon("an event", generation.events.recv()).await {
        match event {
            GenerationEvent::Delta(delta) => text.push_str(&delta.text),
            GenerationEvent::End { end, .. } => return (text, end),
            GenerationEvent::Prompt { .. } | GenerationEvent::Embedding(_) => {}
        }
    }
    panic!("the channel closed without an end after '{text}'");
}

/// A worker that does what its test says.
pub(crate) struct FakeWorker {
    send: Sender<Report>,
    commands: Receiver<Command>,
}

/// A link without sockets, from Hello to its end.
pub(crate) async fn serve_link(
    doorkeeper: Arc<Doorkeeper>,
    stream: impl Stream + 'static,
    peer: &str,
) {
    if let Ok(met) = Met::hear(stream).await {
        doorkeeper.run(met, peer).await;
    }
}

impl FakeWorker {
    /// Words of a worker called `n/NAME`.
    pub(crate) fn hello(core: &Core, name: &str) -> Hello {
        Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            secret: core.doorkeeper.secret.clone(),
            worker: WorkerId(format!("n/{name}")),
            boot: BootId::random(),
            device: Device {
                kind: DeviceKind::Cpu,
                name: "fake".into(),
                memory_bytes: 1 << 30,
                threads: 1,
                rates: Some(DeviceRates {
                    bytes_per_s: 1_000_000_000,
                    flops_per_s: 10_000_000_000,
                }),
            },
            group_address: format!("127.0.0.1:{}", 7000 + name.len()),
            shards: vec![],
        }
    }

    /// Dials and says `hello`.
    pub(crate) async fn dial(core: &Core, hello: Hello) -> Self {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let doorkeeper = core.doorkeeper.clone();
        tokio::spawn(serve_link(doorkeeper, theirs, "test"));
        let (mut send, commands) = link::split(ours);
        send.send(&Report::Hello(Box::new(hello))).await.unwrap();
        FakeWorker { send, commands }
    }

    /// A worker that was welcomed.
    pub(crate) async fn join(core: &Core, name: &str) -> Self {
        Self::join_with(core, name, vec![]).await
    }

    /// A worker that was welcomed with shards from before.
    pub(crate) async fn join_with(core: &Core, name: &str, shards: Vec<HeldShard>) -> Self {
        let mut worker = Self::dial(
            core,
            Hello {
                shards,
                ..Self::hello(core, name)
            },
        )
        .await;
        assert!(matches!(
            worker.command().await,
            Some(Command::Welcome { .. })
        ));
        worker
    }

    /// The next command that is no ping; `None` when the link is closed.
    pub(crate) async fn command(&mut self) -> Option<Command> {
        let next = async {
            loop {
                match self.commands.receive().await.ok().flatten()? {
                    // On a link that is being closed there is nobody to answer.
                    Command::Ping { nonce } => drop(self.send.send(&Report::Pong { nonce }).await),
                    other => return Some(other),
                }
            }
        };
        soon("a command", next).await
    }

    /// Nothing but pings comes for a moment.
    pub(crate) async fn is_left_alone(&mut self, moment: Duration) {
        let came = tokio::time::timeout(moment, self.command()).await;
        assert!(came.is_err(), "a command came: {came:?}");
    }

    pub(crate) async fn report(&mut self, report: Report) {
        self.send.send(&report).await.unwrap();
    }

    /// Expects a Load.
    pub(crate) async fn load(&mut self) -> ShardSpec {
        match self.command().await {
            Some(Command::Load { shard, .. }) => *shard,
            other => panic!("expected Load, got {other:?}"),
        }
    }

    /// Expects an Unload.
    pub(crate) async fn unload(&mut self) -> ReplicaId {
        self.unload_and(false).await
    }

    /// Expects an Unload of a replica that will be formed again.
    pub(crate) async fn unload_and_keep(&mut self) -> ReplicaId {
        self.unload_and(true).await
    }

    async fn unload_and(&mut self, kept: bool) -> ReplicaId {
        match self.command().await {
            Some(Command::Unload { replica, keep, .. }) if keep == kept => replica,
            other => panic!("expected Unload, keep: {kept}, got {other:?}"),
        }
    }

    pub(crate) async fn state(&mut self, shard: &ShardSpec, state: ShardState) {
        let (replica, generation, rank) = (shard.replica, shard.generation, shard.rank);
        self.report(Report::Shard {
            replica,
            generation,
            rank,
            state,
        })
        .await;
    }

    /// Expects a Load and says ready.
    pub(crate) async fn serve(&mut self) -> ShardSpec {
        let shard = self.load().await;
        self.state(&shard, ready_state()).await;
        shard
    }

    /// Expects a Start.
    pub(crate) async fn start(&mut self) -> Start {
        match self.command().await {
            Some(Command::Start { start, .. }) => *start,
            other => panic!("expected Start, got {other:?}"),
        }
    }

    /// Expects a Start and accepts it.
    pub(crate) async fn accept(&mut self) -> Start {
        let start = self.start().await;
        self.report(Report::Accepted {
            request: start.request,
            attempt: start.attempt,
            prompt_tokens: 3,
        })
        .await;
        start
    }

    /// Expects a Cancel.
    pub(crate) async fn cancel(&mut self) -> RequestId {
        match self.command().await {
            Some(Command::Cancel { request }) => request,
            other => panic!("expected Cancel, got {other:?}"),
        }
    }

    /// Gives one token.
    pub(crate) async fn token(&mut self, start: &Start, text: &str) {
        let delta = Delta {
            candidate: 0,
            ids: vec![7],
            text: text.into(),
            ..Delta::default()
        };
        let outputs = vec![Output::Delta {
            request: start.request,
            delta,
        }];
        self.report(Report::Step {
            replica: start.replica,
            generation: start.generation,
            outputs,
        })
        .await;
    }

    /// Ends the only candidate.
    pub(crate) async fn end(&mut self, start: &Start, end: End) {
        let (request, candidate) = (start.request, 0);
        let outputs = vec![Output::End {
            request,
            candidate,
            output_tokens: 1,
            cached_tokens: 0,
            end,
        }];
        self.report(Report::Step {
            replica: start.replica,
            generation: start.generation,
            outputs,
        })
        .await;
    }

    /// Refuses a request.
    pub(crate) async fn reject(&mut self, start: &Start, failure: Failure) {
        self.report(Report::Rejected {
            request: start.request,
            attempt: start.attempt,
            failure,
        })
        .await;
    }
}

/// Facts of a loaded tiny model.
pub(crate) fn ready_state() -> ShardState {
    ShardState::Ready(Box::new(ReadyShard {
        numerics_id: 1,
        task: Some("llm/v1/completions".into()),
        chat: false,
        context_max: 1024,
        kv_blocks: 100,
        weight_bytes: 1 << 20,
        load_ms: 1,
    }))
}

/// A shard as its worker names it after a broken link.
pub(crate) fn held(shard: &ShardSpec) -> HeldShard {
    HeldShard {
        replica: shard.replica,
        generation: shard.generation,
        rank: shard.rank,
        state: ready_state(),
    }
}
