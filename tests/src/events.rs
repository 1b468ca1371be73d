//! Server-sent events as real clients read them: only `data:` lines and blank lines, `[DONE]` last.

use std::collections::BTreeMap;

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::Response;
use serde_json::Value;

/// A streaming answer being read. Dropping it closes the connection.
pub struct Events {
    body: BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    buffer: Vec<u8>,
    done: bool,
}

/// A streaming answer read to its end.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Streamed {
    /// Text of each choice.
    pub texts: BTreeMap<u64, String>,
    /// Reason of each choice that ended.
    pub finish_reasons: BTreeMap<u64, String>,
    /// The usage event, when there was one.
    pub usage: Option<Value>,
    /// The error event, when there was one.
    pub error: Option<Value>,
    /// Events with text.
    pub text_events: usize,
    /// Whether `[DONE]` came.
    pub done: bool,
}

impl Streamed {
    /// The only choice's text.
    pub fn text(&self) -> &str {
        assert!(self.texts.len() <= 1, "several choices: {self:?}");
        self.texts.get(&0).map_or("", String::as_str)
    }

    /// The only choice's finish reason.
    pub fn finish_reason(&self) -> &str {
        self.finish_reasons
            .get(&0)
            .unwrap_or_else(|| panic!("no finish reason: {self:?}"))
    }
}

impl Events {
    /// Reads the body of an answer.
    pub(crate) fn new(response: Response) -> Events {
        Events {
            body: response.bytes_stream().boxed(),
            buffer: Vec::new(),
            done: false,
        }
    }

    /// The next event's JSON; `None` when the stream ended. Whether `[DONE]` came before: [`Events::done`].
    ///
    /// # Panics
    /// When the server sends anything that a strict client would choke on.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are whole UTF-8");
                assert!(!self.done, "something follows [DONE]: {event:?}");
                let data = event.trim_end().strip_prefix("data: ");
                let data = data.unwrap_or_else(|| panic!("not a data line: {event:?}"));
                assert!(!data.contains('\n'), "an event of several lines: {event:?}");
                if data == "[DONE]" {
                    self.done = true;
                    continue;
                }
                return Some(
                    serde_json::from_str(data).unwrap_or_else(|e| panic!("{e} in {data}")),
                );
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(_)) | None => return None,
            }
        }
    }

    /// Whether `[DONE]` was read.
    pub fn done(&self) -> bool {
        self.done
    }

    /// Reads to the end.
    pub async fn collect(mut self) -> Streamed {
        let mut all = Streamed::default();
        while let Some(event) = self.next().await {
            all.take(&event);
        }
        all.done = self.done;
        all
    }
}

impl Streamed {
    /// Adds an event.
    pub fn take(&mut self, event: &Value) {
        if event.get("error").is_some() {
            self.error = Some(event.clone());
            return;
        }
        if let Some(usage) = event.get("usage").filter(|usage| !usage.is_null()) {
            self.usage = Some(usage.clone());
        }
        for choice in event["choices"].as_array().expect("an event has choices") {
            let index = choice["index"].as_u64().expect("a choice has an index");
            let text = choice["text"]
                .as_str()
                .or_else(|| choice["delta"]["content"].as_str())
                .unwrap_or_default();
            assert!(
                !self.finish_reasons.contains_key(&index),
                "choice {index} goes on after its end: {event}"
            );
            if !text.is_empty() {
                self.text_events += 1;
            }
            self.texts.entry(index).or_default().push_str(text);
            if let Some(reason) = choice["finish_reason"].as_str() {
                self.finish_reasons.insert(index, reason.to_owned());
            }
        }
    }
}
