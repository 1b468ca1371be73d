//! A real worker against a coordinator that the test plays: what it keeps, what it refuses, and whom it outlives.

use cluster_tests::fake_coordinator::{FakeCoordinator, Link, absent_member, start};
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::settings::Settings;
use cluster_tests::until::PATIENCE;
use common::ids::{RequestId, Term};
use common::request::{End, Failure, FailureKind, Generate, Prompt, Stop};
use common::wire::message::{Command, Report, ShardSpec, ShardState};
use tokio::io::AsyncWriteExt;

fn tiny_llama(link: &Link) -> ShardSpec {
    Link::shard(&golden::model_folder("tiny-llama"), vec![link.member()], 0)
}

fn prompt(name: &str) -> Generate {
    let golden = golden::named("tiny-llama", name);
    let stop = Stop {
        tokens_max: Some(TOKENS_MAX),
        ..Stop::default()
    };
    Generate {
        stop,
        ..Generate::new(Prompt::Text(golden.prompt))
    }
}

/// Waits for the verdict on a request.
async fn verdict(link: &mut Link, request: u64) -> Result<u32, Failure> {
    link.wait("a verdict", |report| match report {
        Report::Accepted {
            request: of,
            prompt_tokens,
            ..
        } if of == RequestId(request) => Some(Ok(prompt_tokens)),
        Report::Rejected {
            request: of,
            failure,
            ..
        } if of == RequestId(request) => Some(Err(failure)),
        _ => None,
    })
    .await
}

#[tokio::test]
async fn a_worker_loads_a_shard_and_answers() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let _worker = coordinator.start_worker(0);
    let mut link = coordinator.welcomed(1).await;
    let spec = tiny_llama(&link);
    link.send(Command::Load {
        term: Term(1),
        shard: Box::new(spec.clone()),
    })
    .await;
    let ShardState::Ready(ready) = link.loaded(&spec).await else {
        panic!("not ready")
    };
    assert!(
        ready.chat && ready.context_max == 1024 && ready.numerics_id != 0,
        "{ready:?}"
    );
    link.send(Command::Start {
        term: Term(1),
        start: Box::new(start(&spec, 5, prompt("spark"))),
    })
    .await;
    let golden = golden::named("tiny-llama", "spark");
    assert_eq!(
        verdict(&mut link, 5).await,
        Ok(golden.input_ids.len() as u32)
    );
    assert_eq!(link.answer(RequestId(5)).await, (golden.text, End::Stop));
}

#[tokio::test]
async fn shards_outlive_their_link_and_are_named_in_the_next_hello() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let _worker = coordinator.start_worker(0);
    let mut link = coordinator.welcomed(1).await;
    let spec = tiny_llama(&link);
    let boot = link.hello.boot;
    link.send(Command::Load {
        term: Term(1),
        shard: Box::new(spec.clone()),
    })
    .await;
    assert!(matches!(link.loaded(&spec).await, ShardState::Ready(_)));
    drop(link);
    let mut link = coordinator.welcomed(2).await;
    assert_eq!(link.hello.boot, boot);
    let held = &link.hello.shards[0];
    assert_eq!(
        (held.replica, held.generation, held.rank),
        (spec.replica, spec.generation, 0)
    );
    assert!(matches!(held.state, ShardState::Ready(_)), "{held:?}");
    // And it still answers.
    link.send(Command::Start {
        term: Term(2),
        start: Box::new(start(&spec, 6, prompt("sum"))),
    })
    .await;
    assert_eq!(
        link.answer(RequestId(6)).await.0,
        golden::named("tiny-llama", "sum").text
    );
}

#[tokio::test]
async fn garbage_from_a_coordinator_costs_the_link_and_not_the_worker() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let mut worker = coordinator.start_worker(0);
    for garbage in [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        &[0xff; 300],
        &[0x1a, 0x7d, 1, 0, 0xff, 0xff, 0xff, 0xff],
    ] {
        let mut connection = coordinator.connection().await;
        connection.write_all(garbage).await.unwrap();
    }
    coordinator.welcomed(1).await;
    assert!(worker.try_exit().is_none(), "{}", worker.stderr());
}

#[tokio::test]
async fn commands_of_an_older_term_are_refused() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let _worker = coordinator.start_worker(0);
    let mut link = coordinator.welcomed(7).await;
    let spec = tiny_llama(&link);
    link.send(Command::Load {
        term: Term(7),
        shard: Box::new(spec.clone()),
    })
    .await;
    assert!(matches!(link.loaded(&spec).await, ShardState::Ready(_)));
    // A coordinator of the past tells it to let go, and asks it something.
    link.send(Command::Unload {
        term: Term(6),
        replica: spec.replica,
        generation: spec.generation,
        keep: false,
    })
    .await;
    link.send(Command::Start {
        term: Term(7),
        start: Box::new(start(&spec, 8, prompt("sum"))),
    })
    .await;
    assert_eq!(
        link.answer(RequestId(8)).await.0,
        golden::named("tiny-llama", "sum").text
    );
}

#[tokio::test]
async fn a_request_for_a_shard_that_is_not_held_is_rejected_as_unavailable() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let _worker = coordinator.start_worker(0);
    let mut link = coordinator.welcomed(1).await;
    let spec = tiny_llama(&link);
    link.send(Command::Start {
        term: Term(1),
        start: Box::new(start(&spec, 9, prompt("sum"))),
    })
    .await;
    let failure = verdict(&mut link, 9).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unavailable, "{failure}");
}

#[tokio::test]
#[ignore = "waits a minute for the missing rank: scripts/check --long"]
async fn a_group_that_cannot_form_says_which_rank_is_missing() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let _worker = coordinator.start_worker(0);
    let mut link = coordinator.welcomed(1).await;
    let members = vec![link.member(), absent_member()];
    let spec = Link::shard(&golden::model_folder("tiny-llama"), members, 0);
    link.send(Command::Load {
        term: Term(1),
        shard: Box::new(spec.clone()),
    })
    .await;
    let ShardState::Failed(failure) = link.loaded(&spec).await else {
        panic!("a group of one half formed")
    };
    assert!(failure.message.contains("rank 1"), "{failure}");
}

#[tokio::test]
async fn a_refused_worker_ends_with_the_reason() {
    let coordinator = FakeCoordinator::listen(Settings::new()).await;
    let mut worker = coordinator.start_worker(0);
    let mut link = coordinator.greeted().await;
    link.send(Command::Refused {
        reason: "told by the test".into(),
    })
    .await;
    assert_eq!(worker.exit(PATIENCE).await.code(), Some(1));
    assert!(
        worker.stderr().contains("told by the test"),
        "{}",
        worker.stderr()
    );
}
