//! A generation request as it travels from the coordinator to a worker, and the answer's parts.
//!
//! Checked at the coordinator's door ([`Sampling::check`]); workers check again what only they can know (prompt length
//! in tokens, ids in the vocabulary). Text and token ids pass through the coordinator unopened.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// What to continue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    /// Text, tokenized by the worker with the tokenizer's own special tokens.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template.
    Chat(Chat),
}

impl Prompt {
    /// An upper bound of the prompt's tokens that needs no tokenizer: no tokenizer of the supported kinds gives more
    /// tokens than UTF-8 bytes, plus a few special ones per message.
    pub fn tokens_upper_bound(&self) -> u64 {
        const SPECIAL_TOKENS: u64 = 4;
        match self {
            Prompt::Text(text) => text.len() as u64 + SPECIAL_TOKENS,
            Prompt::Tokens(ids) => ids.len() as u64,
            Prompt::Chat(chat) => {
                // A template adds role names and turn marks around each message, and words around tools.
                const TEMPLATE_BYTES: u64 = 256;
                let parts = chat.messages.len() + usize::from(chat.tools.is_some());
                (chat.bytes() as u64) + parts as u64 * TEMPLATE_BYTES + SPECIAL_TOKENS
            }
        }
    }
}

/// A conversation and the tools that its next turn may call.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chat {
    /// The turns so far.
    pub messages: Vec<ChatMessage>,
    /// The tools as a JSON array in OpenAI's form, checked at the door; `None` for none.
    pub tools: Option<String>,
    /// Whether the next turn may or must call one.
    pub tool_choice: ToolChoice,
    /// At most one call in a turn.
    pub single_call: bool,
}

impl Chat {
    /// Bytes of everything that a template may write out.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let message = |m: &ChatMessage| {
            m.role.len()
                + m.content.len()
                + text(&m.tool_calls)
                + text(&m.tool_call_id)
                + text(&m.name)
        };
        self.messages.iter().map(message).sum::<usize>() + text(&self.tools)
    }
}

impl From<Vec<ChatMessage>> for Chat {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Chat {
            messages,
            ..Chat::default()
        }
    }
}

/// Whether a turn calls tools.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// It calls none.
    None,
    /// It calls at least one.
    Required,
    /// It calls this one.
    Function(String),
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, `tool`, ... as the template knows them.
    pub role: String,
    /// The text; empty for a turn that only calls tools.
    pub content: String,
    /// An assistant's calls of tools: a JSON array in OpenAI's form.
    #[serde(default)]
    pub tool_calls: Option<String>,
    /// Which call a tool's turn answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
    /// Who speaks, or which tool.
    #[serde(default)]
    pub name: Option<String>,
}

impl ChatMessage {
    /// A plain turn.
    pub fn said(role: impl Into<String>, content: impl Into<String>) -> Self {
        ChatMessage {
            role: role.into(),
            content: content.into(),
            ..ChatMessage::default()
        }
    }
}

/// What the whole answer must be: tokens that would break it are never chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema (JSON text) allows.
    JsonSchema(String),
    /// Text that this regular expression matches whole.
    Regex(String),
    /// Text of this grammar, in Lark's notation.
    Grammar(String),
}

/// How tokens are chosen. The meaning of each field is that of the OpenAI API and of transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    /// 1 keeps all tokens.
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub min_p: f32,
    /// 1 does nothing.
    pub repetition_penalty: f32,
    /// 0 does nothing.
    pub presence_penalty: f32,
    /// 0 does nothing.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Always present on the wire: the coordinator draws one when the client gave none.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A sampler field outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} must be {allowed}, got {got}")]
pub struct OutOfRange {
    /// The field's name as clients write it.
    pub field: &'static str,
    /// What is allowed.
    pub allowed: &'static str,
    /// What was given.
    pub got: String,
}

impl Sampling {
    /// Most entries of `logit_bias`.
    pub const LOGIT_BIAS_MAX: usize = 1024;
    /// What may be added to a logit.
    pub const LOGIT_BIAS: RangeInclusive<f32> = -100.0..=100.0;

    /// Checks every field's range.
    ///
    /// # Errors
    /// [`OutOfRange`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), OutOfRange> {
        let range = |field, value: f32, ok: bool, allowed| {
            if ok && value.is_finite() {
                Ok(())
            } else {
                Err(OutOfRange {
                    field,
                    allowed,
                    got: value.to_string(),
                })
            }
        };
        let t = self.temperature;
        range(
            "temperature",
            t,
            (0.0..=100.0).contains(&t),
            "between 0 and 100",
        )?;
        range(
            "top_p",
            self.top_p,
            self.top_p > 0.0 && self.top_p <= 1.0,
            "above 0 and at most 1",
        )?;
        range(
            "min_p",
            self.min_p,
            (0.0..=1.0).contains(&self.min_p),
            "between 0 and 1",
        )?;
        let r = self.repetition_penalty;
        range(
            "repetition_penalty",
            r,
            (1e-3..=100.0).contains(&r),
            "between 0.001 and 100",
        )?;
        let p = self.presence_penalty;
        range(
            "presence_penalty",
            p,
            (-2.0..=2.0).contains(&p),
            "between -2 and 2",
        )?;
        let f = self.frequency_penalty;
        range(
            "frequency_penalty",
            f,
            (-2.0..=2.0).contains(&f),
            "between -2 and 2",
        )?;
        for (_, bias) in &self.logit_bias {
            range(
                "logit_bias",
                *bias,
                Self::LOGIT_BIAS.contains(bias),
                "between -100 and 100 for each token id",
            )?;
        }
        if self.logit_bias.len() > Self::LOGIT_BIAS_MAX {
            let got = format!("{} entries", self.logit_bias.len());
            return Err(OutOfRange {
                field: "logit_bias",
                allowed: "at most 1024 entries",
                got,
            });
        }
        Ok(())
    }
}

/// When to stop.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stop {
    /// Texts that end the answer and are not part of it; found across token borders.
    pub strings: Vec<String>,
    /// Token ids that end the answer, beside the model's own end tokens.
    pub token_ids: Vec<u32>,
    /// Go on past the model's end tokens (benchmarks).
    pub ignore_eos: bool,
    /// Most output tokens per candidate; `None` is what fits the context. 0 scores the prompt only.
    pub tokens_max: Option<u32>,
}

impl Stop {
    /// Most stop strings.
    pub const STRINGS_MAX: usize = 64;
    /// Longest stop string in bytes.
    pub const STRING_BYTES_MAX: usize = 1024;
}

/// One prompt with everything a replica needs to answer it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// What to continue.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// When to stop.
    pub stop: Stop,
    /// How many continuations.
    pub candidates: u32,
    /// Report log-probabilities of output tokens with the n most probable ones.
    pub logprobs: Option<u32>,
    /// Report log-probabilities of prompt tokens with the n most probable ones.
    pub prompt_logprobs: Option<u32>,
    /// Repeat the prompt's text in front of the answer.
    pub echo: bool,
    /// What the answer must be.
    pub constraint: Option<Constraint>,
    /// Drop the prompt's beginning where it does not fit the context, instead of refusing it.
    pub truncate_prompt: bool,
    /// Give the prompt's embedding instead of a continuation: the mean of its last hidden states.
    pub embedding: bool,
}

impl Generate {
    /// Most continuations of one prompt.
    pub const CANDIDATES_MAX: u32 = 64;
    /// Most alternatives in `logprobs`.
    pub const LOGPROBS_MAX: u32 = 20;

    /// A greedy request for one continuation of `prompt`.
    pub fn new(prompt: Prompt) -> Self {
        Generate {
            prompt,
            sampling: Sampling::default(),
            stop: Stop::default(),
            candidates: 1,
            logprobs: None,
            prompt_logprobs: None,
            echo: false,
            constraint: None,
            truncate_prompt: false,
            embedding: false,
        }
    }
}

/// What a candidate had already emitted elsewhere, so that a request can be continued.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resume {
    /// The candidate.
    pub candidate: u32,
    /// Output ids received so far.
    pub emitted: Vec<u32>,
    /// Bytes of its text already delivered to the client.
    pub delivered_bytes: u64,
}

/// A token's text and log-probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The id.
    pub id: u32,
    /// The token's bytes; joined over an answer they are its text.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability; `None` for the first token of a prompt.
    pub logprob: Option<f32>,
    /// The most probable tokens at its place, best first.
    pub top: Vec<TopToken>,
}

/// One of the most probable tokens at a place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopToken {
    /// The id.
    pub id: u32,
    /// The token's bytes.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// New output of one candidate in one step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Delta {
    /// The candidate.
    pub candidate: u32,
    /// Output ids of this step. May come without text while a character or a stop string is incomplete.
    pub ids: Vec<u32>,
    /// Text that is safe to show. Whole characters only.
    pub text: String,
    /// One per token whose text is within what was released so far, when asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Parts of calls of tools. Text that became a call is not in `text`.
    pub tool_calls: Vec<ToolCallDelta>,
}

/// A part of a call of a tool. The first part of a call has its id and name, the later ones more of its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ToolCallDelta {
    /// Which call of the answer, from 0.
    pub index: u32,
    /// The call's id.
    pub id: Option<String>,
    /// The function's name.
    pub name: Option<String>,
    /// More of the arguments' JSON text.
    pub arguments: String,
}

/// Why a candidate ended. Every candidate ends exactly once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum End {
    /// An end token, or a stop string or id of the request.
    Stop,
    /// The most tokens asked for, or the end of the context.
    Length,
    /// The request's deadline passed.
    Deadline,
    /// The client left, or did not read.
    Cancelled,
    /// It failed.
    Error(Failure),
}

/// A failure that a client is told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind.
    pub kind: FailureKind,
    /// What was asked and what would help.
    pub message: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Failure {
            kind,
            message: message.into(),
        }
    }
}

/// Kinds of failure, by what the caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The request is wrong; the same request will fail again.
    BadRequest,
    /// The request can never fit this replica.
    TooLarge,
    /// No room now; try later or elsewhere.
    Overloaded,
    /// The replica is not there (any more); try elsewhere.
    Unavailable,
    /// A fault of ours.
    Internal,
    /// What was asked for is not there any more; the same request will fail again.
    NotFound,
}

impl FailureKind {
    /// Whether the same request may succeed elsewhere or later.
    pub fn retryable(self) -> bool {
        matches!(self, FailureKind::Overloaded | FailureKind::Unavailable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_sampling_is_valid_and_each_wrong_field_is_named() {
        assert!(Sampling::default().check().is_ok());
        let wrong: [(&str, Sampling); 6] = [
            (
                "temperature",
                Sampling {
                    temperature: -0.1,
                    ..Default::default()
                },
            ),
            (
                "temperature",
                Sampling {
                    temperature: f32::NAN,
                    ..Default::default()
                },
            ),
            (
                "top_p",
                Sampling {
                    top_p: 0.0,
                    ..Default::default()
                },
            ),
            (
                "min_p",
                Sampling {
                    min_p: 1.5,
                    ..Default::default()
                },
            ),
            (
                "repetition_penalty",
                Sampling {
                    repetition_penalty: 0.0,
                    ..Default::default()
                },
            ),
            (
                "logit_bias",
                Sampling {
                    logit_bias: vec![(1, 101.0)],
                    ..Default::default()
                },
            ),
        ];
        for (field, sampling) in wrong {
            assert_eq!(sampling.check().unwrap_err().field, field);
        }
    }
}
