//! How the tables' answers are written: JSON, or files with a row per line.

use actix_web::HttpResponse;
use actix_web::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::tables::query::{Filter, Page};
use crate::tables::totals::Sums;

/// Where a file says how to go on.
const NEXT_HEADER: &str = "x-next-page-token";

/// How an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One object.
    Json,
    /// A head line, then a line per row (RFC 4180).
    Csv,
    /// An object per line.
    Ndjson,
}

/// What totals are by.
pub(super) const TOTAL_KEYS: [&str; 3] = ["user", "endpoint", "endpoint_id"];

/// Columns of sums behind their keys.
const SUMS_COLUMNS: [&str; 10] = [
    "calls",
    "complete",
    "cancelled",
    "failed",
    "prompt_tokens",
    "output_tokens",
    "total_tokens",
    "cached_tokens",
    "latency_ms_mean",
    "ttft_ms_mean",
];

/// A file's column and where its values are in a row.
pub(super) type Column = (&'static str, &'static str);

/// Columns of calls.
pub(super) const USAGE_COLUMNS: [Column; 20] = [
    ("time_ms", "/time_ms"),
    ("started_ms", "/started_ms"),
    ("request_id", "/request_id"),
    ("client_request_id", "/client_request_id"),
    ("user", "/user"),
    ("endpoint", "/endpoint"),
    ("endpoint_id", "/endpoint_id"),
    ("served_entity", "/served_entity"),
    ("entity_name", "/entity_name"),
    ("entity_version", "/entity_version"),
    ("format", "/format"),
    ("stream", "/stream"),
    ("status", "/status"),
    ("outcome", "/outcome"),
    ("prompt_tokens", "/prompt_tokens"),
    ("output_tokens", "/output_tokens"),
    ("cached_tokens", "/cached_tokens"),
    ("ttft_ms", "/ttft_ms"),
    ("latency_ms", "/latency_ms"),
    ("usage_context", "/usage_context"),
];

/// Columns of calls with bodies.
pub(super) const INFERENCE_COLUMNS: [Column; 21] = [
    ("time_ms", "/time_ms"),
    ("started_ms", "/started_ms"),
    ("request_id", "/request_id"),
    ("client_request_id", "/client_request_id"),
    ("user", "/user"),
    ("endpoint", "/endpoint"),
    ("endpoint_id", "/endpoint_id"),
    ("served_entity", "/served_entity"),
    ("format", "/format"),
    ("stream", "/stream"),
    ("status", "/status"),
    ("outcome", "/outcome"),
    ("latency_ms", "/latency_ms"),
    ("request_bytes", "/request/bytes"),
    ("request_sha256", "/request/sha256"),
    ("request_text", "/request/text"),
    ("request_truncated", "/request/truncated"),
    ("response_bytes", "/response/bytes"),
    ("response_sha256", "/response/sha256"),
    ("response_text", "/response/text"),
    ("response_truncated", "/response/truncated"),
];

impl Form {
    /// Rows, and where to go on.
    pub fn rows<R: Serialize>(
        self,
        table: &str,
        columns: &[Column],
        page: &Page<R>,
    ) -> HttpResponse {
        let next = page.next.map(|next| next.to_string());
        if self == Form::Json {
            let mut answer = json!({"rows": page.rows});
            if let (Some(next), Some(answer)) = (next, answer.as_object_mut()) {
                answer.insert("next_page_token".to_owned(), next.into());
            }
            return HttpResponse::Ok().json(answer);
        }
        let rows = page
            .rows
            .iter()
            .map(|row| serde_json::to_value(row).unwrap_or_default());
        let text = match self {
            Form::Csv => csv(
                columns.iter().map(|(name, _)| *name),
                rows.map(|row| values(&row, columns)),
            ),
            _ => rows.map(|row| format!("{row}\n")).collect(),
        };
        self.file(table, text, next)
    }

    /// Sums by these keys, and over all of them.
    pub fn sums<'a>(
        self,
        list: &str,
        keys: &[&str],
        groups: impl Iterator<Item = (&'a [String], &'a Sums)>,
        whole: &Sums,
        filter: Option<&Filter>,
    ) -> HttpResponse {
        let group = |(values, sums): (&[String], &Sums)| {
            let mut group = Map::new();
            for (key, value) in keys.iter().zip(values) {
                group.insert((*key).to_owned(), value.as_str().into());
            }
            group.extend(sums_fields(sums));
            Value::Object(group)
        };
        let groups = groups.map(group);
        if self == Form::Json {
            let mut answer = Map::new();
            if let Some(filter) = filter {
                answer.insert("start_ms".to_owned(), filter.start_ms.into());
                answer.insert("end_ms".to_owned(), filter.end_ms.into());
                answer.insert("group_by".to_owned(), keys.into());
            }
            answer.insert(list.to_owned(), groups.collect());
            answer.insert("total".to_owned(), sums_fields(whole).into());
            return HttpResponse::Ok().json(answer);
        }
        let text = match self {
            Form::Csv => {
                let names = || keys.iter().chain(&SUMS_COLUMNS);
                let values = |group: Value| {
                    let value = |name: &&str| group.get(*name).cloned().unwrap_or_default();
                    names().map(value).collect()
                };
                csv(names().copied(), groups.map(values))
            }
            _ => groups.map(|group| format!("{group}\n")).collect(),
        };
        self.file("usage", text, None)
    }

    fn file(self, name: &str, text: String, next: Option<String>) -> HttpResponse {
        let (content_type, suffix) = match self {
            Form::Csv => ("text/csv; charset=utf-8", "csv"),
            _ => ("application/x-ndjson", "ndjson"),
        };
        let mut response = HttpResponse::Ok();
        response.insert_header((CONTENT_TYPE, content_type));
        let disposition = format!("attachment; filename=\"{name}.{suffix}\"");
        response.insert_header((CONTENT_DISPOSITION, disposition));
        if let Some(next) = next {
            response.insert_header((NEXT_HEADER, next));
        }
        response.body(text)
    }
}

fn sums_fields(sums: &Sums) -> Map<String, Value> {
    let mean = |sum: u64, of: u64| (of > 0).then(|| sum as f64 / of as f64);
    let total = sums.prompt_tokens.saturating_add(sums.output_tokens);
    let values: [Value; 10] = [
        sums.calls.into(),
        sums.complete.into(),
        sums.cancelled.into(),
        sums.failed.into(),
        sums.prompt_tokens.into(),
        sums.output_tokens.into(),
        total.into(),
        sums.cached_tokens.into(),
        mean(sums.latency_ms, sums.calls).into(),
        mean(sums.ttft_ms, sums.with_output).into(),
    ];
    SUMS_COLUMNS
        .map(str::to_owned)
        .into_iter()
        .zip(values)
        .collect()
}

fn values(row: &Value, columns: &[Column]) -> Vec<Value> {
    columns
        .iter()
        .map(|(_, place)| row.pointer(place).cloned().unwrap_or_default())
        .collect()
}

fn csv<'a>(names: impl Iterator<Item = &'a str>, rows: impl Iterator<Item = Vec<Value>>) -> String {
    let mut text = names.collect::<Vec<_>>().join(",");
    text.push_str("\r\n");
    for row in rows {
        for (i, value) in row.iter().enumerate() {
            if i > 0 {
                text.push(',');
            }
            push_field(&mut text, value);
        }
        text.push_str("\r\n");
    }
    text
}

fn push_field(text: &mut String, value: &Value) {
    let field = match value {
        Value::Null => return,
        Value::String(field) => field.clone(),
        Value::Object(object) if object.is_empty() => return,
        other => other.to_string(),
    };
    if field.contains([',', '"', '\r', '\n']) {
        text.push('"');
        text.push_str(&field.replace('"', "\"\""));
        text.push('"');
    } else {
        text.push_str(&field);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::row::{InferenceRow, UsageRow};

    #[test]
    fn a_file_has_a_column_for_everything_that_a_row_has() {
        let leaves = |row: Value| {
            let mut places = Vec::new();
            for (name, value) in row.as_object().unwrap() {
                match value {
                    Value::Object(fields) if name != "usage_context" => {
                        places.extend(fields.keys().map(|field| format!("/{name}/{field}")));
                    }
                    _ => places.push(format!("/{name}")),
                }
            }
            places.sort();
            places
        };
        let sorted = |columns: &[Column]| {
            let mut places: Vec<String> = columns
                .iter()
                .map(|(_, place)| (*place).to_owned())
                .collect();
            places.sort();
            places
        };
        let usage = serde_json::to_value(UsageRow::default()).unwrap();
        assert_eq!(leaves(usage), sorted(&USAGE_COLUMNS));
        let inference = InferenceRow {
            response: Some(Default::default()),
            ..InferenceRow::default()
        };
        let inference = serde_json::to_value(inference).unwrap();
        assert_eq!(leaves(inference), sorted(&INFERENCE_COLUMNS));
    }

    #[test]
    fn fields_of_a_file_are_quoted_where_they_must_be() {
        let row = vec![
            json!("plain"),
            json!("a,\"b\"\nc"),
            json!(null),
            json!(5),
            json!({"k": "v"}),
            json!({}),
        ];
        let text = csv(["a", "b"].into_iter(), std::iter::once(row));
        let expected = "a,b\r\nplain,\"a,\"\"b\"\"\nc\",,5,\"{\"\"k\"\":\"\"v\"\"}\",\r\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn means_are_over_the_calls_that_have_them() {
        let sums = Sums {
            calls: 4,
            latency_ms: 100,
            ttft_ms: 30,
            with_output: 3,
            prompt_tokens: 5,
            output_tokens: 7,
            ..Sums::default()
        };
        let fields = sums_fields(&sums);
        assert_eq!(fields["latency_ms_mean"], 25.0);
        assert_eq!(fields["ttft_ms_mean"], 10.0);
        assert_eq!(fields["total_tokens"], 12);
        assert!(sums_fields(&Sums::default())["ttft_ms_mean"].is_null());
    }
}
