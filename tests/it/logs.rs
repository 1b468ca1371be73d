//! Logs and build logs: what a deployment and a run say, read over the API by whoever may see the endpoint.

use cluster_tests::cluster::Cluster;
use cluster_tests::fault::ModelCopy;
use cluster_tests::golden;
use cluster_tests::settings::{Model, Settings};
use cluster_tests::until::{PATIENCE, until};
use serde_json::json;

pub(crate) async fn read(cluster: &Cluster, endpoint: &str, entity: &str, which: &str) -> String {
    let path = format!("/api/2.0/serving-endpoints/{endpoint}/served-models/{entity}/{which}");
    let reply = cluster.client.get(&path).await.ok();
    reply["logs"].as_str().expect("logs are text").to_owned()
}

/// Waits until a log says all of these, in this order.
pub async fn says(cluster: &Cluster, endpoint: &str, entity: &str, which: &str, parts: &[&str]) {
    until(
        &format!("the {which} of {entity} to say {parts:?}"),
        PATIENCE,
        async || {
            let text = read(cluster, endpoint, entity, which).await;
            let mut rest = text.as_str();
            for part in parts {
                match rest.split_once(part) {
                    Some((_, after)) => rest = after,
                    None => return Err(text),
                }
            }
            Ok(())
        },
    )
    .await;
}

#[tokio::test]
async fn a_build_log_tells_a_deployment_from_placement_to_ready_on_every_rank() {
    let cluster = Cluster::start(Settings::with_workers(2)).await;
    cluster
        .client
        .deploy_on("pair", "tiny-llama", "GPU_LARGE_2", "Small")
        .await;
    let parts = [
        "[coordinator] reads the headers of model ml.demo.tiny-llama version 1\n",
        "[coordinator] headers read: LlamaForCausalLM",
        "[coordinator] placed on local/cpu",
        "KV blocks",
    ];
    says(&cluster, "pair", "tiny-llama-1", "build-logs", &parts).await;
    for rank in 0..2 {
        let who = format!(" rank {rank} generation 1] ");
        let parts = [
            format!("{who}load begins: rank {rank} of 2 on "),
            format!("{who}files checked in "),
            format!("{who}memory taken in "),
            format!("{who}shard group of 2 ranks formed in "),
            format!("{who}weights read and packed in "),
            format!("{who}ready in "),
        ];
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        says(&cluster, "pair", "tiny-llama-1", "build-logs", &parts).await;
    }
    says(&cluster, "pair", "tiny-llama-1", "logs", &["serves on "]).await;
}

#[tokio::test]
async fn a_failed_deployment_can_be_read_about_also_after_a_restart_until_its_endpoint_is_deleted()
{
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    copy.edit("tokenizer.json", |bytes| bytes.truncate(100));
    let settings = Settings::new().model(Model::at("ml.demo.broken", copy.path()));
    let mut cluster = Cluster::start(settings).await;
    cluster
        .client
        .create("e", "broken", "CPU", "Small")
        .await
        .ok();
    let message = cluster.client.wait_failed("e").await;
    // What the state says is what the worker said, and the log has it by then.
    let failure = message.split_once(": ").map_or("", |(_, why)| why);
    assert!(failure.contains("tokenizer.json"), "{message}");
    let before = read(&cluster, "e", "broken-1", "build-logs").await;
    for part in [
        "load begins".to_owned(),
        format!("] failed: {failure}"),
        format!("[coordinator] over: {message}"),
        "[coordinator] the deployment has failed; it is not tried again".to_owned(),
    ] {
        assert!(
            before.contains(&part),
            "the log\n{before}\ndoes not say\n  {part}"
        );
    }
    cluster.kill_coordinator();
    cluster.restart_coordinator().await;
    let after = read(&cluster, "e", "broken-1", "build-logs").await;
    assert!(after.starts_with(&before), "{after}");
    let path = "/api/2.0/serving-endpoints/e/served-models/none/logs";
    let unknown = cluster.client.get(path).await;
    unknown.refused(404, "RESOURCE_DOES_NOT_EXIST", &["'none'"]);
    let folder = cluster.folder().join("var/coordinator/logs/e");
    assert!(folder.is_dir());
    let path = "/api/2.0/serving-endpoints/e";
    let delete = reqwest::Method::DELETE;
    cluster.client.call(delete, path, &json!(null)).await.ok();
    until("the logs to be deleted", PATIENCE, async || {
        if folder.exists() {
            Err("still there".into())
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test]
async fn a_run_log_tells_of_lost_workers_and_never_of_prompts() {
    const SECRET: &str = "xyzzy-4711";
    let mut cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("e", "tiny-llama").await;
    let body = json!({"inputs": SECRET, "params": {"max_tokens": 5}});
    cluster.client.invoke("e", &body).await.ok();
    says(
        &cluster,
        "e",
        "tiny-llama-1",
        "logs",
        &["1 requests accepted, 0 refused; "],
    )
    .await;
    cluster.kill_worker(0);
    let parts = [
        "[coordinator] waiting for worker local/cpu0",
        "[coordinator] over: worker local/cpu0",
    ];
    says(&cluster, "e", "tiny-llama-1", "logs", &parts).await;
    cluster.start_worker(0);
    cluster.client.wait_ready("e").await;
    let parts = ["generation 1] ready in", "generation 2] ready in"];
    says(&cluster, "e", "tiny-llama-1", "build-logs", &parts).await;
    for which in ["logs", "build-logs"] {
        let text = read(&cluster, "e", "tiny-llama-1", which).await;
        assert!(!text.contains(SECRET), "{text}");
    }
}
