//! Thousands of malformed or extreme requests beside good streams: each gets a refusal that helps or what it asked for,
//! never a fault of the server; the good streams do not notice, nothing restarts, memory stays steady.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, Golden, TOKENS_MAX};
use cluster_tests::settings::Settings;
use futures::future::{join, join_all};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::long;

const GOOD_STREAMS: usize = 16;
/// Requests of the other kind, and in a long run.
const HOSTILE: u64 = 1_600;
const HOSTILE_LONG: u64 = 10_000;
/// Of them this many are under way at a time.
const ATTACKERS: u64 = 8;
const BODY_BYTES_MAX: u64 = 256 << 10;
/// Growth that is not a leak: caches that fill, allocators that keep pages.
const GROWTH_BYTES_MAX: u64 = 48 << 20;

/// Where nobody is, or nobody of this name.
const PATHS: [&str; 4] = [
    "/serving-endpoints/nobody/invocations",
    "/serving-endpoints/%2e%2e/invocations",
    "/nothing",
    "/serving-endpoints/completions",
];
const INVOKE: &str = "/serving-endpoints/llama/invocations";

/// A request, and what must become of it.
struct Attack {
    method: Method,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
    /// It must not be taken. Others may be answered: they are odd, not wrong.
    refused: bool,
}

fn attack(body: impl Into<Vec<u8>>, refused: bool) -> Attack {
    Attack {
        method: Method::POST,
        path: INVOKE,
        headers: Vec::new(),
        body: body.into(),
        refused,
    }
}

/// Good bodies, to be spoilt.
fn good(random: &mut StdRng) -> Value {
    let bodies = [
        json!({"prompt": "Hello, I'm", "max_tokens": 2, "n": 2, "stop": ["x"], "logprobs": 1, "seed": 1, "echo": true}),
        json!({"prompt": [1, 5, 9], "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "logit_bias": {"5": 1}}),
        json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}}),
        json!({"inputs": {"prompt": ["a", "b"]}, "params": {"max_tokens": 2, "candidate_count": 2, "stop": "x"}}),
        json!({"dataframe_split": {"columns": ["prompt"], "data": [["a"], ["b"]]}, "params": {"max_tokens": 1}}),
        json!({"instances": [{"prompt": "a", "max_tokens": 1}], "params": null}),
        json!({"input": ["a", [1, 2]], "encoding_format": "base64"}),
    ];
    bodies.choose(random).expect("some").clone()
}

/// Values that fit nowhere, or hardly.
fn nasty(random: &mut StdRng) -> Value {
    let deep = (0..60).fold(json!(1), |inner, _| json!([inner]));
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1.5),
        json!(1e308),
        json!(5e-324),
        json!(i64::MIN),
        json!("NaN"),
        json!(""),
        json!("\u{0}\u{202e}\u{feff}😀"),
        json!("a".repeat(5000)),
        json!([]),
        json!([null, [], {}]),
        json!({}),
        json!({"": {"": ""}}),
        json!(vec![1; 2000]),
        json!(vec!["s"; 300]),
        deep,
    ];
    values.choose(random).expect("some").clone()
}

/// Puts something nasty to a random place of a body, or under a key that parsers know.
fn spoil(random: &mut StdRng, body: &mut Value) {
    const KEYS: [&str; 24] = [
        "prompt",
        "messages",
        "inputs",
        "instances",
        "dataframe_records",
        "input",
        "params",
        "stop",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "seed",
        "stream_options",
        "suffix",
        "extra_params",
        "response_format",
        "tools",
        "tool_choice",
        "usage_context",
    ];
    let value = nasty(random);
    if let Some(fields) = body.as_object_mut().filter(|_| random.random_bool(0.3)) {
        let key = KEYS.choose(random).expect("some");
        fields.insert((*key).to_owned(), value);
        return;
    }
    let mut at = body;
    loop {
        let children = match at {
            Value::Array(values) => values.len(),
            Value::Object(fields) => fields.len(),
            _ => 0,
        };
        if children == 0 || random.random_bool(0.2) {
            *at = value;
            return;
        }
        let child = random.random_range(0..children);
        at = match at {
            Value::Array(values) => &mut values[child],
            Value::Object(fields) => fields.values_mut().nth(child).expect("in range"),
            _ => unreachable!("it has children"),
        };
    }
}

/// The next attack.
fn next(random: &mut StdRng) -> Attack {
    let body = good(random).to_string().into_bytes();
    let text = |text: &str| attack(text, true);
    let refused = |body: Value| attack(body.to_string(), true);
    match random.random_range(0..26) {
        0 => attack(&body[..random.random_range(0..body.len())], true),
        1..=4 => {
            let mut body = good(random);
            for _ in 0..random.random_range(1..4) {
                spoil(random, &mut body);
            }
            attack(body.to_string(), false)
        }
        5 => {
            let mut body = body;
            let at = random.random_range(0..body.len());
            body[at] = random.random();
            attack(body, false)
        }
        6 => attack(
            (0..random.random_range(1..400))
                .map(|_| random.random())
                .collect::<Vec<u8>>(),
            true,
        ),
        7 => {
            let depth = random.random_range(200..50_000);
            attack([vec![b'['; depth], vec![b']'; depth]].concat(), true)
        }
        8 => attack(
            format!(
                "{{\"prompt\": {}1{}}}",
                "{\"a\":".repeat(5000),
                "}".repeat(5000)
            ),
            true,
        ),
        9 => text(r#"{"prompt": "a", "temperature": NaN}"#),
        10 => text(r#"{"prompt": "a", "temperature": 1e999}"#),
        11 => text(
            r#"{"prompt": "a", "max_tokens": 1, "max_tokens": -123456789012345678901234567890}"#,
        ),
        12 => text(r#"{"prompt": "\ud800 alone", "max_tokens": 1}"#),
        13 => attack(
            b"{\"prompt\": \"\xff\xfe\xc0\xaf\", \"max_tokens\": 1}".as_slice(),
            true,
        ),
        14 => refused(json!({"prompt": "a", "stop": vec!["x"; 10_000]})),
        15 => refused(json!({"prompt": "a", "stop": ["x".repeat(100_000)]})),
        16 => {
            let bias: serde_json::Map<String, Value> =
                (0..2000).map(|id| (id.to_string(), json!(1))).collect();
            refused(json!({"prompt": "a", "logit_bias": bias}))
        }
        17 => {
            let wrong = [
                json!({"prompt": [u32::MAX], "max_tokens": 1}),
                json!({"prompt": [1, -1], "max_tokens": 1}),
                json!({"prompt": [1, 1.5], "max_tokens": 1}),
                json!({"prompt": vec![5; 2000], "max_tokens": 1}),
                json!({"prompt": vec![vec![5]; 257], "max_tokens": 1}),
                json!({"prompt": "a", "n": 1_000_000_000}),
                json!({"prompt": "a", "n": 64, "best_of": 2}),
                json!({"prompt": "a", "logit_bias": {"99999999": 1}, "max_tokens": 1}),
                json!({"prompt": "word ".repeat(20_000), "max_tokens": 1}),
                json!({"input": vec!["a"; 1000]}),
            ];
            refused(wrong.choose(random).expect("some").clone())
        }
        18 => {
            let turn = |role: &str| json!({"role": role, "content": "hi"});
            let wrong = [
                json!({"messages": []}),
                json!({"messages": vec![turn("user"); 5000]}),
                json!({"messages": [turn("wizard")], "max_tokens": 1}),
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
                json!({"messages": [{"role": "user", "content": {"a": 1}}]}),
            ];
            refused(wrong.choose(random).expect("some").clone())
        }
        19 => {
            // Not wrong, only odd.
            let odd = [
                json!({"messages": [{"role": "user", "content": "{{ 7 * 7 }}{% for x in range(999999) %}"}], "max_tokens": 1}),
                json!({"prompt": "\u{0}\u{1}\u{202e}", "max_tokens": 1, "temperature": 100, "top_p": 1e-7, "seed": -1}),
                json!({"prompt": "a", "max_tokens": 1, "n": 64, "temperature": 2, "logprobs": 20}),
                json!({"prompt": vec!["a"; 256], "max_tokens": 1}),
                json!({"prompt": "a", "max_tokens": 1, "unknown": {"deep": [[[[]]]]}, "extra_params": {"x": "y"}}),
                json!({"prompt": "a", "max_tokens": 1, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}}),
                json!({"prompt": "a", "max_tokens": 1, "regex": "(a*)*b(?=c)\\1"}),
            ];
            attack(odd.choose(random).expect("some").to_string(), false)
        }
        20 => Attack {
            path: PATHS[random.random_range(0..PATHS.len())],
            ..refused(json!({"model": "nobody", "prompt": "a"}))
        },
        21 => Attack {
            method: [Method::PATCH, Method::DELETE, Method::PUT, Method::GET]
                .choose(random)
                .expect("some")
                .clone(),
            ..attack(body, true)
        },
        22 => Attack {
            headers: vec![
                ("x-request-timeout-ms", "-5"),
                ("x-request-id", "../../etc/passwd"),
            ],
            ..attack(body, true)
        },
        23 => Attack {
            headers: vec![
                ("content-encoding", "gzip"),
                ("content-type", "text/plain; charset=\""),
            ],
            ..attack(body, false)
        },
        24 => Attack {
            headers: vec![("authorization", "Basic AAAA")],
            ..attack(body, true)
        },
        _ => attack(
            vec![b' '; BODY_BYTES_MAX as usize + random.random_range(1..1000)],
            true,
        ),
    }
}

impl Attack {
    /// Sends it; says what is wrong with the answer, if anything is.
    async fn run(self, cluster: &Cluster) -> Option<String> {
        let bare = self
            .headers
            .iter()
            .any(|(name, _)| *name == "authorization");
        let client = if bare {
            cluster.client.with_token(None)
        } else {
            cluster.client.clone()
        };
        let shown = String::from_utf8_lossy(&self.body[..self.body.len().min(300)]).into_owned();
        let what = format!("{} {} {:?} {shown}", self.method, self.path, self.headers);
        let reply = client
            .send_bytes(self.method, self.path, &self.headers, self.body)
            .await;
        if reply.status == 200 {
            return self.refused.then(|| format!("taken: {what}"));
        }
        let body: Value = serde_json::from_str(&reply.text).unwrap_or_default();
        let said = |key: &str| body[key].as_str().is_some_and(|text| !text.is_empty());
        let helps = (400..500).contains(&reply.status)
            && said("error_code")
            && said("message")
            && body.get("error").is_none()
            && reply.text.len() < 4000;
        (!helps).then(|| format!("{} {}: {what}", reply.status, reply.text))
    }
}

/// Clients that do not speak HTTP as they should, and leave.
async fn break_protocol(cluster: &Cluster, random: &mut StdRng) {
    let mut socket = TcpStream::connect(&cluster.http_address)
        .await
        .expect("a connection");
    let body = good(random).to_string();
    let head = |length: usize| {
        format!(
            "POST {INVOKE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {length}\r\n\r\n",
            std::fs::read_to_string(cluster.folder().join("var/admin.token"))
                .expect("a token")
                .trim()
        )
    };
    let sent = match random.random_range(0..6) {
        // A body that never comes to its end.
        0 => head(body.len() + 1000) + &body,
        // One that goes on as a broken request.
        1 => head(body.len() / 2) + &body,
        // A head that never comes to its end.
        2 => head(5)[..40].to_owned(),
        3 => "\u{16}\u{3}\u{1}\u{2}\u{0} hello TLS\r\n\r\n".to_owned(),
        4 => head(5).replace("Content-Length: 5", "Transfer-Encoding: chunked") + "zz\r\nnope",
        _ => format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(200_000)),
    };
    // The server may hang up while this is being written, and what it says is its own matter.
    let _ = socket.write_all(sent.as_bytes()).await;
    if random.random_bool(0.5) {
        let mut some = [0; 64];
        let reading = socket.read(&mut some);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(20), reading).await;
    }
}

/// A good stream's text and end.
async fn stream(cluster: &Cluster, golden: &Golden, seed: usize) -> (String, String) {
    let body = json!({"prompt": golden.prompt, "max_tokens": TOKENS_MAX, "temperature": 0.8, "seed": seed, "stream": true});
    let streamed = cluster.client.stream("llama", &body).await.collect().await;
    assert!(streamed.done && streamed.error.is_none(), "{streamed:?}");
    (
        streamed.text().to_owned(),
        streamed.finish_reason().to_owned(),
    )
}

fn resident_bytes(cluster: &mut Cluster) -> u64 {
    cluster.coordinator.resident_bytes() + cluster.worker(0).resident_bytes()
}

#[tokio::test]
async fn hostile_requests_disturb_no_stream_and_break_nothing() {
    let settings = Settings::new().limit("body_bytes_max", BODY_BYTES_MAX);
    let mut cluster = Cluster::start(settings).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama", "CPU", "Large")
        .await;
    let goldens = golden::all("tiny-llama");
    let prompts: Vec<&Golden> = goldens.iter().cycle().take(GOOD_STREAMS).collect();
    let mut clean = Vec::new();
    for (seed, golden) in prompts.iter().enumerate() {
        clean.push(stream(&cluster, golden, seed).await);
    }
    let total = if long() { HOSTILE_LONG } else { HOSTILE };
    let mut warm = None;
    let mut complaints: Vec<String> = Vec::new();
    for part in 0..4 {
        let (left, over) = (AtomicU64::new(total / 4), AtomicBool::new(false));
        let take = || {
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
        };
        let attackers = join_all((0..ATTACKERS).map(async |id| {
            let mut random = StdRng::seed_from_u64(id + ATTACKERS * part);
            let mut complaints = Vec::new();
            while take().is_ok() {
                if random.random_bool(0.02) {
                    break_protocol(&cluster, &mut random).await;
                } else {
                    complaints.extend(next(&mut random).run(&cluster).await);
                }
            }
            complaints
        }));
        let attackers = async {
            let complaints = attackers.await.concat();
            over.store(true, Ordering::Relaxed);
            complaints
        };
        let streams = join_all(prompts.iter().enumerate().map(async |(seed, golden)| {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) || count == 0 {
                let got = stream(&cluster, golden, seed).await;
                assert_eq!(got, clean[seed], "stream {seed} beside hostile requests");
                count += 1;
            }
        }));
        complaints.extend(join(attackers, streams).await.0);
        assert!(
            complaints.is_empty(),
            "{} answers are wrong, the first of them:\n{}",
            complaints.len(),
            complaints[..complaints.len().min(20)].join("\n")
        );
        let now = resident_bytes(&mut cluster);
        let warm = *warm.get_or_insert(now);
        assert!(
            now < warm + GROWTH_BYTES_MAX,
            "memory grew from {warm} to {now} bytes"
        );
    }
    assert!(cluster.coordinator.try_exit().is_none() && cluster.worker(0).try_exit().is_none());
    cluster.wait_idle().await;
}
