//! The OpenAPI document against a real cluster: every example is taken, and every answer has the promised shape.

use cluster_tests::cluster::Cluster;
use cluster_tests::document::{Document, Operation};
use cluster_tests::settings::{Model, Settings};
use serde_json::{Value, json};

use super::embeddings;

/// Operations after which the endpoints are not what they were; asked in this order, and waited for.
const CREATE: [&str; 2] = ["create", "createProvisioned"];
const UPDATE: [&str; 2] = ["updateConfig", "updateProvisioned"];
const DELETE: [&str; 1] = ["delete"];

/// The endpoint that examples ask for embeddings.
const EMBEDDINGS: &str = "hello-embeddings";

/// Sends an example and checks what comes back.
async fn ask(
    cluster: &Cluster,
    document: &Document,
    operation: &Operation<'_>,
    example: &(String, Value),
) {
    let (name, body) = example;
    let place = format!("{} {} (example {name})", operation.method, operation.path);
    if !body.is_null() {
        let checked = document.check_body(operation, body);
        checked.unwrap_or_else(|e| panic!("{place}: the example is not of its own schema: {e}"));
    }
    let mut path = operation.path.clone();
    if !body["input"].is_null() {
        path = path.replace("/hello/", &format!("/{EMBEDDINGS}/"));
    }
    let reply = cluster
        .client
        .call(operation.method.clone(), &path, body)
        .await;
    let good = (200..300).contains(&reply.status);
    assert_eq!(
        good,
        operation.is_built(),
        "{place}: {} {}",
        reply.status,
        reply.text
    );
    let checked = document.check_reply(operation, &reply);
    checked.unwrap_or_else(|e| panic!("{place}: {e}"));
}

#[tokio::test]
async fn every_example_is_taken_and_answered_as_promised() {
    let folder = tempfile::tempdir().unwrap();
    embeddings::log(folder.path(), "tiny-llama");
    let embeds = Model::at("ml.demo.tiny-llama-embeds", folder.path());
    let mut settings = Settings::new().model(embeds);
    settings.memory = "2GiB".into();
    let cluster = Cluster::start(settings).await;
    cluster.client.deploy(EMBEDDINGS, "tiny-llama-embeds").await;
    let document = Document::fetch(&cluster.client).await;
    document.check_form().unwrap_or_else(|e| panic!("{e}"));
    let operations = document.operations();
    let named = |ids: &'static [&str]| {
        operations
            .iter()
            .filter(move |operation| ids.contains(&operation.id()))
    };
    let mut endpoints = Vec::new();
    for operation in named(&CREATE) {
        for example in operation.examples() {
            ask(&cluster, &document, operation, &example).await;
            endpoints.push(example.1["name"].as_str().unwrap().to_owned());
        }
    }
    for endpoint in &endpoints {
        cluster.client.wait_ready(endpoint).await;
    }
    let rest = |operation: &&Operation<'_>| {
        ![&CREATE[..], &UPDATE, &DELETE]
            .concat()
            .contains(&operation.id())
    };
    for operation in operations.iter().filter(rest) {
        for example in operation.examples() {
            ask(&cluster, &document, operation, &example).await;
        }
    }
    for operation in named(&UPDATE) {
        for example in operation.examples() {
            ask(&cluster, &document, operation, &example).await;
            cluster.client.wait_ready(&endpoints[0]).await;
        }
    }
    for operation in named(&DELETE) {
        for example in operation.examples() {
            ask(&cluster, &document, operation, &example).await;
        }
    }
}

#[tokio::test]
async fn refusals_have_the_promised_shape_too() {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("hello", "tiny-llama").await;
    let document = Document::fetch(&cluster.client).await;
    for operation in document.operations() {
        let place = format!("{} {}", operation.method, operation.path);
        let method = operation.method.clone();
        if !operation.told["responses"]["401"].is_null() {
            let stranger = cluster.client.with_token(None);
            let reply = stranger
                .call(method.clone(), &operation.path, &Value::Null)
                .await;
            assert_eq!(reply.status, 401, "{place}");
            let checked = document.check_reply(&operation, &reply);
            checked.unwrap_or_else(|e| panic!("{place}: {e}"));
        }
        let body = if operation.told["requestBody"].is_null() {
            Value::Null
        } else {
            json!([1])
        };
        if !body.is_null() {
            let reply = cluster
                .client
                .call(method.clone(), &operation.path, &body)
                .await;
            assert!(
                reply.status == 400 || !operation.is_built(),
                "{place}: {} {}",
                reply.status,
                reply.text
            );
            let checked = document.check_reply(&operation, &reply);
            checked.unwrap_or_else(|e| panic!("{place}: {e}"));
        }
    }
    let invoke = document
        .operations()
        .into_iter()
        .find(|operation| operation.id() == "invoke");
    let mut missing = invoke.expect("endpoints can be asked");
    missing.path = missing.template.replace("{name}", "nobody");
    let reply = cluster
        .client
        .post(&missing.path, &json!({"prompt": "x"}))
        .await;
    assert_eq!(reply.status, 404, "{}", reply.text);
    let checked = document.check_reply(&missing, &reply);
    checked.unwrap_or_else(|e| panic!("{}: {e}", missing.path));
}
