//! Requests: caps, queue, cancellation, deadlines, slow readers, refusals.

use std::time::{Duration, Instant};

use common::request::{End, Failure, FailureKind, Generate, Prompt};
use tempfile::TempDir;

use crate::Core;
use crate::actors::testing::{FakeWorker, call, cluster, config, soon, whole};
use crate::api::{ErrorKind, Gateway, GenerationEvent};

/// A ready endpoint of size Small on one worker; four may wait.
async fn ready() -> (TempDir, Core, FakeWorker) {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("e", config("tiny", "CPU")).await.unwrap();
    worker.serve().await;
    core.until_ready("e").await;
    (folder, core, worker)
}

#[actix::test]
async fn four_run_four_wait_and_the_ninth_is_sent_away() {
    let (_folder, core, mut worker) = ready().await;
    let gateway = core.gateway.clone();
    let eight = actix_rt::spawn(async move { gateway.generate(call("e", &["p"; 8])).await });
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(worker.accept().await);
    }
    worker.is_left_alone(Duration::from_millis(300)).await;
    let ninth = core.ask("e", "p").await.unwrap_err();
    assert_eq!(
        (ninth.kind, ninth.retry_after_s.is_some()),
        (ErrorKind::Overloaded, true),
        "{ninth}"
    );
    let never = core
        .gateway
        .generate(call("e", &["p"; 9]))
        .await
        .unwrap_err();
    assert_eq!(never.kind, ErrorKind::BadRequest, "{never}");
    for _ in 0..4 {
        worker.end(&running.pop().unwrap(), End::Stop).await;
        let next = worker.accept().await;
        running.insert(0, next);
    }
    assert_eq!(
        soon("all accepted", eight)
            .await
            .unwrap()
            .unwrap()
            .generations
            .len(),
        8
    );
}

#[actix::test]
async fn a_caller_that_leaves_frees_its_place_wherever_its_request_is() {
    let (_folder, core, mut worker) = ready().await;
    // Streaming.
    let (answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    worker.token(&start, "x").await;
    drop(answer);
    assert_eq!(worker.cancel().await, start.request);
    // Given to a worker, not accepted.
    let gateway = core.gateway.clone();
    let waiting = actix_rt::spawn(async move { gateway.generate(call("e", &["p"])).await });
    let start = worker.start().await;
    waiting.abort();
    assert_eq!(worker.cancel().await, start.request);
    // Queued: four run, the fifth waits and leaves; the sixth is the next to run.
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(tokio::join!(core.ask("e", "p"), worker.accept()));
    }
    let gateway = core.gateway.clone();
    let queued = actix_rt::spawn(async move { gateway.generate(call("e", &["fifth"])).await });
    let gateway = core.gateway.clone();
    let sixth = actix_rt::spawn(async move { gateway.generate(call("e", &["sixth"])).await });
    worker.is_left_alone(Duration::from_millis(200)).await;
    queued.abort();
    let (answer, start) = running.pop().unwrap();
    worker.end(&start, End::Length).await;
    assert_eq!(whole(answer.unwrap()).await.1, End::Length);
    let next = worker.accept().await;
    assert_eq!(next.generate.prompt, Prompt::Text("sixth".into()));
    assert!(soon("the sixth", sixth).await.unwrap().is_ok());
}

#[actix::test]
async fn a_request_that_waits_beyond_its_deadline_is_told_so() {
    let (_folder, core, mut worker) = ready().await;
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(tokio::join!(core.ask("e", "p"), worker.accept()));
    }
    let mut late = call("e", &["late"]);
    late.deadline = Instant::now() + Duration::from_millis(200);
    assert_eq!(
        core.gateway.generate(late).await.unwrap_err().kind,
        ErrorKind::Deadline
    );
    worker.end(&running[0].1, End::Stop).await;
    worker.is_left_alone(Duration::from_millis(300)).await;
}

#[actix::test]
async fn the_time_left_travels_with_the_request() {
    let (_folder, core, mut worker) = ready().await;
    let (_answer, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    let left = start.deadline_ms.unwrap();
    assert!((50_000..=60_000).contains(&left), "{left}");
}

#[actix::test]
async fn a_reader_that_stops_is_cancelled_and_the_others_go_on() {
    let (_folder, core, mut worker) = ready().await;
    let (slow, slow_start) = tokio::join!(core.ask("e", "p"), worker.accept());
    let (other, other_start) = tokio::join!(core.ask("e", "p"), worker.accept());
    let (mut slow, mut other) = (slow.unwrap(), other.unwrap());
    worker.token(&slow_start, "unread").await;
    // idle_stream_ms is 1500; the other reads a token in each round.
    let cancelled = async {
        loop {
            worker.token(&other_start, "x").await;
            if let Ok(request) =
                tokio::time::timeout(Duration::from_millis(100), worker.cancel()).await
            {
                return request;
            }
        }
    };
    let read = async {
        loop {
            soon("the other's token", other.generations[0].events.recv())
                .await
                .unwrap();
        }
    };
    let request = tokio::select! { request = soon("a cancel", cancelled) => request, () = read => unreachable!() };
    assert_eq!(request, slow_start.request);
    let events = &mut slow.generations[0].events;
    assert!(matches!(
        events.recv().await,
        Some(GenerationEvent::Delta(_))
    ));
    assert!(matches!(
        events.recv().await,
        Some(GenerationEvent::End {
            end: End::Cancelled,
            ..
        })
    ));
    assert!(events.recv().await.is_none());
}

#[actix::test]
async fn a_refusal_is_passed_on_by_what_the_caller_can_do() {
    let (_folder, core, mut worker) = ready().await;
    let cases = [
        (FailureKind::BadRequest, ErrorKind::BadRequest),
        (FailureKind::TooLarge, ErrorKind::BadRequest),
        (FailureKind::Overloaded, ErrorKind::Overloaded),
        (FailureKind::Internal, ErrorKind::Internal),
    ];
    for (said, told) in cases {
        let (answer, ()) = tokio::join!(core.ask("e", "p"), async {
            let start = worker.start().await;
            worker.reject(&start, Failure::new(said, "because")).await;
        });
        let error = answer.unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (told, "because"));
    }
}

#[actix::test]
async fn token_prompts_that_cannot_fit_the_context_are_refused_at_once() {
    let (_folder, core, mut worker) = ready().await;
    let ask = |ids: usize, tokens_max| {
        let mut call = call("e", &[]);
        let mut generate = Generate::new(Prompt::Tokens(vec![1; ids]));
        generate.stop.tokens_max = tokens_max;
        call.prompts = vec![generate];
        core.gateway.generate(call)
    };
    let error = ask(1024, None).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadRequest);
    assert!(
        error
            .message
            .contains("the prompt has 1024 tokens; the model's context is 1024"),
        "{error}"
    );
    let (scored, _) = tokio::join!(ask(1024, Some(0)), worker.accept());
    assert!(scored.is_ok());
}

#[actix::test]
async fn a_worker_that_sends_more_than_was_asked_for_loses_the_request_and_nothing_else() {
    let (_folder, core, mut worker) = ready().await;
    let mut greedy = call("e", &["p"]);
    greedy.prompts[0].stop.tokens_max = Some(2);
    let (answer, start) = tokio::join!(core.gateway.generate(greedy), worker.accept());
    let mut answer = answer.unwrap();
    for _ in 0..8 {
        worker.token(&start, "x").await;
    }
    assert_eq!(worker.cancel().await, start.request);
    let mut events = 0;
    while let Some(event) = soon("an event", answer.generations[0].events.recv()).await {
        assert!(matches!(event, GenerationEvent::Delta(_)));
        events += 1;
    }
    assert!(events < 8);
    let (next, _) = tokio::join!(core.ask("e", "p"), worker.accept());
    assert!(next.is_ok());
}

#[actix::test]
async fn a_replica_runs_as_many_requests_as_its_memory_has_room_for() {
    use crate::policy::memory_plan;
    use common::wire::message::DeviceKind;

    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let config = config("tiny", "CPU");
    let registry = &core.gateway.means.registry;
    let facts = registry.facts(&config.entities[0].model).await.unwrap();
    let need = memory_plan::need(&facts, DeviceKind::Cpu, 1, 4).unwrap();
    let mut hello = FakeWorker::hello(&core, "0");
    hello.device.memory_bytes = need.bytes_for(2);
    let mut worker = FakeWorker::dial(&core, hello).await;
    assert!(worker.command().await.is_some());
    core.create("e", config).await.unwrap();
    worker.serve().await;
    let view = core.until_ready("e").await;
    let words = &view.active.unwrap().entities[0].message;
    assert!(words.contains("room for 2 of 4 requests"), "{words}");
    // Two run, four wait.
    let gateway = core.gateway.clone();
    let six = actix_rt::spawn(async move { gateway.generate(call("e", &["p"; 6])).await });
    let (one, _) = (worker.accept().await, worker.accept().await);
    worker.is_left_alone(Duration::from_millis(300)).await;
    let seventh = core.ask("e", "p").await.unwrap_err();
    assert_eq!(seventh.kind, ErrorKind::Overloaded, "{seventh}");
    worker.end(&one, End::Stop).await;
    worker.accept().await;
    worker.is_left_alone(Duration::from_millis(100)).await;
    six.abort();
}

#[actix::test]
async fn deleting_an_endpoint_ends_its_requests_for_good() {
    let (_folder, core, mut worker) = ready().await;
    let (streamed, start) = tokio::join!(core.ask("e", "p"), worker.accept());
    worker.token(&start, "x").await;
    let mut streamed = streamed.unwrap();
    let first = soon("a token", streamed.generations[0].events.recv()).await;
    assert!(matches!(first, Some(GenerationEvent::Delta(_))));
    let gateway = core.gateway.clone();
    let silent = actix_rt::spawn(async move { gateway.generate(call("e", &["p"])).await });
    worker.start().await;
    core.gateway.delete("e".into()).await.unwrap();
    let silent = soon("an answer", silent).await.unwrap().unwrap_err();
    assert_eq!(silent.kind, ErrorKind::NotFound, "{silent}");
    assert_eq!(silent.message, "Endpoint with name 'e' does not exist.");
    let (text, end) = soon("its end", whole(streamed)).await;
    let End::Error(failure) = end else {
        panic!("{end:?}");
    };
    assert_eq!((text.as_str(), failure.kind), ("", FailureKind::NotFound));
    assert!(!failure.kind.retryable());
    assert_eq!(
        failure.message,
        "endpoint 'e' was deleted while it answered"
    );
}
