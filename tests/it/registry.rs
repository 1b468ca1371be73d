//! Models that come from registries: found, planned from their headers, fetched once, whole or not at all.

use std::collections::BTreeMap;

use cluster_tests::cluster::Cluster;
use cluster_tests::fake_registry::{FakeRegistry, Wrong, logged};
use cluster_tests::golden::{self, Golden, TOKENS_MAX};
use cluster_tests::settings::Settings;
use cluster_tests::until::PATIENCE;

const WEIGHTS: &str = "model/model.safetensors";

/// A registry with tiny-llama as `ml.demo.logged` version 1.
async fn registry() -> FakeRegistry {
    let fake = FakeRegistry::start().await;
    fake.register(
        "ml.demo.logged",
        1,
        logged(&golden::model_folder("tiny-llama")),
    );
    fake
}

/// A cluster with this registry and no models of its own.
async fn cluster(fake: &FakeRegistry, workers: usize) -> Cluster {
    let mut settings = Settings::with_workers(workers);
    settings.models.clear();
    settings.extra = fake.toml("mlflow");
    Cluster::start(settings).await
}

fn sum() -> Golden {
    golden::named("tiny-llama", "sum")
}

async fn answers(cluster: &Cluster, endpoint: &str) {
    let sum = sum();
    let text = cluster
        .client
        .continue_text(endpoint, &sum.prompt, TOKENS_MAX);
    assert_eq!(text.await, sum.text);
}

/// Requests for the weights: for their header alone, and for the file.
fn fetched(fake: &FakeRegistry) -> usize {
    fake.requested(WEIGHTS)
}

#[tokio::test]
async fn a_logged_model_is_fetched_once_and_serves_as_from_a_folder() {
    let fake = registry().await;
    let cluster = cluster(&fake, 1).await;
    cluster.client.deploy("first", "logged").await;
    answers(&cluster, "first").await;
    let view = cluster.client.endpoint("first").await;
    assert_eq!(view["task"], "llm/v1/completions");
    assert_eq!(fetched(&fake), 2, "its header, and the file");
    assert_eq!(fake.requested("pytorch_model.bin"), 0);
    assert_eq!(fake.requested("conda.yaml"), 0);
    cluster.client.deploy("second", "logged").await;
    answers(&cluster, "second").await;
    assert_eq!(fetched(&fake), 2, "both endpoints use what is there");
}

#[tokio::test]
async fn a_gguf_file_is_planned_from_its_header_and_fetched_once() {
    const FILE: &str = "model/tiny.gguf";
    let fake = FakeRegistry::start().await;
    let source = golden::model_folder("tiny-llama");
    let mut files = logged(&source);
    files.retain(|path, _| path == "MLmodel" || path == "conda.yaml");
    let mut writer = gguf::write::from_folder(&source, |_| gguf::TensorType::Bf16);
    gguf::write::set_tokenizer(&mut writer, &source, "mpt");
    files.insert(FILE.to_owned(), writer.to_bytes());
    fake.register("ml.demo.logged", 1, files);
    let cluster = cluster(&fake, 2).await;
    cluster
        .client
        .deploy_on("pair", "logged", "GPU_LARGE_2", "Small")
        .await;
    answers(&cluster, "pair").await;
    assert_eq!(fake.requested(FILE), 2, "its header, and the file");
    assert_eq!(fake.requested("conda.yaml"), 0);
    let view = cluster.client.endpoint("pair").await;
    assert_eq!(view["task"], "llm/v1/completions");
}

#[tokio::test]
async fn ranks_on_one_machine_share_one_download() {
    let fake = registry().await;
    let cluster = cluster(&fake, 2).await;
    cluster
        .client
        .deploy_on("pair", "logged", "GPU_LARGE_2", "Small")
        .await;
    answers(&cluster, "pair").await;
    assert_eq!(fetched(&fake), 2, "its header, and the file");
}

#[tokio::test]
async fn a_download_that_breaks_off_is_resumed() {
    let fake = registry().await;
    let cluster = cluster(&fake, 1).await;
    // The header's reader leaves before that.
    fake.fault(WEIGHTS, 2, Wrong::BreaksAfter(1_000_000));
    cluster.client.deploy("e", "logged").await;
    answers(&cluster, "e").await;
    let requests = fake.state().requests.clone();
    assert!(
        requests
            .iter()
            .any(|r| r.contains(&format!("{WEIGHTS} from "))),
        "{requests:#?}"
    );
}

#[tokio::test]
async fn a_file_that_disappears_under_way_fails_the_deployment_by_name() {
    let fake = registry().await;
    let cluster = cluster(&fake, 1).await;
    fake.fault("tokenizer.json", 99, Wrong::Status(404, "gone".into()));
    cluster
        .client
        .create("e", "logged", "CPU", "Small")
        .await
        .ok();
    let message = cluster.client.wait_failed("e").await;
    for says in [
        "components/tokenizer/tokenizer.json",
        "registry fake",
        "404",
    ] {
        assert!(message.contains(says), "{message}");
    }
}

#[tokio::test]
async fn a_model_on_the_hub_is_checked_by_its_digests() {
    let fake = FakeRegistry::start().await;
    let folder = golden::model_folder("tiny-llama");
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        files.insert(name, std::fs::read(&path).unwrap());
    }
    fake.register("org/tiny", 1, files);
    let key = ("org/tiny".to_owned(), "1".to_owned());
    let lie = BTreeMap::from([("model.safetensors".to_owned(), "00".repeat(32))]);
    fake.state().versions.get_mut(&key).unwrap().sha256 = lie;
    let mut settings = Settings::new();
    settings.extra = fake.toml("huggingface")
        + "[[models]]\nname = \"ml.demo.hub\"\nversion = 1\nhub = \"org/tiny\"\n";
    let cluster = Cluster::start(settings).await;
    cluster
        .client
        .create("bad", "hub", "CPU", "Small")
        .await
        .ok();
    let message = cluster.client.wait_failed("bad").await;
    assert!(
        message.contains("fetching model.safetensors of hf://org/tiny@c0ffee")
            && message.contains("its SHA-256 is"),
        "{message}"
    );
    fake.state().versions.get_mut(&key).unwrap().sha256.clear();
    cluster.client.deploy("good", "hub").await;
    answers(&cluster, "good").await;
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_before_anything_is_fetched() {
    let fake = registry().await;
    let plain = logged(&golden::model_folder("tiny-llama"));
    let mlmodel = |from: &str, to: &str| {
        let mut files = plain.clone();
        let text = String::from_utf8(files["MLmodel"].clone()).unwrap();
        assert!(text.contains(from));
        files.insert("MLmodel".into(), text.replace(from, to).into_bytes());
        files
    };
    let mut pickled = plain.clone();
    pickled.remove(WEIGHTS);
    fake.register(
        "ml.demo.other-task",
        1,
        mlmodel("llm/v1/completions", "text-classification"),
    );
    fake.register(
        "ml.demo.adapter",
        1,
        mlmodel(
            "    model_binary",
            "    peft_adaptor: peft\n    model_binary",
        ),
    );
    fake.register("ml.demo.pickled", 1, pickled);
    fake.register("ml.demo.pending", 1, plain.clone());
    let key = ("ml.demo.pending".to_owned(), "1".to_owned());
    let pending = Some("PENDING_REGISTRATION".to_owned());
    fake.state().versions.get_mut(&key).unwrap().status = pending;
    let mut settings = Settings::new();
    settings.memory = "4MiB".into();
    settings.extra = fake.toml("mlflow");
    let cluster = Cluster::start(settings).await;
    let refused = async |model: &str, says: &str| {
        let reply = cluster.client.create("e", model, "CPU", "Small").await;
        reply.refused(400, "INVALID_PARAMETER_VALUE", &[says]);
    };
    refused("other-task", "metadata={\"task\": \"llm/v1/completions\"}").await;
    refused("adapter", "merge it into its base model").await;
    refused("pickled", "log the model again with safetensors").await;
    refused("pending", "is PENDING_REGISTRATION").await;
    refused("logged", "does not fit workload type CPU").await;
    assert_eq!(fake.requested("tokenizer.json"), 0, "nothing was fetched");
    let reply = cluster.client.create("e", "nobody", "CPU", "Small").await;
    reply.refused(
        404,
        "RESOURCE_DOES_NOT_EXIST",
        &["'ml.demo.nobody'", &fake.url],
    );
    let mut body = cluster_tests::client::endpoint("e", "logged", "CPU", "Small");
    body["config"]["served_models"][0]["model_version"] = 7.into();
    let reply = cluster
        .client
        .post("/api/2.0/serving-endpoints", &body)
        .await;
    reply.refused(404, "RESOURCE_DOES_NOT_EXIST", &["Known versions: 1"]);
}

#[tokio::test]
async fn a_deployment_comes_back_while_its_registry_is_away_and_new_ones_are_told_to_wait() {
    let fake = registry().await;
    let mut cluster = cluster(&fake, 1).await;
    cluster.client.deploy("e", "logged").await;
    drop(fake);
    cluster.kill_worker(0);
    let lost = |view: &serde_json::Value| view["state"]["ready"] == "NOT_READY";
    cluster.client.wait_for("e", "NOT_READY", lost).await;
    cluster.start_worker(0);
    cluster.worker(0).line("worker ready", PATIENCE).await;
    cluster.client.wait_ready("e").await;
    answers(&cluster, "e").await;
    let reply = cluster.client.create("f", "other", "CPU", "Small").await;
    reply.refused(503, "TEMPORARILY_UNAVAILABLE", &["does not answer"]);
    assert!(reply.retry_after_s.is_some());
}
