//! Processes that die and come back: endpoints are READY again without anyone re-creating them.

use std::time::Duration;

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::process::Signal;
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};
use serde_json::{Value, json};

async fn answers(cluster: &Cluster, endpoint: &str) {
    let golden = golden::named("tiny-llama", "spark");
    assert_eq!(
        cluster
            .client
            .continue_text(endpoint, &golden.prompt, TOKENS_MAX)
            .await,
        golden.text
    );
}

/// One endpoint on one shard and one on two, both serving.
async fn two_endpoints() -> Cluster {
    let cluster = Cluster::start(Settings::with_workers(2)).await;
    cluster
        .client
        .deploy_on("one", "tiny-llama", "GPU_LARGE", "Small")
        .await;
    cluster
        .client
        .deploy_on("two", "tiny-llama", "GPU_LARGE_2", "Small")
        .await;
    cluster
}

/// Those of the two that have a shard on `worker`.
async fn served_by(cluster: &Cluster, worker: &str) -> Vec<&'static str> {
    let mut found = Vec::new();
    for endpoint in ["one", "two"] {
        let view = cluster.client.endpoint(endpoint).await;
        let state = &view["config"]["served_entities"][0]["state"];
        let message = state["deployment_state_message"].as_str();
        if message.is_some_and(|message| message.contains(worker)) {
            found.push(endpoint);
        }
    }
    found
}

async fn both_serve(cluster: &Cluster) {
    for endpoint in ["one", "two"] {
        cluster.client.wait_ready(endpoint).await;
        answers(cluster, endpoint).await;
    }
}

#[tokio::test]
async fn a_killed_coordinator_comes_back_with_its_endpoints_ready() {
    let mut cluster = two_endpoints().await;
    let before = cluster.client.endpoint("two").await;
    cluster.kill_coordinator();
    cluster.restart_coordinator().await;
    both_serve(&cluster).await;
    let after = cluster.client.endpoint("two").await;
    for kept in ["id", "creator", "creation_timestamp"] {
        assert_eq!(after[kept], before[kept], "{kept}");
    }
    assert_eq!(after["config"]["config_version"], 1);
}

#[tokio::test]
async fn a_coordinator_killed_in_the_middle_of_a_stream_breaks_it_and_serves_the_retry() {
    let mut cluster = two_endpoints().await;
    let body = json!({"prompt": "ROMEO:\n", "max_tokens": 900, "ignore_eos": true, "temperature": 0, "stream": true});
    let mut events = cluster.client.stream("one", &body).await;
    events.next().await.expect("a first event");
    cluster.kill_coordinator();
    while events.next().await.is_some() {}
    assert!(!events.done(), "a broken stream must not look finished");
    cluster.restart_coordinator().await;
    both_serve(&cluster).await;
    cluster.wait_idle().await;
}

#[tokio::test]
async fn a_killed_worker_comes_back_and_its_endpoints_are_ready_again() {
    let mut cluster = two_endpoints().await;
    for index in [1, 0] {
        let hit = served_by(&cluster, &format!("local/cpu{index}")).await;
        assert!(hit.contains(&"two"), "{hit:?}");
        cluster.kill_worker(index);
        cluster.wait_workers(1).await;
        // Endpoints that had a shard there are not ready meanwhile, and say so.
        for endpoint in hit {
            let not_ready = |view: &Value| view["state"]["ready"] == "NOT_READY";
            let client = &cluster.client;
            client.wait_for(endpoint, "NOT_READY", not_ready).await;
        }
        let view = cluster.client.endpoint("two").await;
        assert_eq!(
            view["config"]["served_entities"][0]["state"]["deployment"], "DEPLOYMENT_RECOVERING",
            "{view:#}"
        );
        cluster
            .client
            .invoke("two", &json!({"inputs": "x"}))
            .await
            .refused(503, "TEMPORARILY_UNAVAILABLE", &["two"]);
        cluster.start_worker(index);
        both_serve(&cluster).await;
    }
}

#[tokio::test]
async fn everything_killed_and_started_again_serves_as_before() {
    let mut cluster = two_endpoints().await;
    cluster.kill_coordinator();
    for index in 0..2 {
        cluster.kill_worker(index);
    }
    // Workers first: they wait for their coordinator.
    for index in 0..2 {
        cluster.start_worker(index);
    }
    cluster.restart_coordinator().await;
    both_serve(&cluster).await;
}

#[tokio::test]
async fn a_request_whose_worker_dies_in_the_middle_ends_with_a_typed_error() {
    let mut cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let body = json!({"prompt": "ROMEO:\n", "max_tokens": 900, "ignore_eos": true, "temperature": 0, "stream": true});
    let mut events = cluster.client.stream("llama", &body).await;
    events.next().await.expect("a first event");
    cluster.kill_worker(0);
    let streamed = events.collect().await;
    let error = streamed
        .error
        .unwrap_or_else(|| panic!("no error in the stream: {:?}", streamed.finish_reasons));
    let error = &error["error"];
    let message = error["message"].as_str().unwrap_or_default();
    assert!(message.ends_with("send the request again"), "{error}");
    assert_eq!(
        (&error["code"], &error["retryable"]),
        (&json!("TEMPORARILY_UNAVAILABLE"), &json!(true)),
        "{error}"
    );
}

#[tokio::test]
async fn requests_without_output_survive_the_death_of_a_rank() {
    const REQUESTS: usize = 24;
    let mut cluster = Cluster::start(Settings::with_workers(3)).await;
    cluster
        .client
        .deploy_on("pair", "tiny-llama", "GPU_LARGE_2", "Large")
        .await;
    let view = cluster.client.endpoint("pair").await;
    let words = &view["config"]["served_entities"][0]["state"]["deployment_state_message"];
    let second = words
        .as_str()
        .and_then(|words| words.split([',', ';']).nth(1))
        .and_then(|name| name.trim().strip_prefix("local/cpu")?.parse().ok())
        .unwrap_or_else(|| panic!("who serves is not in {view:#}"));
    // The group stands still, so that none of the requests has any output when its rank dies.
    cluster.worker(second).signal(Signal::Stop);
    let body = json!({"prompt": "word ".repeat(900), "max_tokens": 2, "ignore_eos": true});
    let asked: Vec<_> = (0..REQUESTS)
        .map(|_| {
            let (client, body) = (cluster.client.clone(), body.clone());
            tokio::spawn(async move { client.invoke("pair", &body).await })
        })
        .collect();
    until("all requests to run", PATIENCE, async || {
        let metrics = cluster.client.metrics().await;
        let accepted = metrics.sum("tandem_prompt_tokens_total", "");
        if accepted.is_some_and(|tokens| tokens >= (900 * REQUESTS) as f64) {
            Ok(())
        } else {
            Err(format!("{accepted:?} prompt tokens are accepted"))
        }
    })
    .await;
    cluster.kill_worker(second);
    for reply in asked {
        let answer = reply.await.unwrap().ok();
        assert_eq!(answer["usage"]["completion_tokens"], 2, "{answer:#}");
    }
}

#[tokio::test]
async fn processes_asked_to_stop_do_so_cleanly() {
    let mut cluster = two_endpoints().await;
    cluster.worker(1).signal(Signal::Terminate);
    assert_eq!(cluster.worker(1).exit(PATIENCE).await.code(), Some(0));
    cluster.wait_workers(1).await;
    cluster.coordinator.signal(Signal::Terminate);
    assert_eq!(cluster.coordinator.exit(PATIENCE).await.code(), Some(0));
    // A worker without its coordinator stays, and can be asked to stop.
    cluster.worker(0).signal(Signal::Terminate);
    assert_eq!(cluster.worker(0).exit(PATIENCE).await.code(), Some(0));
}

#[tokio::test]
async fn a_frozen_worker_is_noticed_and_used_again_when_it_thaws() {
    let mut cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    cluster.worker(0).signal(Signal::Stop);
    cluster
        .client
        .wait_for("llama", "NOT_READY", |view| {
            view["state"]["ready"] == "NOT_READY"
        })
        .await;
    cluster.worker(0).signal(Signal::Continue);
    cluster.client.wait_ready("llama").await;
    answers(&cluster, "llama").await;
}

#[tokio::test]
async fn a_worker_that_is_busy_is_not_taken_for_dead() {
    let mut cluster = Cluster::start(Settings::new()).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama", "CPU", "Large")
        .await;
    let prompt = "word ".repeat(900);
    let body =
        json!({"inputs": vec![prompt; 32], "params": {"max_tokens": 20, "ignore_eos": true}});
    let reply = tokio::time::timeout(
        Duration::from_secs(120),
        cluster.client.invoke("llama", &body),
    )
    .await;
    reply.expect("32 long prompts are answered in time").ok();
    assert!(cluster.worker(0).try_exit().is_none());
    assert!(
        !cluster.worker(0).stderr().contains("reconnect"),
        "{}",
        cluster.worker(0).stderr()
    );
}
