//! Limits per minute and falling back, with workers that do what the test says.

use std::time::Duration;

use common::request::{End, Failure, FailureKind};
use tempfile::TempDir;

use crate::Core;
use crate::actors::testing::{FakeWorker, call, cluster, config, soon, whole};
use crate::api::{
    AiGateway, Amendment, ApiError, Caller, ConfigSpec, ErrorKind, Gateway, Limited, RateLimit,
};

async fn amend(core: &Core, amendment: Amendment) {
    core.gateway.amend("e".into(), amendment).await.unwrap();
}

fn each_user(calls: Option<u64>, tokens: Option<u64>) -> Amendment {
    let on = Limited::EachUser;
    Amendment::RateLimits(vec![RateLimit { on, calls, tokens }])
}

fn fallback(enabled: bool) -> Amendment {
    Amendment::AiGateway(AiGateway {
        fallback: Some(enabled),
        ..AiGateway::default()
    })
}

/// A ready endpoint of size Small on one worker.
async fn ready() -> (TempDir, Core, FakeWorker) {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    worker.serve().await;
    core.until_ready("e").await;
    (folder, core, worker)
}

/// A call that is answered with one token.
async fn answered(core: &Core, worker: &mut FakeWorker, user: &str) -> Result<(), ApiError> {
    let mut call = call("e", &["p"]);
    call.caller = Caller::user(user, &[]);
    let answering = async {
        let start = worker.accept().await;
        worker.token(&start, "x").await;
        worker.end(&start, End::Stop).await;
    };
    let asking = core.gateway.generate(call);
    let answered = async { Ok(whole(asking.await?).await) };
    // A refused call never gets to the worker.
    let (text, _) = tokio::select! {
        biased;
        text = answered => text?,
        () = async { answering.await; std::future::pending().await } => unreachable!(),
    };
    assert_eq!(text, "x");
    Ok(())
}

#[actix::test]
async fn calls_are_counted_for_each_user_and_stay_counted_when_the_limit_changes() {
    let (_folder, core, mut worker) = ready().await;
    amend(&core, each_user(Some(2), None)).await;
    for user in ["bob", "eve", "bob"] {
        answered(&core, &mut worker, user).await.unwrap();
    }
    let refused = answered(&core, &mut worker, "bob").await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Overloaded, "{refused}");
    let wait_s = refused.retry_after_s.unwrap();
    assert!((1..=61).contains(&wait_s), "{refused}");
    let says = "takes 2 calls a minute of user 'bob'";
    assert!(refused.message.contains(says), "{refused}");
    amend(&core, each_user(Some(3), None)).await;
    answered(&core, &mut worker, "bob").await.unwrap();
    let again = answered(&core, &mut worker, "bob").await.unwrap_err();
    assert!(again.message.contains("takes 3 calls"), "{again}");
    amend(&core, each_user(Some(0), None)).await;
    let never = answered(&core, &mut worker, "eve").await.unwrap_err();
    assert_eq!(never.kind, ErrorKind::PermissionDenied, "{never}");
    amend(&core, Amendment::RateLimits(vec![])).await;
    answered(&core, &mut worker, "bob").await.unwrap();
}

#[actix::test]
async fn tokens_are_counted_while_they_come() {
    let (_folder, core, mut worker) = ready().await;
    // Each prompt has three.
    amend(&core, each_user(None, Some(5))).await;
    let (answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    let mut answer = answer.unwrap();
    worker.token(&start, "a").await;
    soon("the first token", answer.generations[0].events.recv()).await;
    let (second, other) = tokio::join!(core.ask("e", "p"), worker.accept());
    second.unwrap();
    worker.cancel().await;
    drop(other);
    // 3 + 1 + 3 are used, and the first goes on.
    let refused = core.ask("e", "p").await.unwrap_err();
    let says = "takes 5 tokens a minute of user 'user'";
    assert!(refused.message.contains(says), "{refused}");
    worker.token(&start, "b").await;
    worker.end(&start, End::Stop).await;
    assert_eq!(whole(answer).await, ("b".into(), End::Stop));
}

/// All of the traffic for `tiny-1`, and `other-1` beside it.
fn both() -> ConfigSpec {
    let (tiny, other) = (config("tiny", "CPU"), config("other", "CPU"));
    ConfigSpec {
        entities: [tiny.entities, other.entities].concat(),
        ..tiny
    }
}

/// A ready endpoint with both on one worker.
async fn two() -> (TempDir, Core, FakeWorker) {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", both()).await.unwrap();
    worker.serve().await;
    worker.serve().await;
    core.until_ready("e").await;
    (folder, core, worker)
}

#[actix::test]
async fn a_call_that_its_entity_refuses_is_taken_by_another_one_when_that_is_wished() {
    let (_folder, core, mut worker) = two().await;
    let busy = || Failure::new(FailureKind::Overloaded, "no room");
    let (refused, ()) = tokio::join!(core.ask("e", "p"), async {
        let start = worker.start().await;
        worker.reject(&start, busy()).await;
    });
    assert_eq!(refused.unwrap_err().kind, ErrorKind::Overloaded);

    amend(&core, fallback(true)).await;
    let (answer, replicas) = tokio::join!(core.ask("e", "p"), async {
        let start = worker.start().await;
        worker.reject(&start, busy()).await;
        let again = worker.accept().await;
        worker.end(&again, End::Stop).await;
        (start.replica, again.replica)
    });
    let answer = answer.unwrap();
    assert_eq!(answer.served_entity, "other-1");
    assert_ne!(replicas.0, replicas.1);

    // A call that is wrong is wrong everywhere.
    let (refused, ()) = tokio::join!(core.ask("e", "p"), async {
        let start = worker.start().await;
        let wrong = Failure::new(FailureKind::BadRequest, "no such token");
        worker.reject(&start, wrong).await;
    });
    assert_eq!(refused.unwrap_err().kind, ErrorKind::BadRequest);
    worker.is_left_alone(Duration::from_millis(100)).await;

    // When none can, the one that the traffic was meant for has the word.
    let (refused, ()) = tokio::join!(core.ask("e", "p"), async {
        for reason in ["the first", "the second"] {
            let start = worker.start().await;
            let failure = Failure::new(FailureKind::Overloaded, reason);
            worker.reject(&start, failure).await;
        }
    });
    let refused = refused.unwrap_err();
    assert_eq!(
        (refused.kind, refused.message.as_str()),
        (ErrorKind::Overloaded, "the first")
    );
}

#[actix::test]
async fn what_waits_for_an_entity_that_is_lost_falls_back_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut one = FakeWorker::join(&core, "0").await;
    let mut other = FakeWorker::join(&core, "1").await;
    core.create("e", both()).await.unwrap();
    // The emptiest device takes the next shard: each worker has one.
    one.serve().await;
    other.serve().await;
    core.until_ready("e").await;
    amend(&core, fallback(true)).await;
    let asked = core.ask("e", "p");
    tokio::pin!(asked);
    // Whoever is asked first has the traffic.
    let (lost, mut kept) = tokio::select! {
        _ = one.start() => (one, other),
        _ = other.start() => (other, one),
        answer = &mut asked => panic!("nobody has answered: {answer:?}"),
    };
    drop(lost);
    let (answer, ()) = tokio::join!(asked, async {
        let start = kept.accept().await;
        kept.end(&start, End::Stop).await;
    });
    assert_eq!(answer.unwrap().served_entity, "other-1");
}
