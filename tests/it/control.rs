//! The control plane beside deployments: spellings, permissions, limits, states.

use std::fs;

use cluster_tests::client::Client;
use cluster_tests::cluster::Cluster;
use cluster_tests::fault::ModelCopy;
use cluster_tests::golden;
use cluster_tests::settings::{Model, Settings};
use reqwest::Method;
use serde_json::{Value, json};

const ENDPOINTS: &str = "/api/2.0/serving-endpoints";

/// A cluster with a second caller, bob, who is in the group `team`.
fn with_bob() -> Settings {
    let mut settings = Settings::new();
    settings.extra =
        "[[auth.tokens]]\nuser = \"bob\"\nfile = \"var/bob.token\"\ngroups = [\"team\"]\n".into();
    settings
}

fn bob(cluster: &Cluster) -> Client {
    let token = fs::read_to_string(cluster.folder().join("var/bob.token")).unwrap();
    cluster.client.with_token(Some(token.trim()))
}

fn short() -> Value {
    json!({"inputs": "x", "params": {"max_tokens": 2}})
}

fn entities(model: &str) -> Value {
    json!({"served_entities": [{"entity_name": format!("ml.demo.{model}"), "entity_version": "1",
        "workload_type": "CPU", "scale_to_zero_enabled": false}]})
}

#[tokio::test]
async fn both_spellings_make_the_same_endpoint() {
    let cluster = Cluster::start(Settings::new()).await;
    let more = |noun: &str| {
        json!({format!("{noun}_name"): "ml.demo.tiny-llama", format!("{noun}_version"): 1,
            "workload_type": "CPU", "min_provisioned_concurrency": 4, "max_provisioned_concurrency": 8,
            "scale_to_zero_enabled": "False", "environment_vars": {"K": "{{secrets/scope/key}}"},
            "instance_profile_arn": "arn:x"})
    };
    let route = |key: &str| json!({"routes": [{key: "tiny-llama-1", "traffic_percentage": 100}]});
    let bodies = [
        (
            "old",
            json!({"served_models": [more("model")], "traffic_config": route("served_model_name")}),
        ),
        (
            "new",
            json!({"served_entities": [more("entity")], "traffic_config": route("served_entity_name")}),
        ),
    ];
    let mut shown = Vec::new();
    for (name, config) in bodies {
        let body = json!({"name": name, "config": config, "tags": [{"key": "t", "value": "v"}]});
        cluster.client.post(ENDPOINTS, &body).await.ok();
        let mut view = cluster.client.wait_ready(name).await;
        for key in ["name", "id", "creation_timestamp", "last_updated_timestamp"] {
            assert!(view.as_object_mut().unwrap().remove(key).is_some(), "{key}");
        }
        for list in ["served_entities", "served_models"] {
            let entity = &mut view["config"][list][0];
            assert_eq!(entity["max_provisioned_concurrency"], 8, "{entity}");
            assert!(entity.get("workload_size").is_none(), "{entity}");
            entity.as_object_mut().unwrap().remove("creation_timestamp");
        }
        shown.push(view);
    }
    assert_eq!(shown[0], shown[1]);
}

#[tokio::test]
async fn another_user_may_do_what_it_is_granted_also_after_a_restart() {
    let mut cluster = Cluster::start(with_bob()).await;
    let bob = bob(&cluster);
    cluster.client.deploy("e", "tiny-llama").await;
    let path = format!("{ENDPOINTS}/e");
    assert_eq!(bob.get(ENDPOINTS).await.ok(), json!({"endpoints": []}));
    let needs = |level: &str| format!("User 'bob' needs {level} on endpoint 'e'");
    let refused = bob.invoke("e", &short()).await;
    refused.refused(403, "PERMISSION_DENIED", &[&needs("CAN_QUERY")]);
    bob.get(&path)
        .await
        .refused(403, "PERMISSION_DENIED", &[&needs("CAN_VIEW")]);

    let id = cluster.client.endpoint("e").await["id"].clone();
    let permissions = format!(
        "/api/2.0/permissions/serving-endpoints/{}",
        id.as_str().unwrap()
    );
    let list =
        json!({"access_control_list": [{"group_name": "team", "permission_level": "CAN_QUERY"}]});
    cluster
        .client
        .call(Method::PATCH, &permissions, &list)
        .await
        .ok();
    bob.invoke("e", &short()).await.ok();
    assert_eq!(bob.get(&path).await.ok()["permission_level"], "CAN_QUERY");
    let config = entities("tiny-mpt");
    let put = bob
        .call(Method::PUT, &format!("{path}/config"), &config)
        .await;
    put.refused(
        403,
        "PERMISSION_DENIED",
        &[&needs("CAN_MANAGE"), "has CAN_QUERY"],
    );

    // What bob makes is bob's.
    bob.deploy("bobs", "tiny-mpt").await;
    assert_eq!(bob.endpoint("bobs").await["creator"], "bob");

    cluster.kill_coordinator();
    cluster.restart_coordinator().await;
    cluster.client.wait_ready("e").await;
    bob.invoke("e", &short()).await.ok();
    let list = json!({"access_control_list": []});
    cluster
        .client
        .call(Method::PUT, &permissions, &list)
        .await
        .ok();
    let refused = bob.invoke("e", &short()).await;
    refused.refused(403, "PERMISSION_DENIED", &["has no permission on it"]);
    bob.call(Method::DELETE, &format!("{ENDPOINTS}/bobs"), &Value::Null)
        .await
        .ok();
}

#[tokio::test]
async fn calls_and_tokens_are_limited_and_a_refusal_says_when_to_come_again() {
    let cluster = Cluster::start(with_bob()).await;
    let bob = bob(&cluster);
    cluster.client.deploy("e", "tiny-llama").await;
    let path = format!("{ENDPOINTS}/e");
    let list =
        json!({"access_control_list": [{"user_name": "bob", "permission_level": "CAN_QUERY"}]});
    let permissions = "/api/2.0/permissions/serving-endpoints/e";
    cluster
        .client
        .call(Method::PUT, permissions, &list)
        .await
        .ok();

    let limits = json!({"rate_limits": [{"calls": 2, "key": "user", "renewal_period": "minute"}]});
    let set = cluster
        .client
        .call(Method::PUT, &format!("{path}/rate-limits"), &limits)
        .await;
    assert_eq!(set.ok(), limits);
    for _ in 0..2 {
        bob.invoke("e", &short()).await.ok();
    }
    let refused = bob.invoke("e", &short()).await;
    let says = ["takes 2 calls a minute of user 'bob'"];
    refused.refused(429, "REQUEST_LIMIT_EXCEEDED", &says);
    let wait_s = refused.retry_after_s.unwrap();
    assert!((1..=61).contains(&wait_s), "come again in {wait_s} s");
    cluster.client.invoke("e", &short()).await.ok();

    // The tokens of a stream count as well.
    let none = json!({"rate_limits": []});
    cluster
        .client
        .call(Method::PUT, &format!("{path}/rate-limits"), &none)
        .await
        .ok();
    let limits =
        json!({"rate_limits": [{"tokens": 20, "key": "endpoint", "renewal_period": "minute"}]});
    cluster
        .client
        .call(Method::PUT, &format!("{path}/ai-gateway"), &limits)
        .await
        .ok();
    let long = json!({"prompt": "Once", "stream": true, "max_tokens": 20, "ignore_eos": true});
    bob.stream("e", &long).await.collect().await;
    let refused = bob.invoke("e", &short()).await;
    let says = ["takes 20 tokens a minute of all callers together"];
    refused.refused(429, "REQUEST_LIMIT_EXCEEDED", &says);
    assert!(refused.retry_after_s.is_some());
}

#[tokio::test]
async fn an_update_during_an_update_is_a_conflict_and_a_delete_is_none() {
    // Nobody loads anything: the deployment goes on and on.
    let cluster = Cluster::coordinator_only(Settings::new()).await;
    cluster
        .client
        .create("e", "tiny-llama", "CPU", "Small")
        .await
        .ok();
    let path = format!("{ENDPOINTS}/e");
    let update = cluster
        .client
        .call(
            Method::PUT,
            &format!("{path}/config"),
            &entities("tiny-mpt"),
        )
        .await;
    let says = ["'e' is being updated"];
    update.refused(409, "RESOURCE_CONFLICT", &says);
    // What is no deployment is no conflict.
    let tags = json!({"add_tags": [{"key": "a", "value": "b"}]});
    let tags = cluster
        .client
        .call(Method::PATCH, &format!("{path}/tags"), &tags)
        .await
        .ok();
    assert_eq!(tags, json!({"tags": [{"key": "a", "value": "b"}]}));
    let deleted = cluster
        .client
        .call(Method::DELETE, &path, &Value::Null)
        .await;
    assert_eq!(deleted.ok(), json!({}));
    let gone = ["Endpoint with name 'e' does not exist."];
    for (method, last) in [
        (Method::PUT, "/config"),
        (Method::PATCH, "/tags"),
        (Method::GET, "/metrics"),
    ] {
        let reply = cluster
            .client
            .call(method, &format!("{path}{last}"), &entities("tiny-mpt"))
            .await;
        reply.refused(404, "RESOURCE_DOES_NOT_EXIST", &gone);
    }
}

#[tokio::test]
async fn a_failed_endpoint_is_mended_by_an_update_or_deleted() {
    let copy = ModelCopy::of(&golden::model_folder("tiny-llama"));
    copy.edit("tokenizer.json", |bytes| bytes.truncate(100));
    let settings = Settings::new().model(Model::at("ml.demo.broken", copy.path()));
    let cluster = Cluster::start(settings).await;
    for name in ["mended", "deleted"] {
        cluster
            .client
            .create(name, "broken", "CPU", "Small")
            .await
            .ok();
        cluster.client.wait_failed(name).await;
    }
    let path = format!("{ENDPOINTS}/mended/config");
    cluster
        .client
        .call(Method::PUT, &path, &entities("tiny-mpt"))
        .await
        .ok();
    cluster.client.wait_ready("mended").await;
    cluster.client.invoke("mended", &short()).await.ok();
    let deleted = cluster
        .client
        .call(
            Method::DELETE,
            &format!("{ENDPOINTS}/deleted"),
            &Value::Null,
        )
        .await;
    assert_eq!(deleted.ok(), json!({}));
}

#[tokio::test]
async fn an_endpoint_shows_its_own_metrics() {
    let cluster = Cluster::start(Settings::new()).await;
    for (name, model) in [("a", "tiny-llama"), ("b", "tiny-mpt")] {
        cluster.client.deploy(name, model).await;
        cluster.client.invoke(name, &short()).await.ok();
    }
    let reply = cluster.client.get(&format!("{ENDPOINTS}/a/metrics")).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    for family in [
        "requests_total",
        "request_duration_seconds_bucket",
        "generation_tokens_total",
        "requests_concurrency",
        "kv_blocks_total",
    ] {
        let sample = format!("tandem_{family}{{endpoint=\"a\"");
        assert!(
            reply.text.contains(&sample),
            "{sample} is not in {}",
            reply.text
        );
    }
    assert!(!reply.text.contains("endpoint=\"b\""), "{}", reply.text);
}
