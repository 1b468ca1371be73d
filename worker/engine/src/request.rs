//! What the engine is asked and what it answers: token ids in, token ids out.
//!
//! Owns the request and event types. Knows no text, wire or HTTP: the worker translates.

use crate::mask::{MaskError, TokenMask};
use std::time::Instant;

/// A request's key inside one engine. Unique among the requests in flight.
pub type RequestKey = u64;

/// How the next token is chosen from the logits. Applied in the order of the fields' documentation in
/// [`crate::sampler`].
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 picks the most probable token; above, logits are divided by it.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divide positive (multiply negative) logits of tokens seen in prompt or output; 1 does nothing (CTRL).
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token already in the output (OpenAI).
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output (OpenAI).
    pub frequency_penalty: f32,
    /// Added to the logits of these token ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// With the candidate and the output index, the key of the counter-based generator.
    pub seed: u64,
    /// Report the chosen token's log-probability and those of the n most probable ones.
    pub logprobs: Option<u32>,
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
            logprobs: None,
        }
    }
}

/// One prompt and how many continuations of it are wanted.
#[derive(Debug, Clone)]
pub struct Request {
    /// The caller's key; events carry it.
    pub key: RequestKey,
    /// Prompt token ids, at least one.
    pub prompt: Vec<u32>,
    /// The candidates to generate, by index. Each shares the prompt's blocks. A resumed candidate carries the ids it
    /// already emitted; they are recomputed, never emitted again.
    pub candidates: Vec<Candidate>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most output tokens per candidate, those already emitted included. 0 scores the prompt only.
    pub tokens_max: u32,
    /// Token ids that end a candidate (the model's end tokens among them, unless the caller ignores them).
    /// The stop token is reported in the ending event, not as an output token.
    pub stop_ids: Vec<u32>,
    /// Report log-probabilities of the prompt's tokens with the n most probable ones. Skips prefix-cache hits.
    pub prompt_logprobs: Option<u32>,
    /// Give the prompt's embedding, the mean of its tokens' last hidden states, and no continuation: one candidate,
    /// `tokens_max` 0. Skips prefix-cache hits.
    pub embedding: bool,
    /// When given and past, the request ends with [`EndReason::Deadline`].
    pub deadline: Option<Instant>,
}

/// One continuation of a request's prompt.
#[derive(Debug, Clone, Default)]
pub struct Candidate {
    /// Index of the candidate in the request; part of the random generator's key.
    pub index: u32,
    /// Output ids emitted before (elsewhere, by an earlier attempt).
    pub emitted: Vec<u32>,
    /// What the outputs are bound to, if they are; it has accepted the emitted ids already.
    pub mask: Option<Box<dyn TokenMask>>,
}

/// A token's log-probability beside the most probable ones at its position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, of the raw logits (before temperature, penalties and filters).
    pub logprob: f32,
    /// The most probable tokens there, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a candidate ended.
#[derive(Debug, Clone, PartialEq)]
pub enum EndReason {
    /// One of the request's stop ids came. It is no output.
    StopToken {
        /// Which.
        id: u32,
        /// Present when asked for.
        logprob: Option<TokenLogprob>,
    },
    /// The candidate's mask says that the output is complete: nothing may follow.
    Complete,
    /// The most output tokens asked for, or the end of the context.
    Length,
    /// The request's deadline passed.
    Deadline,
    /// The caller cancelled.
    Cancelled,
    /// This sequence failed; others go on.
    Error(SequenceError),
}

/// What can go wrong for one sequence alone.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SequenceError {
    /// The model produced NaN or infinite logits or hidden states.
    #[error("the model produced numbers that are not finite")]
    NotFinite,
    /// The request can never fit this engine.
    #[error("the request needs {needed} KV blocks of 16 tokens; this replica has {available}")]
    NeverFits {
        /// Blocks the request needs at its longest.
        needed: u64,
        /// Blocks the pool has.
        available: u64,
    },
    /// The output cannot go on within what it is bound to.
    #[error("the answer cannot go on within its constraint: {0}")]
    Mask(MaskError),
    /// The request is malformed (empty prompt, id outside the vocabulary, prompt beyond the context).
    #[error("{0}")]
    Invalid(String),
    /// The engine (the whole replica) failed; the request may run elsewhere.
    #[error("{0}")]
    Engine(String),
}

/// What an engine tells its caller, in order per candidate. All events of one step arrive together.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt's log-probabilities, before any token of the request. The first entry has no value.
    PromptLogprobs {
        /// The request.
        key: RequestKey,
        /// One entry per prompt token; `None` for the first.
        tokens: Vec<Option<TokenLogprob>>,
    },
    /// The prompt's embedding, before its candidate's end.
    Embedding {
        /// The request.
        key: RequestKey,
        /// One number per hidden unit.
        values: Vec<f32>,
    },
    /// One output token.
    Token {
        /// The request.
        key: RequestKey,
        /// The candidate.
        candidate: u32,
        /// Index among the candidate's output tokens, emitted ones counted.
        index: u32,
        /// The token.
        id: u32,
        /// Present when asked for.
        logprob: Option<TokenLogprob>,
    },
    /// The candidate is over. Exactly one per candidate, and the last.
    Ended {
        /// The request.
        key: RequestKey,
        /// The candidate.
        candidate: u32,
        /// Why.
        reason: EndReason,
        /// Prompt tokens whose K and V came from the prefix cache at first admission.
        cached_tokens: u32,
    },
}
