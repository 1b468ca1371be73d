//! What callers get wrong, one by one: the status, the code, and a message that helps.

use cluster_tests::client::{endpoint, invocations};
use cluster_tests::cluster::Cluster;
use cluster_tests::settings::Settings;
use serde_json::{Value, json};

const ENDPOINTS: &str = "/api/2.0/serving-endpoints";

async fn llama() -> Cluster {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    cluster
}

/// Invokes with a wrong body, and then with a right one: the endpoint must be none the worse.
async fn refused(body: Value, code: &str, says: &[&str]) {
    let cluster = llama().await;
    cluster
        .client
        .invoke("llama", &body)
        .await
        .refused(400, code, says);
    cluster
        .client
        .invoke(
            "llama",
            &json!({"inputs": "x", "params": {"max_tokens": 1}}),
        )
        .await
        .ok();
    cluster.wait_idle().await;
}

#[tokio::test]
async fn malformed_json_is_refused_with_its_place() {
    let cluster = llama().await;
    let reply = cluster
        .client
        .post_text(&invocations("llama"), "{\"inputs\": \n oops}")
        .await;
    reply.refused(400, "MALFORMED_REQUEST", &["JSON", "line 2"]);
    cluster
        .client
        .post_text(ENDPOINTS, "")
        .await
        .refused(400, "MALFORMED_REQUEST", &["JSON"]);
}

#[tokio::test]
async fn two_formats_at_once_are_refused_by_name() {
    let body = json!({"inputs": {"prompt": "a"}, "instances": [{"prompt": "b"}]});
    refused(body, "BAD_REQUEST", &["inputs", "instances"]).await;
}

#[tokio::test]
async fn no_format_at_all_is_refused_with_the_list() {
    let all = [
        "dataframe_split",
        "dataframe_records",
        "instances",
        "inputs",
        "messages",
        "prompt",
    ];
    refused(json!({"params": {"max_tokens": 1}}), "BAD_REQUEST", &all).await;
}

#[tokio::test]
async fn a_missing_prompt_is_named() {
    refused(
        json!({"dataframe_records": [{"prompt": "a"}, {"text": "b"}]}),
        "BAD_REQUEST",
        &["dataframe_records[1].prompt is missing"],
    )
    .await;
}

#[tokio::test]
async fn a_split_dataframe_without_a_prompt_column_is_refused() {
    let body = json!({"dataframe_split": {"columns": ["text"], "data": [["a"]]}});
    let says = ["dataframe_split.columns must have a column named \"prompt\", got [\"text\"]"];
    refused(body, "BAD_REQUEST", &says).await;
}

#[tokio::test]
async fn wrong_types_are_refused_with_the_field_and_what_it_must_be() {
    let cluster = llama().await;
    let with = |params: Value| json!({"inputs": "x", "params": params});
    let cases = [
        (
            json!({"inputs": {"prompt": 7}}),
            "inputs.prompt must be a string, got 7",
        ),
        (
            json!({"inputs": ["x", 7]}),
            "inputs[1] must be a string, got 7",
        ),
        (
            with(json!({"temperature": "hot"})),
            "params.temperature must be a number, got \"hot\"",
        ),
        (
            with(json!({"max_tokens": 1.5})),
            "params.max_tokens must be a whole number of at least 1, got 1.5",
        ),
        (
            with(json!({"stop": 3})),
            "params.stop must be a string or a list of strings, got 3",
        ),
        (with(json!([])), "params must be an object, got a list"),
        (
            json!({"messages": "hello"}),
            "messages must be a list, got \"hello\"",
        ),
        (
            json!({"prompt": {"a": 1}}),
            "prompt must be a string, a list of strings, a list of token ids or a list of such lists, got an object",
        ),
        (json!(["x"]), "the body must be a JSON object, got a list"),
    ];
    for (body, says) in cases {
        cluster
            .client
            .invoke("llama", &body)
            .await
            .refused(400, "BAD_REQUEST", &[says]);
    }
    cluster
        .client
        .invoke(
            "llama",
            &json!({"inputs": "x", "params": {"max_tokens": 1}}),
        )
        .await
        .ok();
}

#[tokio::test]
async fn values_out_of_range_are_refused_with_what_is_allowed() {
    let cluster = llama().await;
    let cases = [
        (
            json!({"temperature": -0.5}),
            "temperature must be between 0 and 100",
        ),
        (json!({"top_p": 0}), "top_p must be above 0 and at most 1"),
        (json!({"candidate_count": 0}), "candidate_count"),
        (json!({"candidate_count": 1000}), "candidate_count"),
        (
            json!({"repetition_penalty": 0}),
            "repetition_penalty must be between 0.001 and 100",
        ),
    ];
    for (params, says) in cases {
        let body = json!({"inputs": "x", "params": params});
        cluster
            .client
            .invoke("llama", &body)
            .await
            .refused(400, "BAD_REQUEST", &[says]);
    }
}

#[tokio::test]
async fn negative_max_tokens_are_refused() {
    refused(
        json!({"inputs": "x", "params": {"max_tokens": -1}}),
        "BAD_REQUEST",
        &["max_tokens", "-1"],
    )
    .await;
}

#[tokio::test]
async fn a_prompt_longer_than_the_context_is_refused_with_both_lengths() {
    let prompt = "word ".repeat(3000);
    refused(
        json!({"inputs": {"prompt": prompt}, "params": {"max_tokens": 1}}),
        "BAD_REQUEST",
        &["1024", "tokens"],
    )
    .await;
}

#[tokio::test]
async fn token_ids_outside_the_vocabulary_are_refused() {
    refused(
        json!({"prompt": [1, 2, 99999], "max_tokens": 1}),
        "BAD_REQUEST",
        &["99999", "0 to 2047"],
    )
    .await;
}

#[tokio::test]
async fn an_empty_prompt_list_is_refused() {
    refused(
        json!({"inputs": {"prompt": []}}),
        "BAD_REQUEST",
        &["prompt"],
    )
    .await;
}

#[tokio::test]
async fn an_unknown_endpoint_is_named() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let says = ["Endpoint with name 'nobody' does not exist."];
    cluster
        .client
        .invoke("nobody", &json!({"inputs": "x"}))
        .await
        .refused(404, "RESOURCE_DOES_NOT_EXIST", &says);
    let chat = json!({"model": "nobody", "messages": [{"role": "user", "content": "x"}]});
    let reply = cluster
        .client
        .post("/serving-endpoints/chat/completions", &chat)
        .await;
    reply.refused(404, "RESOURCE_DOES_NOT_EXIST", &says);
}

#[tokio::test]
async fn an_unknown_path_is_a_json_error() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    cluster.client.get("/api/2.0/nothing/here").await.refused(
        404,
        "ENDPOINT_NOT_FOUND",
        &["/api/2.0/nothing/here"],
    );
    let config = cluster
        .client
        .with_token(None)
        .get("/.well-known/databricks-config")
        .await;
    assert!(
        config.status == 404 || config.status == 200,
        "{}",
        config.status
    );
    config.json();
}

#[tokio::test]
async fn an_endpoint_that_is_not_ready_says_so_and_when_to_come_again() {
    // No worker ever comes.
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    cluster
        .client
        .create("early", "tiny-llama", "CPU", "Small")
        .await
        .ok();
    let reply = cluster
        .client
        .invoke("early", &json!({"inputs": "x"}))
        .await;
    reply.refused(503, "TEMPORARILY_UNAVAILABLE", &["early", "not ready"]);
    assert!(
        reply.retry_after_s.is_some_and(|s| (1..=300).contains(&s)),
        "{:?}",
        reply.retry_after_s
    );
}

#[tokio::test]
async fn a_wrong_token_and_none_are_refused_differently() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    for path in [ENDPOINTS, "/serving-endpoints/models"] {
        cluster.client.with_token(None).get(path).await.refused(
            401,
            "UNAUTHENTICATED",
            &["Bearer"],
        );
        cluster
            .client
            .with_token(Some("guessed"))
            .get(path)
            .await
            .refused(403, "PERMISSION_DENIED", &["token"]);
    }
    assert_eq!(
        cluster.client.with_token(None).get("/health").await.status,
        200
    );
}

#[tokio::test]
async fn an_unknown_workload_type_is_refused_with_the_mapped_ones() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let reply = cluster
        .client
        .create("e", "tiny-llama", "GPU_XLARGE", "Small")
        .await;
    reply.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        &["GPU_XLARGE", "CPU", "GPU_LARGE", "GPU_LARGE_2"],
    );
}

#[tokio::test]
async fn an_unknown_workload_size_is_refused_with_the_known_ones() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let reply = cluster
        .client
        .create("e", "tiny-llama", "CPU", "Huge")
        .await;
    reply.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        &["Huge", "Small", "Medium", "Large"],
    );
}

#[tokio::test]
async fn a_missing_model_and_a_missing_version_are_named() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let reply = cluster
        .client
        .create("e", "tiny-unknown", "CPU", "Small")
        .await;
    reply.refused(404, "RESOURCE_DOES_NOT_EXIST", &["ml.demo.tiny-unknown"]);
    let mut body = endpoint("e", "tiny-llama", "CPU", "Small");
    body["config"]["served_models"][0]["model_version"] = json!("9");
    let reply = cluster.client.post(ENDPOINTS, &body).await;
    reply.refused(404, "RESOURCE_DOES_NOT_EXIST", &["ml.demo.tiny-llama", "9"]);
}

#[tokio::test]
async fn a_wrong_creation_is_refused_by_field() {
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    let with = |change: fn(&mut Value)| {
        let mut body = endpoint("e", "tiny-llama", "CPU", "Small");
        change(&mut body);
        body
    };
    let cases: [(Value, &[&str]); 8] = [
        (
            with(|b| b["name"] = json!("")),
            &[
                "name must be 1 to 63 letters, digits, '-' and '_'",
                "got \"\"",
            ],
        ),
        (
            with(|b| b["name"] = json!("a/b")),
            &["name must be", "got \"a/b\""],
        ),
        (
            with(|b| b["name"] = json!("completions")),
            &["name 'completions' is reserved"],
        ),
        (
            with(|b| b["config"] = json!({"served_models": []})),
            &["served"],
        ),
        (
            with(|b| b["config"]["served_entities"] = json!([])),
            &["served_entities", "served_models"],
        ),
        (
            with(|b| b["config"]["served_models"][0]["model_version"] = json!("latest")),
            &["latest"],
        ),
        (
            with(|b| b["config"]["served_models"][0]["scale_to_zero_enabled"] = Value::Null),
            &["scaleToZeroEnabled is undefined. Please set it to either true or false."],
        ),
        (
            with(|b| {
                b["config"]["traffic_config"] = json!({"routes": [{"served_model_name": "tiny-llama-1", "traffic_percentage": 90}]});
            }),
            &["100"],
        ),
    ];
    for (body, says) in cases {
        cluster
            .client
            .post(ENDPOINTS, &body)
            .await
            .refused(400, "INVALID_PARAMETER_VALUE", says);
    }
    assert_eq!(
        cluster.client.get(ENDPOINTS).await.ok(),
        json!({"endpoints": []})
    );
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let cluster = Cluster::coordinator_only(Settings::new().limit("body_bytes_max", 10_000)).await;
    let body = json!({"inputs": "x".repeat(20_000)});
    cluster
        .client
        .invoke("any", &body)
        .await
        .refused(413, "REQUEST_TOO_LARGE", &["10000"]);
}
