//! An answer as one stream of parts, whoever reads it: SSE passes the parts on, a whole answer collects them.
//!
//! Owns the merging of the prompts' generations, the numbering of choices (prompt by prompt, and in each by candidate)
//! and the promise that every choice ends exactly once. Dropping it cancels what is not over.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use common::request::{End, TokenLogprob};
use futures::stream::{self, BoxStream, SelectAll, Stream, StreamExt};

use super::error::Fault;
use crate::api::{Generation, GenerationEvent};

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
}

impl Finish {
    /// The word clients know.
    pub fn word(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
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
    /// `None` says that a prompt's channel is closed.
    events: SelectAll<BoxStream<'static, (usize, Option<GenerationEvent>)>>,
    /// By prompt: its first choice; one more stands for the end.
    first: Vec<usize>,
    /// By choice.
    ended: Vec<bool>,
    /// By prompt.
    pub prompt_tokens: Vec<u32>,
    pub usage: Usage,
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
        let usage = Usage {
            prompt_tokens: prompt_tokens.iter().copied().map(u64::from).sum(),
            completion_tokens: 0,
        };
        Parts {
            ended: vec![false; first.last().copied().unwrap_or(0)],
            first,
            events: generations
                .into_iter()
                .enumerate()
                .map(|(i, generation)| events(i, generation))
                .collect(),
            prompt_tokens,
            usage,
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

    fn take(&mut self, prompt: usize, event: Option<GenerationEvent>) -> Result<(), Fault> {
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
            Some(GenerationEvent::Embedding(_)) => {}
            Some(GenerationEvent::Delta(delta)) => {
                let choice = self.open_choice(choices, delta.candidate)?;
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
                    End::Stop => Finish::Stop,
                    End::Length => Finish::Length,
                    End::Deadline if self.partial_on_deadline => Finish::Length,
                    End::Deadline => return Err(Fault::deadline(self.deadline.allowed_ms)),
                    End::Cancelled => return Err(Fault::cancelled()),
                    End::Error(failure) => return Err(failure.into()),
                };
                self.ended[choice] = true;
                self.usage.completion_tokens += u64::from(output_tokens);
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
            // Cancels what is left, if anything is.
            this.events.clear();
        }
        Poll::Ready(item)
    }
}

/// A generation's events and then `None`; holds its guard until then.
fn events(
    prompt: usize,
    generation: Generation,
) -> BoxStream<'static, (usize, Option<GenerationEvent>)> {
    let Generation {
        mut events, guard, ..
    } = generation;
    let events = stream::poll_fn(move |cx| {
        let _held = &guard;
        events.poll_recv(cx)
    });
    let closed = stream::once(std::future::ready(None));
    events
        .map(Some)
        .chain(closed)
        .map(move |event| (prompt, event))
        .boxed()
}

/// A choice, complete.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    /// The prompt's text, when asked for, and the output.
    pub text: String,
    /// The tokens of `text`, when asked for.
    pub tokens: Vec<TokenLogprob>,
    pub finish: Finish,
    pub output_tokens: u32,
}

/// A whole answer: its stream, collected.
pub(super) async fn collect(parts: &mut Parts) -> Result<Vec<Choice>, Fault> {
    let empty = Choice {
        text: String::new(),
        tokens: Vec::new(),
        finish: Finish::Stop,
        output_tokens: 0,
    };
    let mut choices = vec![empty; parts.choices()];
    while let Some(part) = parts.next().await {
        match part? {
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
                choices[choice].text.push_str(&text);
                choices[choice].tokens.extend(tokens);
            }
            Part::End {
                choice,
                finish,
                output_tokens,
            } => {
                choices[choice].finish = finish;
                choices[choice].output_tokens = output_tokens;
            }
        }
    }
    Ok(choices)
}

#[cfg(test)]
mod tests;
