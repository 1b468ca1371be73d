//! Faults: workers and actors that die, links that break.

use std::time::Duration;

use common::request::{End, Failure, FailureKind};
use tempfile::TempDir;

use crate::Core;
use crate::actors::testing::{FakeWorker, call, cluster, config, held, soon, whole};
use crate::api::{DeploymentState, ErrorKind, Gateway};
use common::wire::message::{Health, Report, ShardSpec, ShardState};

async fn empty() -> (TempDir, Core) {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    (folder, core)
}

#[actix::test]
async fn a_worker_that_dies_and_comes_back_is_used_again() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let before = worker.serve().await;
    core.until_ready("e").await;
    drop(worker);
    let view = core.until("e", "lost", |view| !view.ready).await;
    assert_eq!(
        view.active.unwrap().entities[0].state,
        DeploymentState::Recovering
    );
    let refused = core.ask("e", "p").await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Unavailable);
    assert!(
        refused.message.starts_with(
            "Served entity 'tiny-1' of endpoint 'e' is being brought back: waiting for worker n/0"
        ),
        "{refused}"
    );
    let mut worker = FakeWorker::join(&core, "0").await;
    let after = worker.serve().await;
    assert_eq!(after.replica, before.replica);
    assert!(after.generation > before.generation);
    core.until_ready("e").await;
}

#[actix::test]
async fn a_link_that_breaks_and_comes_back_with_its_shard_loads_nothing() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = worker.serve().await;
    core.until_ready("e").await;
    drop(worker);
    let mut worker = FakeWorker::join_with(&core, "0", vec![held(&shard)]).await;
    core.until_ready("e").await;
    let (answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    assert_eq!((start.generation, answer.is_ok()), (shard.generation, true));
}

#[actix::test]
async fn a_request_without_output_is_run_again_elsewhere() {
    let (_folder, core) = empty().await;
    let mut first = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    first.serve().await;
    core.until_ready("e").await;
    let mut second = FakeWorker::join(&core, "1").await;
    let (answer, start) = tokio::join!(core.ask("e", "p"), async {
        let started = first.accept().await;
        drop(first);
        second.serve().await;
        let again = second.accept().await;
        second.token(&again, "done").await;
        second.end(&again, End::Stop).await;
        (started, again)
    });
    assert_eq!((start.0.request, start.0.attempt), (start.1.request, 0));
    assert_eq!(start.1.attempt, 1);
    assert_eq!(whole(answer.unwrap()).await, ("done".into(), End::Stop));
}

#[actix::test]
async fn a_request_with_output_ends_with_an_error_that_may_be_tried_again() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    worker.serve().await;
    core.until_ready("e").await;
    let (answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    worker.token(&start, "half").await;
    let mut answer = answer.unwrap();
    // Seen by the client before the worker dies.
    assert!(answer.generations[0].events.recv().await.is_some());
    drop(worker);
    let (_, end) = whole(answer).await;
    let End::Error(failure) = end else {
        panic!("{end:?}")
    };
    assert!(
        failure.kind.retryable() && failure.message.contains("worker n/0"),
        "{failure:?}"
    );
}

/// A pair that served and has lost rank 1: its rank 0, which keeps its weights, and what that had served.
async fn bereaved_pair(core: &Core) -> (FakeWorker, ShardSpec) {
    let mut first = FakeWorker::join(core, "0").await;
    let mut second = FakeWorker::join(core, "1").await;
    core.create("e", config("tiny", "PAIR")).await.unwrap();
    let (one, _) = (first.serve().await, second.serve().await);
    core.until_ready("e").await;
    drop(second);
    assert_eq!(first.unload_and_keep().await, one.replica);
    core.until("e", "lost", |view| !view.ready).await;
    (first, one)
}

#[actix::test]
async fn a_group_that_loses_a_rank_is_formed_anew_with_the_next_generation() {
    let (_folder, core) = empty().await;
    let (mut first, one) = bereaved_pair(&core).await;
    let mut second = FakeWorker::join(&core, "1").await;
    let (again, other) = (first.serve().await, second.serve().await);
    assert!(again.generation > one.generation && again.generation == other.generation);
    assert_ne!(again.group_key, one.group_key);
    core.until_ready("e").await;
}

#[actix::test]
async fn what_was_kept_for_a_replica_that_is_not_wanted_any_more_goes() {
    let (_folder, core) = empty().await;
    let (mut first, one) = bereaved_pair(&core).await;
    core.gateway.delete("e".into()).await.unwrap();
    assert_eq!(first.unload().await, one.replica);
}

#[actix::test]
async fn a_worker_that_lost_its_shard_is_not_preferred_for_the_next_formation() {
    let (_folder, core) = empty().await;
    let mut second = FakeWorker::join(&core, "1").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let before = second.serve().await;
    core.until_ready("e").await;
    let mut first = FakeWorker::join(&core, "0").await;
    drop(second);
    let _second = FakeWorker::join(&core, "1").await;
    let after = first.serve().await;
    assert!(after.generation > before.generation);
    core.until_ready("e").await;
}

#[actix::test]
async fn what_a_replaced_worker_kept_goes_when_it_comes_back() {
    let (_folder, core) = empty().await;
    let mut first = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let old = first.serve().await;
    core.until_ready("e").await;
    let mut second = FakeWorker::join(&core, "1").await;
    drop(first);
    second.serve().await;
    core.until_ready("e").await;
    let mut first = FakeWorker::join_with(&core, "0", vec![held(&old)]).await;
    assert_eq!(first.unload().await, old.replica);
}

#[actix::test]
async fn workers_of_a_formation_that_was_never_ready_are_told_of_the_end_too() {
    let (_folder, core) = empty().await;
    let mut first = FakeWorker::join(&core, "0").await;
    let mut second = FakeWorker::join(&core, "1").await;
    core.create("e", config("tiny", "PAIR")).await.unwrap();
    let one = first.load().await;
    second.load().await;
    drop(second);
    assert_eq!(first.unload_and_keep().await, one.replica);
    core.gateway.delete("e".into()).await.unwrap();
    assert_eq!(first.unload().await, one.replica);
}

#[actix::test]
async fn a_device_that_lacks_room_does_not_cost_the_others_their_weights() {
    for (kind, kept) in [
        (FailureKind::TooLarge, true),
        (FailureKind::BadRequest, false),
    ] {
        let (_folder, core) = empty().await;
        let mut first = FakeWorker::join(&core, "0").await;
        let mut second = FakeWorker::join(&core, "1").await;
        core.create("e", config("tiny", "PAIR")).await.unwrap();
        let (one, two) = (first.serve().await, second.serve().await);
        core.until_ready("e").await;
        let failure = Failure::new(kind, "it does not go");
        second.state(&two, ShardState::Failed(failure)).await;
        let unloaded = match kept {
            true => first.unload_and_keep().await,
            false => first.unload().await,
        };
        assert_eq!(unloaded, one.replica);
    }
}

#[actix::test]
async fn a_shard_that_fails_while_serving_is_loaded_again() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = worker.serve().await;
    core.until_ready("e").await;
    let failure = Failure::new(FailureKind::Internal, "the engine panicked");
    worker.state(&shard, ShardState::Failed(failure)).await;
    assert_eq!(worker.unload_and_keep().await, shard.replica);
    assert!(worker.serve().await.generation > shard.generation);
    core.until_ready("e").await;
}

#[actix::test]
async fn actors_that_panic_are_started_again() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = worker.serve().await;
    core.until_ready("e").await;
    let directory = core.doorkeeper.directory.clone();

    directory.endpoint("e").unwrap().door.do_send(super::Panic);
    let mut patience = 0;
    let mut looks = tokio::time::interval(std::time::Duration::from_millis(5));
    let start = loop {
        // The door may be the old one for a moment.
        let asked = async { core.ask("e", "p").await };
        tokio::select! {
            answer = asked => assert_eq!(answer.unwrap_err().kind, ErrorKind::Unavailable),
            start = worker.start() => break start,
        }
        patience += 1;
        assert!(patience < 1000);
        looks.tick().await;
    };
    assert_eq!(worker.cancel().await, start.request);

    directory.coordinator().unwrap().do_send(super::Panic);
    assert!(worker.command().await.is_none(), "its links are cut");
    let mut worker = loop {
        let mut worker = FakeWorker::dial(
            &core,
            common::wire::message::Hello {
                shards: vec![held(&shard)],
                ..FakeWorker::hello(&core, "0")
            },
        )
        .await;
        if worker.command().await.is_some() {
            break worker;
        }
    };
    core.until_ready("e").await;
    let (answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    assert_eq!((start.generation, answer.is_ok()), (shard.generation, true));
}

/// Ends a request as the leader of a broken group does.
async fn breaks(worker: &mut FakeWorker, start: &common::wire::message::Start) {
    let failure = Failure::new(FailureKind::Unavailable, "rank 1 was lost");
    worker.end(start, End::Error(failure)).await;
}

#[actix::test]
async fn requests_whose_leader_tells_of_the_death_are_run_again_elsewhere() {
    let (_folder, core) = empty().await;
    let mut first = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = first.serve().await;
    core.until_ready("e").await;
    let gateway = core.gateway.clone();
    let four = actix_rt::spawn(async move { gateway.generate(call("e", &["p"; 4])).await });
    let mut started = Vec::new();
    for accepts in [true, true, true, false] {
        started.push(if accepts {
            first.accept().await
        } else {
            first.start().await
        });
    }
    // The engine ends: each request is told so, and the shard a moment later.
    for start in &started[..3] {
        breaks(&mut first, start).await;
    }
    let failure = || Failure::new(FailureKind::Unavailable, "rank 1 was lost");
    first.reject(&started[3], failure()).await;
    first.is_left_alone(Duration::from_millis(200)).await;
    first.state(&shard, ShardState::Failed(failure())).await;
    assert_eq!(first.unload_and_keep().await, shard.replica);
    first.serve().await;
    for _ in 0..4 {
        let again = first.accept().await;
        assert_eq!(again.attempt, 1);
        assert!(started.iter().any(|start| start.request == again.request));
        // What is left of the attempt before does not touch this one.
        breaks(&mut first, &started[0]).await;
        first.token(&started[0], "late").await;
        first.token(&again, "done").await;
        first.end(&again, End::Stop).await;
    }
    let answer = soon("the answers", four).await.unwrap().unwrap();
    for mut generation in answer.generations {
        let mut text = String::new();
        while let Some(event) = soon("an event", generation.events.recv()).await {
            match event {
                crate::api::GenerationEvent::Delta(delta) => text.push_str(&delta.text),
                crate::api::GenerationEvent::End { end, .. } => assert_eq!(end, End::Stop),
                crate::api::GenerationEvent::Prompt { .. }
                | crate::api::GenerationEvent::Embedding(_) => {}
            }
        }
        assert_eq!(text, "done");
    }
}

#[actix::test]
async fn a_stream_whose_leader_tells_of_the_death_ends_with_an_error_that_may_be_tried_again() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    worker.serve().await;
    core.until_ready("e").await;
    let (answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    worker.token(&start, "half").await;
    breaks(&mut worker, &start).await;
    let (text, end) = whole(answer.unwrap()).await;
    let End::Error(failure) = end else {
        panic!("{end:?}")
    };
    assert_eq!(
        (text.as_str(), failure.kind),
        ("half", FailureKind::Unavailable)
    );
    assert!(
        failure.message.ends_with("send the request again"),
        "{failure}"
    );
}

async fn health(worker: &mut FakeWorker, shard: &ShardSpec, steps: u64, stalled: bool) {
    let health = Health {
        steps,
        step_us: vec![1000],
        stalled,
        ..Health::default()
    };
    let (replica, generation) = (shard.replica, shard.generation);
    let report = Report::Health {
        replica,
        generation,
        health,
    };
    worker.report(report).await;
}

#[actix::test]
async fn an_engine_that_stays_stalled_is_given_up_and_its_requests_go_on_elsewhere() {
    let (_folder, core) = empty().await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    let shard = worker.serve().await;
    core.until_ready("e").await;
    let asked = async { core.ask("e", "p").await };
    let played = async {
        let start = worker.accept().await;
        let mut reports = tokio::time::interval(Duration::from_millis(100));
        // A slow step that is done after all costs nothing.
        for steps in 1..10 {
            health(&mut worker, &shard, steps, true).await;
            reports.tick().await;
        }
        let given_up = async {
            loop {
                health(&mut worker, &shard, 10, true).await;
                let unloaded =
                    tokio::time::timeout(Duration::from_millis(100), worker.unload_and_keep());
                if let Ok(replica) = unloaded.await {
                    return replica;
                }
            }
        };
        assert_eq!(soon("an unload", given_up).await, shard.replica);
        let again = worker.serve().await;
        assert!(again.generation > shard.generation);
        let retried = worker.accept().await;
        assert_eq!((retried.request, retried.attempt), (start.request, 1));
        worker.token(&retried, "done").await;
        worker.end(&retried, End::Stop).await;
    };
    let (answer, ()) = tokio::join!(asked, played);
    assert_eq!(whole(answer.unwrap()).await, ("done".into(), End::Stop));
}
