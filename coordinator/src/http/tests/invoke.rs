//! Generation through its paths.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::request::{Delta, End, Failure, FailureKind, Prompt, TokenLogprob};
use serde_json::{Value, json};

use super::fake::{FakeGateway, Script, delta, end, endpoint_view, generation};
use super::{Reply, call, get, post};
use crate::api::{ApiError, ErrorKind, GenerationEvent};

const INVOKE: &str = "/serving-endpoints/e/invocations";

fn answer(text: &str) -> Vec<GenerationEvent> {
    vec![delta(0, text), end(0, 2, End::Stop)]
}

/// A cluster that answers one call with these prompts' events.
fn cluster(prompts: Vec<Vec<GenerationEvent>>) -> Arc<FakeGateway> {
    FakeGateway::playing([Script::Events(prompts)])
}

async fn ask(gateway: &Arc<FakeGateway>, path: &str, body: Value) -> Reply {
    call(gateway, post(path, &body)).await
}

#[actix_web::test]
async fn the_four_formats_answer_with_predictions() {
    let bodies = [
        json!({"dataframe_split": {"columns": ["prompt"], "index": [0], "data": [["p"]]}, "params": {"stop": ["x"]}}),
        json!({"dataframe_records": [{"prompt": "p"}]}),
        json!({"instances": [{"prompt": "p"}]}),
        json!({"inputs": {"prompt": ["p"]}, "params": null}),
    ];
    for body in bodies {
        let gateway = cluster(vec![answer("text")]);
        let reply = ask(&gateway, INVOKE, body).await;
        let expected = r#"{"predictions":[{"candidates":[{"text":"text","metadata":{"finish_reason":"stop"}}],"metadata":{"input_tokens":3,"output_tokens":2,"total_tokens":5}}]}"#;
        assert_eq!((reply.status, reply.text.as_str()), (200, expected));
        assert_eq!(reply.header("served-model-name"), Some("llama2-7b-1"));
        let call = gateway.calls.lock().unwrap()[0].clone();
        assert_eq!(
            (call.endpoint.as_str(), &call.prompts[0].prompt),
            ("e", &Prompt::Text("p".into()))
        );
        assert_eq!(Some(call.request_id.as_str()), reply.header("x-request-id"));
    }
}

#[actix_web::test]
async fn prompts_may_ask_for_different_numbers_of_candidates() {
    let two = vec![
        delta(1, "b"),
        delta(0, "a"),
        end(1, 1, End::Length),
        end(0, 1, End::Stop),
    ];
    let gateway = cluster(vec![two, answer("c")]);
    let body = json!({"instances": [{"prompt": "p", "candidate_count": 2}, {"prompt": "q"}]});
    let predictions = ask(&gateway, INVOKE, body).await.ok()["predictions"].clone();
    let texts = |i: usize| {
        let candidates = predictions[i]["candidates"].as_array().unwrap();
        candidates
            .iter()
            .map(|c| c["text"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (texts(0), texts(1)),
        (vec!["a".into(), "b".into()], vec!["c".into()])
    );
    assert_eq!(predictions[0]["metadata"]["output_tokens"], 2);
}

#[actix_web::test]
async fn completions_and_chats_answer_on_all_their_paths() {
    for path in [
        INVOKE,
        "/serving-endpoints/completions",
        "/serving-endpoints/v1/completions/",
        "/ai-gateway/mlflow/v1/completions",
        "/ai-gateway/openai/v1/completions",
    ] {
        let body = json!({"model": "e", "prompt": ["p", "q"], "suffix": "!"});
        let gateway = cluster(vec![answer("a"), answer("b")]);
        let json = ask(&gateway, path, body).await.ok();
        assert_eq!(
            (&json["object"], &json["model"]),
            (&json!("text_completion"), &json!("e"))
        );
        assert!(
            json["id"].as_str().unwrap().starts_with("cmpl-")
                && json["created"].as_u64().unwrap() > 1_700_000_000
        );
        assert_eq!(
            (&json["choices"][1]["index"], &json["choices"][1]["text"]),
            (&json!(1), &json!("b!"))
        );
        assert_eq!(
            json["usage"],
            json!({"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10})
        );
    }
    for path in [
        INVOKE,
        "/serving-endpoints/chat/completions",
        "/serving-endpoints/v1/chat/completions",
    ] {
        let body = json!({"model": "e", "messages": [{"role": "user", "content": "p"}]});
        let json = ask(&cluster(vec![answer("a")]), path, body).await.ok();
        assert_eq!(json["object"], "chat.completion");
        assert_eq!(
            json["choices"][0]["message"],
            json!({"role": "assistant", "content": "a"})
        );
        let id = json["id"].as_str().unwrap();
        assert!(id.starts_with("chatcmpl-") && id.len() <= 64, "{id}");
    }
}

#[actix_web::test]
async fn a_stream_says_the_same_as_the_whole_answer() {
    let script = || {
        vec![
            delta(0, "one "),
            delta(0, ""),
            delta(0, "two"),
            end(0, 2, End::Stop),
        ]
    };
    let body = |stream: bool| json!({"prompt": "p", "stream": stream, "stream_options": {"include_usage": true}});
    let whole = ask(&cluster(vec![script()]), INVOKE, body(false))
        .await
        .ok();
    let streamed = ask(&cluster(vec![script()]), INVOKE, body(true)).await;
    assert_eq!(streamed.header("content-type"), Some("text/event-stream"));
    assert_eq!(streamed.header("cache-control"), Some("no-cache"));
    assert_eq!(streamed.header("served-model-name"), Some("llama2-7b-1"));
    let events: Vec<&str> = streamed
        .text
        .split_terminator("\n\n")
        .map(|e| e.strip_prefix("data: ").unwrap())
        .collect();
    let (last, events) = events.split_last().unwrap();
    assert_eq!(*last, "[DONE]");
    let chunks: Vec<Value> = events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["created"] == chunks[0]["created"]));
    let text: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(json!(text), whole["choices"][0]["text"]);
    assert_eq!(
        chunks.len(),
        4,
        "two of text, the end and the usage: {chunks:?}"
    );
    assert_eq!(chunks[3]["usage"], whole["usage"]);
}

#[actix_web::test]
async fn refusals_come_before_the_first_byte_also_of_a_stream() {
    let refusals = [
        (ErrorKind::BadRequest, 400, "BAD_REQUEST", None),
        (ErrorKind::NotFound, 404, "RESOURCE_DOES_NOT_EXIST", None),
        (
            ErrorKind::Overloaded,
            429,
            "REQUEST_LIMIT_EXCEEDED",
            Some("1"),
        ),
        (
            ErrorKind::Unavailable,
            503,
            "TEMPORARILY_UNAVAILABLE",
            Some("1"),
        ),
    ];
    for (kind, status, code, retry_after) in refusals {
        for stream in [false, true] {
            let gateway = FakeGateway::playing([Script::Refusal(ApiError::new(kind, "because"))]);
            let reply = ask(&gateway, INVOKE, json!({"prompt": "p", "stream": stream})).await;
            reply.refused(status, code, "because");
            assert_eq!(reply.header("retry-after"), retry_after);
        }
    }
}

#[actix_web::test]
async fn a_whole_answer_that_fails_has_the_status_of_its_failure() {
    let failed = |kind| End::Error(Failure::new(kind, "because"));
    let table = [
        (failed(FailureKind::TooLarge), 400, "because"),
        (failed(FailureKind::Unavailable), 503, "because"),
        (failed(FailureKind::Internal), 500, "because"),
        (End::Deadline, 504, "the request's 60000 ms were over"),
        (End::Cancelled, 503, "cancelled"),
    ];
    for (bad, status, says) in table {
        for body in [json!({"prompt": "p"}), json!({"inputs": "p"})] {
            let reply = ask(
                &cluster(vec![vec![delta(0, "x"), end(0, 1, bad.clone())]]),
                INVOKE,
                body,
            )
            .await;
            let code = reply.json()["error_code"].as_str().unwrap().to_owned();
            reply.refused(status, &code, says);
        }
    }
    let truncated = vec![delta(0, "half"), end(0, 1, End::Deadline)];
    let body = json!({"prompt": "p", "error_behavior": "truncate"});
    let kept = ask(&cluster(vec![truncated]), INVOKE, body).await.ok();
    assert_eq!(
        (
            &kept["choices"][0]["text"],
            &kept["choices"][0]["finish_reason"]
        ),
        (&json!("half"), &json!("length"))
    );
}

#[actix_web::test]
async fn exactly_one_input_is_taken() {
    let table = [
        (
            json!({"params": {}}),
            "dataframe_split, dataframe_records, instances, inputs, messages, prompt, input",
        ),
        (
            json!({"inputs": "a", "prompt": "b"}),
            "the body has inputs, prompt, give one",
        ),
        (
            json!({"messages": [], "instances": []}),
            "the body has instances, messages, give one",
        ),
        (
            json!({"prompt": "a", "input": "a"}),
            "the body has prompt, input, give one",
        ),
    ];
    for (body, says) in table {
        let gateway = Arc::new(FakeGateway::default());
        ask(&gateway, INVOKE, body)
            .await
            .refused(400, "BAD_REQUEST", says);
        assert!(gateway.calls.lock().unwrap().is_empty());
    }
}

#[actix_web::test]
async fn openai_paths_need_a_model() {
    let gateway = Arc::new(FakeGateway::default());
    for path in [
        "/serving-endpoints/completions",
        "/serving-endpoints/chat/completions",
    ] {
        let reply = ask(&gateway, path, json!({"prompt": "a", "messages": []})).await;
        reply.refused(400, "BAD_REQUEST", "model is missing");
        assert_eq!(reply.json()["param"], "model");
    }
}

#[actix_web::test]
async fn a_client_may_shorten_its_deadline() {
    let gateway = cluster(vec![answer("a")]);
    let before = Instant::now();
    let request =
        post(INVOKE, &json!({"inputs": "p"})).insert_header(("x-request-timeout-ms", "1500"));
    call(&gateway, request).await.ok();
    let left = gateway.calls.lock().unwrap()[0].deadline - before;
    assert!(
        left > Duration::from_millis(1400) && left < Duration::from_secs(60),
        "{left:?}"
    );
    let request =
        post(INVOKE, &json!({"inputs": "p"})).insert_header(("x-request-timeout-ms", "soon"));
    call(&gateway, request).await.refused(
        400,
        "BAD_REQUEST",
        "x-request-timeout-ms must be a whole number",
    );
}

#[actix_web::test]
async fn an_answer_to_another_number_of_prompts_is_a_fault() {
    let gateway = FakeGateway::playing([Script::Generations(vec![generation(1, answer("a"))])]);
    let reply = ask(&gateway, INVOKE, json!({"prompt": ["p", "q"]})).await;
    reply.refused(500, "INTERNAL_ERROR", "the cluster answered 1 of 2 prompts");
}

#[actix_web::test]
async fn models_are_the_endpoints() {
    let gateway = FakeGateway::default();
    gateway.endpoints.lock().unwrap().push(endpoint_view("e"));
    let gateway = Arc::new(gateway);
    let model = json!({"id": "e", "object": "model", "created": 1_710_327_769, "owned_by": "ann"});
    for path in [
        "/serving-endpoints/models",
        "/serving-endpoints/v1/models",
        "/ai-gateway/mlflow/v1/models",
        "/ai-gateway/openai/v1/models/",
    ] {
        assert_eq!(
            call(&gateway, get(path)).await.ok(),
            json!({"object": "list", "data": [model]})
        );
    }
}

#[actix_web::test]
async fn one_model_is_told_by_its_name() {
    let gateway = FakeGateway::default();
    gateway.endpoints.lock().unwrap().push(endpoint_view("e"));
    let gateway = Arc::new(gateway);
    let one = call(&gateway, get("/serving-endpoints/models/e"))
        .await
        .ok();
    assert_eq!((&one["id"], &one["object"]), (&json!("e"), &json!("model")));
    call(&gateway, get("/serving-endpoints/models/x"))
        .await
        .refused(
            404,
            "RESOURCE_DOES_NOT_EXIST",
            "Endpoint with name 'x' does not exist.",
        );
}

#[actix_web::test]
async fn the_best_candidates_are_shown_and_all_are_counted() {
    let said = |candidate, text: &str, logprob| {
        GenerationEvent::Delta(Delta {
            candidate,
            ids: vec![1],
            text: text.into(),
            logprobs: vec![TokenLogprob {
                id: 1,
                bytes: text.into(),
                logprob: Some(logprob),
                top: vec![],
            }],
            ..Delta::default()
        })
    };
    // The mean counts, not the sum: the longest one is the best.
    let events = vec![
        said(0, "bad", -3.0),
        said(1, "good", -0.5),
        said(2, "be", -0.4),
        said(2, "st", -0.4),
        end(0, 1, End::Stop),
        end(1, 1, End::Stop),
        end(2, 2, End::Length),
    ];
    let body = json!({"prompt": "p", "n": 2, "best_of": 3});
    let reply = ask(&cluster(vec![events.clone()]), INVOKE, body).await.ok();
    let texts: Vec<&str> = reply["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["best", "good"]);
    assert_eq!(reply["choices"][1]["index"], 1);
    assert_eq!(reply["choices"][0]["logprobs"], Value::Null);
    assert_eq!(reply["usage"]["completion_tokens"], 4);
    let body = json!({"prompt": "p", "best_of": 3, "logprobs": 1});
    let reply = ask(&cluster(vec![events]), INVOKE, body).await.ok();
    assert_eq!(reply["choices"].as_array().unwrap().len(), 1);
    assert_eq!(
        reply["choices"][0]["logprobs"]["tokens"],
        json!(["be", "st"])
    );
}

#[actix_web::test]
async fn embeddings_answer_on_all_their_paths() {
    let embedded = |values: &[f32]| {
        vec![
            GenerationEvent::Embedding(values.to_vec()),
            end(0, 0, End::Length),
        ]
    };
    for path in [
        INVOKE,
        "/serving-endpoints/embeddings",
        "/serving-endpoints/v1/embeddings",
        "/ai-gateway/mlflow/v1/embeddings",
        "/ai-gateway/openai/v1/embeddings",
    ] {
        let gateway = cluster(vec![embedded(&[0.5, 1.0]), embedded(&[2.0, 3.0])]);
        let body = json!({"model": "e", "input": ["p", "q"]});
        let reply = ask(&gateway, path, body).await;
        assert_eq!(reply.header("served-model-name"), Some("llama2-7b-1"));
        let data = |index: usize, values: &[f32]| json!({"object": "embedding", "index": index, "embedding": values});
        let expected = json!({
            "object": "list", "model": "e", "data": [data(0, &[0.5, 1.0]), data(1, &[2.0, 3.0])],
            "usage": {"prompt_tokens": 6, "total_tokens": 6},
        });
        assert_eq!(reply.ok(), expected, "{path}");
        assert!(
            gateway.calls.lock().unwrap()[0]
                .prompts
                .iter()
                .all(|prompt| prompt.embedding)
        );
    }
    let short = json!({"input": "p", "dimensions": 1});
    ask(&cluster(vec![embedded(&[0.5, 1.0])]), INVOKE, short)
        .await
        .refused(
            400,
            "BAD_REQUEST",
            "dimensions is 1, but this model's embeddings have 2 numbers",
        );
}
