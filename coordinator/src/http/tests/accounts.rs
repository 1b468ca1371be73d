//! Every call is on its account once: answered, refused, failed or left.

use std::sync::Arc;

use actix_web::test::{TestRequest, call_service, init_service, read_body};
use actix_web::web::Data;
use common::request::{End, Failure, FailureKind};
use serde_json::{Value, json};

use super::super::account::tests::Ledger;
use super::super::app;
use super::fake::{FakeGateway, Script, delta, end};
use super::{post, state};
use crate::api::{ApiError, CallFormat, CallRecord, ErrorKind, Outcome};

const INVOKE: &str = "/serving-endpoints/e/invocations";

/// The status and the one record of a request.
async fn recorded(scripts: Vec<Script>, payloads: bool, request: TestRequest) -> (u16, CallRecord) {
    let ledger = Arc::new(Ledger {
        payloads,
        ..Ledger::default()
    });
    let mut state = state(FakeGateway::playing(scripts));
    state.observer = Arc::<Ledger>::clone(&ledger);
    let service = init_service(app(Data::new(state))).await;
    let response = call_service(&service, request.to_request()).await;
    let status = response.status().as_u16();
    read_body(response).await;
    (status, ledger.only())
}

fn answer() -> Script {
    Script::Events(vec![vec![
        delta(0, "a"),
        delta(0, "b"),
        end(0, 2, End::Stop),
    ]])
}

#[actix_web::test]
async fn an_answered_call_is_recorded_with_its_tokens_labels_and_bodies() {
    let labels = json!({"client_request_id": "c-1", "usage_context": {"team": "search"}});
    let with = |body: Value| {
        let mut body = body.as_object().unwrap().clone();
        body.extend(labels.as_object().unwrap().clone());
        Value::Object(body)
    };
    let table = [
        (INVOKE, json!({"inputs": "p"}), CallFormat::Predictions),
        (
            INVOKE,
            json!({"prompt": "p", "stream": true}),
            CallFormat::Completions,
        ),
        (
            "/serving-endpoints/completions",
            json!({"model": "e", "prompt": "p"}),
            CallFormat::Completions,
        ),
        (
            "/serving-endpoints/v1/chat/completions",
            json!({"model": "e", "messages": [{"role": "user", "content": "p"}], "stream": true}),
            CallFormat::Chat,
        ),
    ];
    for (path, body, format) in table {
        let body = with(body);
        let request = post(path, &body).insert_header(("x-request-id", "my-id"));
        let (status, record) = recorded(vec![answer()], true, request).await;
        assert_eq!(status, 200);
        assert_eq!(
            (record.endpoint.as_str(), record.user.as_str()),
            ("e", "ann")
        );
        assert_eq!(record.request_id, "my-id");
        assert_eq!(record.served_entity.as_deref(), Some("llama2-7b-1"));
        assert_eq!(record.client_request_id.as_deref(), Some("c-1"));
        assert_eq!(
            record.usage_context,
            [("team".to_owned(), "search".to_owned())]
        );
        assert_eq!(
            (record.format, record.stream),
            (format, body["stream"] == json!(true))
        );
        assert_eq!((record.prompt_tokens, record.output_tokens), (3, 2));
        assert_eq!((record.status, record.outcome), (200, Outcome::Complete));
        let payload = record.payload.unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&payload.request).unwrap(),
            body
        );
        let response: Value = serde_json::from_str(&payload.response.unwrap()).unwrap();
        assert!(response.to_string().contains("\"ab\""), "{response}");
    }
}

#[actix_web::test]
async fn a_call_that_is_not_answered_is_recorded_with_its_error() {
    let refused = || Script::Refusal(ApiError::new(ErrorKind::Overloaded, "full"));
    let failing = || {
        let failure = Failure::new(FailureKind::Unavailable, "gone");
        Script::Events(vec![vec![delta(0, "a"), end(0, 1, End::Error(failure))]])
    };
    let table = [
        (vec![], json!({"prompt": 5}), 400, 400, "BAD_REQUEST", 0),
        (vec![], json!({"nothing": 5}), 400, 400, "BAD_REQUEST", 0),
        (
            vec![],
            json!({"prompt": "p", "usage_context": 5}),
            400,
            400,
            "BAD_REQUEST",
            0,
        ),
        (
            vec![refused()],
            json!({"inputs": "p"}),
            429,
            429,
            "REQUEST_LIMIT_EXCEEDED",
            0,
        ),
        (
            vec![failing()],
            json!({"inputs": "p"}),
            503,
            503,
            "TEMPORARILY_UNAVAILABLE",
            1,
        ),
        (
            vec![failing()],
            json!({"prompt": "p", "stream": true}),
            200,
            503,
            "TEMPORARILY_UNAVAILABLE",
            1,
        ),
    ];
    for (scripts, body, status, recorded_status, code, tokens) in table {
        let (got, record) = recorded(scripts, false, post(INVOKE, &body)).await;
        assert_eq!((got, record.status), (status, recorded_status), "{body}");
        assert_eq!(record.output_tokens, tokens);
        assert_eq!(record.payload, None);
        let Outcome::Failed { code: told, .. } = record.outcome else {
            panic!("{body} gave {:?}", record.outcome);
        };
        assert_eq!(told, code);
    }
}
