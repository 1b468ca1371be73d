//! Packed weights: what one deployment leaves in the cache the next maps.

use std::time::{Duration, Instant};

use cluster_tests::cluster::Cluster;
use cluster_tests::settings::Settings;
use reqwest::Method;
use serde_json::json;

use crate::billion;
use crate::logs::says;

const WRITTEN: &str = "packed weights written to the cache in ";
const MAPPED: &str = "weights found packed in the cache, mapped in ";

#[tokio::test]
async fn a_second_deployment_and_a_new_process_map_what_the_first_packed() {
    let mut cluster = Cluster::start(Settings::new()).await;
    let client = &cluster.client;
    client.deploy("first", "tiny-llama").await;
    let entity = "tiny-llama-1";
    says(&cluster, "first", entity, "build-logs", &[WRITTEN]).await;
    let text = client.continue_text("first", "The capital of", 12).await;
    client.deploy("second", "tiny-llama").await;
    says(&cluster, "second", entity, "build-logs", &[MAPPED]).await;
    let second = client.continue_text("second", "The capital of", 12).await;
    assert_eq!(second, text);
    cluster.kill_worker(0);
    cluster.start_worker(0);
    for endpoint in ["first", "second"] {
        let parts = [" generation 2] load begins", MAPPED];
        says(&cluster, endpoint, entity, "build-logs", &parts).await;
        cluster.client.wait_ready(endpoint).await;
        let again = cluster
            .client
            .continue_text(endpoint, "The capital of", 12)
            .await;
        assert_eq!(again, text);
    }
}

/// Deploys 2.2 GB of weights twice and fills the KV cache of the second deployment.
#[tokio::test]
#[ignore = "needs 5 GB of disk and of memory, and a quiet machine: scripts/check --long"]
async fn a_second_deployment_of_a_billion_parameters_is_ready_in_3_s_and_as_large_as_its_weights_and_cache()
 {
    let (folder, mut cluster) = billion::start().await;
    let before = cluster.worker(0).resident_bytes();
    let begun = Instant::now();
    cluster.client.deploy("first", "billion").await;
    let first = begun.elapsed();
    says(&cluster, "first", "billion-1", "build-logs", &[WRITTEN]).await;
    let path = "/api/2.0/serving-endpoints/first";
    let delete = Method::DELETE;
    cluster.client.call(delete, path, &json!(null)).await.ok();

    let begun = Instant::now();
    cluster.client.deploy("second", "billion").await;
    let second = begun.elapsed();
    says(&cluster, "second", "billion-1", "build-logs", &[MAPPED]).await;
    billion::fill_cache(&cluster, "second").await;
    let plan = billion::plan(&folder);
    let expected = plan.need.weight_bytes + plan.kv_bytes();
    let resident = cluster.worker(0).resident_bytes() - before;
    let ratio = resident as f64 / expected as f64;
    println!(
        "READY after {first:.2?}, the second time after {second:.2?}; resident {resident} bytes ({before} before the \
         first load), weights and KV cache {expected}, ratio {ratio:.3}"
    );
    assert!(second < Duration::from_secs(3), "{second:?}");
    assert!((0.9..=1.1).contains(&ratio), "{ratio:.3}");
}
