//! Endpoints from their creation to their deletion, as clients see them.

use cluster_tests::client::endpoint;
use cluster_tests::cluster::Cluster;
use cluster_tests::fault::ModelCopy;
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::settings::{Model, Settings};
use reqwest::Method;
use serde_json::{Value, json};

const ENDPOINTS: &str = "/api/2.0/serving-endpoints";

fn config(model: &str) -> Value {
    endpoint("", model, "CPU", "Small")["config"].clone()
}

#[tokio::test]
async fn a_created_endpoint_is_shown_pending_then_ready_with_names_in_both_dialects() {
    let cluster = Cluster::start(Settings::with_workers(2)).await;
    // In the shape of the oldest notebooks: served_models, and a number as version.
    let created = cluster
        .client
        .create("llama2-3b-chat", "tiny-llama", "GPU_LARGE", "Small")
        .await
        .ok();
    assert_eq!(created["name"], "llama2-3b-chat");
    assert_eq!(
        created["state"],
        json!({"ready": "NOT_READY", "config_update": "IN_PROGRESS"})
    );
    assert_eq!(created["creator"], "admin");
    assert_eq!(created["id"].as_str().unwrap().len(), 32);
    let pending = &created["pending_config"];
    assert_eq!(
        (
            &pending["served_models"][0]["name"],
            &pending["served_entities"][0]["entity_version"]
        ),
        (&json!("tiny-llama-1"), &json!("1"))
    );
    assert!(created.get("config").is_none(), "{created}");

    let ready = cluster.client.wait_ready("llama2-3b-chat").await;
    assert!(ready.get("pending_config").is_none(), "{ready}");
    let entity = &ready["config"]["served_entities"][0];
    assert_eq!(entity["state"]["deployment"], "DEPLOYMENT_READY");
    let message = entity["state"]["deployment_state_message"]
        .as_str()
        .unwrap();
    assert!(
        message.contains("1 x A100 80 GB"),
        "the message must say what a CPU stands in for: {message}"
    );
    let route = &ready["config"]["traffic_config"]["routes"][0];
    assert_eq!(
        (&route["served_model_name"], &route["served_entity_name"]),
        (&json!("tiny-llama-1"), &json!("tiny-llama-1"))
    );
    assert_eq!(route["traffic_percentage"], 100);
}

#[tokio::test]
async fn endpoints_are_listed_and_a_deleted_one_is_gone() {
    let cluster = Cluster::start(Settings::new()).await;
    for (name, model) in [("a", "tiny-llama"), ("b", "tiny-mpt")] {
        cluster.client.deploy(name, model).await;
    }
    for path in [ENDPOINTS, "/api/2.0/serving-endpoints/"] {
        let list = cluster.client.get(path).await.ok();
        let names: Vec<&str> = list["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["a", "b"]);
    }
    let deleted = cluster
        .client
        .call(Method::DELETE, &format!("{ENDPOINTS}/a"), &Value::Null)
        .await;
    assert_eq!((deleted.status, deleted.text.as_str()), (200, "{}"));
    let gone = "Endpoint with name 'a' does not exist.";
    cluster.client.get(&format!("{ENDPOINTS}/a")).await.refused(
        404,
        "RESOURCE_DOES_NOT_EXIST",
        &[gone],
    );
    cluster
        .client
        .call(Method::DELETE, &format!("{ENDPOINTS}/a"), &Value::Null)
        .await
        .refused(404, "RESOURCE_DOES_NOT_EXIST", &[gone]);
    cluster
        .client
        .invoke("a", &json!({"inputs": "x"}))
        .await
        .refused(404, "RESOURCE_DOES_NOT_EXIST", &[gone]);
    // What it held is free again: the name and the room.
    cluster.client.deploy("a", "tiny-mistral").await;
}

#[tokio::test]
async fn a_name_is_taken_once() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("twice", "tiny-llama").await;
    let again = cluster
        .client
        .create("twice", "tiny-mpt", "CPU", "Small")
        .await;
    again.refused(400, "RESOURCE_ALREADY_EXISTS", &["twice"]);
}

#[tokio::test]
async fn the_old_configuration_serves_until_the_new_one_is_ready() {
    let cluster = Cluster::start(Settings::new()).await;
    let client = &cluster.client;
    client.deploy("e", "tiny-llama").await;
    let prompt = golden::named("tiny-llama", "reverse").prompt;
    let body = json!({"inputs": {"prompt": prompt}, "params": {"max_tokens": TOKENS_MAX}});

    let path = format!("{ENDPOINTS}/e/config");
    let updating = client
        .call(Method::PUT, &path, &config("tiny-mpt"))
        .await
        .ok();
    assert_eq!(
        updating["state"],
        json!({"ready": "READY", "config_update": "IN_PROGRESS"})
    );
    assert_eq!(
        updating["config"]["served_models"][0]["name"],
        "tiny-llama-1"
    );
    assert_eq!(
        updating["pending_config"]["served_models"][0]["name"],
        "tiny-mpt-1"
    );
    // Asked all through the change, it never fails, and once the new one has answered the old one does not any more.
    let mut seen = Vec::new();
    loop {
        let reply = client.invoke("e", &body).await;
        assert_eq!(reply.candidate(), "king, apple, red.");
        let entity = reply.served_model_name.unwrap();
        if seen.last() != Some(&entity) {
            seen.push(entity.clone());
        }
        if entity == "tiny-mpt-1" {
            break;
        }
    }
    assert!(
        seen == ["tiny-llama-1", "tiny-mpt-1"] || seen == ["tiny-mpt-1"],
        "{seen:?}"
    );
    let done = client.wait_ready("e").await;
    assert_eq!(done["config"]["config_version"], 2);
    assert_eq!(done["config"]["served_models"][0]["name"], "tiny-mpt-1");
}

#[tokio::test]
async fn a_failed_update_leaves_the_old_configuration_serving() {
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    let settings = Settings::new().model(Model::at("ml.demo.broken", copy.path()));
    let cluster = Cluster::start(settings).await;
    let client = &cluster.client;
    client.deploy("e", "tiny-llama").await;
    // Headers stay as they were, so that the door lets it in; the tokenizer is what the worker cannot read.
    copy.edit("tokenizer.json", |bytes| bytes.truncate(100));
    let path = format!("{ENDPOINTS}/e/config");
    client
        .call(Method::PUT, &path, &config("broken"))
        .await
        .ok();
    let message = client.wait_failed("e").await;
    assert!(message.contains("tokenizer.json"), "{message}");
    let view = client.endpoint("e").await;
    assert_eq!(
        view["state"],
        json!({"ready": "READY", "config_update": "UPDATE_FAILED"})
    );
    let golden = golden::named("tiny-llama", "sum");
    assert_eq!(
        client.continue_text("e", &golden.prompt, TOKENS_MAX).await,
        golden.text
    );
    // And it can be updated again.
    client
        .call(Method::PUT, &path, &config("tiny-mpt"))
        .await
        .ok();
    client.wait_ready("e").await;
}

#[tokio::test]
async fn a_failed_first_deployment_answers_invocations_with_a_clear_400() {
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    copy.edit("tokenizer.json", |bytes| bytes.truncate(100));
    let settings = Settings::new().model(Model::at("ml.demo.broken", copy.path()));
    let cluster = Cluster::start(settings).await;
    cluster
        .client
        .create("broken", "broken", "CPU", "Small")
        .await
        .ok();
    cluster.client.wait_failed("broken").await;
    let view = cluster.client.endpoint("broken").await;
    assert_eq!(
        view["state"],
        json!({"ready": "NOT_READY", "config_update": "UPDATE_FAILED"})
    );
    let reply = cluster
        .client
        .invoke("broken", &json!({"inputs": "x"}))
        .await;
    reply.refused(400, "BAD_REQUEST", &["broken", "tokenizer.json"]);
}

#[tokio::test]
async fn traffic_is_split_by_percentage() {
    let cluster = Cluster::start(Settings::new()).await;
    let entity = |model: &str| {
        json!({"entity_name": format!("ml.demo.{model}"), "entity_version": "1", "workload_size": "Small",
            "workload_type": "CPU", "scale_to_zero_enabled": "False"})
    };
    let routes = json!([{"served_model_name": "tiny-llama-1", "traffic_percentage": 75},
        {"served_entity_name": "tiny-mpt-1", "traffic_percentage": 25}]);
    let body = json!({"name": "both", "config": {"served_entities": [entity("tiny-llama"), entity("tiny-mpt")],
        "traffic_config": {"routes": routes}}});
    cluster.client.post(ENDPOINTS, &body).await.ok();
    cluster.client.wait_ready("both").await;
    let mut llama = 0;
    for _ in 0..200 {
        let reply = cluster
            .client
            .invoke("both", &json!({"inputs": "x", "params": {"max_tokens": 1}}))
            .await;
        reply.ok();
        llama += usize::from(reply.served_model_name.as_deref() == Some("tiny-llama-1"));
    }
    assert!(
        (110..=190).contains(&llama),
        "{llama} of 200 went to the entity with 75 %"
    );
}

#[tokio::test]
async fn what_cannot_fit_is_refused_at_creation_with_what_would_help() {
    let settings = Settings {
        memory: "1MiB".into(),
        ..Settings::new()
    };
    let cluster = Cluster::start(settings).await;
    let reply = cluster
        .client
        .create("big", "tiny-llama", "CPU", "Small")
        .await;
    reply.refused(400, "INVALID_PARAMETER_VALUE", &["MiB"]);
    cluster
        .client
        .get(&format!("{ENDPOINTS}/big"))
        .await
        .refused(404, "RESOURCE_DOES_NOT_EXIST", &["big"]);
}

#[tokio::test]
async fn an_endpoint_waits_for_its_worker_and_is_ready_when_it_comes() {
    let mut cluster = Cluster::coordinator_only(Settings::new()).await;
    cluster
        .client
        .create("early", "tiny-llama", "CPU", "Small")
        .await
        .ok();
    let view = cluster.client.endpoint("early").await;
    assert_eq!(view["state"]["ready"], "NOT_READY", "{view}");
    cluster.start_worker(0);
    cluster.client.wait_ready("early").await;
    let golden = golden::named("tiny-llama", "sum");
    assert_eq!(
        cluster
            .client
            .continue_text("early", &golden.prompt, TOKENS_MAX)
            .await,
        golden.text
    );
}

#[tokio::test]
async fn an_endpoint_of_cluster_toml_exists_from_the_first_start() {
    let mut settings = Settings::new();
    settings.extra = "[[endpoints]]\nname = \"wished\"\n[[endpoints.served_entities]]\nentity_name = \"ml.demo.tiny-llama\"\n\
        entity_version = 1\nworkload_type = \"CPU\"\nworkload_size = \"Small\"\n"
        .into();
    let cluster = Cluster::start(settings).await;
    cluster.client.wait_ready("wished").await;
}

#[tokio::test]
async fn metrics_count_requests_and_tokens() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let golden = golden::named("tiny-llama", "spark");
    for _ in 0..3 {
        cluster
            .client
            .continue_text("llama", &golden.prompt, TOKENS_MAX)
            .await;
    }
    let metrics = cluster.client.with_token(None).metrics().await;
    let count = |name: &str| {
        metrics
            .sum(name, "")
            .unwrap_or_else(|| panic!("no {name} in {:?}", metrics.names()))
    };
    assert_eq!(count("tandem_requests_total"), 3.0);
    assert_eq!(
        count("tandem_prompt_tokens_total"),
        3.0 * golden.input_ids.len() as f64
    );
    assert!(count("tandem_generation_tokens_total") >= 3.0 * golden.output_ids.len() as f64);
    assert_eq!(count("tandem_time_to_first_token_seconds_count"), 3.0);
    assert!(count("tandem_inter_token_latency_seconds_count") > 0.0);
    cluster.wait_idle().await;
}

#[tokio::test]
async fn a_repeated_prompt_is_found_in_the_prefix_cache() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    let golden = golden::named("tiny-llama", "long_prompt");
    for _ in 0..2 {
        assert_eq!(
            cluster
                .client
                .continue_text("llama", &golden.prompt, TOKENS_MAX)
                .await,
            golden.text
        );
    }
    cluster.wait_idle().await;
    let metrics = cluster.client.metrics().await;
    let hits = metrics
        .sum("tandem_prefix_cache_hits_total", "")
        .unwrap_or_default();
    let whole_blocks = (golden.input_ids.len() / 16 * 16) as f64;
    assert!(
        hits >= whole_blocks - 16.0,
        "{hits} of {} prompt tokens were found",
        golden.input_ids.len()
    );
}
