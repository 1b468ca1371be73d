//! Rows of the tables as they stand in their files: one JSON object per line.
//!
//! Fields are only ever added: readers of older files find the new ones empty.

use std::collections::BTreeMap;

use common::model_ref::ModelRef;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::api::{CallFormat, CallRecord, Outcome};

/// What one call came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UsageRow {
    /// When it ended, in milliseconds since 1970.
    pub time_ms: u64,
    /// When it came.
    pub started_ms: u64,
    /// Its id, as in the header `x-request-id`.
    pub request_id: String,
    /// The client's own id of it.
    pub client_request_id: Option<String>,
    /// Who called.
    pub user: String,
    /// The endpoint's name.
    pub endpoint: String,
    /// The endpoint's id.
    pub endpoint_id: String,
    /// Which served entity took it; none when it was refused.
    pub served_entity: Option<String>,
    /// The entity's model.
    pub entity_name: Option<String>,
    /// The model's version.
    pub entity_version: Option<String>,
    /// `predictions`, `completions`, `chat` or `embeddings`.
    pub format: String,
    /// It was asked for as a stream.
    pub stream: bool,
    /// The HTTP status; 499 when the client left before the end.
    pub status: u16,
    /// `complete`, `cancelled`, or the error code.
    pub outcome: String,
    /// Tokens of its prompts.
    pub prompt_tokens: u64,
    /// Tokens made for it, read or not.
    pub output_tokens: u64,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: u64,
    /// Milliseconds to the first output.
    pub ttft_ms: Option<u64>,
    /// Milliseconds to the end.
    pub latency_ms: u64,
    /// The client's labels.
    pub usage_context: BTreeMap<String, String>,
}

impl UsageRow {
    /// The row of a call of the endpoint with this id, whose entity serves `model`.
    pub fn of(record: &CallRecord, endpoint_id: &str, model: Option<&ModelRef>) -> UsageRow {
        let latency_ms = millis(record.latency);
        UsageRow {
            time_ms: record.started_ms + latency_ms,
            started_ms: record.started_ms,
            request_id: record.request_id.clone(),
            client_request_id: record.client_request_id.clone(),
            user: record.user.clone(),
            endpoint: record.endpoint.clone(),
            endpoint_id: endpoint_id.to_owned(),
            served_entity: record.served_entity.clone(),
            entity_name: model.map(|model| model.name.clone()),
            entity_version: model.map(|model| model.version.clone()),
            format: format_word(record.format).to_owned(),
            stream: record.stream,
            status: record.status,
            outcome: outcome_word(&record.outcome).to_owned(),
            prompt_tokens: record.prompt_tokens,
            output_tokens: record.output_tokens,
            cached_tokens: record.cached_tokens,
            ttft_ms: record.first_output.map(millis),
            latency_ms,
            usage_context: record.usage_context.iter().cloned().collect(),
        }
    }
}

/// A call with its bodies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InferenceRow {
    /// When it ended, in milliseconds since 1970.
    pub time_ms: u64,
    /// When it came.
    pub started_ms: u64,
    /// Its id, as in the header `x-request-id`.
    pub request_id: String,
    /// The client's own id of it.
    pub client_request_id: Option<String>,
    /// Who called.
    pub user: String,
    /// The endpoint's name.
    pub endpoint: String,
    /// The endpoint's id.
    pub endpoint_id: String,
    /// Which served entity took it.
    pub served_entity: Option<String>,
    /// `predictions`, `completions`, `chat` or `embeddings`.
    pub format: String,
    /// It was asked for as a stream.
    pub stream: bool,
    /// The HTTP status; 499 when the client left before the end.
    pub status: u16,
    /// `complete`, `cancelled`, or the error code.
    pub outcome: String,
    /// Milliseconds to the end.
    pub latency_ms: u64,
    /// The request's body.
    pub request: Body,
    /// The answer's body, a stream's as if it had been asked for whole; none where there was none.
    pub response: Option<Body>,
}

impl InferenceRow {
    /// The row of a call of the endpoint with this id, its bodies as `keep` says. Takes the bodies out of the record.
    pub fn of(mut record: CallRecord, endpoint_id: &str, keep: Keep) -> Option<InferenceRow> {
        let payload = record.payload.take()?;
        let latency_ms = millis(record.latency);
        Some(InferenceRow {
            time_ms: record.started_ms + latency_ms,
            started_ms: record.started_ms,
            request_id: record.request_id,
            client_request_id: record.client_request_id,
            user: record.user,
            endpoint: record.endpoint,
            endpoint_id: endpoint_id.to_owned(),
            served_entity: record.served_entity,
            format: format_word(record.format).to_owned(),
            stream: record.stream,
            status: record.status,
            outcome: outcome_word(&record.outcome).to_owned(),
            latency_ms,
            request: Body::of(payload.request, keep),
            response: payload.response.map(|response| Body::of(response, keep)),
        })
    }
}

/// What is kept of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Bytes of text at most; 0 keeps none.
    pub bytes_max: usize,
    /// Length and digest alone.
    pub redact: bool,
}

/// A body in a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Body {
    /// Its length, all of it.
    pub bytes: u64,
    /// SHA-256 of all of it.
    pub sha256: String,
    /// Its text; none when it is redacted.
    pub text: Option<String>,
    /// The text is its beginning only.
    pub truncated: bool,
}

impl Body {
    fn of(mut text: String, keep: Keep) -> Body {
        let (bytes, sha256) = (text.len() as u64, hex::encode(Sha256::digest(&text)));
        if keep.redact {
            return Body {
                bytes,
                sha256,
                text: None,
                truncated: false,
            };
        }
        let truncated = text.len() > keep.bytes_max;
        if truncated {
            let mut end = keep.bytes_max;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
        }
        Body {
            bytes,
            sha256,
            text: Some(text),
            truncated,
        }
    }
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn format_word(format: CallFormat) -> &'static str {
    match format {
        CallFormat::Predictions => "predictions",
        CallFormat::Completions => "completions",
        CallFormat::Chat => "chat",
        CallFormat::Embeddings => "embeddings",
    }
}

fn outcome_word(outcome: &Outcome) -> &str {
    match outcome {
        Outcome::Complete => "complete",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed { code, .. } => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str, bytes_max: usize, redact: bool) -> Body {
        Body::of(text.into(), Keep { bytes_max, redact })
    }

    #[test]
    fn a_body_is_kept_cut_or_reduced_to_its_digest() {
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let whole = body("abc", 3, false);
        assert_eq!(
            (whole.text.as_deref(), whole.truncated),
            (Some("abc"), false)
        );
        let cut = body("abc", 2, false);
        assert_eq!((cut.text.as_deref(), cut.truncated), (Some("ab"), true));
        let redacted = body("abc", 2, true);
        assert_eq!((redacted.text, redacted.truncated), (None, false));
        for (bytes, sha256) in [
            (whole.bytes, whole.sha256),
            (cut.bytes, cut.sha256),
            (redacted.bytes, redacted.sha256),
        ] {
            assert_eq!((bytes, sha256.as_str()), (3, digest));
        }
        assert_eq!(body("aé", 2, false).text.as_deref(), Some("a"));
    }

    #[test]
    fn rows_of_other_versions_are_read() {
        let row: UsageRow =
            serde_json::from_str(r#"{"time_ms": 5, "user": "ann", "from_the_future": [1]}"#)
                .unwrap();
        assert_eq!((row.time_ms, row.user.as_str()), (5, "ann"));
    }
}
