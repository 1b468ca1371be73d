//! What is refused at the door: requests that can never run here, and more waiting work than the engine may hold.
//!
//! Pure arithmetic over a request and the model's sizes.

use super::SchedulerConfig;
use crate::plan::BLOCK_TOKENS;
use crate::request::{Request, Sampling, SequenceError};
use crate::runner::Geometry;
use std::collections::HashSet;

/// Most probable tokens reported per position, at most.
pub const LOGPROBS_MAX: u32 = 128;

/// Candidates of one request, at most.
pub const CANDIDATES_MAX: usize = 128;

/// Largest magnitude of a bias or penalty: beyond any sensible value, and far from overflowing a logit.
const ADJUSTMENT_MAX: f32 = 1e6;

/// Work that waits for its first admission.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Tokens to prefill, cache hits not foreseen.
    pub tokens: u64,
    /// Candidates.
    pub sequences: u64,
}

impl Backlog {
    /// What a request adds. Its prompt counts once: the candidates share it.
    pub fn of(request: &Request) -> Self {
        let emitted: usize = request
            .candidates
            .iter()
            .map(|candidate| candidate.emitted.len())
            .sum();
        Backlog {
            tokens: (request.prompt.len() + emitted) as u64,
            sequences: request.candidates.len() as u64,
        }
    }
}

impl std::ops::Add for Backlog {
    type Output = Backlog;
    fn add(self, other: Backlog) -> Backlog {
        Backlog {
            tokens: self.tokens + other.tokens,
            sequences: self.sequences + other.sequences,
        }
    }
}

/// The backlog is full: try later or elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the backlog is full: {} tokens of {} sequences wait, at most {} tokens of {} may; try again later",
    .waiting.tokens, .waiting.sequences, .limits.tokens, .limits.sequences
)]
pub struct Full {
    /// What waits.
    pub waiting: Backlog,
    /// What may wait.
    pub limits: Backlog,
}

/// Whether `incoming` may join what is `waiting`. An empty backlog takes any request.
///
/// # Errors
/// [`Full`] when one of the `limits` would be exceeded.
pub fn check_backlog(limits: Backlog, waiting: Backlog, incoming: Backlog) -> Result<(), Full> {
    let sum = waiting + incoming;
    let fits = sum.tokens <= limits.tokens && sum.sequences <= limits.sequences;
    if fits || waiting == Backlog::default() {
        Ok(())
    } else {
        Err(Full { waiting, limits })
    }
}

/// Whether a request can run on a model of this size at all.
///
/// # Errors
/// [`SequenceError::Invalid`] names the first mistake; [`SequenceError::NeverFits`] when a candidate at its longest
/// needs more KV blocks than the pool has.
pub fn check_request(config: &SchedulerConfig, request: &Request) -> Result<(), SequenceError> {
    let Geometry {
        vocab,
        context_max,
        blocks,
        ..
    } = config.geometry;
    let invalid = |what: String| Err(SequenceError::Invalid(what));
    if request.prompt.is_empty() {
        return invalid("the prompt is empty; give at least one token".into());
    }
    if request.candidates.is_empty() {
        return invalid("no candidate is asked for; ask for at least one".into());
    }
    if request.candidates.len() > CANDIDATES_MAX {
        return invalid(format!(
            "{} candidates are asked for; at most {CANDIDATES_MAX}",
            request.candidates.len()
        ));
    }
    let mut indices = HashSet::new();
    let mut longest = 0;
    for candidate in &request.candidates {
        if !indices.insert(candidate.index) {
            return invalid(format!("candidate {} is asked for twice", candidate.index));
        }
        let len = request.prompt.len() + candidate.emitted.len();
        if len > context_max as usize {
            return invalid(format!(
                "{len} tokens of prompt and output exceed the context of {context_max}"
            ));
        }
        let end = (request.prompt.len() + request.tokens_max as usize).min(context_max as usize);
        longest = longest.max(len).max(end);
    }
    let mut ids = request.prompt.iter().chain(
        request
            .candidates
            .iter()
            .flat_map(|candidate| &candidate.emitted),
    );
    if let Some(id) = ids.find(|&&id| id >= vocab) {
        return invalid(format!("token {id} is outside the vocabulary of {vocab}"));
    }
    if request
        .prompt_logprobs
        .is_some_and(|top| top > LOGPROBS_MAX)
    {
        return invalid(format!("prompt_logprobs is at most {LOGPROBS_MAX}"));
    }
    if request.embedding
        && (
            request.candidates.len(),
            request.tokens_max,
            request.prompt_logprobs,
        ) != (1, 0, None)
    {
        return invalid("an embedding has one candidate and no tokens or log-probabilities".into());
    }
    check_sampling(&request.sampling, vocab).map_err(SequenceError::Invalid)?;
    let needed = config.blocks_most(longest) as u64;
    let available = u64::from(blocks.saturating_sub(1));
    if needed > available {
        return Err(SequenceError::NeverFits { needed, available });
    }
    Ok(())
}

/// Most blocks that a sequence of `len` tokens holds at once when it is computed in chunks of `chunk` tokens.
pub(super) fn blocks_most(len: usize, chunk: usize, window: Option<u32>) -> usize {
    let all = len.div_ceil(BLOCK_TOKENS);
    // A chunk of n tokens and the window - 1 tokens before it touch at most this many blocks, however they lie.
    window.map_or(all, |window| {
        all.min((window as usize + chunk).saturating_sub(2) / BLOCK_TOKENS + 2)
    })
}

fn check_sampling(sampling: &Sampling, vocab: u32) -> Result<(), String> {
    let range = |name: &str, value: f32, fits: bool, range: &str| {
        if fits {
            Ok(())
        } else {
            Err(format!("{name} is {value}; give {range}"))
        }
    };
    let Sampling {
        temperature,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        ..
    } = *sampling;
    range(
        "temperature",
        temperature,
        (0.0..=1e6).contains(&temperature),
        "0 to 1e6",
    )?;
    range(
        "top_p",
        top_p,
        top_p > 0.0 && top_p <= 1.0,
        "more than 0, at most 1",
    )?;
    range("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
    range(
        "repetition_penalty",
        repetition_penalty,
        (1e-3..=1e3).contains(&repetition_penalty),
        "0.001 to 1000",
    )?;
    let adjustment = -ADJUSTMENT_MAX..=ADJUSTMENT_MAX;
    range(
        "presence_penalty",
        presence_penalty,
        adjustment.contains(&presence_penalty),
        "-1e6 to 1e6",
    )?;
    range(
        "frequency_penalty",
        frequency_penalty,
        adjustment.contains(&frequency_penalty),
        "-1e6 to 1e6",
    )?;
    for &(id, bias) in &sampling.logit_bias {
        range(
            "logit_bias",
            bias,
            adjustment.contains(&bias),
            "-1e6 to 1e6",
        )?;
        if id >= vocab {
            return Err(format!(
                "logit_bias names token {id}, outside the vocabulary of {vocab}"
            ));
        }
    }
    if sampling.logprobs.is_some_and(|top| top > LOGPROBS_MAX) {
        return Err(format!("logprobs is at most {LOGPROBS_MAX}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Candidate;

    const GEOMETRY: Geometry = Geometry {
        blocks: 5,
        context_max: 100,
        vocab: 10,
        window: None,
        step_tokens_max: 32,
        spans_max: 2,
    };

    fn config() -> SchedulerConfig {
        SchedulerConfig::new(GEOMETRY, 1, Vec::new(), 32)
    }

    fn request(prompt: usize, tokens_max: u32) -> Request {
        Request {
            key: 1,
            prompt: vec![3; prompt],
            candidates: vec![Candidate::default()],
            sampling: Sampling::default(),
            tokens_max,
            stop_ids: Vec::new(),
            prompt_logprobs: None,
            embedding: false,
            deadline: None,
        }
    }

    fn check(change: impl FnOnce(&mut Request)) -> Result<(), SequenceError> {
        let mut request = request(10, 10);
        change(&mut request);
        check_request(&config(), &request)
    }

    #[test]
    fn mistakes_are_named() {
        let message = |change: fn(&mut Request)| check(change).expect_err("a mistake").to_string();
        assert_eq!(check(|_| ()), Ok(()));
        assert!(message(|r| r.prompt.clear()).contains("prompt is empty"));
        assert!(message(|r| r.candidates.clear()).contains("no candidate"));
        assert!(message(|r| r.candidates.push(Candidate::default())).contains("asked for twice"));
        assert!(
            message(|r| r.candidates = vec![Candidate::default(); 129]).contains("at most 128")
        );
        assert!(message(|r| r.prompt = vec![1; 101]).contains("exceed the context of 100"));
        assert!(message(|r| r.prompt[4] = 10).contains("token 10 is outside the vocabulary of 10"));
        assert!(message(|r| r.candidates[0].emitted = vec![99]).contains("token 99"));
        assert!(message(|r| r.sampling.temperature = f32::NAN).contains("temperature"));
        assert!(message(|r| r.sampling.temperature = -1.0).contains("temperature"));
        assert!(message(|r| r.sampling.top_p = 0.0).contains("top_p"));
        assert!(message(|r| r.sampling.min_p = 1.1).contains("min_p"));
        assert!(message(|r| r.sampling.repetition_penalty = 0.0).contains("repetition_penalty"));
        assert!(
            message(|r| r.sampling.presence_penalty = f32::INFINITY).contains("presence_penalty")
        );
        assert!(message(|r| r.sampling.frequency_penalty = f32::NAN).contains("frequency_penalty"));
        assert!(
            message(|r| r.sampling.logit_bias = vec![(10, 1.0)])
                .contains("logit_bias names token 10")
        );
        assert!(message(|r| r.sampling.logit_bias = vec![(1, f32::NAN)]).contains("logit_bias"));
        assert!(message(|r| r.sampling.logprobs = Some(129)).contains("at most 128"));
        assert!(message(|r| r.prompt_logprobs = Some(129)).contains("at most 128"));
        assert!(message(|r| r.embedding = true).contains("an embedding has one candidate"));
    }

    #[test]
    fn a_request_that_can_never_fit_says_what_it_needs() {
        assert_eq!(check_request(&config(), &request(60, 4)), Ok(()));
        let never = SequenceError::NeverFits {
            needed: 5,
            available: 4,
        };
        assert_eq!(check_request(&config(), &request(60, 5)), Err(never));
        // The context ends a sequence whatever it asked for.
        let never = SequenceError::NeverFits {
            needed: 7,
            available: 4,
        };
        assert_eq!(check_request(&config(), &request(60, u32::MAX)), Err(never));
    }

    #[test]
    fn a_window_bounds_what_a_sequence_holds() {
        assert_eq!(blocks_most(1000, 1, None), 63);
        assert_eq!(blocks_most(1000, 1, Some(17)), 3);
        assert_eq!(blocks_most(20, 1, Some(64)), 2);
        // Exact, over every place a chunk can lie at.
        for (chunk, window) in [(1, 2), (1, 17), (7, 20), (16, 16), (40, 33)] {
            let held = |at: usize| {
                (at + chunk - 1) / 16 - crate::plan::first_visible_block(at, Some(window)) + 1
            };
            let most = (0..500).map(held).max().expect("some");
            let bound = blocks_most(10_000, chunk, Some(window));
            assert!(
                most <= bound && bound <= most + 1,
                "chunk {chunk} window {window}: {most} held, {bound} reckoned"
            );
        }
    }

    #[test]
    fn the_backlog_is_bounded_in_tokens_and_sequences() {
        let limits = Backlog {
            tokens: 100,
            sequences: 3,
        };
        let of = |tokens, sequences| Backlog { tokens, sequences };
        assert_eq!(check_backlog(limits, of(60, 1), of(40, 2)), Ok(()));
        assert_eq!(
            check_backlog(limits, of(60, 1), of(41, 1)),
            Err(Full {
                waiting: of(60, 1),
                limits
            })
        );
        assert_eq!(
            check_backlog(limits, of(1, 1), of(1, 3)),
            Err(Full {
                waiting: of(1, 1),
                limits
            })
        );
        assert_eq!(
            check_backlog(limits, of(0, 0), of(500, 9)),
            Ok(()),
            "an empty backlog takes any request"
        );
    }
}
