//! Calls become rows: of the right table, once, with what is known of their endpoint.

use super::*;
use crate::api::{CallFormat, Outcome, Payload};

fn config() -> TablesConfig {
    TablesConfig {
        usage: true,
        redact: false,
        payload_bytes_max: 10,
        segment_bytes_max: 1 << 20,
        usage_days_max: 90,
        usage_bytes_max: 1 << 30,
        inference_days_max: 30,
        inference_bytes_max: 1 << 30,
    }
}

fn known(capture: Option<Capture>) -> Known {
    Known {
        id: "0123".into(),
        usage: true,
        inference: capture,
        models: vec![("m-1".into(), ModelRef::new("cat.s.m", "1").unwrap())],
    }
}

fn record(endpoint: &str, payload: bool) -> CallRecord {
    CallRecord {
        endpoint: endpoint.into(),
        served_entity: Some("m-1".into()),
        user: "ann".into(),
        request_id: "r-1".into(),
        client_request_id: Some("c-1".into()),
        usage_context: vec![("team".into(), "search".into())],
        format: CallFormat::Chat,
        stream: true,
        started_ms: crate::actors::gateway::now_ms() - 250,
        first_output: Some(Duration::from_millis(100)),
        latency: Duration::from_millis(250),
        prompt_tokens: 3,
        output_tokens: 5,
        cached_tokens: 1,
        status: 200,
        outcome: Outcome::Complete,
        payload: payload.then(|| Payload {
            request: "{\"a long\": \"request\"}".into(),
            response: Some("{}".into()),
        }),
    }
}

async fn usage(tables: &Arc<Tables>) -> Vec<UsageRow> {
    tables
        .usage_rows(Filter::default(), None, 100)
        .await
        .unwrap()
        .rows
}

async fn inference(tables: &Arc<Tables>, endpoint: &str) -> Vec<InferenceRow> {
    let filter = Filter {
        endpoint: Some(endpoint.into()),
        ..Filter::default()
    };
    tables.inference_rows(filter, None, 100).await.unwrap().rows
}

#[tokio::test]
async fn a_call_is_one_row_with_everything_known_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let tables = Tables::open(config(), folder.path()).unwrap();
    tables.know("e", Some(known(None)));
    let record = record("e", false);
    tables.record(record.clone());
    let rows = usage(&tables).await;
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert_eq!(row.time_ms, record.started_ms + 250);
    assert_eq!(
        (
            row.endpoint_id.as_str(),
            row.entity_name.as_deref(),
            row.entity_version.as_deref()
        ),
        ("0123", Some("cat.s.m"), Some("1"))
    );
    assert_eq!((row.ttft_ms, row.latency_ms), (Some(100), 250));
    assert_eq!(
        (row.prompt_tokens, row.output_tokens, row.cached_tokens),
        (3, 5, 1)
    );
    assert_eq!(
        (row.format.as_str(), row.outcome.as_str(), row.stream),
        ("chat", "complete", true)
    );
    assert_eq!(row.usage_context["team"], "search");
    let sums = tables.usage_sums(Filter::default(), vec![By::Entity]).await;
    assert_eq!(sums.unwrap()[0].keys, ["m-1"]);
    assert!(inference(&tables, "e").await.is_empty());
}

#[tokio::test]
async fn bodies_are_kept_where_they_are_switched_on_cut_or_redacted() {
    let folder = tempfile::tempdir().unwrap();
    let tables = Tables::open(config(), folder.path()).unwrap();
    tables.know("open", Some(known(Some(Capture { redact: false }))));
    tables.know("shut", Some(known(Some(Capture { redact: true }))));
    tables.know("none", Some(known(None)));
    for endpoint in ["open", "shut", "none"] {
        let wanted = tables.wants_payload(endpoint);
        assert_eq!(wanted, endpoint != "none");
        tables.record(record(endpoint, wanted));
    }
    assert!(!tables.wants_payload("unknown"));
    let open = inference(&tables, "open").await;
    assert_eq!(open[0].request.text.as_deref(), Some("{\"a long\":"));
    assert!(open[0].request.truncated && open[0].request.bytes == 21);
    assert_eq!(
        open[0].response.as_ref().unwrap().text.as_deref(),
        Some("{}")
    );
    let shut = inference(&tables, "shut").await;
    assert_eq!(
        (shut[0].request.text.as_deref(), shut[0].request.bytes),
        (None, 21)
    );
    assert_eq!(shut[0].request.sha256, open[0].request.sha256);
    assert!(inference(&tables, "none").await.is_empty());
    assert_eq!(usage(&tables).await.len(), 3);
    let config = TablesConfig {
        redact: true,
        ..config()
    };
    let folder = tempfile::tempdir().unwrap();
    let all = Tables::open(config, folder.path()).unwrap();
    all.know("open", Some(known(Some(Capture { redact: false }))));
    all.record(record("open", true));
    assert_eq!(inference(&all, "open").await[0].request.text, None);
}

#[tokio::test]
async fn calls_of_unknown_and_untracked_endpoints_are_in_no_table_and_those_of_deleted_ones_are() {
    let folder = tempfile::tempdir().unwrap();
    let tables = Tables::open(config(), folder.path()).unwrap();
    tables.know(
        "untracked",
        Some(Known {
            usage: false,
            ..known(None)
        }),
    );
    tables.know("deleted", Some(known(None)));
    tables.know("deleted", None);
    for endpoint in ["unknown", "untracked", "deleted"] {
        tables.record(record(endpoint, false));
    }
    let rows = usage(&tables).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(rows[0].endpoint, "deleted");
    for i in 0..GONE_MAX + 10 {
        let name = i.to_string();
        tables.know(&name, Some(known(None)));
        tables.know(&name, None);
    }
    let endpoints = tables.endpoints.read().unwrap();
    assert_eq!(endpoints.gone.len(), GONE_MAX);
    assert_eq!(endpoints.known.len(), GONE_MAX + 1);
}

#[tokio::test]
async fn a_usage_table_that_is_off_says_how_to_switch_it_on() {
    let folder = tempfile::tempdir().unwrap();
    let off = TablesConfig {
        usage: false,
        ..config()
    };
    let tables = Tables::open(off, folder.path()).unwrap();
    tables.know("e", Some(known(None)));
    tables.record(record("e", false));
    let error = tables.usage_sums(Filter::default(), vec![]).await;
    assert!(error.unwrap_err().to_string().contains("usage = true"));
    assert!(!folder.path().join("tables").exists());
}
