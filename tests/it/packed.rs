//! Packed weights: what one deployment leaves in the cache the next maps.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use cluster_tests::cluster::Cluster;
use cluster_tests::golden;
use cluster_tests::settings::{Model, Settings};
use gguf::TensorType;
use reqwest::Method;
use serde_json::json;

use crate::billion;
use crate::logs::says;
use crate::quantised::file_of;
use crate::quantiser::{Quantiser, quantised};

const WRITTEN: &str = "packed weights written to the cache in ";
const MAPPED: &str = "weights found packed in the cache, mapped in ";
const NOT_USED: &str = "packed weights in the cache were not used: ";
/// Checkpoints that are quantised already.
const READY_MADE: [&str; 2] = ["gguf", "gptq"];

/// Waits until the build log of a model's version 1 says these.
async fn build_log(cluster: &Cluster, endpoint: &str, model: &str, parts: &[&str]) {
    let entity = format!("{model}-1");
    says(cluster, endpoint, &entity, "build-logs", parts).await;
}

async fn ask(cluster: &Cluster, endpoint: &str) -> String {
    let text = cluster.client.continue_text(endpoint, "The capital of", 12);
    text.await
}

async fn delete(cluster: &Cluster, endpoint: &str) {
    let path = format!("/api/2.0/serving-endpoints/{endpoint}");
    let reply = cluster.client.call(Method::DELETE, &path, &json!(null));
    reply.await.ok();
}

#[tokio::test]
async fn a_second_deployment_and_a_new_process_map_what_the_first_packed() {
    let mut cluster = Cluster::start(Settings::new()).await;
    let client = &cluster.client;
    client.deploy("first", "tiny-llama").await;
    build_log(&cluster, "first", "tiny-llama", &[WRITTEN]).await;
    let text = ask(&cluster, "first").await;
    client.deploy("second", "tiny-llama").await;
    build_log(&cluster, "second", "tiny-llama", &[MAPPED]).await;
    assert_eq!(ask(&cluster, "second").await, text);
    cluster.kill_worker(0);
    cluster.start_worker(0);
    for endpoint in ["first", "second"] {
        let parts = [" generation 2] load begins", MAPPED];
        build_log(&cluster, endpoint, "tiny-llama", &parts).await;
        cluster.client.wait_ready(endpoint).await;
        assert_eq!(ask(&cluster, endpoint).await, text);
    }
}

#[tokio::test]
async fn quantised_checkpoints_are_mapped_too_and_damaged_entries_are_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let file = file_of("tiny-llama", TensorType::Q4_1, folder.path());
    let gptq = quantised(&golden::model_folder("tiny-llama"), Quantiser::GPTQ);
    let settings = Settings::new()
        .model(Model::at("ml.demo.gguf", &file))
        .model(Model::at("ml.demo.gptq", gptq.path()));
    let mut cluster = Cluster::start(settings).await;
    let mut texts = Vec::new();
    for model in READY_MADE {
        cluster.client.deploy(model, model).await;
        build_log(&cluster, model, model, &[WRITTEN]).await;
        texts.push(ask(&cluster, model).await);
        let second = format!("{model}-second");
        cluster.client.deploy(&second, model).await;
        build_log(&cluster, &second, model, &[MAPPED]).await;
        assert_eq!(ask(&cluster, &second).await, *texts.last().unwrap());
        delete(&cluster, &second).await;
    }
    cluster.kill_worker(0);
    let entries = cluster.folder().join("var/cache/packed");
    let entries: Vec<_> = fs::read_dir(entries).unwrap().collect();
    assert_eq!(entries.len(), READY_MADE.len());
    for entry in entries {
        let file = OpenOptions::new().write(true).open(entry.unwrap().path());
        let file = file.unwrap();
        let middle = file.metadata().unwrap().len() / 2;
        file.write_all_at(b"spoilt", middle).unwrap();
    }
    cluster.start_worker(0);
    for (model, text) in READY_MADE.iter().zip(texts) {
        let parts = [" generation 2] load begins", NOT_USED, WRITTEN];
        build_log(&cluster, model, model, &parts).await;
        cluster.client.wait_ready(model).await;
        assert_eq!(ask(&cluster, model).await, text, "{model}");
        let third = format!("{model}-third");
        cluster.client.deploy(&third, model).await;
        build_log(&cluster, &third, model, &[MAPPED]).await;
        assert_eq!(ask(&cluster, &third).await, text, "{model}");
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
    build_log(&cluster, "first", "billion", &[WRITTEN]).await;
    delete(&cluster, "first").await;

    let begun = Instant::now();
    cluster.client.deploy("second", "billion").await;
    let second = begun.elapsed();
    build_log(&cluster, "second", "billion", &[MAPPED]).await;
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
