//! Which tokens of which sequences run in the next step.
//!
//! One budget of tokens per step, no phases: each running sequence gets as many tokens as bring it up to date, whether
//! they are its prompt's, a recomputation's or the one token of a decode. When blocks run out, the youngest running
//! sequence is put back to the head of the queue and recomputed later (its outputs are kept). Sees counters and block
//! ids only; `now` is an argument; no I/O. Memory, logits and threads are elsewhere.

mod config;
mod limits;
mod planning;
mod sequence;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use config::SchedulerConfig;
pub use limits::{Backlog, CANDIDATES_MAX, Full, LOGPROBS_MAX, check_backlog, check_request};

use crate::kv::blocks::BlockManager;
use crate::kv::prefix::PrefixHasher;
use crate::mask::MaskSlot;
use crate::plan::StepPlan;
use crate::request::{Candidate, EndReason, Event, Request, RequestKey};
use crate::runner::{PoolRows, SampleRow, ScoreRows, StepError, StepOutput};
use sequence::{Advance, Sequence};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Numbers for the engine's statistics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Sequences put back to be recomputed.
    pub preemptions: u64,
    /// Prompt tokens of admitted sequences.
    pub tokens_in: u64,
    /// Output tokens.
    pub tokens_out: u64,
}

/// The step scheduler. Each step: [`Scheduler::schedule`], run [`Scheduler::plan`] with [`Scheduler::rows`], then
/// [`Scheduler::complete`]. Requests enter and are cancelled between steps.
pub struct Scheduler {
    config: SchedulerConfig,
    hasher: PrefixHasher,
    blocks: BlockManager,
    /// In order of admission.
    running: Vec<Sequence>,
    /// In order of arrival, preempted ones in front. They hold no blocks.
    waiting: VecDeque<Sequence>,
    /// Wait for their leader's prompt. They hold no blocks.
    parked: Vec<Sequence>,
    plan: StepPlan,
    planned: Vec<Planned>,
    /// Block lists of spans that were, for spans to come.
    lists: Vec<Vec<u32>>,
    counters: Counters,
}

/// What a span of the plan is to its sequence.
struct Planned {
    /// Index in `running`, stable until the step is complete.
    running: usize,
    len: usize,
    sample: bool,
    /// Tokens to score, as a range of the sequence's tokens.
    targets: Range<usize>,
    /// Its hidden states are summed.
    pool: bool,
}

/// The rows of a plan to sample from, to score and to sum.
pub type Rows<'a> = (Vec<SampleRow<'a>>, Vec<ScoreRows<'a>>, Vec<PoolRows<'a>>);

impl Scheduler {
    /// A scheduler with all blocks free.
    pub fn new(config: SchedulerConfig) -> Self {
        Scheduler {
            hasher: PrefixHasher::new(&config.prefix_salt),
            blocks: BlockManager::new(config.geometry.blocks),
            running: Vec::new(),
            waiting: VecDeque::new(),
            parked: Vec::new(),
            plan: StepPlan {
                generation: config.generation,
                ..StepPlan::default()
            },
            planned: Vec::new(),
            lists: Vec::new(),
            counters: Counters::default(),
            config,
        }
    }

    /// Takes a request. One that can never run here, or has nothing left to do, ends at once.
    pub fn submit(&mut self, request: Request, events: &mut Vec<Event>) {
        let key = request.key;
        if let Err(error) = check_request(&self.config, &request) {
            let ended = |candidate: Candidate| Event::Ended {
                key,
                candidate: candidate.index,
                reason: EndReason::Error(error.clone()),
                cached_tokens: 0,
            };
            events.extend(request.candidates.into_iter().map(ended));
            return;
        }
        let (complete, goes_on): (Vec<_>, Vec<_>) =
            Sequence::of(request, self.config.geometry.context_max)
                .into_iter()
                .partition(Sequence::is_complete);
        events.extend(
            complete
                .iter()
                .map(|sequence| sequence.ended(EndReason::Length)),
        );
        let mut goes_on = goes_on.into_iter();
        if let Some(mut leader) = goes_on.next() {
            leader.leads = true;
            self.waiting.push_back(leader);
        }
        self.parked.extend(goes_on);
    }

    /// Ends one candidate of a request, or all of them; their blocks are free at once. Unknown ones are ignored: they
    /// may just have ended.
    pub fn cancel(&mut self, key: RequestKey, candidate: Option<u32>, events: &mut Vec<Event>) {
        let mut led = false;
        let cancelled = |sequence: &mut Sequence| {
            let meant = sequence.shared.key == key
                && candidate.is_none_or(|index| index == sequence.candidate);
            led |= meant && sequence.leads;
            meant.then_some(EndReason::Cancelled)
        };
        self.end_where(cancelled, events);
        let heir = |sequence: &Sequence| sequence.shared.key == key;
        if led && let Some(at) = self.parked.iter().position(heir) {
            let mut leader = self.parked.remove(at);
            leader.leads = true;
            leader.scores = leader.shared.first_scores();
            self.waiting.push_front(leader);
        }
    }

    /// Makes the next step's plan. False when there is nothing to run.
    pub fn schedule(&mut self, now: Instant, events: &mut Vec<Event>) -> bool {
        let expired = |sequence: &Sequence| {
            sequence
                .shared
                .deadline
                .is_some_and(|deadline| deadline <= now)
        };
        self.end_where(
            |sequence| expired(sequence).then_some(EndReason::Deadline),
            events,
        );
        self.plan.tokens.clear();
        let lists = self.plan.spans.drain(..).map(|span| span.blocks);
        self.lists.extend(lists);
        let preempted = self.schedule_running();
        if !preempted {
            self.schedule_waiting();
        }
        self.plan.step += u64::from(!self.planned.is_empty());
        !self.planned.is_empty()
    }

    /// The plan made by the last [`Scheduler::schedule`].
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }

    /// The rows of the plan's logits to sample from and to score, and of its hidden states to sum.
    pub fn rows(&self) -> Rows<'_> {
        let (mut samples, mut scores, mut pools) = (Vec::new(), Vec::new(), Vec::new());
        for (span, planned) in self.planned.iter().enumerate() {
            let sequence = &self.running[planned.running];
            if planned.sample {
                samples.push(sequence.sample_row(span));
            }
            if !planned.targets.is_empty() {
                let top = sequence.shared.prompt_logprobs.unwrap_or(0);
                scores.push(ScoreRows {
                    span,
                    targets: &sequence.tokens[planned.targets.clone()],
                    top,
                });
            }
            if planned.pool {
                let sum = sequence.pool.as_deref().unwrap_or_default();
                pools.push(PoolRows { span, sum });
            }
        }
        (samples, scores, pools)
    }

    /// The masks that the planned step will need.
    pub fn masks(&self) -> impl Iterator<Item = &Arc<MaskSlot>> {
        let sampled = self.planned.iter().filter(|planned| planned.sample);
        sampled.filter_map(|planned| self.running[planned.running].mask.as_ref())
    }

    /// Takes what the planned step gave: tokens and scores become events, full blocks get their names, sequences that
    /// are over give their blocks back.
    ///
    /// # Errors
    /// [`StepError::Broken`] when the output does not answer the rows asked for.
    pub fn complete(
        &mut self,
        output: &mut StepOutput,
        events: &mut Vec<Event>,
    ) -> Result<(), StepError> {
        let sample_count = self.planned.iter().filter(|planned| planned.sample).count();
        let score_count = self
            .planned
            .iter()
            .filter(|planned| !planned.targets.is_empty())
            .count();
        let pool_count = self.planned.iter().filter(|planned| planned.pool).count();
        let StepOutput {
            samples,
            scores,
            pools,
        } = output;
        let got = (samples.len(), scores.len(), pools.len());
        let asked = (sample_count, score_count, pool_count);
        if got != asked {
            return Err(StepError::Broken(format!(
                "a step gave samples, scores and sums of hidden states {got:?} where {asked:?} were asked for"
            )));
        }
        let (mut samples, mut scores) = (samples.drain(..), scores.drain(..));
        let mut pools = pools.drain(..);
        for planned in self.planned.drain(..) {
            let sequence = &mut self.running[planned.running];
            sequence.computed += planned.len;
            let computed = &sequence.tokens[..sequence.computed];
            sequence
                .table
                .commit(&mut self.blocks, &self.hasher, computed);
            sequence.table.slide(
                &mut self.blocks,
                sequence.computed,
                self.config.geometry.window,
            );
            let scored = if planned.targets.is_empty() {
                None
            } else {
                scores.next()
            };
            let sampled = if planned.sample { samples.next() } else { None };
            let pooled = if planned.pool { pools.next() } else { None };
            let outputs = sequence.outputs().len();
            sequence.advance(
                Advance {
                    scored,
                    pooled,
                    sampled,
                },
                events,
            );
            self.counters.tokens_out += (sequence.outputs().len() - outputs) as u64;
        }
        self.unpark();
        self.end_where(|sequence| sequence.ended.take(), events);
        Ok(())
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.parked.is_empty()
    }

    /// Sequences that run.
    pub fn running_count(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait, preempted ones and those behind their leader included.
    pub fn waiting_count(&self) -> usize {
        self.waiting.len() + self.parked.len()
    }

    /// What waits for its first admission.
    pub fn backlog(&self) -> Backlog {
        let fresh = self
            .waiting
            .iter()
            .filter(|sequence| sequence.cached.is_none());
        let leaders = fresh.map(|sequence| Backlog {
            tokens: sequence.tokens.len() as u64,
            sequences: 1,
        });
        let siblings = self.parked.iter().map(|sequence| Backlog {
            tokens: sequence.outputs().len() as u64,
            sequences: 1,
        });
        leaders
            .chain(siblings)
            .fold(Backlog::default(), std::ops::Add::add)
    }

    /// The block manager's counts.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Numbers since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Sends siblings whose leader has computed the prompt, or is over, to the head of the queue.
    fn unpark(&mut self) {
        for leader in self.running.iter_mut().filter(|leader| leader.leads) {
            if leader.computed < leader.prompt_len && leader.ended.is_none() {
                continue;
            }
            leader.leads = false;
            let key = leader.shared.key;
            let siblings: Vec<Sequence> = self
                .parked
                .extract_if(.., |sequence| sequence.shared.key == key)
                .collect();
            siblings
                .into_iter()
                .rev()
                .for_each(|sequence| self.waiting.push_front(sequence));
        }
    }

    /// Ends the sequences for which `reason` gives one, wherever they are, and takes their blocks.
    fn end_where(
        &mut self,
        mut reason: impl FnMut(&mut Sequence) -> Option<EndReason>,
        events: &mut Vec<Event>,
    ) {
        debug_assert!(self.planned.is_empty(), "sequences end between steps");
        let blocks = &mut self.blocks;
        let mut goes_on = |sequence: &mut Sequence| {
            let Some(reason) = reason(sequence) else {
                return true;
            };
            sequence.table.clear(blocks);
            events.push(sequence.ended(reason));
            false
        };
        self.running.retain_mut(&mut goes_on);
        self.waiting.retain_mut(&mut goes_on);
        self.parked.retain_mut(&mut goes_on);
    }
}
