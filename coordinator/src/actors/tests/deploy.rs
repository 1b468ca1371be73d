//! Deployments: create, update, delete, restart of the coordinator.

use common::request::{End, Failure, FailureKind};
use common::wire::message::ShardState;

use crate::actors::testing::{FakeWorker, cluster, config, held, whole};
use crate::api::{DeploymentState, ErrorKind, Gateway, UpdateState};

#[actix::test]
async fn an_endpoint_is_created_loaded_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    let view = core.create("e", config("tiny", "CPU")).await.unwrap();
    assert_eq!(
        (view.ready, view.update, view.active.is_none()),
        (false, UpdateState::InProgress, true)
    );
    let shard = worker.load().await;
    assert_eq!(
        (shard.rank, shard.members.len(), shard.options.context_max),
        (0, 1, 1024)
    );
    let loading = ShardState::Loading {
        stage: "reading weights".into(),
        done_bytes: 45,
        total_bytes: 100,
    };
    worker.state(&shard, loading).await;
    let words = |view: &crate::api::EndpointView| {
        view.pending
            .as_ref()
            .map_or(String::new(), |p| p.entities[0].message.clone())
    };
    core.until("e", "loading", |view| {
        words(view).starts_with("reading weights 45 %: 45 B of 100 B")
    })
    .await;
    let early = core.ask("e", "hi").await.unwrap_err();
    assert_eq!(
        (early.kind, early.retry_after_s.is_some()),
        (ErrorKind::Unavailable, true)
    );
    worker
        .state(&shard, crate::actors::testing::ready_state())
        .await;
    let view = core.until_ready("e").await;
    assert_eq!(
        (view.update, view.pending.is_none(), view.task.as_deref()),
        (UpdateState::NotUpdating, true, Some("llm/v1/completions"))
    );
    let (answer, _) = tokio::join!(core.ask("e", "hi"), async {
        let start = worker.accept().await;
        worker.token(&start, "Hel").await;
        worker.token(&start, "lo").await;
        worker.end(&start, End::Stop).await;
    });
    let answer = answer.unwrap();
    assert_eq!(
        (
            answer.served_entity.as_str(),
            answer.generations[0].prompt_tokens
        ),
        ("tiny-1", 3)
    );
    assert_eq!(whole(answer).await, ("Hello".into(), End::Stop));
}

#[actix::test]
async fn a_group_is_ready_when_all_its_ranks_are_and_says_what_stands_in() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    core.create("e", config("tiny", "PAIR")).await.unwrap();
    let mut first = FakeWorker::join(&core, "0").await;
    core.until("e", "waiting", |view| {
        view.pending.as_ref().unwrap().entities[0]
            .message
            .contains("waiting for workers")
    })
    .await;
    let mut second = FakeWorker::join(&core, "1").await;
    let (one, two) = (first.serve().await, second.load().await);
    assert_eq!(
        (one.rank, two.rank, &one.members, one.group_key),
        (0, 1, &two.members, two.group_key)
    );
    assert!(!core.gateway.get("e".into()).await.unwrap().ready);
    second
        .state(&two, crate::actors::testing::ready_state())
        .await;
    let view = core.until_ready("e").await;
    let message = &view.active.unwrap().entities[0].message;
    assert_eq!(
        message,
        "Served by n/0, n/1; 2 CPU shards stand in for 2 x A100 80 GB"
    );
}

#[actix::test]
async fn what_cannot_be_created_says_why_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| {
        text.replace("memory = \"1GiB\"", "memory = \"16MiB\"")
    })
    .await;
    let refused = |result: Result<_, crate::api::ApiError>| {
        result.map(|_: crate::api::EndpointView| ()).unwrap_err()
    };
    let large = refused(core.create("e", config("tiny", "CPU")).await);
    assert_eq!(large.kind, ErrorKind::InvalidParameter);
    assert!(
        large.message.contains("does not fit workload type CPU")
            && large.message.contains("What would do"),
        "{large}"
    );
    let unmapped = refused(core.create("e", config("tiny", "GPU_MEDIUM")).await);
    assert!(
        unmapped
            .message
            .ends_with("Please choose a node type from [CPU, PAIR]"),
        "{unmapped}"
    );
    let unknown = refused(core.create("e", config("nobody", "CPU")).await);
    assert_eq!(unknown.kind, ErrorKind::NotFound);
    assert!(core.gateway.list().await.unwrap().is_empty());
    let missing = core.ask("e", "hi").await.unwrap_err();
    assert_eq!(
        (missing.kind, missing.message.as_str()),
        (
            ErrorKind::NotFound,
            "Endpoint with name 'e' does not exist."
        )
    );
}

#[actix::test]
async fn a_name_is_taken_once() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let both = tokio::join!(
        core.create("e", config("tiny", "CPU")),
        core.create("e", config("tiny", "CPU"))
    );
    let failed = [both.0.err(), both.1.err()]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>();
    assert_eq!(
        failed.iter().map(|e| e.kind).collect::<Vec<_>>(),
        [ErrorKind::AlreadyExists]
    );
}

#[actix::test]
async fn a_first_deployment_that_fails_answers_with_a_clear_400() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = worker.load().await;
    let failure = Failure::new(FailureKind::BadRequest, "tensor x is missing");
    worker.state(&shard, ShardState::Failed(failure)).await;
    let view = core
        .until("e", "failed", |view| view.update == UpdateState::Failed)
        .await;
    assert!(!view.ready && view.active.is_none());
    assert_eq!(
        view.pending.unwrap().entities[0].state,
        DeploymentState::Failed
    );
    assert_eq!(worker.unload().await, shard.replica);
    let refused = core.ask("e", "hi").await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::BadRequest);
    assert!(
        refused
            .message
            .contains("could not be deployed: rank 0 on n/0: tensor x is missing"),
        "{refused}"
    );
}

#[actix::test]
async fn the_old_version_serves_until_the_new_one_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let old = worker.serve().await;
    core.until_ready("e").await;
    let update = || {
        core.gateway
            .update("user".into(), "e".into(), config("other", "CPU"))
    };
    let view = update().await.unwrap();
    assert_eq!((view.ready, view.update), (true, UpdateState::InProgress));
    assert_eq!(update().await.unwrap_err().kind, ErrorKind::Conflict);
    let new = worker.load().await;
    let (answer, start) = tokio::join!(core.ask("e", "hi"), worker.accept());
    assert_eq!(
        (start.replica, answer.unwrap().served_entity.as_str()),
        (old.replica, "tiny-1")
    );
    worker.end(&start, End::Stop).await;
    assert_eq!(worker.cancel().await, start.request);
    worker
        .state(&new, crate::actors::testing::ready_state())
        .await;
    let view = core
        .until("e", "updated", |view| {
            view.update == UpdateState::NotUpdating
        })
        .await;
    assert!(view.ready);
    assert_eq!(view.active.unwrap().version, 2);
    assert_eq!(worker.unload().await, old.replica);
    let (answer, start) = tokio::join!(core.ask("e", "hi"), worker.accept());
    assert_eq!(
        (start.replica, answer.unwrap().served_entity.as_str()),
        (new.replica, "other-1")
    );
}

#[actix::test]
async fn an_update_without_room_for_both_fails_and_the_old_version_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| {
        text.replace("memory = \"1GiB\"", "memory = \"64MiB\"")
            .replace(
                "name = \"1\"\nkind = \"cpu\"",
                "name = \"1\"\nkind = \"cuda:0\"",
            )
    })
    .await;
    let hello = FakeWorker::hello(&core, "0");
    let device = common::wire::message::Device {
        memory_bytes: 64 << 20,
        ..hello.device.clone()
    };
    let mut worker =
        FakeWorker::dial(&core, common::wire::message::Hello { device, ..hello }).await;
    worker.command().await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let old = worker.serve().await;
    core.until_ready("e").await;
    core.gateway
        .update("user".into(), "e".into(), config("other", "CPU"))
        .await
        .unwrap();
    let view = core
        .until("e", "failed", |view| view.update == UpdateState::Failed)
        .await;
    assert!(view.ready);
    assert!(
        view.pending.unwrap().entities[0]
            .message
            .contains("does not fit"),
        "it says why"
    );
    let (answer, start) = tokio::join!(core.ask("e", "hi"), worker.accept());
    assert_eq!((start.replica, answer.is_ok()), (old.replica, true));
}

#[actix::test]
async fn deleting_an_endpoint_ends_its_requests_and_frees_its_shards() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = worker.serve().await;
    core.until_ready("e").await;
    let (answer, start) = tokio::join!(core.ask("e", "hi"), worker.accept());
    worker.token(&start, "Hel").await;
    core.gateway.delete("e".into()).await.unwrap();
    assert_eq!(
        core.gateway.get("e".into()).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    let (text, end) = whole(answer.unwrap()).await;
    assert_eq!(text, "Hel");
    assert!(
        matches!(
            end,
            End::Error(Failure {
                kind: FailureKind::NotFound,
                ..
            })
        ),
        "{end:?}"
    );
    assert_eq!(worker.unload().await, shard.replica);
    core.create("e", config("tiny", "CPU")).await.unwrap();
    assert_ne!(worker.serve().await.replica, shard.replica);
    core.until_ready("e").await;
}

#[actix::test]
async fn after_a_restart_held_shards_are_adopted_and_lost_ones_loaded_again() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("kept", config("tiny", "CPU")).await.unwrap();
    let kept = worker.serve().await;
    core.until_ready("kept").await;
    core.create("lost", config("other", "CPU")).await.unwrap();
    let mut second = FakeWorker::join(&core, "1").await;
    let lost = tokio::select! { shard = worker.serve() => shard, shard = second.serve() => shard };
    core.until_ready("lost").await;
    let term = core.doorkeeper.term;
    core.stop().await.unwrap();

    let core = cluster(folder.path(), |text| text).await;
    assert!(core.doorkeeper.term > term);
    for name in ["kept", "lost"] {
        let view = core.gateway.get(name.into()).await.unwrap();
        assert_eq!(
            (view.ready, view.active.unwrap().entities[0].state),
            (false, DeploymentState::Recovering)
        );
    }
    let mut worker = FakeWorker::join_with(&core, "0", vec![held(&kept)]).await;
    let mut second = FakeWorker::join(&core, "1").await;
    core.until_ready("kept").await;
    let again = tokio::select! { shard = worker.serve() => shard, shard = second.serve() => shard };
    assert_eq!(again.replica, lost.replica);
    assert!(again.generation > lost.generation);
    core.until_ready("lost").await;
    let (answer, start) = tokio::join!(core.ask("kept", "hi"), worker.accept());
    assert_eq!(
        (start.replica, start.generation, answer.is_ok()),
        (kept.replica, kept.generation, true)
    );
}

#[actix::test]
async fn a_shard_of_an_older_generation_is_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let stray = common::wire::message::HeldShard {
        replica: common::ids::ReplicaId(9),
        generation: common::ids::Generation(1),
        rank: 0,
        state: crate::actors::testing::ready_state(),
    };
    let mut worker = FakeWorker::join_with(&core, "0", vec![stray]).await;
    assert_eq!(worker.unload().await, common::ids::ReplicaId(9));
}

#[actix::test]
async fn endpoints_of_cluster_toml_exist_from_the_first_start() {
    let folder = tempfile::tempdir().unwrap();
    let endpoint = "[[endpoints]]\nname = \"seeded\"\n[[endpoints.served_entities]]\nentity_name = \"tiny\"\nentity_version = 1\n";
    let core = cluster(folder.path(), |text| text + endpoint).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    worker.serve().await;
    let view = core.until_ready("seeded").await;
    assert_eq!(
        (
            view.creator.as_str(),
            view.active.unwrap().entities[0].spec.name.as_str()
        ),
        ("cluster.toml", "tiny-1")
    );
}

#[actix::test]
async fn broken_files_are_refused_at_creation_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-llama");
    let broken = folder.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    let weights = std::fs::read(tiny.join("model.safetensors")).unwrap();
    let config_json = std::fs::read_to_string(tiny.join("config.json")).unwrap();
    let model = "[[models]]\nname = \"broken\"\nversion = 1\npath = \"broken\"\n";
    let core = cluster(folder.path(), |text| text + model).await;
    let refusal = async |weights: &[u8], config_json: &str| {
        std::fs::write(broken.join("model.safetensors"), weights).unwrap();
        std::fs::write(broken.join("config.json"), config_json).unwrap();
        let refused = core.create("e", config("broken", "CPU")).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::InvalidParameter);
        refused.message
    };
    let message = refusal(&weights[..weights.len() / 2], &config_json).await;
    assert!(
        message.contains("model.safetensors: is corrupt or cut short"),
        "{message}"
    );
    let message = refusal(b"not safetensors at all", &config_json).await;
    assert!(
        message.contains("model.safetensors: is corrupt or cut short"),
        "{message}"
    );
    let message = refusal(
        &weights,
        &config_json.replace("LlamaForCausalLM", "GPT2LMHeadModel"),
    )
    .await;
    assert!(
        message.contains("architecture GPT2LMHeadModel is not supported"),
        "{message}"
    );
}

#[actix::test]
async fn traffic_is_split_exactly_by_percentage() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    let mut both = config("tiny", "CPU");
    let other = config("other", "CPU");
    both.entities.extend(other.entities);
    both.routes.extend(other.routes);
    (both.routes[0].percentage, both.routes[1].percentage) = (75, 25);
    core.create("e", both).await.unwrap();
    worker.serve().await;
    let mut second = FakeWorker::join(&core, "1").await;
    tokio::select! { _ = worker.serve() => (), _ = second.serve() => () }
    core.until_ready("e").await;
    let mut answered = Vec::new();
    for _ in 0..20 {
        let (answer, (first, start)) = tokio::join!(core.ask("e", "p"), async {
            tokio::select! { start = worker.accept() => (true, start), start = second.accept() => (false, start) }
        });
        answered.push(answer.unwrap().served_entity);
        let one = if first { &mut worker } else { &mut second };
        one.end(&start, End::Stop).await;
        assert_eq!(
            one.cancel().await,
            start.request,
            "the answer was dropped before its end came"
        );
    }
    assert_eq!(
        answered.iter().filter(|name| *name == "tiny-1").count(),
        15,
        "{answered:?}"
    );
}
