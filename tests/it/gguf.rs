//! What a model says whose tokenizer, chat template and end tokens come from its GGUF file.

use std::path::Path;

use cluster_tests::cluster::Cluster;
use cluster_tests::golden;
use cluster_tests::settings::{Model, Settings};
use gguf::TensorType;
use gguf::write::{Writer, from_folder, set_tokenizer};
use serde_json::{Value, json};

const MODEL: &str = "tiny-llama";

/// tiny-llama in bf16 as `ml.demo.file`, with metadata that `change` may change.
fn file(folder: &Path, change: impl FnOnce(&mut Writer)) -> Model {
    let source = golden::model_folder(MODEL);
    let mut writer = from_folder(&source, |_| TensorType::Bf16);
    set_tokenizer(&mut writer, &source, "");
    change(&mut writer);
    let path = folder.join("tiny.gguf");
    std::fs::write(&path, writer.to_bytes()).unwrap();
    Model::at("ml.demo.file", &path)
}

#[tokio::test]
async fn chats_and_bound_answers_of_a_file_are_those_of_the_models_folder() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(Settings::new().model(file(folder.path(), |_| ()))).await;
    cluster.client.deploy("file", "file").await;
    cluster.client.deploy("folder", MODEL).await;
    let messages = json!([{"role": "user", "content": "What is a token?"}]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object",
        "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"], "additionalProperties": false}}});
    for format in [json!({"type": "text"}), schema] {
        let body = json!({"messages": messages, "max_tokens": 60, "temperature": 0, "response_format": format});
        let mut answers: Vec<[Value; 3]> = Vec::new();
        for endpoint in ["file", "folder"] {
            let reply = cluster.client.invoke(endpoint, &body).await.ok();
            let choice = &reply["choices"][0];
            answers.push(
                [
                    &choice["message"]["content"],
                    &choice["finish_reason"],
                    &reply["usage"],
                ]
                .map(Value::clone),
            );
        }
        assert_eq!(answers[0], answers[1]);
    }
}

#[tokio::test]
async fn an_unknown_pre_tokenizer_fails_the_deployment_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let unknown = |writer: &mut Writer| {
        writer.set("tokenizer.ggml.model", "gpt2");
        writer.set("tokenizer.ggml.pre", "klingon");
    };
    let cluster = Cluster::start(Settings::new().model(file(folder.path(), unknown))).await;
    let client = &cluster.client;
    client.create("file", "file", "CPU", "Small").await.ok();
    let message = client.wait_failed("file").await;
    assert!(
        message.contains("its pre-tokenizer \"klingon\" is not known; known are gpt-2"),
        "{message}"
    );
}
