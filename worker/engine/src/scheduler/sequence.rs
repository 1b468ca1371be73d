//! One candidate on its way through the scheduler: its tokens, how far they are computed, when it is over.
//!
//! Owns no blocks but through its table, and takes no decision about others.

use crate::kv::table::BlockTable;
use crate::mask::{MaskSlot, Next};
use crate::request::{
    EndReason, Event, Request, RequestKey, Sampling, SequenceError, TokenLogprob,
};
use crate::runner::{SampleRow, Sampled};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// What the candidates of a request have in common.
pub(super) struct Shared {
    pub key: RequestKey,
    pub sampling: Sampling,
    pub stop_ids: Vec<u32>,
    pub prompt_logprobs: Option<u32>,
    pub embedding: bool,
    pub deadline: Option<Instant>,
}

impl Shared {
    /// Where the prompt's log-probabilities are gathered, if they are wanted: the first token has none.
    pub fn first_scores(&self) -> Option<Vec<Option<TokenLogprob>>> {
        self.prompt_logprobs.map(|_| vec![None])
    }
}

/// What a step gave one sequence: scores of prompt tokens, the sum of hidden states, the next token.
pub(super) struct Advance {
    pub scored: Option<Result<Vec<TokenLogprob>, SequenceError>>,
    pub pooled: Option<Result<Vec<f64>, SequenceError>>,
    pub sampled: Option<Result<Sampled, SequenceError>>,
}

/// One candidate.
pub(super) struct Sequence {
    pub shared: Arc<Shared>,
    pub candidate: u32,
    /// Prompt, then outputs.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Length of `tokens` at which the sequence ends.
    pub len_max: usize,
    /// Leading tokens whose K and V are in the table's blocks.
    pub computed: usize,
    pub table: BlockTable,
    /// The prompt's log-probabilities so far, first entry included; `None` when not wanted or already reported.
    pub scores: Option<Vec<Option<TokenLogprob>>>,
    /// The sum of the prompt's hidden states so far; `None` when not wanted or already reported.
    pub pool: Option<Vec<f64>>,
    /// Siblings wait for this one's prompt.
    pub leads: bool,
    /// Prompt tokens found in the cache at the first admission; `None` before it.
    pub cached: Option<u32>,
    pub preemptions: u32,
    /// What the outputs are bound to. It stands behind the last output, also after a preemption, which keeps outputs.
    pub mask: Option<Arc<MaskSlot>>,
    /// Set once; the scheduler then retires the sequence.
    pub ended: Option<EndReason>,
}

impl Sequence {
    /// A request's candidates, in order. The first one reports the prompt's log-probabilities.
    pub fn of(request: Request, context_max: u32) -> Vec<Sequence> {
        let Request {
            key,
            prompt,
            candidates,
            sampling,
            tokens_max,
            stop_ids,
            prompt_logprobs,
            embedding,
            deadline,
        } = request;
        let shared = Arc::new(Shared {
            key,
            sampling,
            stop_ids,
            prompt_logprobs,
            embedding,
            deadline,
        });
        let prompt_len = prompt.len();
        let len_max = prompt_len
            .saturating_add(tokens_max as usize)
            .min(context_max as usize);
        let mut first = true;
        let sequence = |candidate: crate::request::Candidate| {
            let mut tokens = prompt.clone();
            tokens.extend(&candidate.emitted);
            let scores = shared.first_scores().filter(|_| std::mem::take(&mut first));
            Sequence {
                shared: shared.clone(),
                candidate: candidate.index,
                tokens,
                prompt_len,
                len_max,
                computed: 0,
                table: BlockTable::default(),
                scores,
                pool: shared.embedding.then(Vec::new),
                leads: false,
                cached: None,
                preemptions: 0,
                mask: candidate.mask.map(MaskSlot::new),
                ended: None,
            }
        };
        candidates.into_iter().map(sequence).collect()
    }

    /// Output tokens so far.
    pub fn outputs(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// Tokens not yet computed. Never 0 for a sequence that goes on.
    pub fn rest(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether nothing is left to do.
    pub fn is_complete(&self) -> bool {
        self.scores.is_none() && self.pool.is_none() && self.tokens.len() >= self.len_max
    }

    /// Whether computing `len` more tokens gives a row of logits to sample from.
    pub fn samples_after(&self, len: usize) -> bool {
        self.computed + len == self.tokens.len() && self.tokens.len() < self.len_max
    }

    /// The prompt's tokens to score when `len` more tokens are computed: those that follow each of them.
    pub fn targets_of(&self, len: usize) -> Range<usize> {
        let first = self.computed + 1;
        let end = if self.scores.is_some() {
            (first + len).min(self.prompt_len)
        } else {
            first
        };
        first..end.max(first)
    }

    /// The row to sample from span `span`.
    pub fn sample_row(&self, span: usize) -> SampleRow<'_> {
        SampleRow {
            span,
            sampling: &self.shared.sampling,
            candidate: self.candidate,
            output_index: self.outputs().len() as u32,
            prompt: &self.tokens[..self.prompt_len],
            outputs: self.outputs(),
            mask: self.mask.as_deref(),
        }
    }

    /// Takes what a step gave, and notes the end when it came.
    pub fn advance(&mut self, advance: Advance, events: &mut Vec<Event>) {
        let Advance {
            scored,
            pooled,
            sampled,
        } = advance;
        let result = match scored {
            Some(scored) => scored.map(|scored| self.take_scores(scored)),
            None => Ok(()),
        };
        let result = result.and_then(|()| match pooled {
            Some(pooled) => pooled.map(|sum| self.pool = Some(sum)),
            None => Ok(()),
        });
        let result = result.and_then(|()| {
            self.report_scores(events);
            self.report_embedding(events);
            match sampled {
                Some(sampled) => sampled.map(|sampled| self.take_sample(sampled, events)),
                None => Ok(()),
            }
        });
        if let Err(error) = result {
            self.ended = Some(EndReason::Error(error));
        }
        if self.ended.is_none() && self.is_complete() {
            self.ended = Some(EndReason::Length);
        }
    }

    fn take_scores(&mut self, scored: Vec<TokenLogprob>) {
        if let Some(scores) = &mut self.scores {
            scores.extend(scored.into_iter().map(Some));
        }
    }

    fn report_scores(&mut self, events: &mut Vec<Event>) {
        if self.computed >= self.prompt_len {
            let key = self.shared.key;
            events.extend(
                self.scores
                    .take()
                    .map(|tokens| Event::PromptLogprobs { key, tokens }),
            );
        }
    }

    fn report_embedding(&mut self, events: &mut Vec<Event>) {
        if self.computed < self.prompt_len {
            return;
        }
        if let Some(sum) = self.pool.take() {
            let count = self.prompt_len as f64;
            events.push(Event::Embedding {
                key: self.shared.key,
                values: sum.iter().map(|sum| (sum / count) as f32).collect(),
            });
        }
    }

    fn take_sample(&mut self, Sampled { id, logprob }: Sampled, events: &mut Vec<Event>) {
        if self.shared.stop_ids.contains(&id) {
            self.ended = Some(EndReason::StopToken { id, logprob });
            return;
        }
        let index = self.outputs().len() as u32;
        self.tokens.push(id);
        events.push(Event::Token {
            key: self.shared.key,
            candidate: self.candidate,
            index,
            id,
            logprob,
        });
        self.ended = match self.mask.as_ref().map(|mask| mask.accept(id)) {
            None | Some(Ok(Next::Open)) => None,
            Some(Ok(Next::Complete)) => Some(EndReason::Complete),
            Some(Err(error)) => Some(EndReason::Error(error)),
        };
    }

    /// Forgets what was computed; outputs are kept. The caller has taken the blocks.
    pub fn restart(&mut self) {
        self.computed = 0;
        self.preemptions += 1;
        if let Some(scores) = &mut self.scores {
            scores.truncate(1);
        }
        if let Some(sum) = &mut self.pool {
            sum.clear();
        }
    }

    /// The last event.
    pub fn ended(&self, reason: EndReason) -> Event {
        Event::Ended {
            key: self.shared.key,
            candidate: self.candidate,
            reason,
            cached_tokens: self.cached.unwrap_or(0),
        }
    }
}
