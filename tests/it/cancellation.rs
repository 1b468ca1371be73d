//! A client that leaves frees what it took: streaming, whole, queued and prefilling requests, and slow readers.

use std::time::Duration;

use cluster_tests::client::{Client, invocations};
use cluster_tests::cluster::Cluster;
use cluster_tests::fake_worker::FakeWorker;
use cluster_tests::fault::DeafClient;
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};
use common::request::End;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::long;

/// Runs for a second or more unless it is cancelled.
fn endless(stream: bool) -> Value {
    json!({"prompt": "ROMEO:\n", "max_tokens": 1000, "ignore_eos": true, "temperature": 0, "stream": stream})
}

/// A coordinator with an endpoint `fake` on a worker that the test plays.
async fn faked(settings: Settings) -> (Cluster, FakeWorker) {
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

/// A request in the background. Aborting it closes its connection.
fn invoke_later(client: &Client, body: Value) -> tokio::task::JoinHandle<()> {
    let client = client.on_new_connections();
    tokio::spawn(async move {
        client.invoke("fake", &body).await;
    })
}

/// Steps that the engine has made, once nothing runs any more.
async fn steps_when_idle(cluster: &Cluster) -> f64 {
    cluster.wait_idle().await;
    cluster
        .client
        .metrics()
        .await
        .sum("tandem_step_seconds_count", "")
        .unwrap_or_default()
}

/// Waits until the request runs on the worker.
async fn running(cluster: &Cluster) {
    until("a request to run", PATIENCE, async || {
        let running = cluster
            .client
            .metrics()
            .await
            .sum("tandem_requests_running", "");
        if running == Some(1.0) {
            Ok(())
        } else {
            Err(format!("{running:?} running"))
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_left_frees_its_blocks_and_stops_computing() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    // Sixteen long continuations: seconds of work, in a thousand steps and some.
    let body = |stream: bool| {
        let mut body = endless(stream);
        body["n"] = json!(16);
        body
    };
    let mut events = cluster.client.stream("llama", &body(true)).await;
    events.next().await.expect("a first event");
    drop(events);
    let streaming = steps_when_idle(&cluster).await;

    let client = cluster.client.on_new_connections();
    let request = tokio::spawn(async move { client.invoke("llama", &body(false)).await });
    running(&cluster).await;
    request.abort();
    let whole = steps_when_idle(&cluster).await;

    cluster.client.invoke("llama", &endless(false)).await.ok();
    let finished = steps_when_idle(&cluster).await - whole;
    assert!(finished >= 900.0, "a thousand tokens took {finished} steps");
    assert!(
        streaming < 500.0,
        "a stream that was left went on for {streaming} steps"
    );
    assert!(
        whole - streaming < 500.0,
        "a request that was left went on for {} steps",
        whole - streaming
    );
}

#[tokio::test]
async fn cancelling_a_stream_reaches_the_worker() {
    let (cluster, mut worker) = faked(Settings::new()).await;
    let client = cluster.client.clone();
    let opening = tokio::spawn(async move { client.stream("fake", &endless(true)).await });
    let start = worker.accept().await;
    worker.say(&start, "one");
    let mut events = opening.await.unwrap();
    while events.next().await.expect("an event")["choices"][0]["text"] != "one" {}
    drop(events);
    assert_eq!(worker.cancelled().await, start.request);
}

#[tokio::test]
async fn cancelling_a_whole_answer_reaches_the_worker() {
    let (cluster, mut worker) = faked(Settings::new()).await;
    let request = invoke_later(&cluster.client, endless(false));
    let start = worker.accept().await;
    worker.say(&start, "one");
    request.abort();
    assert_eq!(worker.cancelled().await, start.request);
}

#[tokio::test]
async fn cancelling_a_prefilling_request_reaches_the_worker() {
    let (cluster, mut worker) = faked(Settings::new()).await;
    // Before Accepted, and between Accepted and the first token.
    for accepted in [false, true] {
        let request = invoke_later(&cluster.client, endless(false));
        let start = worker.start().await;
        if accepted {
            worker.accepted(&start);
        }
        request.abort();
        assert_eq!(
            worker.cancelled().await,
            start.request,
            "accepted: {accepted}"
        );
    }
}

#[tokio::test]
async fn a_cancelled_request_in_the_queue_never_reaches_the_worker() {
    let (cluster, mut worker) = faked(Settings::new()).await;
    // Small admits four.
    let running: Vec<_> = (0..4)
        .map(|_| invoke_later(&cluster.client, endless(false)))
        .collect();
    let mut starts = Vec::new();
    for _ in 0..4 {
        starts.push(worker.accept().await);
    }
    let waiting = async |count: f64| {
        until(&format!("{count} requests to wait"), PATIENCE, async || {
            let waiting = cluster
                .client
                .metrics()
                .await
                .sum("tandem_requests_waiting", "");
            if waiting == Some(count) {
                Ok(())
            } else {
                Err(format!("{waiting:?}"))
            }
        })
        .await;
    };
    let queued = invoke_later(&cluster.client, json!({"prompt": "left", "max_tokens": 1}));
    waiting(1.0).await;
    queued.abort();
    waiting(0.0).await;
    let patient = invoke_later(
        &cluster.client,
        json!({"prompt": "patient", "max_tokens": 1}),
    );
    waiting(1.0).await;
    worker.end(&starts[0], 0, End::Stop);
    let next = worker.start().await;
    assert_eq!(
        next.generate.prompt,
        common::request::Prompt::Text("patient".into())
    );
    drop((running, patient));
}

#[tokio::test]
async fn a_slow_reader_stalls_nobody_and_is_cancelled_after_its_time() {
    let (cluster, mut worker) = faked(Settings::new().limit("idle_stream_ms", 1000)).await;
    let token = std::fs::read_to_string(cluster.folder().join("var/admin.token")).unwrap();
    let deaf = DeafClient::post(
        &cluster.http_address,
        token.trim(),
        &invocations("fake"),
        &endless(true),
    )
    .await;
    let start = worker.accept().await;
    // More than all buffers between us hold.
    let text = "x".repeat(64 << 10);
    for _ in 0..500 {
        worker.say(&start, &text);
    }
    deaf.answered().await;
    // The link is free: another request passes it at once.
    let client = cluster.client.clone();
    let other = tokio::spawn(async move {
        client
            .invoke("fake", &json!({"prompt": "quick", "max_tokens": 4}))
            .await
    });
    let quick = worker.accept().await;
    worker.say(&quick, "here");
    worker.end(&quick, 1, End::Stop);
    let answer = timeout(PATIENCE, other)
        .await
        .expect("an answer in time")
        .unwrap()
        .ok();
    assert_eq!(answer["choices"][0]["text"], "here");
    assert_eq!(worker.cancelled().await, start.request);
    deaf.hang_up();
}

#[tokio::test]
async fn a_deadline_ends_a_request_and_cancels_it() {
    let (cluster, mut worker) = faked(Settings::new().limit("deadline_ms", 500)).await;
    let client = cluster.client.clone();
    let request = tokio::spawn(async move { client.invoke("fake", &endless(false)).await });
    let start = worker.accept().await;
    assert!(
        start.deadline_ms.is_some_and(|ms| ms <= 500),
        "{:?}",
        start.deadline_ms
    );
    let reply = timeout(PATIENCE, request)
        .await
        .expect("an answer in time")
        .unwrap();
    reply.refused(504, "DEADLINE_EXCEEDED", &["500"]);
    assert_eq!(worker.cancelled().await, start.request);
}

#[tokio::test]
async fn a_worker_ends_a_request_at_its_deadline() {
    let cluster = Cluster::start(Settings::new().limit("deadline_ms", 300)).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let mut body = endless(false);
    body["n"] = json!(16);
    let reply = cluster.client.invoke("llama", &body).await;
    reply.refused(504, "DEADLINE_EXCEEDED", &["300"]);
    let steps = steps_when_idle(&cluster).await;
    assert!(steps < 900.0, "the engine went on for {steps} steps");
}

/// Clients that leave at random moments: before the answer, in its middle, or not at all.
#[tokio::test]
async fn after_random_disconnects_all_blocks_are_free() {
    let clients = if long() { 10_000 } else { 300 };
    let cluster = Cluster::start(Settings::new()).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama", "CPU", "Large")
        .await;
    let mut random = StdRng::seed_from_u64(7);
    let mut open = FuturesUnordered::new();
    for _ in 0..clients {
        let body = json!({
            "prompt": "word ".repeat(random.random_range(1..400)),
            "max_tokens": random.random_range(1..200),
            "ignore_eos": true,
            "temperature": 0,
            "n": random.random_range(1..3),
            "stream": random.random_bool(0.5),
        });
        let leaves_after = Duration::from_micros(random.random_range(0..200_000));
        let client = cluster.client.on_new_connections();
        open.push(async move {
            let answer = async {
                if body["stream"] == true {
                    if let Ok(events) = client.try_stream(&invocations("llama"), &body).await {
                        events.collect().await;
                    }
                } else {
                    client.invoke("llama", &body).await;
                }
            };
            // Leaving is the point; finishing before is fine.
            let _ = timeout(leaves_after, answer).await;
        });
        if open.len() >= 48 {
            open.next().await;
        }
    }
    while open.next().await.is_some() {}
    cluster.wait_idle().await;
    let golden = cluster_tests::golden::named("tiny-llama", "spark");
    assert_eq!(
        cluster
            .client
            .continue_text("llama", &golden.prompt, 64)
            .await,
        golden.text
    );
}
