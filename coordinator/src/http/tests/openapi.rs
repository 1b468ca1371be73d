//! The document against the server that it describes.

mod bounds;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use actix_web::ResponseError;
use actix_web::http::Method;
use actix_web::http::header::HeaderMap;
use actix_web::test::{TestRequest, call_service, init_service, read_body};
use actix_web::web::Data;
use serde_json::{Value, json};

use super::fake::{FakeGateway, endpoint_view, with_state};
use super::{authorized, call, get, state};
use crate::api::{ApiError, DeploymentState, ErrorKind};
use crate::http::app;
use crate::http::error::Fault;
use crate::http::openapi::explorer::FILES;
use crate::http::openapi::parameters::in_path;
use crate::http::openapi::{self, DOCUMENT_PATHS, TAGS, errors};

/// Prefixes under which paths answer a second time, and what they stand for.
const ALIASES: [(&str, &str); 4] = [
    (
        "/api/2.0/preview/serving-endpoints",
        "/api/2.0/serving-endpoints",
    ),
    ("/serving-endpoints/v1/", "/serving-endpoints/"),
    ("/ai-gateway/mlflow/v1/", "/serving-endpoints/"),
    ("/ai-gateway/openai/v1/", "/serving-endpoints/"),
];

/// Paths that belong to no API.
const ELSEWHERE: [&str; 1] = ["/docs/{file}"];

/// HEAD is answered wherever GET is.
const METHODS: [&str; 5] = ["get", "put", "post", "delete", "patch"];

fn document() -> Value {
    let types = ["CPU", "GPU_LARGE", "GPU_LARGE_2"].map(String::from);
    serde_json::to_value(openapi::of(&types)).unwrap()
}

/// Every operation: its path, its method, and itself.
fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    paths
        .flat_map(|(path, item)| {
            let item = item.as_object().unwrap().iter();
            item.map(|(method, operation)| (path.as_str(), method.as_str(), operation))
        })
        .collect()
}

/// Every path that is registered, as actix prints its map of resources.
async fn registered() -> BTreeSet<String> {
    let service = init_service(app(Data::new(state(Arc::default())))).await;
    let response = call_service(&service, get("/nothing").to_request()).await;
    let map = format!("{:?}", response.request().resource_map());
    let patterns = map.split("patterns: ").skip(1);
    let paths = patterns.map(|rest| {
        let path = rest.split('"').nth(1).unwrap_or_default();
        assert!(
            rest.starts_with("Single(") && rest.contains("is_prefix: "),
            "actix prints its map differently: {rest}"
        );
        let is_prefix = rest.split("is_prefix: ").nth(1).unwrap().starts_with("true");
        assert!(
            path.is_empty() || !is_prefix,
            "{path} is a scope: register its resources with their whole paths, so that this test sees them"
        );
        path.to_owned()
    });
    paths.filter(|path| !path.is_empty()).collect()
}

/// The path under which a registered one is documented.
fn documented(path: &str) -> String {
    let alias = ALIASES.iter().find(|(alias, _)| path.starts_with(alias));
    alias.map_or_else(
        || path.to_owned(),
        |(alias, main)| path.replacen(alias, main, 1),
    )
}

/// A path with something in place of its parameters.
fn filled(path: &str) -> String {
    let mut parts = path.split(['{', '}']).enumerate();
    parts.by_ref().fold(String::new(), |filled, (i, part)| {
        filled + if i % 2 == 0 { part } else { "1" }
    })
}

#[actix_web::test]
async fn every_route_is_documented_and_every_documented_one_is_there() {
    let document = document();
    let told: BTreeSet<(String, String)> = operations(&document)
        .into_iter()
        .map(|(path, method, _)| (path.to_owned(), method.to_owned()))
        .collect();
    let service = init_service(app(Data::new(state(Arc::default())))).await;
    let mut found = BTreeSet::new();
    for path in registered().await {
        if ELSEWHERE.contains(&path.as_str()) {
            continue;
        }
        let mut answered = Vec::new();
        for method in METHODS {
            let http = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let request = TestRequest::with_uri(&filled(&path)).method(http);
            let response = call_service(&service, authorized(request).to_request()).await;
            if response.status() != 405 {
                answered.push(method);
            }
        }
        // What answers all methods in the same way is told once.
        if answered.len() == METHODS.len() {
            answered.truncate(1);
        }
        found.extend(
            answered
                .into_iter()
                .map(|method| (documented(&path), method.to_owned())),
        );
    }
    let show = |set: BTreeSet<&(String, String)>| format!("{set:#?}");
    let missing: BTreeSet<_> = found.difference(&told).collect();
    assert!(
        missing.is_empty(),
        "these are served and not documented: write them down in http/openapi:\n{}",
        show(missing)
    );
    let gone: BTreeSet<_> = told.difference(&found).collect();
    assert!(
        gone.is_empty(),
        "these are documented and not served:\n{}",
        show(gone)
    );
}

#[test]
fn every_operation_says_what_it_is_takes_and_gives() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    let mut ids = BTreeMap::new();
    let tags: Vec<&str> = TAGS.iter().map(|(name, _)| *name).collect();
    for (path, method, operation) in operations(&document) {
        let place = format!("{method} {path}");
        for field in ["operationId", "summary"] {
            assert!(operation[field].is_string(), "{place} has no {field}");
        }
        let id = operation["operationId"].as_str().unwrap();
        assert_eq!(ids.insert(id, place.clone()), None, "{id} is used twice");
        assert!(
            tags.contains(&operation["tags"][0].as_str().unwrap()),
            "{place}"
        );
        let responses = operation["responses"].as_object().unwrap();
        let open = operation["security"] == json!([{}]);
        assert_eq!(responses.contains_key("401"), !open, "{place}");
        let promised = responses
            .keys()
            .filter(|status| status.starts_with('2'))
            .count();
        assert_eq!(
            promised,
            usize::from(!responses.contains_key("501")),
            "{place}"
        );
        let parameters = operation["parameters"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let explained: Vec<&str> = parameters
            .iter()
            .filter(|parameter| parameter["in"] == "path")
            .map(|parameter| parameter["name"].as_str().unwrap())
            .collect();
        let named: Vec<&str> = in_path(path).collect();
        assert_eq!(explained, named, "{place}");
        for parameter in &parameters {
            assert_ne!(
                parameter["description"], "",
                "{place}: {parameter} is not explained"
            );
        }
        if operation["requestBody"].is_object() {
            let content = &operation["requestBody"]["content"]["application/json"];
            let examples = content["examples"].as_object();
            assert!(
                examples.is_some_and(|all| !all.is_empty()),
                "{place} has no example"
            );
        }
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_component_is_used() {
    fn walk(value: &Value, see: &mut impl FnMut(&str)) {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(to)) = object.get("$ref") {
                    see(to);
                }
                object.values().for_each(|value| walk(value, see));
            }
            Value::Array(values) => values.iter().for_each(|value| walk(value, see)),
            _ => {}
        }
    }
    /// Described in words: events are no JSON document, and no operation is asked by a method that it does not have.
    const IN_WORDS: [&str; 3] = ["CompletionChunk", "ChatChunk", "MethodNotAllowed"];
    let document = document();
    let mut seen = BTreeSet::new();
    walk(&document, &mut |to| {
        let pointer = to.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{to} leads nowhere");
        seen.insert(to.to_owned());
    });
    for kind in ["schemas", "responses"] {
        for name in document["components"][kind].as_object().unwrap().keys() {
            let used = seen.contains(&format!("#/components/{kind}/{name}"));
            assert!(
                used || IN_WORDS.contains(&name.as_str()),
                "{name} is not used"
            );
        }
    }
}

#[test]
fn refusals_have_the_status_and_code_that_the_document_says() {
    let kinds = [
        ErrorKind::InvalidParameter,
        ErrorKind::BadRequest,
        ErrorKind::Malformed,
        ErrorKind::PermissionDenied,
        ErrorKind::NotFound,
        ErrorKind::AlreadyExists,
        ErrorKind::Conflict,
        ErrorKind::Overloaded,
        ErrorKind::Unavailable,
        ErrorKind::Deadline,
        ErrorKind::Internal,
        ErrorKind::NotImplemented,
    ];
    let mut faults: Vec<Fault> = kinds.map(|kind| ApiError::new(kind, "why").into()).into();
    faults.extend([
        Fault::unauthenticated("why"),
        Fault::permission_denied("why"),
        Fault::too_large(1),
        Fault::body_timeout(1),
    ]);
    for fault in faults {
        let status = fault.status_code().as_u16();
        let told = errors::ALL.iter().find(|refusal| refusal.status == status);
        let told = told.unwrap_or_else(|| panic!("{status} is not documented"));
        assert!(told.codes.contains(&fault.code), "{status} {}", fault.code);
    }
}

#[actix_web::test]
async fn the_document_is_served_without_a_token_at_both_places() {
    let gateway = Arc::new(FakeGateway::default());
    for path in DOCUMENT_PATHS {
        let reply = call(&gateway, TestRequest::get().uri(path)).await;
        assert_eq!(reply.header("content-type"), Some("application/json"));
        assert_eq!(reply.ok(), document(), "{path}");
    }
}

#[actix_web::test]
async fn an_endpoints_own_document_tells_how_to_ask_it() {
    let gateway = Arc::new(FakeGateway::default());
    let view = with_state(endpoint_view("mine"), DeploymentState::Ready);
    gateway.endpoints.lock().unwrap().push(view);
    let ask = |path: &str| get(path).insert_header(("accept", "text/plain"));
    let own = call(&gateway, ask("/api/2.0/serving-endpoints/mine/openapi"))
        .await
        .ok();
    assert_eq!(
        (&own["openapi"], &own["info"]["title"]),
        (&"3.1.0".into(), &"mine".into())
    );
    let asked = operations(&own);
    let [(path, method, operation)] = asked[..] else {
        panic!("{asked:?}")
    };
    assert_eq!(
        (path, method),
        ("/serving-endpoints/mine/invocations", "post")
    );
    let content = &operation["requestBody"]["content"]["application/json"];
    assert_eq!(content["schema"]["oneOf"].as_array().unwrap().len(), 7);
    assert!(content["examples"]["chat"]["value"]["messages"].is_array());
    call(&gateway, ask("/api/2.0/serving-endpoints/other/openapi"))
        .await
        .refused(404, "RESOURCE_DOES_NOT_EXIST", "other");
    call(
        &gateway,
        TestRequest::get().uri("/api/2.0/serving-endpoints/mine/openapi"),
    )
    .await
    .refused(401, "UNAUTHENTICATED", "token");
}

#[actix_web::test]
async fn the_explorer_page_loads_nothing_from_elsewhere() {
    let gateway = Arc::new(FakeGateway::default());
    let mut loaded = vec!["/docs".to_owned(), "/docs/".to_owned()];
    let page = call(&gateway, TestRequest::get().uri("/docs")).await;
    for part in page
        .text
        .split(['"'])
        .filter(|part| part.starts_with("/docs/"))
    {
        loaded.push(part.to_owned());
    }
    assert_eq!(loaded.len(), 2 + FILES.len(), "{loaded:?}");
    assert!(
        !page.text.contains("//"),
        "the page names another server: {}",
        page.text
    );
    for path in loaded {
        let reply = call_bytes(&gateway, &path).await;
        let header = |name: &str| {
            reply
                .headers
                .get(name)
                .map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(reply.status, 200, "{path}");
        assert_eq!(
            header("x-content-type-options").as_deref(),
            Some("nosniff"),
            "{path}"
        );
        let rights = header("content-security-policy").unwrap();
        assert!(
            rights.starts_with("default-src 'none'") && !rights.contains("http"),
            "{rights}"
        );
        let kind = header("content-type").unwrap();
        let expected = match path.rsplit_once('.') {
            Some((_, "js")) => "text/javascript",
            Some((_, "css")) => "text/css",
            Some((_, "png")) => "image/png",
            _ => "text/html; charset=utf-8",
        };
        assert_eq!(kind, expected, "{path}");
        assert!(reply.bytes > 100, "{path} has {} bytes", reply.bytes);
    }
    let start = call(
        &gateway,
        TestRequest::get().uri("/docs/swagger-initializer.js"),
    )
    .await;
    assert!(
        start.text.contains("\"url\": \"/api/2.0/openapi.json\""),
        "{}",
        start.text
    );
    assert!(!start.text.contains("://"), "{}", start.text);
    let other = call(&gateway, get("/docs/oauth2-redirect.html")).await;
    other.refused(404, "ENDPOINT_NOT_FOUND", "/docs/oauth2-redirect.html");
}

struct Bytes {
    status: u16,
    headers: HeaderMap,
    bytes: usize,
}

/// Files need not be text.
async fn call_bytes(gateway: &Arc<FakeGateway>, path: &str) -> Bytes {
    let service = init_service(app(Data::new(state(Arc::clone(gateway))))).await;
    let response = call_service(&service, TestRequest::get().uri(path).to_request()).await;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let bytes = read_body(response).await.len();
    Bytes {
        status,
        headers,
        bytes,
    }
}
