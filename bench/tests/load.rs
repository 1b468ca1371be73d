//! Loads against a server that is played: what is counted is what it did.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bench::client::{Api, Client, Target};
use bench::length::Length;
use bench::load::{Load, Loop};
use bench::prompt::{PromptForm, Prompts};
use bench::report::Report;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// Answers requests as its script says, one connection each.
struct FakeServer {
    url: String,
    /// Requests that were open together at most.
    together: Arc<AtomicUsize>,
}

/// What the server does with a request.
type Script = fn(&Value) -> String;

impl FakeServer {
    async fn start(script: Script) -> FakeServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, together) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let most = Arc::clone(&together);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (open, most) = (Arc::clone(&open), Arc::clone(&most));
                tokio::spawn(async move {
                    most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    serve(stream, script).await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        FakeServer {
            url: format!("http://{address}/v1/completions"),
            together,
        }
    }
}

async fn serve(stream: TcpStream, script: Script) {
    let mut stream = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    let mut body = vec![0; length.unwrap().trim().parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    let answer = script(&serde_json::from_slice(&body).unwrap());
    // The end of the connection is the end of the answer.
    stream.write_all(answer.as_bytes()).await.unwrap();
}

/// A stream of `max_tokens` words, an event each, and the usage.
fn words(ask: &Value) -> String {
    let count = ask["max_tokens"].as_u64().unwrap();
    let mut answer = head("200 OK");
    for _ in 0..count {
        answer += &format!(
            "data: {}\n\n",
            json!({"choices": [{"index": 0, "text": " w"}]})
        );
    }
    let prompt = ask["prompt"].as_array().unwrap().len();
    let usage = json!({"prompt_tokens": prompt, "completion_tokens": count});
    answer
        + &format!(
            "data: {}\n\ndata: [DONE]\n\n",
            json!({"choices": [], "usage": usage})
        )
}

fn head(status: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
}

fn load(loop_: Loop, requests: u64) -> Load {
    Load {
        loop_,
        requests,
        time_max: None,
        prompt: Length::Uniform(3, 9),
        output: Length::Fixed(5),
        prompts: Prompts {
            form: PromptForm::Ids,
            shared: 0.5,
            seed: 1,
        },
    }
}

async fn report(server: &FakeServer, api: Api, load: &Load) -> Report {
    let client = Client::new(Target {
        url: server.url.clone(),
        api,
        model: Some("m".into()),
        token: None,
        timeout: Duration::from_secs(60),
    });
    Report::of("test", &load.run(&client.unwrap()).await, None)
}

#[tokio::test]
async fn a_closed_loop_sends_all_its_requests_and_no_more_at_a_time_than_it_has_clients() {
    let server = FakeServer::start(words).await;
    let load = load(Loop::Closed(3), 20);
    let report = report(&server, Api::Openai, &load).await;
    assert_eq!((report.answered, report.failed()), (20, 0));
    assert_eq!(report.output_tokens, 100);
    let asked: u64 = (0..20)
        .map(|number| u64::from(load.ask(number).prompt_tokens))
        .sum();
    assert_eq!(report.prompt_tokens, asked);
    assert!(report.output_tokens_per_s > 0.0 && report.e2e_ms.max >= report.ttft_ms.p50);
    assert_eq!(report.tokens_by_second.iter().sum::<f64>().round(), 100.0);
    assert!((1..=3).contains(&server.together.load(Ordering::SeqCst)));
}

#[tokio::test]
async fn an_open_loop_sends_all_its_requests() {
    let server = FakeServer::start(words).await;
    let report = report(&server, Api::Openai, &load(Loop::Open(2000.0), 50)).await;
    assert_eq!((report.answered, report.failed()), (50, 0));
}

#[tokio::test]
async fn no_request_begins_after_the_time_is_up() {
    let server = FakeServer::start(words).await;
    for loop_ in [Loop::Closed(2), Loop::Open(1.0)] {
        let mut load = load(loop_, u64::MAX);
        load.time_max = Some(Duration::ZERO);
        assert_eq!(report(&server, Api::Openai, &load).await.answered, 0);
    }
}

#[tokio::test]
async fn every_kind_of_failure_is_counted_as_what_it_is() {
    let cases: [(Script, &str); 6] = [
        (|_| head("429 Too Many Requests"), "status 429"),
        (
            |_| head("200 OK") + "data: {\"error\": {}}\n\n",
            "error in the stream",
        ),
        (
            |_| head("200 OK") + "data: {\"choices\": [{\"text\": \"x\"}]}\n\n",
            "cut short",
        ),
        (|_| head("200 OK") + "data: no json\n\n", "cut short"),
        (
            |_| {
                let body = json!({"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}});
                head("200 OK") + &format!("data: {body}\n\ndata: [DONE]\n\n")
            },
            "too few tokens",
        ),
        (|_| String::new(), "connection"),
    ];
    for (script, kind) in cases {
        let server = FakeServer::start(script).await;
        let report = report(&server, Api::Openai, &load(Loop::Closed(1), 2)).await;
        let expected = BTreeMap::from([(kind.to_owned(), 2)]);
        assert_eq!((report.answered, report.failures), (0, expected));
    }
}

#[tokio::test]
async fn an_answer_that_comes_whole_is_timed_by_its_end() {
    let server = FakeServer::start(|ask| {
        assert_eq!(ask.get("stream"), None);
        // As the server counts its text.
        let usage = json!({"prompt_tokens": 4, "completion_tokens": 4});
        let body = json!([{"choices": [{"text": "x"}], "usage": usage}]).to_string();
        head("200 OK") + &body
    })
    .await;
    let report = report(&server, Api::Mlflow, &load(Loop::Closed(1), 1)).await;
    assert_eq!((report.answered, report.output_tokens), (1, 5));
    assert!(report.ttft_ms.p50 <= report.e2e_ms.p50 && report.itl_ms.max == 0.0);
}
