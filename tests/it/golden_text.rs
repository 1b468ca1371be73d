//! The models' answers over REST equal those of transformers, in each input format and with one and more shards.

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, FAMILIES, Golden, TOKENS_MAX};
use cluster_tests::settings::Settings;
use serde_json::{Value, json};

/// The four input formats, with one prompt.
fn formats(prompt: &str) -> [(&'static str, Value); 4] {
    let params = json!({"max_tokens": TOKENS_MAX, "temperature": 0.0});
    [
        (
            "dataframe_split",
            json!({"dataframe_split": {"columns": ["prompt"], "index": [0], "data": [[prompt]]}, "params": params}),
        ),
        (
            "dataframe_records",
            json!({"dataframe_records": [{"prompt": prompt}], "params": params}),
        ),
        (
            "instances",
            json!({"instances": [{"prompt": prompt}], "params": params}),
        ),
        (
            "inputs",
            json!({"inputs": {"prompt": prompt}, "params": params}),
        ),
    ]
}

/// Checks text, finish reason and usage of one prediction.
fn check(what: &str, golden: &Golden, prediction: &Value) {
    let candidate = &prediction["candidates"][0];
    assert_eq!(
        candidate["text"], golden.text,
        "{what}, prompt {}",
        golden.name
    );
    assert_eq!(
        candidate["metadata"]["finish_reason"], golden.finish_reason,
        "{what}, prompt {}",
        golden.name
    );
    let usage = &prediction["metadata"];
    assert_eq!(
        usage["input_tokens"],
        golden.input_ids.len(),
        "{what}, prompt {}",
        golden.name
    );
    let (input, output) = (
        usage["input_tokens"].as_u64().unwrap(),
        usage["output_tokens"].as_u64().unwrap(),
    );
    // A final end token may or may not be counted; text tokens always are.
    let made = golden.output_ids.len() as u64;
    assert!(
        output == made || (golden.finish_reason == "stop" && output == made + 1),
        "{what}: {usage}"
    );
    assert_eq!(usage["total_tokens"], input + output, "{what}");
}

async fn all_goldens(cluster: &Cluster, endpoint: &str, model: &str) {
    for golden in golden::exact(model) {
        let (what, body) = &formats(&golden.prompt)[3];
        let reply = cluster.client.invoke(endpoint, body).await.ok();
        check(
            &format!("{model} {what}"),
            &golden,
            &reply["predictions"][0],
        );
    }
}

#[tokio::test]
async fn each_family_answers_its_goldens_in_each_of_the_four_formats() {
    let cluster = Cluster::start(Settings::new()).await;
    for model in FAMILIES {
        cluster.client.deploy(model, model).await;
        for golden in golden::exact(model) {
            for (what, body) in formats(&golden.prompt) {
                let reply = cluster.client.invoke(model, &body).await;
                assert_eq!(
                    reply.served_model_name.as_deref(),
                    Some(format!("{model}-1").as_str())
                );
                check(
                    &format!("{model} {what}"),
                    &golden,
                    &reply.ok()["predictions"][0],
                );
            }
        }
    }
}

#[tokio::test]
async fn two_shards_give_the_goldens_of_each_family() {
    let cluster = Cluster::start(Settings::with_workers(2)).await;
    for model in FAMILIES {
        cluster
            .client
            .deploy_on(model, model, "GPU_LARGE_2", "Small")
            .await;
        all_goldens(&cluster, model, model).await;
    }
}

#[tokio::test]
async fn four_shards_give_the_goldens_of_each_family() {
    let cluster = Cluster::start(Settings::with_workers(4)).await;
    for model in FAMILIES {
        cluster
            .client
            .deploy_on(model, model, "CPU_4", "Small")
            .await;
        all_goldens(&cluster, model, model).await;
    }
}

#[tokio::test]
async fn several_prompts_are_answered_in_their_order() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let goldens = golden::exact("tiny-llama");
    let prompts: Vec<&str> = goldens.iter().map(|g| g.prompt.as_str()).collect();
    let rows: Vec<Value> = prompts
        .iter()
        .map(|prompt| json!({"prompt": prompt}))
        .collect();
    let params = json!({"max_tokens": TOKENS_MAX});
    let bodies = [
        json!({"inputs": {"prompt": prompts}, "params": params}),
        json!({"inputs": prompts, "params": params}),
        json!({"instances": rows, "params": params}),
        json!({"dataframe_records": rows, "params": params}),
    ];
    for body in bodies {
        let reply = cluster.client.invoke("llama", &body).await.ok();
        let predictions = reply["predictions"].as_array().unwrap();
        assert_eq!(predictions.len(), goldens.len());
        for (golden, prediction) in goldens.iter().zip(predictions) {
            check("several prompts", golden, prediction);
        }
    }
}

#[tokio::test]
async fn parameters_may_stand_in_columns_and_params_win() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let prompt = golden::named("tiny-llama", "count").prompt;
    let columns =
        json!({"dataframe_split": {"columns": ["prompt", "max_tokens"], "data": [[prompt, 3]]}});
    let reply = cluster.client.invoke("llama", &columns).await.ok();
    assert_eq!(reply["predictions"][0]["metadata"]["output_tokens"], 3);
    let both = json!({"dataframe_records": [{"prompt": prompt, "max_tokens": 3}], "params": {"max_tokens": 5}});
    let reply = cluster.client.invoke("llama", &both).await.ok();
    assert_eq!(reply["predictions"][0]["metadata"]["output_tokens"], 5);
    assert_eq!(
        reply["predictions"][0]["candidates"][0]["metadata"]["finish_reason"],
        "length"
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let golden = golden::named("tiny-llama", "spark");
    // Crosses token borders, and is followed by text that must not show.
    let stop = "source engine";
    let before = golden.text.split(stop).next().unwrap();
    for stop in [json!([stop]), json!(stop), json!(["never there", stop])] {
        let body = json!({"inputs": {"prompt": golden.prompt}, "params": {"max_tokens": TOKENS_MAX, "stop": stop}});
        let reply = cluster.client.invoke("llama", &body).await;
        assert_eq!(reply.candidate(), before);
        assert_eq!(
            reply.json()["predictions"][0]["candidates"][0]["metadata"]["finish_reason"],
            "stop"
        );
    }
}

#[tokio::test]
async fn candidates_are_as_many_as_asked_for_and_differ_when_sampled() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let body = json!({"inputs": {"prompt": "ROMEO:\n"},
        "params": {"max_tokens": 24, "temperature": 1.0, "seed": 5, "candidate_count": 4}});
    let reply = cluster.client.invoke("llama", &body).await;
    let candidates = reply.candidates().remove(0);
    assert_eq!(candidates.len(), 4);
    let different: std::collections::HashSet<&String> = candidates.iter().collect();
    assert!(
        different.len() > 1,
        "all candidates are the same: {candidates:?}"
    );
    let metadata = &reply.json()["predictions"][0]["metadata"];
    assert!(
        metadata["output_tokens"].as_u64().unwrap() > 24,
        "output_tokens is the sum over candidates: {metadata}"
    );
    assert_eq!(
        cluster
            .client
            .invoke("llama", &body)
            .await
            .candidates()
            .remove(0),
        candidates,
        "the seed repeats them"
    );
}

#[tokio::test]
async fn sharded_safetensors_give_the_same_text_as_one_file() {
    use cluster_tests::fault::ModelCopy;
    use cluster_tests::settings::Model;

    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    copy.shard();
    let settings = Settings::with_workers(2).model(Model::at("ml.demo.sharded", copy.path()));
    let cluster = Cluster::start(settings).await;
    cluster.client.deploy("one", "sharded").await;
    all_goldens(&cluster, "one", "tiny-llama").await;
    cluster
        .client
        .deploy_on("two", "sharded", "GPU_LARGE_2", "Small")
        .await;
    all_goldens(&cluster, "two", "tiny-llama").await;
}

#[tokio::test]
async fn f32_kv_gives_every_golden_with_a_margin_above_a_hundredth() {
    use cluster_tests::settings::Model;

    let mut settings = Settings::new();
    settings.models = FAMILIES
        .iter()
        .map(|name| Model {
            kv_dtype: Some("f32"),
            ..Model::tiny(name)
        })
        .collect();
    let cluster = Cluster::start(settings).await;
    for model in FAMILIES {
        cluster.client.deploy(model, model).await;
        for golden in golden::all(model)
            .iter()
            .filter(|golden| golden.min_margin > 0.01)
        {
            let text = cluster
                .client
                .continue_text(model, &golden.prompt, TOKENS_MAX)
                .await;
            assert_eq!(text, golden.text, "{model} {}", golden.name);
        }
    }
}
