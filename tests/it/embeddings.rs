//! Embeddings of models whose task they are: transformers' numbers, on every number of ranks, the same bits in a crowd.

use std::fs;
use std::path::Path;

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{FAMILIES, model_folder};
use cluster_tests::settings::{Model, Settings};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A recorded embedding of transformers in float32.
#[derive(Deserialize)]
struct Golden {
    prompt: String,
    input_ids: Vec<u32>,
    embedding: Vec<f64>,
}

fn goldens(model: &str) -> Vec<Golden> {
    let path = model_folder("golden").join(model).join("embeddings.json");
    let text = fs::read_to_string(path).expect("recorded embeddings");
    serde_json::from_str(&text).expect("a recording")
}

/// The tiny models, each logged once more for embeddings: `ml.demo.MODEL-embeds`, with a cache of f32.
struct Logged {
    settings: Settings,
    _folder: TempDir,
}

fn logged(workers: usize) -> Logged {
    let folder = tempfile::tempdir().expect("a folder");
    let mut settings = Settings::with_workers(workers);
    for name in FAMILIES {
        let at = folder.path().join(name);
        log(&at, name);
        settings = settings.model(Model {
            kv_dtype: Some("f32"),
            ..Model::at(&format!("ml.demo.{name}-embeds"), &at)
        });
    }
    Logged {
        settings,
        _folder: folder,
    }
}

/// What MLflow's transformers flavour writes of a model whose task is embeddings.
pub(super) fn log(at: &Path, name: &str) {
    for part in ["model", "components/tokenizer"] {
        fs::create_dir_all(at.join(part)).expect("folders");
        for file in fs::read_dir(model_folder(name)).expect("a model") {
            let file = file.expect("an entry");
            fs::copy(file.path(), at.join(part).join(file.file_name())).expect("a copy");
        }
    }
    let text = "flavors:\n  transformers:\n    task: feature-extraction\n    model_binary: model\n    components:\n    \
                - tokenizer\nmetadata:\n  task: llm/v1/embeddings\n";
    fs::write(at.join("MLmodel"), text).expect("MLmodel");
}

fn vectors(reply: &Value) -> Vec<Vec<f64>> {
    let data = reply["data"].as_array().expect("data");
    for (index, item) in data.iter().enumerate() {
        assert_eq!(
            (item["index"].as_u64(), &item["object"]),
            (Some(index as u64), &json!("embedding"))
        );
    }
    data.iter()
        .map(|item| serde_json::from_value(item["embedding"].clone()).expect("numbers"))
        .collect()
}

/// Near what transformers computes with f32 activations: a worker may round them to bf16.
fn assert_near(what: &str, golden: &Golden, vector: &[f64]) {
    assert_eq!(golden.embedding.len(), vector.len());
    for (expected, got) in golden.embedding.iter().zip(vector) {
        let off = (expected - got).abs();
        assert!(off < 2e-2, "{what}, {:?}: off by {off}", golden.prompt);
    }
}

#[tokio::test]
async fn embeddings_are_transformers_for_each_family_and_number_of_ranks() {
    let logged = logged(4);
    let cluster = Cluster::start(logged.settings.clone()).await;
    for (model, workload) in FAMILIES.into_iter().zip(["CPU", "GPU_LARGE_2", "CPU_4"]) {
        let registered = format!("{model}-embeds");
        cluster
            .client
            .deploy_on(model, &registered, workload, "Medium")
            .await;
        let goldens = goldens(model);
        let texts: Vec<&str> = goldens
            .iter()
            .map(|golden| golden.prompt.as_str())
            .collect();
        let ids: Vec<&[u32]> = goldens.iter().map(|golden| &golden.input_ids[..]).collect();
        let tokens: usize = ids.iter().map(|ids| ids.len()).sum();
        let expected = json!({"prompt_tokens": tokens, "total_tokens": tokens});
        let text = cluster
            .client
            .invoke(model, &json!({"input": texts}))
            .await
            .ok();
        assert_eq!(
            (&text["object"], &text["model"]),
            (&json!("list"), &json!(model))
        );
        assert_eq!(text["usage"], expected);
        for (golden, vector) in goldens.iter().zip(vectors(&text)) {
            assert_near(&format!("{model} on {workload}"), golden, &vector);
        }
        let body = json!({"model": model, "input": ids});
        let by_ids = cluster
            .client
            .post("/serving-endpoints/v1/embeddings", &body)
            .await
            .ok();
        assert_eq!(by_ids["data"], text["data"], "ids and text are one prompt");
    }
}

#[tokio::test]
async fn an_embedding_has_the_same_bits_alone_in_a_crowd_and_from_a_warm_cache() {
    let logged = logged(1);
    let cluster = Cluster::start(logged.settings.clone()).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama-embeds", "CPU", "Large")
        .await;
    let goldens = goldens("tiny-llama");
    let embed = async |input: Value| {
        let reply = cluster
            .client
            .invoke("llama", &json!({"input": input}))
            .await
            .ok();
        vectors(&reply)
    };
    let mut alone = Vec::new();
    for golden in &goldens {
        alone.extend(embed(json!(golden.prompt)).await);
    }
    let crowd: Vec<&str> = goldens
        .iter()
        .cycle()
        .take(256)
        .map(|golden| golden.prompt.as_str())
        .collect();
    let together = embed(json!(crowd)).await;
    assert_eq!(together.len(), 256);
    for (index, vector) in together.iter().enumerate() {
        assert_eq!(*vector, alone[index % alone.len()], "input {index}");
    }
    cluster.wait_idle().await;
}

#[tokio::test]
async fn embeddings_come_as_base64_and_in_no_other_length() {
    let logged = logged(1);
    let cluster = Cluster::start(logged.settings.clone()).await;
    cluster.client.deploy("mpt", "tiny-mpt-embeds").await;
    let floats = cluster
        .client
        .invoke("mpt", &json!({"input": "Hello"}))
        .await
        .ok();
    let body = json!({"input": "Hello", "encoding_format": "base64", "dimensions": 128});
    let base64 = cluster.client.invoke("mpt", &body).await.ok();
    let text = base64["data"][0]["embedding"].as_str().expect("a text");
    let expected: Vec<f32> = vectors(&floats)[0]
        .iter()
        .map(|value| *value as f32)
        .collect();
    assert_eq!(decoded(text), expected);
    let body = json!({"input": "Hello", "dimensions": 64});
    let reply = cluster.client.invoke("mpt", &body).await;
    reply.refused(
        400,
        "BAD_REQUEST",
        &["dimensions is 64", "have 128 numbers"],
    );
}

/// The f32 values of a base64 text.
fn decoded(text: &str) -> Vec<f32> {
    const DIGITS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in text.trim_end_matches('=').chars() {
        bits = bits << 6 | DIGITS.find(digit).expect("a digit") as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    let (values, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    values
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

#[tokio::test]
async fn a_model_is_asked_for_what_it_was_logged_for() {
    let logged = logged(2);
    let cluster = Cluster::start(logged.settings.clone()).await;
    cluster.client.deploy("text", "tiny-llama").await;
    cluster.client.deploy("embeds", "tiny-llama-embeds").await;
    let reply = cluster
        .client
        .invoke("text", &json!({"input": "Hello"}))
        .await;
    reply.refused(
        400,
        "BAD_REQUEST",
        &["log it with the task llm/v1/embeddings"],
    );
    for body in [json!({"prompt": "Hello"}), json!({"inputs": "Hello"})] {
        let reply = cluster.client.invoke("embeds", &body).await;
        reply.refused(
            400,
            "BAD_REQUEST",
            &["task is llm/v1/embeddings", "llm/v1/completions"],
        );
    }
    assert_eq!(
        cluster.client.endpoint("embeds").await["task"],
        "llm/v1/embeddings"
    );
    let long = json!({"input": "word ".repeat(3000)});
    let reply = cluster.client.invoke("embeds", &long).await;
    reply.refused(400, "BAD_REQUEST", &["1024"]);
    let mut cut = long;
    cut["error_behavior"] = json!("truncate");
    let reply = cluster.client.invoke("embeds", &cut).await.ok();
    assert_eq!(reply["usage"]["prompt_tokens"], 1024);
}
