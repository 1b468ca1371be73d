//! The HTTP layer as its clients see it, before a cluster that plays a script.

mod accounts;
mod amendments;
mod control;
pub(super) mod fake;
mod fuzz;
mod invoke;
mod logs;
mod openapi;
mod permissions;
mod provisioned;
mod server;
mod tables;

use std::path::Path;
use std::sync::Arc;

use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use actix_web::test::{TestRequest, call_service, init_service, read_body};
use actix_web::web::Data;
use common::config::{Limits, TablesConfig};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::fake::FakeGateway;
use super::{HttpState, TokenTable, app, build_recorder};
use crate::api::{ApiError, Caller, ErrorKind};
use crate::logs::Logs;
use crate::tables::Tables;

const BODY_BYTES_MAX: u64 = 64 << 10;

/// An answer.
struct Reply {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {:?}", self.text))
    }

    fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Checks a refusal: status, code and what its message says.
    fn refused(&self, status: u16, code: &str, says: &str) {
        let body = self.json();
        assert_eq!(
            (self.status, body["error_code"].as_str()),
            (status, Some(code)),
            "{}",
            self.text
        );
        assert!(
            body.get("error").is_none(),
            "clients would take it for the message: {body}"
        );
        let message = body["message"].as_str().unwrap();
        assert!(message.contains(says), "{message:?} does not say {says:?}");
    }
}

/// Tables in a folder; nothing is made before the first row.
fn tables_in(folder: &Path, usage: bool) -> Arc<Tables> {
    let config = TablesConfig {
        usage,
        ..TablesConfig::default()
    };
    Tables::open(config, folder).unwrap()
}

fn state(gateway: Arc<FakeGateway>) -> HttpState {
    HttpState {
        gateway,
        tokens: TokenTable::new(vec![
            (Caller::admin("ann"), Sha256::digest(b"secret").into()),
            (
                Caller::user("bob", &["team"]),
                Sha256::digest(b"bobs").into(),
            ),
        ]),
        limits: Limits {
            body_bytes_max: BODY_BYTES_MAX,
            deadline_ms: 60_000,
            queue_tokens_max: 1,
            queue_requests_max: 1,
            idle_stream_ms: 1,
        },
        metrics: build_recorder().unwrap().handle(),
        observer: Arc::new(()),
        // A place where nothing can be written; nothing is.
        logs: Logs::open(Path::new("/dev/null")).unwrap(),
        tables: tables_in(Path::new("/nowhere"), false),
    }
}

async fn call(gateway: &Arc<FakeGateway>, request: TestRequest) -> Reply {
    let service = init_service(app(Data::new(state(Arc::clone(gateway))))).await;
    let response = call_service(&service, request.to_request()).await;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = String::from_utf8(read_body(response).await.to_vec()).unwrap();
    Reply {
        status,
        headers,
        text,
    }
}

fn authorized(request: TestRequest) -> TestRequest {
    request.insert_header((AUTHORIZATION, "Bearer secret"))
}

fn get(path: &str) -> TestRequest {
    authorized(TestRequest::get().uri(path))
}

/// Without a content type, as the misspelt header of the oldest notebooks leaves it.
fn post(path: &str, body: &Value) -> TestRequest {
    authorized(TestRequest::post().uri(path)).set_payload(body.to_string())
}

#[actix_web::test]
async fn requests_without_a_known_token_are_refused_everywhere_but_where_none_is_needed() {
    let gateway = Arc::new(FakeGateway::default());
    for path in [
        "/api/2.0/serving-endpoints",
        "/serving-endpoints/models",
        "/nothing",
        "/",
    ] {
        let bare = call(&gateway, TestRequest::get().uri(path)).await;
        bare.refused(401, "UNAUTHENTICATED", "Bearer");
        assert_eq!(bare.header("www-authenticate"), Some("Bearer"));
        let wrong = TestRequest::get()
            .uri(path)
            .insert_header((AUTHORIZATION, "Bearer guessed"));
        call(&gateway, wrong)
            .await
            .refused(403, "PERMISSION_DENIED", "token");
    }
    for path in [
        "/health",
        "/health/",
        "/health/live",
        "/health/ready",
        "/metrics",
    ] {
        assert_eq!(
            call(&gateway, TestRequest::get().uri(path)).await.status,
            200,
            "{path}"
        );
    }
    let config = call(
        &gateway,
        TestRequest::get().uri("/.well-known/databricks-config"),
    )
    .await;
    assert_eq!(config.ok(), json!({}));
    let other = call(&gateway, TestRequest::get().uri("/.well-known/other")).await;
    other.refused(404, "ENDPOINT_NOT_FOUND", "GET /.well-known/other");
}

#[actix_web::test]
async fn unknown_paths_and_methods_are_json_errors() {
    let gateway = Arc::new(FakeGateway::default());
    let unknown = call(&gateway, get("/api/2.0/nothing/here")).await;
    unknown.refused(404, "ENDPOINT_NOT_FOUND", "GET /api/2.0/nothing/here");
    assert!(unknown.json().get("type").is_none());
    let openai = call(&gateway, post("/serving-endpoints/rerank", &json!({}))).await;
    openai.refused(404, "ENDPOINT_NOT_FOUND", "POST /serving-endpoints/rerank");
    assert_eq!(openai.json()["type"], "invalid_request_error");
    let method = authorized(TestRequest::patch().uri("/api/2.0/serving-endpoints"));
    call(&gateway, method)
        .await
        .refused(405, "METHOD_NOT_ALLOWED", "PATCH");
    let method = call(&gateway, get("/serving-endpoints/e/invocations")).await;
    method.refused(
        405,
        "METHOD_NOT_ALLOWED",
        "'/serving-endpoints/e/invocations' does not answer to GET",
    );
    assert_eq!(method.header("allow"), Some("POST"));
}

#[actix_web::test]
async fn bad_bodies_are_json_errors_with_their_place() {
    let gateway = Arc::new(FakeGateway::default());
    for path in [
        "/api/2.0/serving-endpoints",
        "/serving-endpoints/e/invocations",
    ] {
        let post = || authorized(TestRequest::post().uri(path));
        let broken = call(&gateway, post().set_payload("{\"inputs\": \n oops}")).await;
        broken.refused(400, "MALFORMED_REQUEST", "line 2 column 2");
        call(&gateway, post())
            .await
            .refused(400, "MALFORMED_REQUEST", "the body is empty");
        call(&gateway, post().set_payload("[]")).await.refused(
            400,
            "BAD_REQUEST",
            "must be a JSON object, got a list",
        );
        let large = vec![b' '; BODY_BYTES_MAX as usize + 1];
        call(&gateway, post().set_payload(large)).await.refused(
            413,
            "REQUEST_TOO_LARGE",
            "65536 bytes",
        );
        let full = vec![b' '; BODY_BYTES_MAX as usize];
        call(&gateway, post().set_payload(full))
            .await
            .refused(400, "MALFORMED_REQUEST", "empty");
    }
}

#[actix_web::test]
async fn openai_paths_get_the_fields_that_openais_clients_read() {
    let gateway = Arc::new(FakeGateway::default());
    let body = json!({"inputs": "x", "params": {"max_tokens": -1}});
    let reply = call(&gateway, post("/serving-endpoints/e/invocations", &body)).await;
    reply.refused(
        400,
        "BAD_REQUEST",
        "params.max_tokens must be a whole number of at least 1, got -1",
    );
    let json = reply.json();
    assert_eq!(
        (&json["code"], &json["type"]),
        (&json!("BAD_REQUEST"), &json!("invalid_request_error"))
    );
    assert_eq!(json["param"], "params.max_tokens");
}

#[actix_web::test]
async fn every_answer_has_a_request_id_and_a_good_one_of_the_clients_is_kept() {
    let gateway = Arc::new(FakeGateway::default());
    let of = async |given: Option<&str>| {
        let request = TestRequest::get().uri("/nothing");
        let request = given.map_or(request, |id| {
            TestRequest::get()
                .uri("/nothing")
                .insert_header(("x-request-id", id))
        });
        call(&gateway, request)
            .await
            .header("x-request-id")
            .unwrap()
            .to_owned()
    };
    assert_eq!(of(Some("my-id_1.2")).await, "my-id_1.2");
    for given in [
        None,
        Some(""),
        Some("has space"),
        Some("x".repeat(65).as_str()),
    ] {
        let id = of(given).await;
        assert!(
            id.len() == 32 && id.chars().all(|c| c.is_ascii_hexdigit()),
            "{given:?} became {id}"
        );
    }
}

#[actix_web::test]
async fn health_says_how_the_cluster_is() {
    let gateway = Arc::new(FakeGateway::default());
    let health = call(&gateway, TestRequest::get().uri("/health")).await.ok();
    assert_eq!(
        (&health["ready"], &health["workers_expected"]),
        (&json!(true), &json!(2))
    );
    gateway
        .unready
        .store(1, std::sync::atomic::Ordering::SeqCst);
    for (path, status) in [
        ("/health", 503),
        ("/health/ready", 503),
        ("/health/live", 200),
    ] {
        let reply = call(&gateway, TestRequest::get().uri(path)).await;
        assert_eq!(
            (reply.status, &reply.json()["ready"]),
            (status, &json!(false)),
            "{path}"
        );
    }
}

#[actix_web::test]
async fn metrics_are_text_and_count_requests_by_route() {
    let recorder = build_recorder().unwrap();
    let gateway = Arc::new(FakeGateway::default());
    let mut state = state(gateway);
    state.metrics = recorder.handle();
    let service = init_service(app(Data::new(state))).await;
    let _counted = metrics::set_default_local_recorder(&recorder);
    for path in [
        "/api/2.0/serving-endpoints/a",
        "/api/2.0/serving-endpoints/b/",
        "/nothing",
    ] {
        call_service(&service, get(path).to_request()).await;
    }
    let response = call_service(&service, TestRequest::get().uri("/metrics").to_request()).await;
    assert_eq!(
        response.headers().get("content-type").unwrap(),
        "text/plain; version=0.0.4"
    );
    let text = String::from_utf8(read_body(response).await.to_vec()).unwrap();
    let shown = "tandem_http_requests_total{handler=\"/api/2.0/serving-endpoints/{name}\",method=\"GET\",status=\"404\"} 2";
    let unknown =
        "tandem_http_requests_total{handler=\"unmatched\",method=\"GET\",status=\"404\"} 1";
    assert!(text.contains(shown) && text.contains(unknown), "{text}");
}

#[actix_web::test]
async fn refusals_of_the_cluster_keep_their_kind_and_time() {
    let error = ApiError::new(ErrorKind::Conflict, "an update is going on");
    let gateway = Arc::new(FakeGateway::default());
    *gateway.refusal.lock().unwrap() = Some(error);
    call(&gateway, get("/api/2.0/serving-endpoints/e"))
        .await
        .refused(409, "RESOURCE_CONFLICT", "an update is going on");
    let error = ApiError::new(ErrorKind::Overloaded, "the queue is full").retry_after(7);
    *gateway.refusal.lock().unwrap() = Some(error);
    let reply = call(&gateway, get("/api/2.0/serving-endpoints/e")).await;
    reply.refused(429, "REQUEST_LIMIT_EXCEEDED", "the queue is full");
    assert_eq!(reply.header("retry-after"), Some("7"));
}
