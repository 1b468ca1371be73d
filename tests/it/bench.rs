//! The load generator against a real cluster, and a checkpoint of a real shape made and served.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bench::client::{Api, Client, Target};
use bench::length::Length;
use bench::load::{Load, Loop};
use bench::prompt::{PromptForm, Prompts};
use bench::report::Report;
use cluster_tests::cluster::Cluster;
use cluster_tests::settings::{Model, Settings};
use cluster_tests::source;

const REQUESTS: u64 = 12;

/// Sends a short load to an endpoint and sums it up.
async fn report(cluster: &mut Cluster, endpoint: &str, form: PromptForm) -> Report {
    let target = Target {
        url: format!(
            "http://{}/serving-endpoints/completions",
            cluster.http_address
        ),
        api: Api::Openai,
        model: Some(endpoint.into()),
        token: Some(cluster.admin_token()),
        timeout: Duration::from_secs(60),
    };
    let load = Load {
        loop_: Loop::Closed(4),
        requests: REQUESTS,
        time_max: None,
        prompt: Length::Uniform(20, 60),
        output: Length::Fixed(8),
        prompts: Prompts {
            form,
            shared: 0.5,
            seed: 1,
        },
    };
    let worker = cluster.worker(0).id();
    let before = bench::process::cpu_seconds(&[worker]);
    let records = load.run(&Client::new(target).unwrap()).await;
    let used = bench::process::cpu_seconds(&[worker]) - before;
    Report::of(endpoint, &records, Some(used))
}

#[tokio::test]
async fn a_load_on_a_cluster_is_answered_whole_and_its_tokens_are_counted() {
    let mut cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let ids = report(&mut cluster, "llama", PromptForm::Ids).await;
    assert_eq!((ids.answered, ids.failed()), (REQUESTS, 0), "{ids}");
    assert_eq!(ids.output_tokens, 8 * REQUESTS, "{ids}");
    assert!(
        (20 * REQUESTS..=60 * REQUESTS).contains(&ids.prompt_tokens),
        "{ids}"
    );
    assert!(
        ids.ttft_ms.p50 > 0.0 && ids.e2e_ms.p50 >= ids.ttft_ms.p50,
        "{ids}"
    );
    let text = report(&mut cluster, "llama", PromptForm::Text).await;
    assert_eq!((text.answered, text.failed()), (REQUESTS, 0), "{text}");
    cluster.wait_idle().await;
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_told_by_its_status() {
    let mut cluster = Cluster::start(Settings::new()).await;
    let report = report(&mut cluster, "nobody", PromptForm::Ids).await;
    assert_eq!(
        report.failures.get("status 404"),
        Some(&REQUESTS),
        "{report}"
    );
}

#[tokio::test]
async fn random_checkpoints_are_the_same_again_and_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let made = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        make(&out, more);
        out
    };
    let llama = made("llama", &["--layers", "2"]);
    let mistral = made(
        "mistral",
        &["--family", "mistral", "--layers", "1", "--shard-mb", "5"],
    );
    let mpt = made("mpt", &["--family", "mpt", "--layers", "1"]);
    let again = made("again", &["--layers", "2"]);
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(
        weights(&llama) == weights(&again),
        "equal seeds gave other weights"
    );

    let model = |name: &str, path: &Path| {
        let mut model = Model::at(&format!("ml.demo.{name}"), path);
        model.context_max = Some(128);
        model
    };
    let settings = Settings::new()
        .model(model("random-llama", &llama))
        .model(model("random-mistral", &mistral))
        .model(model("random-mpt", &mpt));
    let mut cluster = Cluster::start(settings).await;
    for name in ["random-llama", "random-mistral", "random-mpt"] {
        cluster.client.deploy(name, name).await;
        let report = report(&mut cluster, name, PromptForm::Text).await;
        assert_eq!(
            (report.answered, report.failed()),
            (REQUESTS, 0),
            "{report}"
        );
    }
}

fn make(out: &Path, more: &[&str]) {
    let script = source::root().join("scripts/make_random_model");
    let made = Command::new("python3")
        .arg(script)
        .args(["--size", "15m", "--out"])
        .arg(out)
        .args(more)
        .output()
        .expect("python3 is installed");
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}
