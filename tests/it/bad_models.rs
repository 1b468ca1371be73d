//! Model folders that are broken: each is a clear message about the file, and the worker lives on.

use cluster_tests::cluster::Cluster;
use cluster_tests::fault::ModelCopy;
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::settings::{Model, Settings};
use serde_json::json;

/// Breaks a copy of tiny-llama, creates an endpoint with it, and gives what the cluster says: at the door, or when the
/// deployment fails. Afterwards the same worker must serve a good model.
async fn broken(break_it: impl FnOnce(&ModelCopy)) -> String {
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    break_it(&copy);
    let cluster =
        Cluster::start(Settings::new().model(Model::at("ml.demo.broken", copy.path()))).await;
    let reply = cluster
        .client
        .create("broken", "broken", "CPU", "Small")
        .await;
    let message = if reply.status == 200 {
        cluster.client.wait_failed("broken").await
    } else {
        reply.refused(400, "INVALID_PARAMETER_VALUE", &[]);
        reply.json()["message"].as_str().unwrap().to_owned()
    };
    cluster.client.deploy("good", "tiny-llama").await;
    let golden = golden::named("tiny-llama", "sum");
    assert_eq!(
        cluster
            .client
            .continue_text("good", &golden.prompt, TOKENS_MAX)
            .await,
        golden.text
    );
    message
}

fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(
            message.contains(part),
            "the message\n  {message}\ndoes not say\n  {part}"
        );
    }
}

#[tokio::test]
async fn corrupt_safetensors_are_named() {
    let message =
        broken(|copy| copy.edit("model.safetensors", |bytes| bytes[..64].fill(0xff))).await;
    let claimed = format!("its header claims {} bytes", u64::MAX);
    says(
        &message,
        &["/model.safetensors: is corrupt or cut short: ", &claimed],
    );
}

#[tokio::test]
async fn a_truncated_file_is_named() {
    let message =
        broken(|copy| copy.edit("model.safetensors", |bytes| bytes.truncate(bytes.len() / 2)))
            .await;
    says(
        &message,
        &[
            "/model.safetensors: is corrupt or cut short: tensor ",
            " ends at byte ",
        ],
    );
}

#[tokio::test]
async fn a_truncated_shard_is_named() {
    let message = broken(|copy| {
        copy.shard();
        copy.edit("model-00002-of-00002.safetensors", |bytes| {
            bytes.truncate(bytes.len() - 1000)
        });
    })
    .await;
    says(
        &message,
        &[
            "/model-00002-of-00002.safetensors: is corrupt or cut short: tensor ",
            " ends at byte ",
        ],
    );
}

#[tokio::test]
async fn a_missing_shard_is_named() {
    let message = broken(|copy| {
        copy.shard();
        std::fs::remove_file(copy.path().join("model-00001-of-00002.safetensors")).unwrap();
    })
    .await;
    says(
        &message,
        &["/model-00001-of-00002.safetensors: ", "No such file"],
    );
}

#[tokio::test]
async fn an_unknown_architecture_is_named_with_the_known_ones() {
    let message = broken(|copy| {
        copy.edit_json("config.json", |config| {
            config["architectures"] = json!(["GPTNeoXForCausalLM"])
        })
    })
    .await;
    says(
        &message,
        &[
            "GPTNeoXForCausalLM",
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "MPTForCausalLM",
        ],
    );
}

#[tokio::test]
async fn an_unknown_rope_type_is_named() {
    let message = broken(|copy| {
        copy.edit_json("config.json", |config| {
            config["rope_scaling"] = json!({"rope_type": "yarn", "factor": 2.0})
        });
    })
    .await;
    says(&message, &["yarn"]);
}

#[tokio::test]
async fn a_config_that_contradicts_the_weights_names_the_tensor() {
    let message = broken(|copy| {
        copy.edit_json("config.json", |config| {
            config["intermediate_size"] = json!(300)
        })
    })
    .await;
    says(&message, &["mlp", "352"]);
}

#[tokio::test]
async fn a_folder_without_a_config_is_named() {
    let message =
        broken(|copy| std::fs::remove_file(copy.path().join("config.json")).unwrap()).await;
    says(&message, &["config.json"]);
}

#[tokio::test]
async fn a_template_that_loops_is_stopped_and_hurts_nobody() {
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    copy.edit_json("tokenizer_config.json", |config| {
        config["chat_template"] = json!("{% for i in range(10000) %}{% for j in range(10000) %}{% for k in range(10000) %}{{ k }}{% endfor %}{% endfor %}{% endfor %}");
    });
    let cluster =
        Cluster::start(Settings::new().model(Model::at("ml.demo.loops", copy.path()))).await;
    cluster.client.deploy("loops", "loops").await;
    let chat =
        json!({"messages": [{"role": "user", "content": "What is 7 plus 5?"}], "max_tokens": 4});
    cluster.client.invoke("loops", &chat).await.refused(
        400,
        "BAD_REQUEST",
        &["the model's chat template did not end within ", " steps"],
    );
    // Text completions do not need the template.
    let golden = golden::named("tiny-llama", "sum");
    assert_eq!(
        cluster
            .client
            .continue_text("loops", &golden.prompt, TOKENS_MAX)
            .await,
        golden.text
    );
}

#[tokio::test]
async fn a_role_the_template_refuses_is_a_400_with_the_templates_words() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let chat = json!({"messages": [{"role": "system", "content": "Be brief."}], "max_tokens": 4});
    let says = ["Only the roles user and assistant are known to this model."];
    cluster
        .client
        .invoke("llama", &chat)
        .await
        .refused(400, "BAD_REQUEST", &says);
}

#[tokio::test]
async fn a_model_without_a_template_refuses_chat_and_completes_text() {
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    copy.edit_json("tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let cluster =
        Cluster::start(Settings::new().model(Model::at("ml.demo.plain", copy.path()))).await;
    cluster.client.deploy("plain", "plain").await;
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 4});
    cluster.client.invoke("plain", &chat).await.refused(
        400,
        "BAD_REQUEST",
        &["this model has no chat template"],
    );
    cluster
        .client
        .invoke(
            "plain",
            &json!({"inputs": "x", "params": {"max_tokens": 1}}),
        )
        .await
        .ok();
}

#[tokio::test]
async fn an_mlflow_folder_serves_like_a_plain_one() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden::model_folder("tiny-llama");
    for (part, files) in [
        (
            "model",
            &["config.json", "generation_config.json", "model.safetensors"][..],
        ),
        (
            "components/tokenizer",
            &[
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
            ][..],
        ),
    ] {
        std::fs::create_dir_all(folder.path().join(part)).unwrap();
        for file in files {
            std::fs::copy(source.join(file), folder.path().join(part).join(file)).unwrap();
        }
    }
    let mlmodel = "flavors:\n  transformers:\n    task: text-generation\n    model_binary: model\n    components:\n    - tokenizer\n    \
                   pipeline_model_type: LlamaForCausalLM\nmetadata:\n  task: llm/v1/completions\n";
    std::fs::write(folder.path().join("MLmodel"), mlmodel).unwrap();
    let cluster =
        Cluster::start(Settings::new().model(Model::at("ml.demo.logged", folder.path()))).await;
    cluster.client.deploy("logged", "logged").await;
    let golden = golden::named("tiny-llama", "spark");
    assert_eq!(
        cluster
            .client
            .continue_text("logged", &golden.prompt, TOKENS_MAX)
            .await,
        golden.text
    );
    assert_eq!(
        cluster.client.endpoint("logged").await["task"],
        "llm/v1/completions"
    );
}
