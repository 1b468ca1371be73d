//! Tables through their paths: who sees what, and in which form.

use std::sync::Arc;

use actix_web::http::header::{ACCEPT, AUTHORIZATION};
use actix_web::test::{TestRequest, call_service, init_service, read_body};
use actix_web::web::Data;
use common::model_ref::ModelRef;
use common::request::End;
use serde_json::{Value, json};

use super::super::app;
use super::fake::{FakeGateway, Script, delta, end, endpoint_view};
use super::{Reply, get, post, state, tables_in};
use crate::api::{Grant, Grantee, Level};
use crate::tables::{Capture, Known, Tables};

const INVOKE: &str = "/serving-endpoints/e/invocations";
const ONE: &str = "/api/2.0/serving-endpoints/e";

/// A server whose endpoint `e` is ann's, with a usage and an inference table; bob may query it.
struct Server {
    state: Data<super::HttpState>,
    _folder: tempfile::TempDir,
}

impl Server {
    fn new(scripts: Vec<Script>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gateway = FakeGateway::playing(scripts);
        let mut view = endpoint_view("e");
        view.settings.grants = vec![Grant {
            to: Grantee::User("bob".into()),
            level: Level::Query,
        }];
        gateway.endpoints.lock().unwrap().push(view);
        let mut state = state(gateway);
        let tables = tables_in(folder.path(), true);
        state.observer = Arc::<Tables>::clone(&tables);
        state.tables = tables;
        let server = Server {
            state: Data::new(state),
            _folder: folder,
        };
        server.state.tables.know("e", Some(server.known()));
        server
    }

    fn known(&self) -> Known {
        let entity = "llama2-7b-1".to_owned();
        Known {
            // The endpoint's own: rows of earlier endpoints of its name are not its.
            id: endpoint_view("e").id,
            usage: true,
            inference: Some(Capture { redact: false }),
            models: vec![(entity, ModelRef::new("cat.default.llama2-7b", "1").unwrap())],
        }
    }

    async fn call(&self, request: TestRequest) -> Reply {
        let service = init_service(app(self.state.clone())).await;
        let response = call_service(&service, request.to_request()).await;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = String::from_utf8(read_body(response).await.to_vec()).unwrap();
        Reply {
            status,
            headers,
            text,
        }
    }

    /// As ann, an admin.
    async fn get(&self, path: &str) -> Reply {
        self.call(get(path)).await
    }

    /// As bob.
    async fn get_as_bob(&self, path: &str) -> Reply {
        self.call(bob(TestRequest::get().uri(path))).await
    }
}

fn bob(request: TestRequest) -> TestRequest {
    request.insert_header((AUTHORIZATION, "Bearer bobs"))
}

fn answer() -> Script {
    Script::Events(vec![vec![
        delta(0, "a"),
        delta(0, "b"),
        end(0, 2, End::Stop),
    ]])
}

/// Two calls of ann, one of them refused, and one of bob.
async fn three_calls() -> Server {
    let server = Server::new(vec![answer(), answer()]);
    let prompt = json!({"inputs": "p", "client_request_id": "c-1", "usage_context": {"team": "x"}});
    server.call(post(INVOKE, &prompt)).await.ok();
    let wrong = json!({"inputs": 5});
    assert_eq!(server.call(post(INVOKE, &wrong)).await.status, 400);
    let stream = json!({"prompt": "p", "stream": true});
    let request = bob(TestRequest::post().uri(INVOKE)).set_payload(stream.to_string());
    assert_eq!(server.call(request).await.status, 200);
    server
}

#[actix_web::test]
async fn sums_rows_and_totals_agree_with_the_calls() {
    let server = three_calls().await;
    for base in [ONE, "/api/2.0/preview/serving-endpoints/e"] {
        let sums = server
            .get(&format!("{base}/usage?group_by=user"))
            .await
            .ok();
        assert_eq!(sums["group_by"], json!(["user"]));
        let (ann, bob) = (&sums["groups"][0], &sums["groups"][1]);
        assert_eq!(
            (
                &ann["user"],
                &ann["calls"],
                &ann["complete"],
                &ann["failed"]
            ),
            (&json!("ann"), &json!(2), &json!(1), &json!(1))
        );
        assert_eq!(
            (&bob["user"], &bob["prompt_tokens"], &bob["output_tokens"]),
            (&json!("bob"), &json!(3), &json!(2))
        );
        assert_eq!(sums["total"]["total_tokens"], 10);
        let totals = server.get(&format!("{base}/usage/totals")).await.ok();
        assert_eq!(totals["total"], sums["total"]);
        let first = &totals["totals"][0];
        assert_eq!(
            (&first["endpoint"], &first["endpoint_id"]),
            (&json!("e"), &json!(endpoint_view("e").id))
        );
    }
    let rows = server.get(&format!("{ONE}/usage/rows")).await.ok();
    let rows = rows["rows"].as_array().unwrap();
    let outcomes: Vec<&Value> = rows.iter().map(|row| &row["outcome"]).collect();
    assert_eq!(outcomes, ["complete", "BAD_REQUEST", "complete"]);
    assert_eq!(
        (&rows[0]["client_request_id"], &rows[0]["usage_context"]),
        (&json!("c-1"), &json!({"team": "x"}))
    );
    assert_eq!(rows[0]["entity_name"], "cat.default.llama2-7b");
    assert_eq!(
        (&rows[1]["served_entity"], &rows[1]["status"]),
        (&json!(null), &json!(400))
    );
    assert_eq!(rows[2]["stream"], true);
    let all = server.get("/api/2.0/usage?group_by=endpoint,entity").await;
    assert_eq!(all.ok()["groups"][1]["entity"], "llama2-7b-1");
}

#[actix_web::test]
async fn pages_go_on_where_the_one_before_ended() {
    let server = three_calls().await;
    let first = server.get(&format!("{ONE}/usage/rows?limit=2")).await.ok();
    assert_eq!(first["rows"].as_array().unwrap().len(), 2);
    let token = first["next_page_token"].as_str().unwrap();
    let path = format!("{ONE}/usage/rows?limit=2&page_token={token}");
    let second = server.get(&path).await.ok();
    assert_eq!(second["rows"].as_array().unwrap().len(), 1);
    assert!(second.get("next_page_token").is_none());
    let file = server
        .get(&format!("{ONE}/usage/rows?limit=2&format=ndjson"))
        .await;
    assert_eq!(file.header("x-next-page-token"), Some(token));
}

#[actix_web::test]
async fn everybody_sees_their_own_calls_and_managers_see_all() {
    let server = three_calls().await;
    for path in [&format!("{ONE}/usage/rows"), "/api/2.0/usage/rows"] {
        let rows = server.get_as_bob(path).await.ok();
        let rows = rows["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 1, "{path}");
        assert_eq!(rows[0]["user"], "bob");
    }
    let sums = server.get_as_bob("/api/2.0/usage").await.ok();
    assert_eq!(sums["total"]["calls"], 1);
    for path in [&format!("{ONE}/usage?user=ann"), "/api/2.0/usage?user=ann"] {
        let refused = server.get_as_bob(path).await;
        refused.refused(403, "PERMISSION_DENIED", "their own");
    }
    let bodies = server.get_as_bob(&format!("{ONE}/inference-table")).await;
    bodies.refused(403, "PERMISSION_DENIED", "CAN_MANAGE");
}

#[actix_web::test]
async fn bodies_are_in_the_inference_table() {
    let server = three_calls().await;
    let table = server
        .get(&format!("{ONE}/inference-table?user=ann"))
        .await
        .ok();
    let rows = table["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    let request: Value =
        serde_json::from_str(rows[0]["request"]["text"].as_str().unwrap()).unwrap();
    assert_eq!(request["inputs"], "p");
    let response: Value =
        serde_json::from_str(rows[0]["response"]["text"].as_str().unwrap()).unwrap();
    assert_eq!(response["predictions"][0]["candidates"][0]["text"], "ab");
    assert_eq!(rows[1]["response"], json!(null));
}

#[actix_web::test]
async fn answers_are_files_for_whoever_asks_for_them() {
    let server = three_calls().await;
    let request = get(&format!("{ONE}/usage?group_by=user")).insert_header((ACCEPT, "text/csv"));
    let csv = server.call(request).await;
    assert_eq!(csv.status, 200);
    assert_eq!(csv.header("content-type"), Some("text/csv; charset=utf-8"));
    let lines: Vec<&str> = csv.text.split("\r\n").collect();
    assert!(
        lines[0].starts_with("user,calls,complete,cancelled,failed,prompt_tokens"),
        "{}",
        csv.text
    );
    assert!(lines[2].starts_with("bob,1,1,0,0,3,2,5,0,"), "{}", csv.text);
    let request =
        get(&format!("{ONE}/inference-table")).insert_header((ACCEPT, "application/x-ndjson"));
    let file = server.call(request).await;
    assert_eq!(file.header("content-type"), Some("application/x-ndjson"));
    let rows: Vec<Value> = file
        .text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 3);
    let csv = server
        .get(&format!("{ONE}/usage/rows?format=csv"))
        .await
        .text;
    assert_eq!(csv.lines().count(), 4, "{csv}");
}

#[actix_web::test]
async fn calls_of_an_earlier_endpoint_of_the_same_name_are_shown_to_admins_alone() {
    let server = three_calls().await;
    let mut known = server.known();
    known.id = "of another life".into();
    server.state.tables.know("e", Some(known));
    server.call(post(INVOKE, &json!({"inputs": 5}))).await;
    let calls = async |path: &str| {
        let answer = server.get(path).await.ok();
        let rows = answer["rows"].as_array().map(Vec::len);
        rows.unwrap_or_else(|| answer["total"]["calls"].as_u64().unwrap() as usize)
    };
    for path in ["usage", "usage/rows", "usage/totals", "inference-table"] {
        assert_eq!(calls(&format!("{ONE}/{path}")).await, 3, "{path}");
    }
    for path in ["usage", "usage/rows", "usage/totals"] {
        let path = format!("/api/2.0/{path}?endpoint=e");
        assert_eq!(calls(&path).await, 4, "{path}");
    }
    let other = server.get(&format!("{ONE}/usage?endpoint=f")).await;
    other.refused(400, "INVALID_PARAMETER_VALUE", "must be left out");
}

#[actix_web::test]
async fn a_time_is_from_start_on_and_before_end() {
    let server = three_calls().await;
    let rows = server.get(&format!("{ONE}/usage/rows")).await.ok();
    let last = rows["rows"][2]["time_ms"].as_u64().unwrap();
    let count = async |query: String| {
        let sums = server.get(&format!("{ONE}/usage?{query}")).await.ok();
        sums["total"]["calls"].as_u64().unwrap()
    };
    assert_eq!(count(format!("start={}", last + 1)).await, 0);
    assert_eq!(count(format!("end={}", last + 1)).await, 3);
    assert_eq!(count("end=2020-01-01".into()).await, 0);
    let wrong = server.get(&format!("{ONE}/usage?start=noon")).await;
    wrong.refused(400, "INVALID_PARAMETER_VALUE", "start must be milliseconds");
    let wrong = server
        .get(&format!(
            "{ONE}/usage/rows?page_token=2020-01-01.jsonl@1&limit=5"
        ))
        .await;
    assert_eq!(wrong.status, 200, "a segment that is gone is passed over");
}
