//! The control plane through its paths.

use std::sync::Arc;

use actix_web::test::TestRequest;
use serde_json::{Value, json};

use super::fake::{FakeGateway, endpoint_view, with_state};
use super::{authorized, call, get, post};
use crate::api::DeploymentState;

const PATHS: [&str; 4] = [
    "/api/2.0/serving-endpoints",
    "/api/2.0/serving-endpoints/",
    "/api/2.0/preview/serving-endpoints",
    "/api/2.0/preview/serving-endpoints/",
];

fn body(name: &str) -> Value {
    json!({"name": name, "config": {"served_models": [{
        "model_name": "ml.llm-catalog.llama-13b", "model_version": 3, "workload_size": "Small",
        "workload_type": "GPU_LARGE", "scale_to_zero_enabled": false}]}})
}

fn with_ready(name: &str) -> Arc<FakeGateway> {
    let gateway = FakeGateway::default();
    gateway
        .endpoints
        .lock()
        .unwrap()
        .push(with_state(endpoint_view(name), DeploymentState::Ready));
    Arc::new(gateway)
}

#[actix_web::test]
async fn endpoints_are_created_on_every_path_by_whoever_calls() {
    for path in PATHS {
        let gateway = Arc::new(FakeGateway::default());
        let created = call(&gateway, post(path, &body("llama2-3b-chat")))
            .await
            .ok();
        assert_eq!(created["name"], "llama2-3b-chat", "{path}");
        assert_eq!(
            created["state"],
            json!({"ready": "NOT_READY", "config_update": "IN_PROGRESS"})
        );
        let asked = gateway.created.lock().unwrap();
        assert_eq!(
            (
                asked[0].0.as_str(),
                asked[0].1.config.entities[0].name.as_str()
            ),
            ("ann", "llama-13b-3")
        );
    }
}

#[actix_web::test]
async fn the_content_type_does_not_matter() {
    for content_type in [
        "application/json; charset=utf-8",
        "text/json",
        "application/x-www-form-urlencoded",
    ] {
        let gateway = Arc::new(FakeGateway::default());
        let request = post(PATHS[0], &body("e")).insert_header(("content-type", content_type));
        call(
            &gateway,
            request.insert_header(("Context-Type", "text/json")),
        )
        .await
        .ok();
    }
}

#[actix_web::test]
async fn a_wrong_creation_never_reaches_the_cluster() {
    let gateway = Arc::new(FakeGateway::default());
    let mut unmapped = body("e");
    unmapped["config"]["served_models"][0]["workload_type"] = json!("GPU_MEDIUM");
    let refused = call(&gateway, post(PATHS[0], &unmapped)).await;
    let expected = "Workload type 'GPU_MEDIUM' with size 'Small' is not supported. \
                    Please choose a node type from CPU, GPU_LARGE, GPU_LARGE_2.";
    refused.refused(400, "INVALID_PARAMETER_VALUE", expected);
    call(&gateway, post(PATHS[0], &body("v1"))).await.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        "reserved",
    );
    assert!(gateway.created.lock().unwrap().is_empty());
}

#[actix_web::test]
async fn endpoints_are_listed_shown_and_deleted() {
    for path in PATHS {
        let gateway = with_ready("e");
        let list = call(&gateway, get(path)).await.ok();
        assert_eq!(list["endpoints"][0]["name"], "e");
        let one = format!("{}/e", path.trim_end_matches('/'));
        assert_eq!(
            call(&gateway, get(&one)).await.ok()["id"],
            "08f9f293f47247588069fa4e4e61a9be"
        );
        let config = call(&gateway, get(&format!("{one}/config"))).await.ok();
        assert_eq!(config["served_models"][0]["name"], "llama2-7b-1");
        let deleted = call(&gateway, authorized(TestRequest::delete().uri(&one))).await;
        assert_eq!((deleted.status, deleted.text.as_str()), (200, "{}"));
        let gone = "Endpoint with name 'e' does not exist.";
        call(&gateway, get(&one))
            .await
            .refused(404, "RESOURCE_DOES_NOT_EXIST", gone);
        let again = call(&gateway, authorized(TestRequest::delete().uri(&one))).await;
        again.refused(404, "RESOURCE_DOES_NOT_EXIST", gone);
    }
}

#[actix_web::test]
async fn a_configuration_is_replaced_whole() {
    let gateway = with_ready("e");
    let config = json!({"served_entities": [{"entity_name": "m", "entity_version": "2",
        "scale_to_zero_enabled": "False"}], "traffic_config": null, "auto_capture_config": {}});
    let put = |body: &Value| {
        authorized(TestRequest::put().uri("/api/2.0/serving-endpoints/e/config"))
            .set_payload(body.to_string())
    };
    assert_eq!(call(&gateway, put(&config)).await.ok()["name"], "e");
    let updated = gateway.updated.lock().unwrap()[0].clone();
    assert_eq!((updated.0.as_str(), updated.1.as_str()), ("ann", "e"));
    assert_eq!(updated.2.entities[0].name, "m-2");
    let wrong = call(&gateway, put(&json!({"config": config}))).await;
    wrong.refused(400, "INVALID_PARAMETER_VALUE", "served_entities is missing");
}

#[actix_web::test]
async fn an_endpoint_without_an_active_configuration_has_none_to_show() {
    let gateway = Arc::new(FakeGateway::default());
    gateway.endpoints.lock().unwrap().push(endpoint_view("e"));
    let reply = call(&gateway, get("/api/2.0/serving-endpoints/e/config")).await;
    reply.refused(
        404,
        "RESOURCE_DOES_NOT_EXIST",
        "'e' has no configuration that serves yet",
    );
}
