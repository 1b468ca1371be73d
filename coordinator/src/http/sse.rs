//! Answers as server-sent events: `data:` lines and blank lines, nothing else, for some clients read nothing else.
//!
//! `[DONE]` comes only after success; what goes wrong after the first byte is an event with an `error`, and then the
//! end. A reader that is slow is simply not polled further; dropping the stream cancels the generation.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::web::Bytes;
use futures::stream::{Stream, StreamExt};
use serde::Serialize;

use super::error::Fault;
use super::offsets::Offsets;
use super::openai::Style;
use super::parts::{Choice, Part, Parts, Usage, gather};
use super::replies::{Meta, OpenAiReply};

/// Events that are ready together go out together, up to about this many bytes.
const BATCH_BYTES: usize = 16 << 10;

/// The events of one answer.
pub(super) struct SseStream {
    parts: Parts,
    writer: Writer,
    /// What was sent, for the call's account, when that is wanted.
    sent: Option<Vec<Choice>>,
    over: bool,
}

impl SseStream {
    /// The events of `parts`. `suffix` stands behind every completion; `include_usage` says the usage at the end.
    pub fn new(parts: Parts, meta: Meta, suffix: String, include_usage: bool) -> Self {
        let writer = Writer::new(meta, suffix, include_usage, parts.choices());
        let sent = parts
            .account
            .wants_payload()
            .then(|| vec![Choice::default(); parts.choices()]);
        SseStream {
            parts,
            writer,
            sent,
            over: false,
        }
    }

    /// Nothing more is sent: the account can be closed, before the client sees the end.
    fn end(&mut self) {
        self.over = true;
        self.tell_sent();
        self.parts.account.close();
    }

    fn tell_sent(&mut self) {
        if let Some(mut sent) = self.sent.take() {
            for choice in sent.iter_mut().filter(|choice| choice.finish.is_some()) {
                choice.text.push_str(&self.writer.suffix);
            }
            let whole = OpenAiReply::whole(&self.writer.meta, &sent, self.parts.usage());
            let body = serde_json::to_string(&whole).unwrap_or_default();
            self.parts.account.replied(body);
        }
    }
}

impl Drop for SseStream {
    fn drop(&mut self) {
        self.tell_sent();
    }
}

impl Stream for SseStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while !this.over && this.writer.bytes.len() < BATCH_BYTES {
            match this.parts.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(part))) => {
                    this.writer.part(&part);
                    if let Some(sent) = &mut this.sent {
                        gather(sent, part);
                    }
                }
                Poll::Ready(Some(Err(fault))) => {
                    this.writer.fail(&fault);
                    this.end();
                }
                Poll::Ready(None) => {
                    this.writer.finish(this.parts.usage());
                    this.end();
                }
                Poll::Pending if this.writer.bytes.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        let bytes = std::mem::take(&mut this.writer.bytes);
        Poll::Ready((!bytes.is_empty()).then(|| Ok(Bytes::from(bytes))))
    }
}

/// Writes events into a buffer.
struct Writer {
    meta: Meta,
    suffix: String,
    include_usage: bool,
    /// By choice: where the tokens written so far end.
    offsets: Vec<Offsets>,
    bytes: Vec<u8>,
}

impl Writer {
    /// A chat opens each choice at once.
    fn new(meta: Meta, suffix: String, include_usage: bool, choices: usize) -> Self {
        let mut writer = Writer {
            meta,
            suffix,
            include_usage,
            offsets: vec![Offsets::default(); choices],
            bytes: Vec::new(),
        };
        if writer.meta.style == Style::Chat {
            for index in 0..choices {
                event(
                    &mut writer.bytes,
                    &OpenAiReply::opening(&writer.meta, index),
                );
            }
        }
        writer
    }

    fn part(&mut self, part: &Part) {
        let Writer {
            meta,
            bytes,
            offsets,
            suffix,
            ..
        } = self;
        match part {
            Part::Prompt {
                choice,
                text,
                tokens,
            }
            | Part::Delta {
                choice,
                text,
                logprobs: tokens,
            } => {
                event(
                    bytes,
                    &OpenAiReply::chunk(meta, *choice, text, tokens, &mut offsets[*choice]),
                );
            }
            // Asked for whole only.
            Part::Embedding { .. } => {}
            Part::Call { choice, part } => {
                event(bytes, &OpenAiReply::call(meta, *choice, part));
            }
            Part::End { choice, finish, .. } => {
                event(bytes, &OpenAiReply::closing(meta, *choice, *finish, suffix));
            }
        }
    }

    fn finish(&mut self, usage: Usage) {
        if self.include_usage {
            event(&mut self.bytes, &OpenAiReply::usage(&self.meta, usage));
        }
        self.bytes.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn fail(&mut self, fault: &Fault) {
        tracing::debug!(id = %self.meta.id, code = fault.code, message = %fault.message, "stream failed");
        event(&mut self.bytes, &fault.event());
    }
}

fn event(bytes: &mut Vec<u8>, value: &impl Serialize) {
    bytes.extend_from_slice(b"data: ");
    // JSON text has no line breaks of its own, and writing our own shapes to memory cannot fail.
    let length = bytes.len();
    if let Err(error) = serde_json::to_writer(&mut *bytes, value) {
        tracing::error!(%error, "an event could not be written");
        bytes.truncate(length);
        bytes.extend_from_slice(b"{\"error\":{\"message\":\"an event could not be written\"}}");
    }
    bytes.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use common::request::{Delta, End, Failure, FailureKind, TokenLogprob, ToolCallDelta};

    use super::super::account::tests::{Ledger, account};
    use super::super::parts::Deadline;
    use super::super::tests::fake::{delta, end, generation};
    use super::*;
    use crate::api::GenerationEvent;

    fn later() -> Deadline {
        Deadline {
            at: Instant::now() + Duration::from_secs(60),
            allowed_ms: 60_000,
        }
    }

    async fn transcript(
        style: Style,
        candidates: u32,
        logprobs: bool,
        events: Vec<GenerationEvent>,
    ) -> String {
        let parts = Parts::new(
            vec![generation(3, events)],
            &[candidates],
            false,
            later(),
            account(&Arc::default()),
        );
        let meta = Meta {
            style,
            id: "id-1".into(),
            created: 5,
            model: "e".into(),
            logprobs,
        };
        let suffix = if style == Style::Completion { "!" } else { "" };
        let stream = SseStream::new(parts, meta, suffix.into(), style == Style::Chat);
        let chunks: Vec<_> = stream.map(|chunk| chunk.unwrap().to_vec()).collect().await;
        String::from_utf8(chunks.concat()).unwrap()
    }

    #[tokio::test]
    async fn a_chat_with_two_choices_and_usage_reads_like_this() {
        let events = vec![
            delta(0, "Hello"),
            delta(1, "Hi\n"),
            delta(0, ""),
            end(0, 2, End::Stop),
            end(1, 1, End::Length),
        ];
        let expected = r#"data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null,"logprobs":null}]}

data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{"index":1,"delta":{"role":"assistant","content":""},"finish_reason":null,"logprobs":null}]}

data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{"index":0,"delta":{"content":"Hello"},"finish_reason":null,"logprobs":null}]}

data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{"index":1,"delta":{"content":"Hi\n"},"finish_reason":null,"logprobs":null}]}

data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{"index":0,"delta":{},"finish_reason":"stop","logprobs":null}]}

data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{"index":1,"delta":{},"finish_reason":"length","logprobs":null}]}

data: {"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6}}

data: [DONE]

"#;
        assert_eq!(transcript(Style::Chat, 2, false, events).await, expected);
    }

    #[tokio::test]
    async fn a_chat_that_calls_a_tool_reads_like_this() {
        let part = |id: Option<&str>, arguments: &str| ToolCallDelta {
            index: 0,
            id: id.map(str::to_owned),
            name: id.map(|_| "f".to_owned()),
            arguments: arguments.into(),
        };
        let called = |text: &str, parts: Vec<ToolCallDelta>| {
            GenerationEvent::Delta(Delta {
                candidate: 0,
                ids: vec![1],
                text: text.into(),
                tool_calls: parts,
                ..Delta::default()
            })
        };
        let events = vec![
            called("I look.", vec![part(Some("c1"), ""), part(None, "{\"a\"")]),
            called("", vec![part(None, ": 1}")]),
            end(0, 9, End::Stop),
        ];
        let chunk = |delta: &str, finish: &str| {
            format!(
                r#"data: {{"id":"id-1","object":"chat.completion.chunk","created":5,"model":"e","choices":[{{"index":0,"delta":{delta},"finish_reason":{finish},"logprobs":null}}]}}"#
            )
        };
        let expected = [
            chunk(r#"{"role":"assistant","content":""}"#, "null"),
            chunk(r#"{"content":"I look."}"#, "null"),
            chunk(
                r#"{"tool_calls":[{"index":0,"id":"c1","type":"function","function":{"name":"f","arguments":""}}]}"#,
                "null",
            ),
            chunk(
                r#"{"tool_calls":[{"index":0,"function":{"arguments":"{\"a\""}}]}"#,
                "null",
            ),
            chunk(
                r#"{"tool_calls":[{"index":0,"function":{"arguments":": 1}"}}]}"#,
                "null",
            ),
            chunk("{}", "\"tool_calls\""),
        ];
        let transcript = transcript(Style::Chat, 1, false, events).await;
        let got: Vec<&str> = transcript.split("\n\n").take(6).collect();
        assert_eq!(got, expected);
    }

    #[tokio::test]
    async fn a_completion_with_echo_and_logprobs_reads_like_this() {
        let token = |bytes: &[u8], logprob| TokenLogprob {
            id: 1,
            bytes: bytes.to_vec(),
            logprob,
            top: vec![],
        };
        let events = vec![
            GenerationEvent::Prompt {
                text: "p".into(),
                tokens: vec![token(b"<s>", None), token(b" p", None)],
            },
            GenerationEvent::Delta(Delta {
                candidate: 0,
                ids: vec![1],
                text: " w".into(),
                logprobs: vec![token(b" w", Some(-0.5))],
                ..Delta::default()
            }),
            end(0, 1, End::Length),
        ];
        let expected = r#"data: {"id":"id-1","object":"text_completion","created":5,"model":"e","choices":[{"index":0,"text":"p","finish_reason":null,"logprobs":{"tokens":["<s>"," p"],"token_logprobs":[null,null],"top_logprobs":[null,null],"text_offset":[0,0]}}]}

data: {"id":"id-1","object":"text_completion","created":5,"model":"e","choices":[{"index":0,"text":" w","finish_reason":null,"logprobs":{"tokens":[" w"],"token_logprobs":[-0.5],"top_logprobs":[{" w":-0.5}],"text_offset":[1]}}]}

data: {"id":"id-1","object":"text_completion","created":5,"model":"e","choices":[{"index":0,"text":"!","finish_reason":"length","logprobs":null}]}

data: [DONE]

"#;
        assert_eq!(
            transcript(Style::Completion, 1, true, events).await,
            expected
        );
    }

    #[tokio::test]
    async fn an_error_after_the_first_byte_is_an_event_and_there_is_no_done() {
        let failure = Failure::new(FailureKind::Unavailable, "the replica is gone");
        let events = vec![delta(0, "x"), end(0, 1, End::Error(failure))];
        let expected = r#"data: {"id":"id-1","object":"text_completion","created":5,"model":"e","choices":[{"index":0,"text":"x","finish_reason":null,"logprobs":null}]}

data: {"error":{"message":"the replica is gone","type":"server_error","code":"TEMPORARILY_UNAVAILABLE","param":null,"retryable":true}}

"#;
        assert_eq!(
            transcript(Style::Completion, 1, false, events).await,
            expected
        );
    }

    #[tokio::test]
    async fn events_that_are_ready_together_go_out_together_but_not_without_bound() {
        let mut events: Vec<_> = (0..1000).map(|_| delta(0, "word")).collect();
        events.push(end(0, 1000, End::Stop));
        let parts = Parts::new(
            vec![generation(3, events)],
            &[1],
            false,
            later(),
            account(&Arc::default()),
        );
        let meta = Meta {
            style: Style::Completion,
            id: "id".into(),
            created: 5,
            model: "e".into(),
            logprobs: false,
        };
        let chunks: Vec<_> = SseStream::new(parts, meta, String::new(), false)
            .collect()
            .await;
        let largest = chunks
            .iter()
            .map(|chunk| chunk.as_ref().unwrap().len())
            .max()
            .unwrap();
        assert!(
            chunks.len() < 20 && largest < 2 * BATCH_BYTES,
            "{} chunks, largest {largest}",
            chunks.len()
        );
    }

    #[tokio::test]
    async fn a_stream_is_on_its_account_when_its_end_is_seen_and_when_it_is_left() {
        let stream = |events| {
            let ledger = Arc::new(Ledger {
                payloads: true,
                ..Ledger::default()
            });
            let account = account(&ledger);
            let parts = Parts::new(vec![generation(3, events)], &[1], false, later(), account);
            let meta = Meta {
                style: Style::Completion,
                id: "id".into(),
                created: 5,
                model: "e".into(),
                logprobs: false,
            };
            (ledger, SseStream::new(parts, meta, "!".into(), false))
        };
        let (ledger, mut whole) = stream(vec![delta(0, "a"), delta(0, "b"), end(0, 2, End::Stop)]);
        let last = whole.next().await.unwrap().unwrap();
        assert!(last.ends_with(b"data: [DONE]\n\n"));
        let record = ledger.only();
        assert_eq!((record.status, record.output_tokens), (200, 2));
        let response = record.payload.unwrap().response.unwrap();
        assert!(
            response.contains(r#""text":"ab!","finish_reason":"stop""#),
            "{response}"
        );
        drop(whole);
        ledger.only();

        let many: Vec<_> = (0..2000).map(|_| delta(0, "word")).collect();
        let (ledger, mut left) = stream(many);
        left.next().await.unwrap().unwrap();
        assert!(ledger.records.lock().unwrap().is_empty());
        drop(left);
        let record = ledger.only();
        assert_eq!(record.outcome, crate::api::Outcome::Cancelled);
        assert_eq!(
            record.output_tokens, 2000,
            "what came is counted, read or not"
        );
        let response = record.payload.unwrap().response.unwrap();
        assert!(
            response.contains(r#"wordword","finish_reason":null"#),
            "{response}"
        );
    }
}
