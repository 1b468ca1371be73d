//! Which tokens of which sequences run in the next step.
//!
//! One budget of tokens per step, no phases: each running sequence gets as many tokens as bring it up to date, whether
//! they are its prompt's, a recomputation's or the one token of a decode. When blocks run out, the youngest running
//! sequence is put back to the head of the queue and recomputed later (its outputs are kept). Sees counters and block
//! ids only; `now` is an argument; no I/O. Memory, logits and threads are elsewhere.

mod limits;
mod sequence;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use limits::{Backlog, Full, LOGPROBS_MAX, check_backlog, check_request};

use crate::kv::blocks::BlockManager;
use crate::kv::prefix::PrefixHasher;
use crate::plan::{Logits, Span, StepPlan};
use crate::request::{EndReason, Event, Request, RequestKey};
use crate::runner::{Geometry, SampleRow, ScoreRows, StepError, StepOutput};
use limits::blocks_most;
use sequence::Sequence;
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

/// A sequence preempted this often is spared as long as a less often preempted one can be taken instead.
const PREEMPTIONS_MAX: u32 = 3;

/// One block in this many stays free when a sequence is admitted beside others, so that the running ones can grow
/// without preempting it at once.
const WATERMARK_SHARE: usize = 100;

/// Most tokens of one span whose rows of logits are all wanted: a row is as wide as the vocabulary.
const SCORE_TOKENS_MAX: usize = 64;

/// What a scheduler is made for.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Sizes of the model and its memory.
    pub geometry: Geometry,
    /// Generation of the shard group, put on every plan.
    pub generation: u64,
    /// Key of the prefix cache: see [`PrefixHasher::new`].
    pub prefix_salt: Vec<u8>,
    /// Most tokens of one sequence in one step.
    pub chunk_tokens_max: u32,
}

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
}

impl Scheduler {
    /// A scheduler with all blocks free.
    pub fn new(config: SchedulerConfig) -> Self {
        let geometry = &config.geometry;
        let config = SchedulerConfig {
            chunk_tokens_max: config.chunk_tokens_max.clamp(1, geometry.step_tokens_max.max(1)),
            // Each running sequence gets a token in each step.
            geometry: Geometry { spans_max: geometry.spans_max.clamp(1, geometry.step_tokens_max.max(1)), ..*geometry },
            ..config
        };
        Scheduler {
            hasher: PrefixHasher::new(&config.prefix_salt),
            blocks: BlockManager::new(config.geometry.blocks),
            running: Vec::new(),
            waiting: VecDeque::new(),
            parked: Vec::new(),
            plan: StepPlan { generation: config.generation, ..StepPlan::default() },
            planned: Vec::new(),
            counters: Counters::default(),
            config,
        }
    }

    /// Takes a request. One that can never run here, or has nothing left to do, ends at once.
    pub fn submit(&mut self, request: Request, events: &mut Vec<Event>) {
        let refusal = check_request(&self.config.geometry, self.config.chunk_tokens_max, &request).err();
        let mut sequences = Sequence::of(request, self.config.geometry.context_max);
        for sequence in &mut sequences {
            sequence.ended = refusal.clone().map(EndReason::Error);
            sequence.end_if_complete();
        }
        let mut goes_on = retire(sequences, events).into_iter();
        let Some(mut leader) = goes_on.next() else { return };
        self.parked.extend(goes_on);
        leader.leads = true;
        self.waiting.push_back(leader);
    }

    /// Ends all candidates of a request; its blocks are free at once. Unknown keys are ignored: the request may just
    /// have ended.
    pub fn cancel(&mut self, key: RequestKey, events: &mut Vec<Event>) {
        self.end_where(|sequence| (sequence.shared.key == key).then_some(EndReason::Cancelled), events);
    }

    /// Makes the next step's plan. False when there is nothing to run.
    pub fn schedule(&mut self, now: Instant, events: &mut Vec<Event>) -> bool {
        let expired = |sequence: &Sequence| sequence.shared.deadline.is_some_and(|deadline| deadline <= now);
        self.end_where(|sequence| expired(sequence).then_some(EndReason::Deadline), events);
        self.plan.tokens.clear();
        self.plan.spans.clear();
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

    /// The rows of the plan's logits to sample from and to score.
    pub fn rows(&self) -> (Vec<SampleRow<'_>>, Vec<ScoreRows<'_>>) {
        let (mut samples, mut scores) = (Vec::new(), Vec::new());
        for (span, planned) in self.planned.iter().enumerate() {
            let sequence = &self.running[planned.running];
            if planned.sample {
                samples.push(sequence.sample_row(span));
            }
            if !planned.targets.is_empty() {
                let top = sequence.shared.prompt_logprobs.unwrap_or(0);
                scores.push(ScoreRows { span, targets: &sequence.tokens[planned.targets.clone()], top });
            }
        }
        (samples, scores)
    }

    /// Takes what the planned step gave: tokens and scores become events, full blocks get their names, sequences that
    /// are over give their blocks back.
    ///
    /// # Errors
    /// [`StepError::Broken`] when the output does not answer the rows asked for.
    pub fn complete(&mut self, output: StepOutput, events: &mut Vec<Event>) -> Result<(), StepError> {
        let sample_count = self.planned.iter().filter(|planned| planned.sample).count();
        let score_count = self.planned.iter().filter(|planned| !planned.targets.is_empty()).count();
        if (output.samples.len(), output.scores.len()) != (sample_count, score_count) {
            return Err(StepError::Broken(format!(
                "a step gave {} samples and {} scores where {sample_count} and {score_count} were asked for",
                output.samples.len(),
                output.scores.len()
            )));
        }
        let (mut samples, mut scores) = (output.samples.into_iter(), output.scores.into_iter());
        for planned in std::mem::take(&mut self.planned) {
            let sequence = &mut self.running[planned.running];
            sequence.computed += planned.len;
            let computed = &sequence.tokens[..sequence.computed];
            sequence.table.commit(&mut self.blocks, &self.hasher, computed);
            sequence.table.slide(&mut self.blocks, sequence.computed, self.config.geometry.window);
            if let Some(scored) = scores.next_if(!planned.targets.is_empty()) {
                sequence.take_scores(scored, events);
            }
            sequence.report_scores(events);
            if let Some(sampled) = samples.next_if(planned.sample)
                && sequence.ended.is_none()
            {
                let outputs = sequence.outputs().len();
                sequence.take_sample(sampled, events);
                self.counters.tokens_out += (sequence.outputs().len() - outputs) as u64;
            }
            sequence.end_if_complete();
        }
        self.unpark(events);
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
        let fresh = self.waiting.iter().filter(|sequence| sequence.cached.is_none());
        let leaders = fresh.map(|sequence| Backlog { tokens: sequence.tokens.len() as u64, sequences: 1 });
        let siblings =
            self.parked.iter().map(|sequence| Backlog { tokens: sequence.outputs().len() as u64, sequences: 1 });
        leaders.chain(siblings).fold(Backlog::default(), std::ops::Add::add)
    }

    /// The block manager's counts.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Numbers since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Gives each running sequence its tokens, and says whether one was preempted for lack of blocks.
    ///
    /// All sequences after the current one are sure of a token: no prompt can starve a decode behind it.
    fn schedule_running(&mut self) -> bool {
        let mut budget = self.config.geometry.step_tokens_max as usize;
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let promised = self.running.len() - at - 1;
            let len = self.chunk_of(&self.running[at], budget - promised);
            let sequence = &mut self.running[at];
            if sequence.table.grow(&mut self.blocks, sequence.computed + len) {
                self.push_span(at, len);
                budget -= len;
                at += 1;
            } else {
                // The victim may be the current sequence itself: then the next one has moved to its place.
                self.preempt(self.victim_from(at));
                preempted = true;
            }
        }
        preempted
    }

    /// Admits sequences from the queue's head while budget, places and blocks last.
    fn schedule_waiting(&mut self) {
        let spent = self.plan.tokens.len();
        let mut budget = self.config.geometry.step_tokens_max as usize - spent;
        while budget > 0 && self.running.len() < self.config.geometry.spans_max as usize {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            let Some(len) = self.admit(&mut sequence, budget) else {
                self.waiting.push_front(sequence);
                return;
            };
            self.running.push(sequence);
            self.push_span(self.running.len() - 1, len);
            budget -= len;
        }
    }

    /// Gives a waiting sequence the blocks of its cached prefix and of its first chunk, and tells the chunk's length.
    /// `None`, and nothing changed, when the blocks that it needs to catch up are not free.
    fn admit(&mut self, sequence: &mut Sequence, budget: usize) -> Option<usize> {
        let window = self.config.geometry.window;
        let hit = match sequence.scores {
            // Cached tokens have no logits to score.
            Some(_) => Default::default(),
            None => sequence.table.lookup(&self.blocks, &self.hasher, &sequence.tokens, window),
        };
        let most = blocks_most(sequence.tokens.len(), self.config.chunk_tokens_max as usize, window);
        let watermark = if self.running.is_empty() { 0 } else { self.blocks.total().div_ceil(WATERMARK_SHARE) };
        if most.saturating_sub(hit.held()) + hit.free + watermark > self.blocks.free_count() {
            return None;
        }
        let cached = hit.tokens();
        sequence.table.adopt(&mut self.blocks, hit);
        sequence.computed = cached;
        let len = self.chunk_of(sequence, budget);
        if !sequence.table.grow(&mut self.blocks, cached + len) {
            sequence.table.clear(&mut self.blocks);
            sequence.computed = 0;
            return None;
        }
        if sequence.cached.is_none() {
            let cached = cached.min(sequence.prompt_len);
            sequence.cached = Some(cached as u32);
            self.counters.prefix_queries += sequence.prompt_len as u64;
            self.counters.prefix_hits += cached as u64;
            self.counters.tokens_in += sequence.prompt_len as u64;
        }
        Some(len)
    }

    fn chunk_of(&self, sequence: &Sequence, budget: usize) -> usize {
        let scored = !sequence.targets_of(1).is_empty();
        let most = if scored { SCORE_TOKENS_MAX } else { usize::MAX };
        sequence.rest().min(self.config.chunk_tokens_max as usize).min(budget).min(most)
    }

    fn push_span(&mut self, running: usize, len: usize) {
        let sequence = &self.running[running];
        let sample = sequence.samples_after(len);
        let targets = sequence.targets_of(len);
        let logits = match (targets.is_empty(), sample) {
            (false, _) => Logits::All,
            (true, true) => Logits::Last,
            (true, false) => Logits::None,
        };
        self.plan.tokens.extend(&sequence.tokens[sequence.computed..sequence.computed + len]);
        self.plan.spans.push(Span {
            position: sequence.computed as u32,
            len: len as u32,
            logits,
            blocks: sequence.table.blocks().to_vec(),
        });
        self.planned.push(Planned { running, len, sample, targets });
    }

    /// Who gives way, among the running sequences not yet planned: the youngest, but one preempted too often only
    /// after all others. So the oldest of those always gets on, and nobody is recomputed for ever.
    fn victim_from(&self, at: usize) -> usize {
        let spared = |sequence: &Sequence| sequence.preemptions >= PREEMPTIONS_MAX;
        let youngest = self.running[at..].iter().rposition(|sequence| !spared(sequence));
        youngest.map_or(self.running.len() - 1, |offset| at + offset)
    }

    fn preempt(&mut self, victim: usize) {
        let mut sequence = self.running.remove(victim);
        sequence.table.clear(&mut self.blocks);
        sequence.restart();
        self.counters.preemptions += 1;
        self.waiting.push_front(sequence);
    }

    /// Sends siblings whose leader has computed the prompt, or is over, to the head of the queue.
    fn unpark(&mut self, events: &mut Vec<Event>) {
        for leader in self.running.iter_mut().filter(|leader| leader.leads) {
            if leader.computed < leader.prompt_len && leader.ended.is_none() {
                continue;
            }
            leader.leads = false;
            let key = leader.shared.key;
            let siblings: Vec<Sequence> = self.parked.extract_if(.., |sequence| sequence.shared.key == key).collect();
            for sequence in retire(siblings, events).into_iter().rev() {
                self.waiting.push_front(sequence);
            }
        }
    }

    /// Ends the sequences for which `reason` gives one, wherever they are, and takes their blocks.
    fn end_where(&mut self, mut reason: impl FnMut(&mut Sequence) -> Option<EndReason>, events: &mut Vec<Event>) {
        debug_assert!(self.planned.is_empty(), "sequences end between steps");
        let blocks = &mut self.blocks;
        let mut goes_on = |sequence: &mut Sequence| {
            let Some(reason) = reason(sequence) else { return true };
            sequence.table.clear(blocks);
            events.push(sequence.ended(reason));
            false
        };
        self.running.retain_mut(&mut goes_on);
        self.waiting.retain_mut(&mut goes_on);
        self.parked.retain_mut(&mut goes_on);
    }
}
