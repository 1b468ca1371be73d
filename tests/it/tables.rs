//! Usage and inference tables: one row per call, and their sums are what clients saw, whatever became of the calls.

use cluster_tests::client::Client;
use cluster_tests::cluster::Cluster;
use cluster_tests::process::Signal;
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};
use reqwest::Method;
use serde_json::{Value, json};

/// Tokens that a client was told of.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seen {
    calls: u64,
    prompt_tokens: u64,
    output_tokens: u64,
}

impl Seen {
    fn add(&mut self, usage: &Value) {
        let tokens = |key: &str| usage[key].as_u64().unwrap_or_else(|| panic!("{usage}"));
        self.calls += 1;
        self.prompt_tokens += tokens("prompt_tokens");
        self.output_tokens += tokens("completion_tokens");
    }
}

/// A worker and a second user, bob.
fn settings(workers: usize) -> Settings {
    Settings {
        extra: "[[auth.tokens]]\nuser = \"bob\"\nfile = \"var/bob.token\"\n".into(),
        ..Settings::with_workers(workers)
    }
}

fn bob(cluster: &Cluster) -> Client {
    let token = std::fs::read_to_string(cluster.folder().join("var/bob.token")).expect("a token");
    cluster.client.with_token(Some(token.trim()))
}

async fn ask(cluster: &Cluster, path: &str) -> Value {
    cluster
        .client
        .get(&format!("/api/2.0/serving-endpoints/e/{path}"))
        .await
        .ok()
}

/// What the table says of a user.
async fn summed(cluster: &Cluster, user: &str) -> Value {
    ask(cluster, &format!("usage?user={user}")).await["total"].clone()
}

/// Waits until the table has as many calls of a user.
async fn calls(cluster: &Cluster, user: &str, count: u64) -> Value {
    until(
        &format!("{count} calls of {user} in the table"),
        PATIENCE,
        async || {
            let total = summed(cluster, user).await;
            if total["calls"] == count {
                Ok(total)
            } else {
                Err(total.to_string())
            }
        },
    )
    .await
}

async fn last_row(cluster: &Cluster) -> Value {
    let rows = ask(cluster, "usage/rows").await;
    rows["rows"]
        .as_array()
        .and_then(|rows| rows.last().cloned())
        .expect("a row")
}

#[tokio::test]
async fn the_tables_sums_are_what_clients_saw_and_survive_a_killed_coordinator() {
    let mut cluster = Cluster::start(settings(1)).await;
    cluster.client.deploy("e", "tiny-llama").await;
    let mut seen = Seen::default();

    // Whole, with several candidates, and streamed.
    let whole = json!({"prompt": "ROMEO:\n", "max_tokens": 7, "ignore_eos": true});
    let several = json!({"prompt": ["a", "b c"], "n": 2, "max_tokens": 3, "ignore_eos": true});
    for body in [&whole, &several, &whole] {
        seen.add(&cluster.client.invoke("e", body).await.ok()["usage"]);
    }
    let stream = json!({"prompt": "ROMEO:\n", "max_tokens": 9, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}, "client_request_id": "c-9",
        "usage_context": {"team": "search"}});
    let streamed = cluster.client.stream("e", &stream).await.collect().await;
    seen.add(&streamed.usage.expect("usage was asked for"));
    let row = last_row(&cluster).await;
    assert_eq!(
        (&row["client_request_id"], &row["usage_context"]["team"]),
        (&json!("c-9"), &json!("search")),
        "{row}"
    );
    assert_eq!(
        (&row["entity_name"], &row["entity_version"], &row["format"]),
        (
            &json!("ml.demo.tiny-llama"),
            &json!("1"),
            &json!("completions")
        ),
        "{row}"
    );
    let id = cluster.client.endpoint("e").await["id"].clone();
    assert_eq!(
        (&row["endpoint_id"], &row["output_tokens"]),
        (&id, &json!(9))
    );
    assert!(row["ttft_ms"].as_u64() <= row["latency_ms"].as_u64());

    // Refused: a row, and no tokens.
    let wrong = json!({"prompt": 5});
    cluster
        .client
        .invoke("e", &wrong)
        .await
        .refused(400, "BAD_REQUEST", &[]);
    seen.calls += 1;
    // Of an endpoint that is not there: no row anywhere.
    assert_eq!(cluster.client.invoke("nobody", &whole).await.status, 404);

    let total = summed(&cluster, "admin").await;
    let of = |key: &str| total[key].as_u64().unwrap_or_else(|| panic!("{total}"));
    let in_table = Seen {
        calls: of("calls"),
        prompt_tokens: of("prompt_tokens"),
        output_tokens: of("output_tokens"),
    };
    assert_eq!(in_table, seen);
    assert_eq!((of("complete"), of("failed")), (4, 1), "{total}");

    // Left in the middle of a stream: what was made until then counts.
    let endless = json!({"prompt": "ROMEO:\n", "max_tokens": 1000, "ignore_eos": true, "temperature": 0, "stream": true});
    let mut events = cluster.client.stream("e", &endless).await;
    for _ in 0..3 {
        events.next().await.expect("an event");
    }
    drop(events);
    calls(&cluster, "admin", seen.calls + 1).await;
    let row = last_row(&cluster).await;
    assert_eq!(
        (&row["outcome"], &row["status"]),
        (&json!("cancelled"), &json!(499))
    );
    let tokens = row["output_tokens"].as_u64().unwrap();
    assert!((3..1000).contains(&tokens), "{row}");

    // Killed and started again: nothing is lost, nothing counted twice.
    let before = (
        summed(&cluster, "admin").await,
        ask(&cluster, "usage/totals").await,
        ask(&cluster, "usage/rows").await,
    );
    cluster.kill_coordinator();
    cluster.restart_coordinator().await;
    cluster.client.wait_ready("e").await;
    let after = (
        summed(&cluster, "admin").await,
        ask(&cluster, "usage/totals").await,
        ask(&cluster, "usage/rows").await,
    );
    assert_eq!(before, after);
    seen.add(&cluster.client.invoke("e", &whole).await.ok()["usage"]);
    let totals = ask(&cluster, "usage/totals").await;
    assert_eq!(totals["total"]["calls"], seen.calls + 1);
    assert_eq!(
        totals["total"]["output_tokens"],
        seen.output_tokens + tokens
    );
}

#[tokio::test]
async fn calls_that_move_to_another_worker_are_one_row_and_those_that_break_have_the_tokens_they_showed()
 {
    const REQUESTS: u64 = 4;
    let mut cluster = Cluster::start(settings(2)).await;
    cluster.client.deploy("e", "tiny-llama").await;
    let serving = async |cluster: &Cluster| -> usize {
        let view = cluster.client.wait_ready("e").await;
        let words = &view["config"]["served_entities"][0]["state"]["deployment_state_message"];
        let worker = words
            .as_str()
            .and_then(|words| words.split("local/cpu").nth(1));
        let digit = worker.and_then(|rest| rest.get(..1)?.parse().ok());
        digit.unwrap_or_else(|| panic!("who serves is not in {view:#}"))
    };

    // The worker stands still, so that the calls have no output when it dies: they run again on the other one.
    let first = serving(&cluster).await;
    cluster.worker(first).signal(Signal::Stop);
    let body = json!({"prompt": "ROMEO:\n", "max_tokens": 5, "ignore_eos": true});
    let asked: Vec<_> = (0..REQUESTS)
        .map(|_| {
            let (client, body) = (cluster.client.clone(), body.clone());
            tokio::spawn(async move { client.invoke("e", &body).await })
        })
        .collect();
    until("all calls to be under way", PATIENCE, async || {
        let metrics = cluster.client.metrics().await;
        match metrics.sum("tandem_requests_running", "") {
            Some(running) if running >= REQUESTS as f64 => Ok(()),
            running => Err(format!("{running:?} run")),
        }
    })
    .await;
    cluster.kill_worker(first);
    let mut seen = Seen::default();
    for reply in asked {
        seen.add(&reply.await.expect("the call ends").ok()["usage"]);
    }
    let total = calls(&cluster, "admin", REQUESTS).await;
    assert_eq!(total["complete"], REQUESTS);
    assert_eq!(
        (&total["prompt_tokens"], &total["output_tokens"]),
        (&json!(seen.prompt_tokens), &json!(seen.output_tokens))
    );

    // A stream whose worker dies in the middle breaks with an error: its row says so.
    let second = serving(&cluster).await;
    let endless = json!({"prompt": "ROMEO:\n", "max_tokens": 1000, "ignore_eos": true, "temperature": 0, "stream": true});
    let mut events = cluster.client.stream("e", &endless).await;
    events.next().await.expect("a first event");
    cluster.kill_worker(second);
    let broken = events.collect().await;
    let error = broken.error.as_ref();
    let error = error.expect("the stream breaks with an error");
    calls(&cluster, "admin", REQUESTS + 1).await;
    let row = last_row(&cluster).await;
    assert_eq!(row["outcome"], error["error"]["code"], "{row}");
    assert_eq!(row["status"], 503);
    // The first event and those with text after it; a token may be held back inside a character.
    let tokens = row["output_tokens"].as_u64().unwrap();
    assert!(tokens as usize > broken.text_events, "{row}, {broken:?}");
}

#[tokio::test]
async fn bodies_are_kept_once_a_manager_switches_it_on_and_each_user_sees_their_own_calls() {
    let cluster = Cluster::start(settings(1)).await;
    cluster.client.deploy("e", "tiny-llama").await;
    let base = "/api/2.0/serving-endpoints/e";
    let body = json!({"inputs": "first", "params": {"max_tokens": 3}});
    cluster.client.invoke("e", &body).await.ok();
    let grant =
        json!({"access_control_list": [{"user_name": "bob", "permission_level": "CAN_QUERY"}]});
    let path = "/api/2.0/permissions/serving-endpoints/e";
    cluster.client.call(Method::PATCH, path, &grant).await.ok();
    let put = async |redact: bool| {
        let table =
            json!({"enabled": true, "catalog_name": "c", "schema_name": "s", "redact": redact});
        let body =
            json!({"inference_table_config": table, "usage_tracking_config": {"enabled": true}});
        let path = format!("{base}/ai-gateway");
        cluster.client.call(Method::PUT, &path, &body).await.ok();
    };
    put(false).await;
    let bob = bob(&cluster);
    let body = json!({"inputs": "of bob", "params": {"max_tokens": 3}});
    bob.invoke("e", &body).await.ok();
    put(true).await;
    bob.invoke("e", &body).await.ok();

    let table = ask(&cluster, "inference-table").await;
    let rows = table["rows"].as_array().expect("rows");
    assert_eq!(
        rows.len(),
        2,
        "the call before the switch is not there: {table}"
    );
    let text = rows[0]["request"]["text"].as_str().expect("a text");
    assert!(text.contains("of bob"), "{text}");
    assert!(
        rows[0]["response"]["text"]
            .as_str()
            .is_some_and(|text| text.contains("predictions"))
    );
    assert_eq!(rows[1]["request"]["text"], json!(null));
    assert_eq!(rows[1]["request"]["sha256"], rows[0]["request"]["sha256"]);
    let files = cluster.folder().join("var/coordinator/tables/inference/e");
    let kept: String = std::fs::read_dir(&files)
        .expect("the table's folder")
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path()).ok())
        .collect();
    assert_eq!(kept.matches("of bob").count(), 1, "{kept}");

    let refused = bob.get(&format!("{base}/inference-table")).await;
    refused.refused(403, "PERMISSION_DENIED", &["CAN_MANAGE"]);
    let own = bob.get(&format!("{base}/usage?group_by=user")).await.ok();
    assert_eq!(own["groups"].as_array().map(Vec::len), Some(1), "{own}");
    assert_eq!(
        (&own["groups"][0]["user"], &own["total"]["calls"]),
        (&json!("bob"), &json!(2))
    );
    let all = cluster
        .client
        .get("/api/2.0/usage?group_by=user,day")
        .await
        .ok();
    assert_eq!(all["total"]["calls"], 3, "{all}");

    // Switched off: calls go on and are not in the table.
    let off = json!({"usage_tracking_config": {"enabled": false}});
    let path = format!("{base}/ai-gateway");
    cluster.client.call(Method::PUT, &path, &off).await.ok();
    cluster.client.invoke("e", &body).await.ok();
    let all = cluster.client.get("/api/2.0/usage").await.ok();
    assert_eq!(all["total"]["calls"], 3, "{all}");

    // Made anew under the same name: nothing of the old one is shown as its own.
    cluster
        .client
        .call(Method::DELETE, base, &json!(null))
        .await
        .ok();
    cluster.client.deploy("e", "tiny-llama").await;
    let own = ask(&cluster, "usage").await;
    assert_eq!(own["total"]["calls"], 0, "{own}");
    let rows = ask(&cluster, "inference-table").await;
    assert_eq!(rows["rows"], json!([]));
    let all = cluster.client.get("/api/2.0/usage?endpoint=e").await.ok();
    assert_eq!(all["total"]["calls"], 3, "{all}");
}
