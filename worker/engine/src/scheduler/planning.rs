//! How a step's budget of tokens and the free blocks are dealt out: running sequences first, then the queue's head.

use super::sequence::Sequence;
use super::{Planned, Scheduler};
use crate::kv::table::Hit;
use crate::plan::{Logits, Span};

/// A sequence preempted this often is spared as long as a less often preempted one can be taken instead.
pub(super) const PREEMPTIONS_MAX: u32 = 3;

/// One block in this many stays free when a sequence is admitted beside others, so that the running ones can grow
/// without preempting it at once.
const WATERMARK_SHARE: usize = 100;

impl Scheduler {
    /// Gives each running sequence its tokens, and says whether one was preempted for lack of blocks.
    ///
    /// All sequences after the current one are sure of a token: no prompt can starve a decode behind it.
    pub(super) fn schedule_running(&mut self) -> bool {
        let mut budget = self.config.geometry.step_tokens_max as usize;
        let mut preempted = false;
        let mut at = 0;
        while at < self.running.len() {
            let promised = self.running.len() - at - 1;
            let len = self.chunk_of(&self.running[at], budget - promised);
            let sequence = &mut self.running[at];
            if sequence
                .table
                .grow(&mut self.blocks, sequence.computed + len)
            {
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
    pub(super) fn schedule_waiting(&mut self) {
        let spent = self.plan.tokens.len();
        let mut budget = self.config.geometry.step_tokens_max as usize - spent;
        while budget > 0 && self.running.len() < self.config.geometry.spans_max as usize {
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
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
        // Cached tokens have neither logits to score nor hidden states to sum.
        let hit = if sequence.scores.is_some() || sequence.pool.is_some() {
            Hit::default()
        } else {
            sequence
                .table
                .lookup(&self.blocks, &self.hasher, &sequence.tokens, window)
        };
        let wanted = self
            .config
            .blocks_most(sequence.tokens.len())
            .saturating_sub(hit.held());
        let watermark = if self.running.is_empty() {
            0
        } else {
            self.blocks.total().div_ceil(WATERMARK_SHARE)
        };
        if wanted + hit.free + self.promised_blocks() + watermark > self.blocks.free_count() {
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

    /// Blocks that the running sequences still need to catch up.
    fn promised_blocks(&self) -> usize {
        let needs = |sequence: &Sequence| self.config.blocks_most(sequence.tokens.len());
        self.running
            .iter()
            .map(|sequence| needs(sequence).saturating_sub(sequence.table.held()))
            .sum()
    }

    fn chunk_of(&self, sequence: &Sequence, budget: usize) -> usize {
        sequence
            .rest()
            .min(self.config.chunk_tokens_max as usize)
            .min(budget)
    }

    fn push_span(&mut self, running: usize, len: usize) {
        let sequence = &self.running[running];
        let sample = sequence.samples_after(len);
        let targets = sequence.targets_of(len);
        let pool = sequence.pool.is_some();
        let logits = match (targets.is_empty(), sample) {
            _ if pool => Logits::Hidden,
            (false, _) => Logits::All,
            (true, true) => Logits::Last,
            (true, false) => Logits::None,
        };
        self.plan
            .tokens
            .extend(&sequence.tokens[sequence.computed..sequence.computed + len]);
        let mut blocks = self.lists.pop().unwrap_or_default();
        blocks.clear();
        blocks.extend_from_slice(sequence.table.blocks());
        self.plan.spans.push(Span {
            position: sequence.computed as u32,
            len: len as u32,
            logits,
            blocks,
        });
        self.planned.push(Planned {
            running,
            len,
            sample,
            targets,
            pool,
        });
    }

    /// Who gives way, among the running sequences not yet planned: the youngest, but one preempted too often only
    /// after all others. So the oldest of those always gets on, and nobody is recomputed for ever.
    pub(super) fn victim_from(&self, at: usize) -> usize {
        let spared = |sequence: &Sequence| sequence.preemptions >= PREEMPTIONS_MAX;
        let youngest = self.running[at..]
            .iter()
            .rposition(|sequence| !spared(sequence));
        youngest.map_or(self.running.len() - 1, |offset| at + offset)
    }

    fn preempt(&mut self, victim: usize) {
        let mut sequence = self.running.remove(victim);
        sequence.table.clear(&mut self.blocks);
        sequence.restart();
        self.counters.preemptions += 1;
        self.waiting.push_front(sequence);
    }
}
