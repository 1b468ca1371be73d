//! What stands beside an endpoint's configuration, through its paths.

use std::sync::Arc;

use actix_web::http::Method;
use actix_web::test::TestRequest;
use serde_json::{Value, json};

use super::fake::{FakeGateway, endpoint_view, with_state};
use super::{Reply, authorized, call, get, post};
use crate::api::DeploymentState;

const ENDPOINT: &str = "/api/2.0/serving-endpoints/e";

fn ready() -> Arc<FakeGateway> {
    let gateway = FakeGateway::default();
    let view = with_state(endpoint_view("e"), DeploymentState::Ready);
    gateway.endpoints.lock().unwrap().push(view);
    Arc::new(gateway)
}

async fn send(gateway: &Arc<FakeGateway>, method: Method, path: &str, body: &Value) -> Reply {
    let request = TestRequest::with_uri(path).method(method);
    call(gateway, authorized(request).set_payload(body.to_string())).await
}

async fn shown(gateway: &Arc<FakeGateway>) -> Value {
    call(gateway, get(ENDPOINT)).await.ok()
}

#[actix_web::test]
async fn tags_are_added_replaced_and_deleted_and_come_back_in_an_object() {
    let gateway = ready();
    for path in [
        "/api/2.0/serving-endpoints/e/tags",
        "/api/2.0/preview/serving-endpoints/e/tags/",
    ] {
        let body = json!({"add_tags": [{"key": "a", "value": "1"}, {"key": "b"}]});
        let tags = send(&gateway, Method::PATCH, path, &body).await.ok();
        let expected = json!({"tags": [{"key": "a", "value": "1"}, {"key": "b", "value": ""}]});
        assert_eq!(tags, expected);
        let body = json!({"add_tags": [{"key": "a", "value": "2"}], "delete_tags": ["b", "none"]});
        let tags = send(&gateway, Method::PATCH, path, &body).await.ok();
        assert_eq!(tags, json!({"tags": [{"key": "a", "value": "2"}]}));
        assert_eq!(shown(&gateway).await["tags"], tags["tags"]);
    }
}

#[actix_web::test]
async fn limits_notifications_and_the_gateway_are_replaced_and_shown() {
    let gateway = ready();
    let limits = json!({"rate_limits": [
        {"calls": 5, "key": "user", "renewal_period": "minute"},
        {"calls": 9, "key": "endpoint", "renewal_period": "minute"}]});
    let path = format!("{ENDPOINT}/rate-limits");
    let reply = send(&gateway, Method::PUT, &path, &limits).await.ok();
    assert_eq!(reply, limits);
    assert_eq!(shown(&gateway).await["rate_limits"], limits["rate_limits"]);

    let emails =
        json!({"email_notifications": {"on_update_success": ["a@x"], "on_update_failure": []}});
    let path = format!("{ENDPOINT}/notifications");
    let reply = send(&gateway, Method::PATCH, &path, &emails).await.ok();
    assert_eq!(reply["name"], "e");
    assert_eq!(reply["email_notifications"], emails["email_notifications"]);
    assert_eq!(
        shown(&gateway).await["email_notifications"],
        emails["email_notifications"]
    );

    let switches = json!({
        "rate_limits": [{"tokens": 7, "key": "user_group", "principal": "team", "renewal_period": "minute"}],
        "usage_tracking_config": {"enabled": true}, "fallback_config": {"enabled": false},
        "inference_table_config": {"enabled": true, "catalog_name": "c", "schema_name": "s",
                                   "table_name_prefix": "p"}});
    let path = format!("{ENDPOINT}/ai-gateway");
    let reply = send(&gateway, Method::PUT, &path, &switches).await.ok();
    assert_eq!(reply, switches);
    assert_eq!(shown(&gateway).await["ai_gateway"], switches);
    let guarded = json!({"guardrails": {"output": {"pii": {"behavior": "BLOCK"}}}});
    let refused = send(&gateway, Method::PUT, &path, &guarded).await;
    refused.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        "guardrails are not supported",
    );
    let none = send(&gateway, Method::PUT, &path, &json!({})).await.ok();
    assert_eq!(none, json!({}));
    assert_eq!(shown(&gateway).await["ai_gateway"], json!({}));
}

#[actix_web::test]
async fn what_is_not_built_says_so_and_what_is_not_there_is_not_found() {
    let gateway = ready();
    for (method, last) in [
        (Method::PATCH, "telemetry-config"),
        (Method::GET, "system-metrics-export-state"),
        (Method::PUT, "system-metrics-export-state"),
    ] {
        let path = format!("{ENDPOINT}/{last}");
        let reply = send(&gateway, method, &path, &json!({})).await;
        reply.refused(501, "NOT_IMPLEMENTED", last);
    }
    let missing = "Endpoint with name 'x' does not exist.";
    let path = "/api/2.0/serving-endpoints/x/tags";
    let reply = send(&gateway, Method::PATCH, path, &json!({})).await;
    reply.refused(404, "RESOURCE_DOES_NOT_EXIST", missing);
}

#[actix_web::test]
async fn metrics_are_the_endpoints_own() {
    let gateway = ready();
    let reply = call(&gateway, get(&format!("{ENDPOINT}/metrics"))).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let expected = Some("text/plain; version=0.0.4");
    assert_eq!(reply.header("content-type"), expected);
}

#[actix_web::test]
async fn what_can_be_read_can_be_asked_about_without_its_body() {
    let gateway = ready();
    for (path, status) in [
        (ENDPOINT, 200),
        ("/api/2.0/serving-endpoints/", 200),
        ("/nothing", 404),
        ("/serving-endpoints/e/invocations", 405),
    ] {
        let head = TestRequest::with_uri(path).method(Method::HEAD);
        let reply = call(&gateway, authorized(head)).await;
        assert_eq!(reply.status, status, "{path}");
    }
    for (path, allowed) in [
        ("/api/2.0/serving-endpoints", "GET, POST, HEAD, OPTIONS"),
        ("/serving-endpoints/e/invocations", "POST, OPTIONS"),
    ] {
        let options = TestRequest::with_uri(path).method(Method::OPTIONS);
        let reply = call(&gateway, authorized(options)).await;
        assert_eq!((reply.status, reply.text.as_str()), (204, ""), "{path}");
        assert_eq!(reply.header("allow"), Some(allowed), "{path}");
    }
}

#[actix_web::test]
async fn a_create_takes_all_that_clients_send() {
    let gateway = Arc::new(FakeGateway::default());
    let body = json!({"name": "e", "task": "llm", "config": {"served_entities": [{"entity_name": "m",
        "entity_version": "1", "scale_to_zero_enabled": false, "environment_vars": {"K": "{{secrets/s/k}}"}}]},
        "tags": [{"key": "t", "value": "v"}], "rate_limits": [{"calls": 3, "renewal_period": "minute"}],
        "ai_gateway": {"usage_tracking_config": {"enabled": true}}, "route_optimized": true,
        "email_notifications": {"on_update_failure": ["a@x"]}, "budget_policy_id": "b", "description": "d"});
    call(&gateway, post("/api/2.0/serving-endpoints", &body))
        .await
        .ok();
    let created = gateway.created.lock().unwrap();
    let settings = &created[0].1.settings;
    assert_eq!((settings.tags.len(), settings.rate_limits.len()), (1, 1));
    assert!(settings.route_optimized && settings.ai_gateway.is_some());
    assert_eq!(settings.budget_policy_id.as_deref(), Some("b"));
}
