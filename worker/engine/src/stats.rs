//! What an engine shows of itself: counters that anyone may read at any time without waiting for it.
//!
//! Written by the engine's thread alone. Whether a busy engine is stalled is judged here, from the time its current
//! step has taken and the times of those before.

use crate::scheduler::Scheduler;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

/// Step times are counted in this many classes; class `i` ends at `2^i` microseconds.
const CLASSES: usize = 32;

/// A step is not called stalled before this, however short steps usually are.
const STALL_MIN: Duration = Duration::from_secs(3);

/// A step is called stalled after this many times the 99th percentile of step times.
const STALL_FACTOR: u32 = 20;

/// The times of so many steps are kept one by one.
const RECENT_STEPS: usize = 1024;

/// The live numbers of one engine.
pub struct Stats {
    born: Instant,
    /// Microseconds from `born` to the current step's start, plus one; 0 while idle.
    step_started: AtomicU64,
    /// Microseconds of the last steps; step `i` (from 0) is at `i % RECENT_STEPS`.
    recent: [AtomicU32; RECENT_STEPS],
    step_times: [AtomicU64; CLASSES],
    steps: AtomicU64,
    running: AtomicU64,
    waiting: AtomicU64,
    waiting_tokens: AtomicU64,
    blocks_used: AtomicU64,
    blocks_total: AtomicU64,
    prefix_queries: AtomicU64,
    prefix_hits: AtomicU64,
    preemptions: AtomicU64,
    tokens_in: AtomicU64,
    tokens_out: AtomicU64,
}

/// [`Stats`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    /// Steps done.
    pub steps: u64,
    /// Sequences that run.
    pub running: u64,
    /// Sequences that wait: new, preempted, or behind a sibling that computes their prompt.
    pub waiting: u64,
    /// Tokens of sequences that wait for their first admission.
    pub waiting_tokens: u64,
    /// KV blocks in use.
    pub blocks_used: u64,
    /// KV blocks that can be used.
    pub blocks_total: u64,
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

impl Default for Stats {
    fn default() -> Self {
        Stats {
            born: Instant::now(),
            step_started: AtomicU64::new(0),
            recent: [const { AtomicU32::new(0) }; RECENT_STEPS],
            step_times: Default::default(),
            steps: AtomicU64::new(0),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            waiting_tokens: AtomicU64::new(0),
            blocks_used: AtomicU64::new(0),
            blocks_total: AtomicU64::new(0),
            prefix_queries: AtomicU64::new(0),
            prefix_hits: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            tokens_in: AtomicU64::new(0),
            tokens_out: AtomicU64::new(0),
        }
    }
}

impl Stats {
    /// All numbers. Each is right by itself; together they may straddle a step's end.
    pub fn snapshot(&self) -> StatsSnapshot {
        let read = |number: &AtomicU64| number.load(Relaxed);
        StatsSnapshot {
            steps: read(&self.steps),
            running: read(&self.running),
            waiting: read(&self.waiting),
            waiting_tokens: read(&self.waiting_tokens),
            blocks_used: read(&self.blocks_used),
            blocks_total: read(&self.blocks_total),
            prefix_queries: read(&self.prefix_queries),
            prefix_hits: read(&self.prefix_hits),
            preemptions: read(&self.preemptions),
            tokens_in: read(&self.tokens_in),
            tokens_out: read(&self.tokens_out),
        }
    }

    /// How long the current step has taken; `None` while the engine is idle.
    pub fn current_step(&self) -> Option<Duration> {
        let started = self.step_started.load(Relaxed).checked_sub(1)?;
        Some(
            self.born
                .elapsed()
                .saturating_sub(Duration::from_micros(started)),
        )
    }

    /// The time below which `share` (0 to 1) of all steps stayed, rounded up to a power of two microseconds. Zero
    /// before the first step.
    pub fn step_quantile(&self, share: f64) -> Duration {
        let counts: Vec<u64> = self
            .step_times
            .iter()
            .map(|count| count.load(Relaxed))
            .collect();
        let wanted = (counts.iter().sum::<u64>() as f64 * share).ceil() as u64;
        let mut sum = 0;
        let reached = counts.iter().position(|count| {
            sum += count;
            sum >= wanted
        });
        match reached {
            Some(class) if wanted > 0 => Duration::from_micros(1 << class),
            _ => Duration::ZERO,
        }
    }

    /// Microseconds of the steps after the first `told` ones, in order, of more than 1024 only the last; and how many
    /// steps are told with them.
    pub fn step_times_us(&self, told: u64) -> (Vec<u32>, u64) {
        let steps = self.steps.load(Acquire);
        let first = told.max(steps.saturating_sub(RECENT_STEPS as u64));
        let time = |step| self.recent[step as usize % RECENT_STEPS].load(Relaxed);
        ((first..steps).map(time).collect(), steps)
    }

    /// Whether the current step takes so long that something must hang. An idle engine is never stalled.
    pub fn is_stalled(&self) -> bool {
        self.is_stalled_after(self.current_step())
    }

    fn is_stalled_after(&self, current: Option<Duration>) -> bool {
        let limit = STALL_MIN.max(self.step_quantile(0.99) * STALL_FACTOR);
        current.is_some_and(|taken| taken > limit)
    }

    /// A turn of the loop begins.
    pub(crate) fn begin_step(&self) {
        self.step_started
            .store(self.born.elapsed().as_micros() as u64 + 1, Relaxed);
    }

    /// A step is through.
    pub(crate) fn end_step(&self) {
        let taken = self.current_step().unwrap_or_default().as_micros() as u64;
        let class = (u64::BITS - taken.saturating_sub(1).leading_zeros()) as usize;
        self.step_times[class.min(CLASSES - 1)].fetch_add(1, Relaxed);
        let step = self.steps.load(Relaxed);
        let kept = u32::try_from(taken).unwrap_or(u32::MAX);
        self.recent[step as usize % RECENT_STEPS].store(kept, Relaxed);
        self.steps.store(step + 1, Release);
    }

    /// Nothing is to do.
    pub(crate) fn idle(&self) {
        self.step_started.store(0, Relaxed);
    }

    /// Copies the scheduler's numbers.
    pub(crate) fn publish(&self, scheduler: &Scheduler) {
        let counters = scheduler.counters();
        let blocks = scheduler.blocks();
        for (number, value) in [
            (&self.running, scheduler.running_count() as u64),
            (&self.waiting, scheduler.waiting_count() as u64),
            (&self.waiting_tokens, scheduler.backlog().tokens),
            (&self.blocks_used, blocks.used_count() as u64),
            (&self.blocks_total, blocks.total() as u64),
            (&self.prefix_queries, counters.prefix_queries),
            (&self.prefix_hits, counters.prefix_hits),
            (&self.preemptions, counters.preemptions),
            (&self.tokens_in, counters.tokens_in),
            (&self.tokens_out, counters.tokens_out),
        ] {
            number.store(value, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_engine_is_stalled_only_beyond_both_limits() {
        let stats = Stats::default();
        assert_eq!(stats.current_step(), None);
        assert!(!stats.is_stalled());
        stats.begin_step();
        assert!(stats.current_step().is_some_and(|taken| taken < STALL_MIN));
        assert!(!stats.is_stalled_after(Some(STALL_MIN)));
        assert!(stats.is_stalled_after(Some(STALL_MIN + Duration::from_micros(1))));
        // Steps of about a second: 20 of them may pass.
        stats.step_times[20].fetch_add(100, Relaxed);
        assert!(!stats.is_stalled_after(Some(Duration::from_secs(20))));
        assert!(stats.is_stalled_after(Some(Duration::from_secs(22))));
    }

    #[test]
    fn quantiles_round_up_to_a_class() {
        let stats = Stats::default();
        assert_eq!(stats.step_quantile(0.99), Duration::ZERO);
        stats.step_times[3].fetch_add(99, Relaxed);
        stats.step_times[10].fetch_add(1, Relaxed);
        assert_eq!(stats.step_quantile(0.99), Duration::from_micros(8));
        assert_eq!(stats.step_quantile(1.0), Duration::from_micros(1024));
    }

    #[test]
    fn the_last_steps_are_told_one_by_one() {
        let stats = Stats::default();
        assert_eq!(stats.step_times_us(0), (vec![], 0));
        for _ in 0..RECENT_STEPS as u64 + 7 {
            stats.begin_step();
            stats.end_step();
        }
        let steps = stats.snapshot().steps;
        assert_eq!(stats.step_times_us(steps - 3).0.len(), 3);
        assert_eq!(stats.step_times_us(0).0.len(), RECENT_STEPS);
        assert_eq!(stats.step_times_us(steps), (vec![], steps));
    }
}
