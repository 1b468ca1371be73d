//! The coordinator against workers that the test plays: retries, typed errors, full queues, strangers.

use cluster_tests::cluster::Cluster;
use cluster_tests::fake_worker::{FakeWorker, hello};
use cluster_tests::fault;
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};
use common::ids::WorkerId;
use common::request::{End, Failure, FailureKind, Prompt};
use common::wire::message::{Command, Report, ShardState};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use cluster_tests::client::Reply;

fn invoke_later(cluster: &Cluster, body: Value) -> JoinHandle<Reply> {
    let client = cluster.client.clone();
    tokio::spawn(async move { client.invoke("fake", &body).await })
}

fn question() -> Value {
    json!({"prompt": "question", "max_tokens": 4, "temperature": 0, "seed": 9})
}

/// One played worker that holds the endpoint `fake`.
async fn one_worker(settings: Settings) -> (Cluster, FakeWorker) {
    let cluster = Cluster::coordinator_only(settings).await;
    let mut worker = FakeWorker::join(&cluster, 0).await;
    cluster
        .client
        .create("fake", "tiny-llama", "CPU", "Small")
        .await
        .ok();
    worker.hold().await;
    cluster.client.wait_ready("fake").await;
    (cluster, worker)
}

#[tokio::test]
async fn a_request_travels_with_what_resuming_needs() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    let request = invoke_later(&cluster, question());
    let start = worker.accept().await;
    assert_eq!((start.attempt, start.resume.len()), (0, 0));
    assert_eq!(start.generate.prompt, Prompt::Text("question".into()));
    assert_eq!(
        (start.generate.sampling.seed, start.generate.stop.tokens_max),
        (9, Some(4))
    );
    assert!(start.deadline_ms.is_some());
    worker.say(&start, " an");
    worker.say(&start, "swer");
    worker.end(&start, 2, End::Length);
    let answer = request.await.unwrap().ok();
    assert_eq!(answer["choices"][0]["text"], " answer");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6})
    );
}

#[tokio::test]
async fn a_request_whose_replica_dies_before_its_first_token_is_retried() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    let request = invoke_later(&cluster, question());
    let first = worker.accept().await;
    drop(worker);
    let mut worker = FakeWorker::join(&cluster, 0).await;
    worker.hold().await;
    let second = worker.accept().await;
    assert_eq!((second.request, second.attempt), (first.request, 1));
    assert_eq!(second.generate, first.generate);
    worker.say(&second, "here");
    worker.end(&second, 1, End::Stop);
    assert_eq!(request.await.unwrap().ok()["choices"][0]["text"], "here");
}

#[tokio::test]
async fn a_stream_whose_replica_dies_after_its_first_token_ends_with_a_typed_error() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    let client = cluster.client.clone();
    let mut body = question();
    body["stream"] = json!(true);
    let opening = tokio::spawn(async move { client.stream("fake", &body).await });
    let start = worker.accept().await;
    worker.say(&start, "one");
    let mut events = opening.await.unwrap();
    while events.next().await.expect("an event")["choices"][0]["text"] != "one" {}
    drop(worker);
    let rest = events.collect().await;
    let error = rest
        .error
        .unwrap_or_else(|| panic!("no error event: {:?}", rest.finish_reasons));
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("send the request again"), "{message}");
    assert_eq!(error["error"]["code"], "TEMPORARILY_UNAVAILABLE", "{error}");
}

#[tokio::test]
async fn a_failure_of_the_worker_is_told_with_its_kind() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    let cases = [
        (FailureKind::BadRequest, 400, "BAD_REQUEST"),
        (FailureKind::TooLarge, 400, "BAD_REQUEST"),
        (FailureKind::Internal, 500, "INTERNAL_ERROR"),
    ];
    for (kind, status, code) in cases {
        let request = invoke_later(&cluster, question());
        let start = worker.start().await;
        worker.rejected(&start, Failure::new(kind, "told by the worker"));
        request
            .await
            .unwrap()
            .refused(status, code, &["told by the worker"]);
    }
}

#[tokio::test]
async fn a_full_queue_is_a_429_with_a_time_to_come_again() {
    let (cluster, mut worker) = one_worker(Settings::new().limit("queue_requests_max", 2)).await;
    let mut requests: Vec<JoinHandle<Reply>> =
        (0..4).map(|_| invoke_later(&cluster, question())).collect();
    let mut starts = Vec::new();
    for _ in 0..4 {
        starts.push(worker.accept().await);
    }
    requests.extend((0..2).map(|_| invoke_later(&cluster, question())));
    until("two requests to wait", PATIENCE, async || {
        let waiting = cluster
            .client
            .metrics()
            .await
            .sum("tandem_requests_waiting", "");
        if waiting == Some(2.0) {
            Ok(())
        } else {
            Err(format!("{waiting:?}"))
        }
    })
    .await;
    let refused = cluster.client.invoke("fake", &question()).await;
    refused.refused(429, "REQUEST_LIMIT_EXCEEDED", &["fake"]);
    assert!(
        refused.retry_after_s.is_some_and(|s| s >= 1),
        "{:?}",
        refused.retry_after_s
    );
    // What waits is answered when there is room.
    for start in &starts {
        worker.end(start, 0, End::Stop);
    }
    for _ in 0..2 {
        let start = worker.accept().await;
        worker.end(&start, 0, End::Stop);
    }
    for request in requests {
        request.await.unwrap().ok();
    }
}

#[tokio::test]
async fn a_full_token_backlog_is_a_429() {
    let (cluster, mut worker) = one_worker(Settings::new().limit("queue_tokens_max", 1000)).await;
    let running: Vec<_> = (0..4).map(|_| invoke_later(&cluster, question())).collect();
    for _ in 0..4 {
        worker.accept().await;
    }
    let long = json!({"prompt": "x".repeat(800), "max_tokens": 4});
    let waiting = invoke_later(&cluster, long.clone());
    until("a request to wait", PATIENCE, async || {
        let waiting = cluster
            .client
            .metrics()
            .await
            .sum("tandem_requests_waiting", "");
        if waiting == Some(1.0) {
            Ok(())
        } else {
            Err(format!("{waiting:?}"))
        }
    })
    .await;
    cluster.client.invoke("fake", &long).await.refused(
        429,
        "REQUEST_LIMIT_EXCEEDED",
        &["busy", "try again in"],
    );
    drop((running, waiting));
}

#[tokio::test]
async fn garbage_on_the_worker_port_closes_its_link_and_nothing_else() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    let mut random = StdRng::seed_from_u64(3);
    let mut noise = vec![0; 4096];
    random.fill_bytes(&mut noise);
    let lying_length = [&[0x1a, 0x7d, 1, 1][..], &u32::MAX.to_le_bytes()[..]].concat();
    let command_to_coordinator = [
        &[0x1a, 0x7d, 1, 0][..],
        &3u32.to_le_bytes()[..],
        &[5, 0, 0][..],
    ]
    .concat();
    let no_message = [
        &[0x1a, 0x7d, 1, 1][..],
        &4u32.to_le_bytes()[..],
        &[0xff; 4][..],
    ]
    .concat();
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &noise,
        &lying_length,
        &command_to_coordinator,
        &no_message,
    ] {
        fault::throw(&cluster.worker_address, bytes).await;
    }
    let request = invoke_later(&cluster, question());
    let start = worker.accept().await;
    worker.end(&start, 0, End::Stop);
    request.await.unwrap().ok();
}

#[tokio::test]
async fn a_joined_worker_that_turns_to_garbage_loses_its_link_and_may_come_back() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    // A second Hello on the same link is out of order.
    worker.report(Report::Hello(Box::new(hello(
        cluster.worker_name(0),
        cluster.worker_secret(),
    ))));
    worker.closed().await;
    let mut worker = FakeWorker::join(&cluster, 0).await;
    worker.hold().await;
    cluster.client.wait_ready("fake").await;
}

#[tokio::test]
async fn a_stranger_is_refused_with_the_reason() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let refused = async |hello| match FakeWorker::dial(&cluster.worker_address, hello)
        .await
        .next()
        .await
    {
        Command::Refused { reason } => reason,
        other => panic!("expected Refused, got {other:?}"),
    };
    let wrong_secret = hello(cluster.worker_name(0), "guessed".into());
    let reason = refused(wrong_secret).await;
    assert!(
        reason.contains("secret") && !reason.contains(&cluster.worker_secret()),
        "{reason}"
    );
    let unknown = hello(WorkerId("local/cpu9".into()), cluster.worker_secret());
    let reason = refused(unknown).await;
    assert!(
        reason.contains("local/cpu9") && reason.contains("cluster.toml"),
        "{reason}"
    );
    let mut from_the_future = hello(cluster.worker_name(0), cluster.worker_secret());
    (from_the_future.protocol_min, from_the_future.protocol_max) = (1000, 1001);
    let reason = refused(from_the_future).await;
    assert!(reason.contains("1000"), "{reason}");
}

#[tokio::test]
async fn a_worker_that_answers_no_pings_is_given_up() {
    let (cluster, mut worker) = one_worker(Settings::new()).await;
    worker.freeze();
    worker.closed().await;
    cluster
        .client
        .wait_for("fake", "NOT_READY", |view| {
            view["state"]["ready"] == "NOT_READY"
        })
        .await;
}

#[tokio::test]
async fn a_shard_that_fails_to_load_fails_the_deployment_with_its_words() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let mut worker = FakeWorker::join(&cluster, 0).await;
    cluster
        .client
        .create("fake", "tiny-llama", "CPU", "Small")
        .await
        .ok();
    let spec = worker.load().await;
    let failure = Failure::new(FailureKind::BadRequest, "the weights are on fire");
    worker.state(&spec, ShardState::Failed(failure));
    assert!(
        cluster
            .client
            .wait_failed("fake")
            .await
            .contains("the weights are on fire")
    );
}

#[tokio::test]
async fn two_ranks_are_loaded_as_one_group() {
    let cluster = Cluster::coordinator_only(Settings::with_workers(2)).await;
    let mut workers = [
        FakeWorker::join(&cluster, 0).await,
        FakeWorker::join(&cluster, 1).await,
    ];
    cluster
        .client
        .create("fake", "tiny-llama", "GPU_LARGE_2", "Small")
        .await
        .ok();
    let specs = [workers[0].load().await, workers[1].load().await];
    assert_eq!(
        (specs[0].replica, specs[0].generation),
        (specs[1].replica, specs[1].generation)
    );
    assert_eq!(
        (specs[0].group_key, &specs[0].members),
        (specs[1].group_key, &specs[1].members)
    );
    let mut ranks = specs.each_ref().map(|spec| spec.rank);
    ranks.sort_unstable();
    assert_eq!(ranks, [0, 1]);
    for (index, spec) in specs.iter().enumerate() {
        assert_eq!(
            spec.members[spec.rank as usize].worker,
            cluster.worker_name(index)
        );
    }
    // Ready when both are.
    workers[0].ready(&specs[0]);
    assert_eq!(
        cluster.client.endpoint("fake").await["state"]["ready"],
        "NOT_READY"
    );
    workers[1].ready(&specs[1]);
    cluster.client.wait_ready("fake").await;
    // Requests go to rank 0.
    let request = invoke_later(&cluster, question());
    let leader = specs.iter().position(|spec| spec.rank == 0).unwrap();
    let start = workers[leader].accept().await;
    workers[leader].end(&start, 0, End::Stop);
    request.await.unwrap().ok();
}
