//! Quantised weights on CPUs: quantised while they are loaded, or as a GGUF file has them; one shard and two.

use std::path::{Path, PathBuf};

use cluster_tests::client::Client;
use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, FAMILIES, TOKENS_MAX};
use cluster_tests::settings::{Model, Settings};
use futures::future::join_all;
use gguf::TensorType;
use gguf::write::{from_folder, set_tokenizer};
use serde_json::{Value, json};

use crate::logs::{read, says};

const FORMS: [&str; 2] = ["int8", "int4"];
/// One shard, and two.
const TYPES: [&str; 2] = ["CPU", "GPU_LARGE_2"];
/// What each endpoint is asked.
const PROMPTS: usize = 8;

/// Tiny-llama in each form, as `ml.demo.int8` and `ml.demo.int4`.
fn settings(workers: usize) -> Settings {
    let model = |form: &'static str| Model {
        quantization: Some(form),
        ..Model::at(
            &format!("ml.demo.{form}"),
            &golden::model_folder("tiny-llama"),
        )
    };
    let settings = Settings::with_workers(workers);
    FORMS.map(model).into_iter().fold(settings, Settings::model)
}

/// An endpoint for each form and number of shards, by name.
async fn deploy_all(client: &Client) -> Vec<String> {
    let mut names = Vec::new();
    for form in FORMS {
        for workload in TYPES {
            let name = format!("{form}-{}", workload.to_lowercase().replace('_', "-"));
            client.deploy_on(&name, form, workload, "Large").await;
            names.push(name);
        }
    }
    names
}

fn requests() -> Vec<Value> {
    let goldens = golden::all("tiny-llama").into_iter().take(PROMPTS);
    let body = |(i, prompt): (usize, String)| {
        json!({"inputs": {"prompt": prompt},
            "params": {"max_tokens": 30, "temperature": 0.9, "top_p": 0.95, "seed": 7000 + i, "candidate_count": 1 + i % 2}})
    };
    goldens
        .map(|golden| golden.prompt)
        .enumerate()
        .map(body)
        .collect()
}

async fn all_at_once(client: &Client, endpoint: &str) -> Vec<Vec<Vec<String>>> {
    let requests = requests();
    let ask = async |body: &Value| client.invoke(endpoint, body).await.candidates();
    join_all(requests.iter().map(ask)).await
}

async fn one_by_one(client: &Client, endpoint: &str) -> Vec<Vec<Vec<String>>> {
    let mut texts = Vec::new();
    for body in requests() {
        texts.push(client.invoke(endpoint, &body).await.candidates());
    }
    texts
}

/// The numerics id that a replica of the model found when it was loaded.
async fn numerics_id(cluster: &Cluster, endpoint: &str, entity: &str) -> String {
    says(cluster, endpoint, entity, "build-logs", &["numerics id "]).await;
    let log = read(cluster, endpoint, entity, "build-logs").await;
    let id = log
        .split("numerics id ")
        .nth(1)
        .and_then(|rest| rest.get(..16));
    id.expect("an id of 16 digits").to_owned()
}

#[tokio::test]
async fn quantised_text_is_the_same_alone_in_a_crowd_and_after_a_death_and_ids_tell_forms_apart() {
    let mut cluster = Cluster::start(settings(2)).await;
    let names = deploy_all(&cluster.client).await;
    let mut texts = Vec::new();
    let mut ids = Vec::new();
    for name in &names {
        let alone = one_by_one(&cluster.client, name).await;
        assert_eq!(all_at_once(&cluster.client, name).await, alone, "{name}");
        texts.push(alone);
        let form = name.split('-').next().unwrap();
        ids.push(numerics_id(&cluster, name, &format!("{form}-1")).await);
    }
    let mut distinct = ids.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), names.len(), "{ids:?}");
    // Every replica is formed anew somewhere, and answers as before. One death at a time: a group that loses a rank while
    // it forms waits a minute for it.
    for worker in 0..2 {
        cluster.kill_worker(worker);
        cluster.wait_workers(1).await;
        cluster.start_worker(worker);
        cluster.wait_workers(2).await;
        let served = vec!["serves on "; worker + 2];
        for form in FORMS {
            let (pair, entity) = (format!("{form}-gpu-large-2"), format!("{form}-1"));
            says(&cluster, &pair, &entity, "logs", &served).await;
        }
    }
    for (name, before) in names.iter().zip(&texts) {
        cluster.client.wait_ready(name).await;
        assert_eq!(all_at_once(&cluster.client, name).await, *before, "{name}");
    }
}

#[tokio::test]
async fn quantised_models_answer_alike_in_every_format_and_int8_as_the_model_does() {
    let cluster = Cluster::start(settings(1)).await;
    let client = &cluster.client;
    for form in FORMS {
        client.deploy(form, form).await;
        let goldens = golden::exact("tiny-llama");
        let mut equal = 0;
        for golden in &goldens {
            let prompt = &golden.prompt;
            let text = client.continue_text(form, prompt, TOKENS_MAX).await;
            equal += usize::from(text == golden.text);
            let params = json!({"max_tokens": TOKENS_MAX, "temperature": 0.0});
            for body in [
                json!({"dataframe_split": {"columns": ["prompt"], "data": [[prompt]]}, "params": params}),
                json!({"dataframe_records": [{"prompt": prompt}], "params": params}),
                json!({"instances": [{"prompt": prompt}], "params": params}),
            ] {
                assert_eq!(client.invoke(form, &body).await.candidate(), text, "{body}");
            }
            let body = json!({"model": form, "prompt": prompt, "max_tokens": TOKENS_MAX, "temperature": 0});
            let answer = client
                .post("/serving-endpoints/completions", &body)
                .await
                .ok();
            assert_eq!(answer["choices"][0]["text"], text, "{answer}");
        }
        let enough = if form == "int8" {
            goldens.len() * 4 / 5
        } else {
            0
        };
        assert!(equal >= enough, "{equal} of {} in {form}", goldens.len());
        let chat = json!({"model": form, "messages": [{"role": "user", "content": "What is a token?"}],
            "max_tokens": 20, "temperature": 0});
        let answer = client
            .post("/serving-endpoints/chat/completions", &chat)
            .await
            .ok();
        let text = answer["choices"][0]["message"]["content"].clone();
        let mut streamed = chat.clone();
        streamed["stream"] = json!(true);
        let events = client.stream(form, &streamed).await.collect().await;
        assert_eq!(json!(events.texts[&0]), text, "{answer}");
    }
}

/// A tiny model as a GGUF file in a folder.
pub fn file_of(model: &str, tensor_type: TensorType, folder: &Path) -> PathBuf {
    let source = golden::model_folder(model);
    let mut writer = from_folder(&source, |_| tensor_type);
    set_tokenizer(&mut writer, &source, "mpt");
    let file = folder.join(format!("{model}-{tensor_type}.gguf"));
    std::fs::write(&file, writer.to_bytes()).unwrap();
    file
}

#[tokio::test]
async fn a_gguf_file_of_bf16_answers_as_the_models_folder_does() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = Settings::with_workers(2);
    for model in FAMILIES {
        let file = file_of(model, TensorType::Bf16, folder.path());
        settings = settings.model(Model::at(&format!("ml.demo.file-{model}"), &file));
    }
    let cluster = Cluster::start(settings).await;
    for model in FAMILIES {
        for workload in TYPES {
            let name = format!("{model}-{}", workload.len());
            let served = format!("file-{model}");
            cluster
                .client
                .deploy_on(&name, &served, workload, "Small")
                .await;
            for golden in golden::exact(model) {
                let client = &cluster.client;
                let text = client.continue_text(&name, &golden.prompt, TOKENS_MAX);
                assert_eq!(text.await, golden.text, "{name}: {}", golden.name);
            }
        }
    }
}

#[tokio::test]
async fn quantised_gguf_files_are_served_from_a_path_and_from_a_folder_alike() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = Settings::with_workers(2);
    let types = [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1];
    let mut names = Vec::new();
    for tensor_type in types {
        let name = tensor_type.to_string().to_lowercase().replace('_', "-");
        let own = folder.path().join(&name);
        std::fs::create_dir(&own).unwrap();
        let file = file_of("tiny-llama", tensor_type, &own);
        settings = settings
            .model(Model::at(&format!("ml.demo.file-{name}"), &file))
            .model(Model::at(&format!("ml.demo.folder-{name}"), &own));
        names.push(name);
    }
    let cluster = Cluster::start(settings).await;
    let client = &cluster.client;
    let golden = golden::named("tiny-llama", "spark");
    for name in names {
        let mut texts = Vec::new();
        for (served, workload) in [("file", "CPU"), ("folder", "CPU"), ("file", "GPU_LARGE_2")] {
            let endpoint = format!("{served}-{name}-{}", workload.len());
            let model = format!("{served}-{name}");
            client.deploy_on(&endpoint, &model, workload, "Small").await;
            let text = client.continue_text(&endpoint, &golden.prompt, TOKENS_MAX);
            texts.push(text.await);
        }
        assert_eq!(texts[0], texts[1], "{name}");
        assert!(texts.iter().all(|text| !text.is_empty()), "{texts:?}");
        if name == "q8-0" {
            assert_eq!(texts[0], golden.text);
        }
    }
}

#[tokio::test]
async fn other_bits_than_the_files_have_are_refused_when_the_endpoint_is_created() {
    let folder = tempfile::tempdir().unwrap();
    let file = file_of("tiny-llama", TensorType::Q4_0, folder.path());
    let model = Model {
        quantization: Some("int8"),
        ..Model::at("ml.demo.twice", &file)
    };
    let cluster = Cluster::start(Settings::new().model(model)).await;
    let reply = cluster.client.create("e", "twice", "CPU", "Small").await;
    let says = [
        "in int4 already",
        "are not changed to int8",
        "leave quantization out",
    ];
    reply.refused(400, "INVALID_PARAMETER_VALUE", &says);
}
