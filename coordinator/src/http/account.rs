//! What a call came to: one record, whoever ends it and however.
//!
//! Owns the promise that a [`CallObserver`] hears of every call exactly once: the record is given away when it is
//! closed, or else when it is dropped, and what nobody spoke for was left by its client.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::error::Fault;
use super::json::{FieldError, Fields, Object};
use crate::api::{CallFormat, CallObserver, CallRecord, Outcome, Payload};

/// nginx's word for a client that closed its connection before the answer.
const CLIENT_LEFT: u16 = 499;
/// Longest `client_request_id`, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 256;
/// Most entries of `usage_context`, and most bytes of all of them.
const LABELS_MAX: usize = 64;
const LABELS_BYTES_MAX: usize = 8 << 10;

/// The account of one call.
pub(super) struct Account {
    observer: Arc<dyn CallObserver>,
    started: Instant,
    /// `None` once it was given away.
    record: Option<Box<CallRecord>>,
}

impl Account {
    /// Opens the account of a call that comes now.
    pub fn open(
        observer: Arc<dyn CallObserver>,
        endpoint: String,
        user: String,
        request_id: String,
        format: CallFormat,
        body: &Object,
    ) -> Self {
        let request = || serde_json::to_string(body).unwrap_or_default();
        let payload = observer.wants_payload(&endpoint).then(|| Payload {
            request: request(),
            response: None,
        });
        let record = CallRecord {
            endpoint,
            served_entity: None,
            user,
            request_id,
            client_request_id: None,
            usage_context: Vec::new(),
            format,
            stream: false,
            started_ms: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as u64),
            first_output: None,
            latency: std::time::Duration::ZERO,
            prompt_tokens: 0,
            output_tokens: 0,
            cached_tokens: 0,
            status: CLIENT_LEFT,
            outcome: Outcome::Cancelled,
            payload,
        };
        Account {
            observer,
            started: Instant::now(),
            record: Some(Box::new(record)),
        }
    }

    /// Reads what the client calls the call: `client_request_id` and `usage_context`.
    pub fn label(&mut self, body: &Object) -> Result<(), FieldError> {
        let labels = labels(&Fields::of("", body))?;
        if let Some(record) = &mut self.record {
            (record.client_request_id, record.usage_context) = labels;
        }
        Ok(())
    }

    /// Whether the bodies are wanted.
    pub fn wants_payload(&self) -> bool {
        self.record
            .as_ref()
            .is_some_and(|record| record.payload.is_some())
    }

    /// A stream is asked for.
    pub fn streams(&mut self) {
        if let Some(record) = &mut self.record {
            record.stream = true;
        }
    }

    /// A served entity has taken the call.
    pub fn accepted(&mut self, served_entity: String, prompt_tokens: u64) {
        if let Some(record) = &mut self.record {
            record.served_entity = Some(served_entity);
            record.prompt_tokens = prompt_tokens;
        }
    }

    /// Output has come; these are the counts so far.
    pub fn came(&mut self, output_tokens: u64, cached_tokens: u64) {
        let since = self.started.elapsed();
        if let Some(record) = &mut self.record {
            record.first_output.get_or_insert(since);
            record.output_tokens = output_tokens;
            record.cached_tokens = cached_tokens;
        }
    }

    /// The answer's body.
    pub fn replied(&mut self, body: String) {
        let payload = self
            .record
            .as_mut()
            .and_then(|record| record.payload.as_mut());
        if let Some(payload) = payload {
            payload.response = Some(body);
        }
    }

    /// It was answered to its end.
    pub fn completed(&mut self) {
        if let Some(record) = &mut self.record {
            (record.status, record.outcome) = (200, Outcome::Complete);
        }
    }

    /// It was refused, or failed.
    pub fn failed(&mut self, fault: &Fault) {
        if let Some(record) = &mut self.record {
            record.status = fault.status.as_u16();
            record.outcome = Outcome::Failed {
                code: fault.code.to_owned(),
                message: fault.message.clone(),
            };
        }
    }

    /// Gives the record away; nothing counts any more.
    pub fn close(&mut self) {
        if let Some(mut record) = self.record.take() {
            record.latency = self.started.elapsed();
            self.observer.record(*record);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.close();
    }
}

type Labels = (Option<String>, Vec<(String, String)>);

fn labels(fields: &Fields<'_>) -> Result<Labels, FieldError> {
    let id = match fields.get("client_request_id") {
        None => None,
        Some(field) => {
            let id = field.text()?;
            if id.len() > CLIENT_ID_BYTES_MAX {
                let (most, got) = (CLIENT_ID_BYTES_MAX, id.len());
                return Err(field.refuse(format!("must be at most {most} bytes long, got {got}")));
            }
            Some(id.to_owned())
        }
    };
    let Some(context) = fields.get("usage_context") else {
        return Ok((id, Vec::new()));
    };
    let mut labels = Vec::new();
    for (key, value) in context.object()? {
        let text = match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Number(_) | serde_json::Value::Bool(_) => value.to_string(),
            _ => return Err(context.refuse("must have strings for values")),
        };
        labels.push((key.clone(), text));
    }
    let bytes: usize = labels
        .iter()
        .map(|(key, text)| key.len() + text.len())
        .sum();
    if labels.len() > LABELS_MAX || bytes > LABELS_BYTES_MAX {
        let got = labels.len();
        return Err(context.refuse(format!(
            "must have at most {LABELS_MAX} entries of {LABELS_BYTES_MAX} bytes in all, got {got} of {bytes}"
        )));
    }
    Ok((id, labels))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;

    use serde_json::json;

    use super::*;

    /// Keeps the records.
    #[derive(Default)]
    pub(in crate::http) struct Ledger {
        pub payloads: bool,
        pub records: Mutex<Vec<CallRecord>>,
    }

    impl Ledger {
        /// The one record that there must be.
        pub fn only(&self) -> CallRecord {
            let records = self.records.lock().unwrap();
            assert_eq!(records.len(), 1, "one call, one record: {records:?}");
            records[0].clone()
        }
    }

    impl CallObserver for Ledger {
        fn wants_payload(&self, _: &str) -> bool {
            self.payloads
        }

        fn record(&self, record: CallRecord) {
            self.records.lock().unwrap().push(record);
        }
    }

    /// An account that goes to this ledger.
    pub(in crate::http) fn account(ledger: &Arc<Ledger>) -> Account {
        Account::open(
            Arc::<Ledger>::clone(ledger),
            "e".into(),
            "ann".into(),
            "id".into(),
            CallFormat::Completions,
            &Object::new(),
        )
    }

    #[test]
    fn an_account_is_given_away_once_and_what_nobody_spoke_for_was_left() {
        let ledger = Arc::new(Ledger::default());
        drop(account(&ledger));
        let record = ledger.only();
        assert_eq!((record.status, record.outcome), (499, Outcome::Cancelled));

        let ledger = Arc::new(Ledger::default());
        let mut closed = account(&ledger);
        closed.came(3, 2);
        closed.completed();
        closed.close();
        closed.failed(&Fault::cancelled());
        closed.close();
        drop(closed);
        let record = ledger.only();
        assert_eq!((record.status, record.outcome), (200, Outcome::Complete));
        assert_eq!((record.output_tokens, record.cached_tokens), (3, 2));
        assert!(
            record
                .first_output
                .is_some_and(|first| first <= record.latency)
        );
    }

    #[test]
    fn labels_are_bounded_texts() {
        let read = |body: serde_json::Value| labels(&Fields::of("", body.as_object().unwrap()));
        let (id, labels) =
            read(json!({"client_request_id": "c-1", "usage_context": {"team": "a", "cost": 5}}))
                .unwrap();
        assert_eq!(id.as_deref(), Some("c-1"));
        assert_eq!(labels.len(), 2);
        assert!(labels.contains(&("cost".into(), "5".into())));
        for (body, says) in [
            (
                json!({"client_request_id": 5}),
                "client_request_id must be a string",
            ),
            (
                json!({"client_request_id": "x".repeat(257)}),
                "at most 256 bytes",
            ),
            (
                json!({"usage_context": ["a"]}),
                "usage_context must be an object",
            ),
            (
                json!({"usage_context": {"a": []}}),
                "must have strings for values",
            ),
            (
                json!({"usage_context": {"a": "x".repeat(9000)}}),
                "8192 bytes in all, got 1 of 9001",
            ),
        ] {
            let error = read(body).unwrap_err();
            assert!(error.message.contains(says), "{}", error.message);
        }
    }
}
