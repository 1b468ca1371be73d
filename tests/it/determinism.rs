//! The same prompt and seed give the same text: again, in a crowd, in another process, and for each number of ranks.

use cluster_tests::client::Client;
use cluster_tests::cluster::Cluster;
use cluster_tests::golden;
use cluster_tests::settings::Settings;
use futures::future::join_all;
use serde_json::{Value, json};

/// Sampled requests over all kinds of prompt; each has a seed of its own.
fn requests() -> Vec<Value> {
    let prompts = golden::all("tiny-llama")
        .into_iter()
        .map(|golden| golden.prompt);
    let body = |(i, prompt)| {
        json!({"inputs": {"prompt": prompt},
            "params": {"max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 1000 + i, "candidate_count": 1 + i % 2}})
    };
    prompts.enumerate().map(body).collect()
}

async fn one_by_one(client: &Client, endpoint: &str, requests: &[Value]) -> Vec<Vec<Vec<String>>> {
    let mut texts = Vec::new();
    for request in requests {
        texts.push(client.invoke(endpoint, request).await.candidates());
    }
    texts
}

async fn all_at_once(client: &Client, endpoint: &str, requests: &[Value]) -> Vec<Vec<Vec<String>>> {
    join_all(
        requests
            .iter()
            .map(async |request| client.invoke(endpoint, request).await.candidates()),
    )
    .await
}

#[tokio::test]
async fn sampled_text_is_the_same_alone_and_in_a_crowd() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama", "CPU", "Large")
        .await;
    let requests = requests();
    let alone = one_by_one(&cluster.client, "llama", &requests).await;
    for _ in 0..3 {
        assert_eq!(
            all_at_once(&cluster.client, "llama", &requests).await,
            alone
        );
    }
}

#[tokio::test]
async fn sampled_text_is_the_same_in_another_process() {
    let requests = requests();
    let mut texts = Vec::new();
    for _ in 0..2 {
        let cluster = Cluster::start(Settings::new()).await;
        cluster
            .client
            .deploy_on("llama", "tiny-llama", "CPU", "Large")
            .await;
        texts.push(all_at_once(&cluster.client, "llama", &requests).await);
    }
    assert_eq!(texts[0], texts[1]);
}

#[tokio::test]
async fn two_ranks_are_equal_to_themselves_alone_in_a_crowd_and_in_another_process() {
    let requests = requests();
    let mut texts = Vec::new();
    for _ in 0..2 {
        let cluster = Cluster::start(Settings::with_workers(2)).await;
        cluster
            .client
            .deploy_on("llama", "tiny-llama", "GPU_LARGE_2", "Large")
            .await;
        texts.push(one_by_one(&cluster.client, "llama", &requests).await);
        texts.push(all_at_once(&cluster.client, "llama", &requests).await);
    }
    assert!(texts.iter().all(|other| *other == texts[0]), "{texts:#?}");
}

#[tokio::test]
async fn a_request_without_a_seed_gets_one_and_varies() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let body =
        json!({"inputs": {"prompt": "ROMEO:\n"}, "params": {"max_tokens": 30, "temperature": 1.0}});
    let mut texts = std::collections::HashSet::new();
    for _ in 0..8 {
        texts.insert(cluster.client.invoke("llama", &body).await.candidate());
    }
    assert!(texts.len() > 1, "eight unseeded answers are all {texts:?}");
}
