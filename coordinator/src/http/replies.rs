//! Answers as JSON: predictions, completions and chats, whole and in chunks.
//!
//! Owns shapes only; what is in an answer is decided in `parts`.

use common::request::{TokenLogprob, ToolCallDelta};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use super::offsets::Offsets;
use super::openai::Style;
use super::parts::{Choice, Finish, ToolCall, Usage};

/// What JSON says for a probability of zero, as OpenAI does.
const LOGPROB_LEAST: f32 = -9999.0;

/// Databricks' predictions, one per prompt.
#[derive(Serialize)]
pub(super) struct Predictions<'a> {
    predictions: Vec<Prediction<'a>>,
}

impl<'a> Predictions<'a> {
    /// `choices` are those of all prompts, of which the i-th has `candidates[i]` and `prompt_tokens[i]`.
    pub fn of(mut choices: &'a [Choice], candidates: &[u32], prompt_tokens: &[u32]) -> Self {
        let mut predictions = Vec::with_capacity(candidates.len());
        for (&count, &input_tokens) in candidates.iter().zip(prompt_tokens) {
            let (of_prompt, rest) = choices.split_at(count as usize);
            predictions.push(Prediction::of(of_prompt, input_tokens));
            choices = rest;
        }
        Predictions { predictions }
    }
}

#[derive(Serialize)]
struct Prediction<'a> {
    candidates: Vec<Candidate<'a>>,
    metadata: PredictionTokens,
}

impl<'a> Prediction<'a> {
    fn of(choices: &'a [Choice], input_tokens: u32) -> Self {
        let output_tokens = choices.iter().map(|choice| choice.output_tokens).sum();
        let candidate = |choice: &'a Choice| Candidate {
            text: &choice.text,
            metadata: CandidateEnd {
                finish_reason: choice.finish.map(Finish::word),
            },
        };
        Prediction {
            candidates: choices.iter().map(candidate).collect(),
            metadata: PredictionTokens {
                input_tokens,
                output_tokens,
                total_tokens: input_tokens + output_tokens,
            },
        }
    }
}

#[derive(Serialize)]
struct Candidate<'a> {
    text: &'a str,
    metadata: CandidateEnd,
}

#[derive(Serialize)]
struct CandidateEnd {
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct PredictionTokens {
    input_tokens: u32,
    output_tokens: u32,
    total_tokens: u32,
}

/// What all parts of one OpenAI answer have in common.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub style: Style,
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The endpoint's name.
    pub model: String,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
}

/// A whole answer, or one chunk of it.
#[derive(Serialize)]
pub(super) struct OpenAiReply<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<OpenAiChoice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageJson>,
}

impl<'a> OpenAiReply<'a> {
    /// Everything at once.
    pub fn whole(meta: &'a Meta, choices: &'a [Choice], usage: Usage) -> Self {
        let choice = |(index, choice): (usize, &'a Choice)| OpenAiChoice {
            index,
            body: match meta.style {
                Style::Completion => ChoiceBody::Completion { text: &choice.text },
                Style::Chat => ChoiceBody::Chat {
                    message: Message {
                        role: "assistant",
                        content: Some(choice.text.as_str())
                            .filter(|text| choice.calls.is_empty() || !text.is_empty()),
                        tool_calls: choice.calls.iter().map(CallJson::of).collect(),
                    },
                },
            },
            finish_reason: choice.finish.map(Finish::word),
            logprobs: Logprobs::of(meta, &choice.text, &choice.tokens, &mut Offsets::default()),
        };
        OpenAiReply {
            object: match meta.style {
                Style::Completion => "text_completion",
                Style::Chat => "chat.completion",
            },
            usage: Some(usage.into()),
            ..Self::frame(meta, choices.iter().enumerate().map(choice).collect())
        }
    }

    /// The first chunk of a choice of a chat: who speaks.
    pub fn opening(meta: &'a Meta, index: usize) -> Self {
        let delta = MessageDelta {
            role: Some("assistant"),
            content: Some(""),
            tool_calls: None,
        };
        let body = ChoiceBody::ChatChunk { delta };
        Self::frame(
            meta,
            vec![OpenAiChoice {
                index,
                body,
                finish_reason: None,
                logprobs: None,
            }],
        )
    }

    /// New text of a choice; `offsets` has walked through what came before it.
    pub fn chunk(
        meta: &'a Meta,
        index: usize,
        text: &'a str,
        tokens: &'a [TokenLogprob],
        offsets: &mut Offsets,
    ) -> Self {
        let body = match meta.style {
            Style::Completion => ChoiceBody::Completion { text },
            Style::Chat => ChoiceBody::ChatChunk {
                delta: MessageDelta {
                    role: None,
                    content: Some(text),
                    tool_calls: None,
                },
            },
        };
        let logprobs = Logprobs::of(meta, text, tokens, offsets);
        Self::frame(
            meta,
            vec![OpenAiChoice {
                index,
                body,
                finish_reason: None,
                logprobs,
            }],
        )
    }

    /// A part of a call of a tool.
    pub fn call(meta: &'a Meta, index: usize, part: &'a ToolCallDelta) -> Self {
        let delta = MessageDelta {
            role: None,
            content: None,
            tool_calls: Some([CallDelta::of(part)]),
        };
        Self::frame(
            meta,
            vec![OpenAiChoice {
                index,
                body: ChoiceBody::ChatChunk { delta },
                finish_reason: None,
                logprobs: None,
            }],
        )
    }

    /// The last chunk of a choice.
    pub fn closing(meta: &'a Meta, index: usize, finish: Finish, suffix: &'a str) -> Self {
        let body = match meta.style {
            Style::Completion => ChoiceBody::Completion { text: suffix },
            Style::Chat => ChoiceBody::ChatChunk {
                delta: MessageDelta {
                    role: None,
                    content: None,
                    tool_calls: None,
                },
            },
        };
        let finish_reason = Some(finish.word());
        Self::frame(
            meta,
            vec![OpenAiChoice {
                index,
                body,
                finish_reason,
                logprobs: None,
            }],
        )
    }

    /// The chunk behind all choices that says what was used.
    pub fn usage(meta: &'a Meta, usage: Usage) -> Self {
        OpenAiReply {
            usage: Some(usage.into()),
            ..Self::frame(meta, Vec::new())
        }
    }

    /// A chunk.
    fn frame(meta: &'a Meta, choices: Vec<OpenAiChoice<'a>>) -> Self {
        let object = match meta.style {
            Style::Completion => "text_completion",
            Style::Chat => "chat.completion.chunk",
        };
        OpenAiReply {
            id: &meta.id,
            object,
            created: meta.created,
            model: &meta.model,
            choices,
            usage: None,
        }
    }
}

#[derive(Serialize)]
struct OpenAiChoice<'a> {
    index: usize,
    #[serde(flatten)]
    body: ChoiceBody<'a>,
    finish_reason: Option<&'static str>,
    logprobs: Option<Logprobs<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ChoiceBody<'a> {
    Completion { text: &'a str },
    Chat { message: Message<'a> },
    ChatChunk { delta: MessageDelta<'a> },
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallJson<'a>>,
}

/// A whole call.
#[derive(Serialize)]
struct CallJson<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    function: FunctionJson<'a>,
}

#[derive(Serialize)]
struct FunctionJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> CallJson<'a> {
    fn of(call: &'a ToolCall) -> Self {
        CallJson {
            id: &call.id,
            kind: "function",
            function: FunctionJson {
                name: Some(&call.name),
                arguments: &call.arguments,
            },
        }
    }
}

/// A part of a call: the first one says whose it is, the others are arguments.
#[derive(Serialize)]
struct CallDelta<'a> {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionJson<'a>,
}

impl<'a> CallDelta<'a> {
    fn of(part: &'a ToolCallDelta) -> Self {
        CallDelta {
            index: part.index,
            id: part.id.as_deref(),
            kind: part.id.as_ref().map(|_| "function"),
            function: FunctionJson {
                name: part.name.as_deref(),
                arguments: &part.arguments,
            },
        }
    }
}

#[derive(Serialize)]
struct MessageDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

#[derive(Serialize)]
struct UsageJson {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

impl From<Usage> for UsageJson {
    fn from(usage: Usage) -> Self {
        let Usage {
            prompt_tokens,
            completion_tokens,
        } = usage;
        UsageJson {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Logprobs<'a> {
    Completion(CompletionLogprobs<'a>),
    Chat { content: Vec<ChatLogprob<'a>> },
}

impl<'a> Logprobs<'a> {
    /// `None` when none were asked for, or a chunk has none.
    fn of(
        meta: &Meta,
        text: &str,
        tokens: &'a [TokenLogprob],
        offsets: &mut Offsets,
    ) -> Option<Self> {
        match meta.style {
            _ if !meta.logprobs => None,
            Style::Completion => Some(Logprobs::Completion(CompletionLogprobs::of(
                tokens,
                offsets.take(text, tokens),
            ))),
            Style::Chat => Some(Logprobs::Chat {
                content: tokens.iter().map(ChatLogprob::of).collect(),
            }),
        }
    }
}

#[derive(Serialize)]
struct CompletionLogprobs<'a> {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs<'a>>>,
    text_offset: Vec<usize>,
}

impl<'a> CompletionLogprobs<'a> {
    fn of(tokens: &'a [TokenLogprob], text_offset: Vec<usize>) -> Self {
        CompletionLogprobs {
            tokens: tokens
                .iter()
                .map(|token| token_text(&token.bytes))
                .collect(),
            token_logprobs: tokens
                .iter()
                .map(|token| token.logprob.map(sayable))
                .collect(),
            top_logprobs: tokens
                .iter()
                .map(|token| token.logprob.map(|_| TopLogprobs(token)))
                .collect(),
            text_offset,
        }
    }
}

/// An object from token to log-probability, best first; the token that was taken is always among them.
struct TopLogprobs<'a>(&'a TokenLogprob);

impl Serialize for TopLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let TokenLogprob {
            id,
            bytes,
            logprob,
            top,
        } = self.0;
        let mut map = serializer.serialize_map(None)?;
        for other in top {
            map.serialize_entry(&token_text(&other.bytes), &sayable(other.logprob))?;
        }
        if let Some(logprob) = logprob.filter(|_| top.iter().all(|other| other.id != *id)) {
            map.serialize_entry(&token_text(bytes), &sayable(logprob))?;
        }
        map.end()
    }
}

#[derive(Serialize)]
struct ChatLogprob<'a> {
    #[serde(flatten)]
    token: ChatToken<'a>,
    top_logprobs: Vec<ChatToken<'a>>,
}

impl<'a> ChatLogprob<'a> {
    fn of(token: &'a TokenLogprob) -> Self {
        ChatLogprob {
            token: ChatToken::of(&token.bytes, token.logprob.unwrap_or(LOGPROB_LEAST)),
            top_logprobs: token
                .top
                .iter()
                .map(|other| ChatToken::of(&other.bytes, other.logprob))
                .collect(),
        }
    }
}

#[derive(Serialize)]
struct ChatToken<'a> {
    token: String,
    logprob: f32,
    bytes: &'a [u8],
}

impl<'a> ChatToken<'a> {
    fn of(bytes: &'a [u8], logprob: f32) -> Self {
        ChatToken {
            token: String::from_utf8_lossy(bytes).into_owned(),
            logprob: sayable(logprob),
            bytes,
        }
    }
}

/// JSON has no infinities.
fn sayable(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        LOGPROB_LEAST
    }
}

/// A token as text; one that is no text is spelt out, so that different tokens stay different.
fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| {
            text + &format!("\\x{byte:02x}")
        }),
    }
}

#[cfg(test)]
mod tests;
