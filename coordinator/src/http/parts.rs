//! An answer as one stream of parts, whoever reads it: SSE passes the parts on, a whole answer collects them.
//!
//! Owns the merging of the prompts' generations, the numbering of choices (prompt by prompt, and in each by candidate)
//! and the promise that every choice ends exactly once. Dropping it cancels what is not over; what had come by then is
//! on the call's account all the same.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use common::request::{End, TokenLogprob, ToolCallDelta};
use futures::stream::{SelectAll, Stream, StreamExt};
use tokio::sync::mpsc;

use super::account::Account;
use super::error::Fault;
use crate::api::{CancelGuard, Generation, GenerationEvent};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Part {
    /// What stands in front of a choice's output, when asked for.
    Prompt {
        choice: usize,
        text: String,
        tokens: Vec<TokenLogprob>,
    },
    /// New output of a choice.
    Delta {
        choice: usize,
        text: String,
        logprobs: Vec<TokenLogprob>,
    },
    /// A prompt's embedding.
    Embedding { choice: usize, values: Vec<f32> },
    /// A part of a call of a tool.
    Call { choice: usize, part: ToolCallDelta },
    /// A choice is complete.
    End {
        choice: usize,
        finish: Finish,
        output_tokens: u32,
    },
}

/// Why a choice is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
    /// As [`Finish::Stop`], with calls of tools.
    ToolCalls,
}

impl Finish {
    /// The word clients know.
    pub fn word(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// Tokens of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// How long the cluster may be late with ending a request at its deadline; then it is given up here.
pub(super) const DEADLINE_GRACE: Duration = Duration::from_secs(10);

/// When a call's time is up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    pub at: Instant,
    /// All the time it had.
    pub allowed_ms: u64,
}

/// The parts of an answer, in the order they come; ends after its first fault.
pub(super) struct Parts {
    events: SelectAll<Source>,
    /// By prompt: its first choice; one more stands for the end.
    first: Vec<usize>,
    /// By choice.
    ended: Vec<bool>,
    /// By choice: whether it calls a tool.
    called: Vec<bool>,
    /// By choice: tokens so far.
    tokens: Vec<u32>,
    /// By prompt: tokens from the prefix cache.
    cached: Vec<u32>,
    /// By prompt.
    pub prompt_tokens: Vec<u32>,
    pub account: Account,
    /// End what the deadline cuts with `length`.
    partial_on_deadline: bool,
    deadline: Deadline,
    give_up: Pin<Box<tokio::time::Sleep>>,
    /// Parts that one event gave and that are still to be handed on, last first.
    pending: Vec<Part>,
    over: bool,
}

impl Parts {
    /// The parts of these generations, of which the i-th has `candidates[i]`.
    pub fn new(
        generations: Vec<Generation>,
        candidates: &[u32],
        partial_on_deadline: bool,
        deadline: Deadline,
        account: Account,
    ) -> Self {
        let mut first = vec![0];
        first.extend(candidates.iter().scan(0, |sum, &candidates| {
            *sum += candidates as usize;
            Some(*sum)
        }));
        let prompt_tokens: Vec<u32> = generations
            .iter()
            .map(|generation| generation.prompt_tokens)
            .collect();
        let choices = first.last().copied().unwrap_or(0);
        Parts {
            ended: vec![false; choices],
            called: vec![false; choices],
            tokens: vec![0; choices],
            cached: vec![0; prompt_tokens.len()],
            first,
            events: generations
                .into_iter()
                .enumerate()
                .map(|(prompt, generation)| Source::new(prompt, generation))
                .collect(),
            prompt_tokens,
            account,
            partial_on_deadline,
            deadline,
            give_up: Box::pin(tokio::time::sleep_until(
                (deadline.at + DEADLINE_GRACE).into(),
            )),
            pending: Vec::new(),
            over: false,
        }
    }

    /// How many choices the answer has.
    pub fn choices(&self) -> usize {
        self.ended.len()
    }

    /// What was used so far.
    pub fn usage(&self) -> Usage {
        let sum = |counts: &[u32]| counts.iter().copied().map(u64::from).sum();
        Usage {
            prompt_tokens: sum(&self.prompt_tokens),
            completion_tokens: sum(&self.tokens),
        }
    }

    /// Puts an event on the account.
    fn count(&mut self, prompt: usize, event: &GenerationEvent) {
        let choices = self.first[prompt]..self.first[prompt + 1];
        let open = |candidate: u32| {
            let choice = choices.start + candidate as usize;
            (choices.contains(&choice) && !self.ended[choice]).then_some(choice)
        };
        match event {
            GenerationEvent::Delta(delta) => {
                if let Some(choice) = open(delta.candidate) {
                    self.tokens[choice] += delta.ids.len() as u32;
                }
            }
            GenerationEvent::End {
                candidate,
                output_tokens,
                cached_tokens,
                ..
            } => {
                if let Some(choice) = open(*candidate) {
                    self.tokens[choice] = *output_tokens;
                }
                self.cached[prompt] = self.cached[prompt].max(*cached_tokens);
            }
            GenerationEvent::Prompt { .. } | GenerationEvent::Embedding(_) => {}
        }
        let cached = self.cached.iter().copied().map(u64::from).sum();
        self.account.came(self.usage().completion_tokens, cached);
    }

    /// Cancels what is not over. What had come by then was made for this call, read or not.
    fn settle(&mut self) {
        for mut source in std::mem::take(&mut self.events) {
            source.guard = None;
            while let Ok(event) = source.events.try_recv() {
                self.count(source.prompt, &event);
            }
        }
    }

    fn take(&mut self, prompt: usize, event: Option<GenerationEvent>) -> Result<(), Fault> {
        if let Some(event) = &event {
            self.count(prompt, event);
        }
        let choices = self.first[prompt]..self.first[prompt + 1];
        match event {
            Some(GenerationEvent::Prompt { text, tokens }) => {
                let part = |choice| Part::Prompt {
                    choice,
                    text: text.clone(),
                    tokens: tokens.clone(),
                };
                self.pending.extend(choices.rev().map(part));
            }
            Some(GenerationEvent::Embedding(values)) => {
                let choice = self.open_choice(choices, 0)?;
                self.pending.push(Part::Embedding { choice, values });
            }
            Some(GenerationEvent::Delta(delta)) => {
                let choice = self.open_choice(choices, delta.candidate)?;
                self.called[choice] |= !delta.tool_calls.is_empty();
                // Behind the text, whose turn is first.
                let calls = delta.tool_calls.into_iter().rev();
                self.pending
                    .extend(calls.map(|part| Part::Call { choice, part }));
                if !delta.text.is_empty() || !delta.logprobs.is_empty() {
                    self.pending.push(Part::Delta {
                        choice,
                        text: delta.text,
                        logprobs: delta.logprobs,
                    });
                }
            }
            Some(GenerationEvent::End {
                candidate,
                output_tokens,
                end,
                ..
            }) => {
                let choice = self.open_choice(choices, candidate)?;
                let finish = match end {
                    End::Stop if self.called[choice] => Finish::ToolCalls,
                    End::Stop => Finish::Stop,
                    End::Length => Finish::Length,
                    End::Deadline if self.partial_on_deadline => Finish::Length,
                    End::Deadline => return Err(Fault::deadline(self.deadline.allowed_ms)),
                    End::Cancelled => return Err(Fault::cancelled()),
                    End::Error(failure) => return Err(failure.into()),
                };
                self.ended[choice] = true;
                self.pending.push(Part::End {
                    choice,
                    finish,
                    output_tokens,
                });
            }
            None if !self.ended[choices].iter().all(|ended| *ended) => {
                return Err(Fault::internal("the answer broke off before its end"));
            }
            None => {}
        }
        Ok(())
    }

    fn open_choice(&self, choices: Range<usize>, candidate: u32) -> Result<usize, Fault> {
        let choice = choices.start + candidate as usize;
        if !choices.contains(&choice) || self.ended[choice] {
            return Err(Fault::internal(format!(
                "candidate {candidate} was not to be answered any more"
            )));
        }
        Ok(choice)
    }

    fn poll_fallible(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Part>, Fault>> {
        loop {
            if let Some(part) = self.pending.pop() {
                return Poll::Ready(Ok(Some(part)));
            }
            match self.events.poll_next_unpin(cx) {
                Poll::Ready(Some((prompt, event))) => self.take(prompt, event)?,
                Poll::Ready(None) => return Poll::Ready(Ok(None)),
                Poll::Pending => {
                    ready!(self.give_up.as_mut().poll(cx));
                    return Poll::Ready(Err(Fault::deadline(self.deadline.allowed_ms)));
                }
            }
        }
    }
}

impl Stream for Parts {
    type Item = Result<Part, Fault>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let item = ready!(this.poll_fallible(cx)).transpose();
        if !matches!(item, Some(Ok(_))) {
            this.over = true;
            this.settle();
        }
        match &item {
            Some(Ok(_)) => {}
            Some(Err(fault)) => this.account.failed(fault),
            None => this.account.completed(),
        }
        Poll::Ready(item)
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.settle();
    }
}

/// A prompt's events, and then `None` once: its channel is closed. Holds its guard until then.
struct Source {
    prompt: usize,
    events: mpsc::Receiver<GenerationEvent>,
    /// `None` once the prompt is over.
    guard: Option<CancelGuard>,
}

impl Source {
    fn new(prompt: usize, generation: Generation) -> Self {
        let Generation { events, guard, .. } = generation;
        Source {
            prompt,
            events,
            guard: Some(guard),
        }
    }
}

impl Stream for Source {
    type Item = (usize, Option<GenerationEvent>);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.guard.is_none() {
            return Poll::Ready(None);
        }
        let event = ready!(self.events.poll_recv(cx));
        if event.is_none() {
            self.guard = None;
        }
        Poll::Ready(Some((self.prompt, event)))
    }
}

/// A choice as far as it came.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Choice {
    /// The prompt's text, when asked for, and the output.
    pub text: String,
    /// The tokens of `text`, when asked for.
    pub tokens: Vec<TokenLogprob>,
    /// Calls of tools.
    pub calls: Vec<ToolCall>,
    /// Why it is complete, once it is.
    pub finish: Option<Finish>,
    pub output_tokens: u32,
    /// The sum of the output's log-probabilities, when asked for, and of how many tokens.
    pub output_logprobs: (f64, u32),
    /// Of the prompt, when that was asked for.
    pub embedding: Vec<f32>,
}

/// A call of a tool as far as it came.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ToolCall {
    pub id: String,
    pub name: String,
    pub arguments: String,
}

impl Choice {
    /// Takes a part of this choice in.
    fn take(&mut self, part: Part) {
        match part {
            Part::Prompt { text, tokens, .. } => {
                self.text.push_str(&text);
                self.tokens.extend(tokens);
            }
            Part::Delta { text, logprobs, .. } => {
                self.text.push_str(&text);
                for logprob in logprobs.iter().filter_map(|token| token.logprob) {
                    self.output_logprobs.0 += f64::from(logprob);
                    self.output_logprobs.1 += 1;
                }
                self.tokens.extend(logprobs);
            }
            Part::Embedding { values, .. } => self.embedding = values,
            Part::Call { part, .. } => {
                let index = part.index as usize;
                if index >= self.calls.len() {
                    // Calls come one after the other.
                    self.calls.push(ToolCall::default());
                }
                if let Some(call) = self.calls.last_mut() {
                    call.id.push_str(&part.id.unwrap_or_default());
                    call.name.push_str(&part.name.unwrap_or_default());
                    call.arguments.push_str(&part.arguments);
                }
            }
            Part::End {
                finish,
                output_tokens,
                ..
            } => {
                self.finish = Some(finish);
                self.output_tokens = output_tokens;
            }
        }
    }
}

impl Choice {
    /// The mean log-probability of its output's tokens; the least there is where it has none.
    fn merit(&self) -> f64 {
        match self.output_logprobs {
            (_, 0) => f64::NEG_INFINITY,
            (sum, tokens) => sum / f64::from(tokens),
        }
    }
}

/// Of each `made` choices in a row the `kept` best ones by the mean log-probability of their tokens, best first.
pub(super) fn best(choices: Vec<Choice>, made: usize, kept: usize) -> Vec<Choice> {
    if made == kept {
        return choices;
    }
    let mut best = Vec::with_capacity(choices.len() / made.max(1) * kept);
    let mut choices = choices.into_iter().peekable();
    while choices.peek().is_some() {
        let mut of_prompt: Vec<Choice> = choices.by_ref().take(made).collect();
        of_prompt.sort_by(|a, b| b.merit().total_cmp(&a.merit()));
        best.extend(of_prompt.into_iter().take(kept));
    }
    best
}

/// Puts a part to its choice.
pub(super) fn gather(choices: &mut [Choice], part: Part) {
    let (Part::Prompt { choice, .. }
    | Part::Delta { choice, .. }
    | Part::Embedding { choice, .. }
    | Part::Call { choice, .. }
    | Part::End { choice, .. }) = part;
    choices[choice].take(part);
}

/// A whole answer: its stream, collected.
pub(super) async fn collect(parts: &mut Parts) -> Result<Vec<Choice>, Fault> {
    let mut choices = vec![Choice::default(); parts.choices()];
    while let Some(part) = parts.next().await {
        gather(&mut choices, part?);
    }
    Ok(choices)
}

#[cfg(test)]
mod tests;
