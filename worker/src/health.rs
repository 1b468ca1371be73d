//! A leader's counters as the wire carries them.
//!
//! Owns what was reported last, since step times are told once. What the numbers mean is the engine's part.

use std::sync::Arc;

use common::wire::message::Health;
use engine::stats::{Stats, StatsSnapshot};

use crate::open::Running;

/// Step times told in one report, at most: more steps than that in a second say nothing new.
const STEP_TIMES_MAX: u64 = 512;

/// Reads an engine's counters.
pub struct HealthReporter {
    stats: Option<Arc<Stats>>,
    /// Steps told so far, by class of time.
    told: Vec<u64>,
}

impl HealthReporter {
    /// Reports on a shard; ranks above 0 have nothing to tell, since rank 0 waits for them in every step.
    pub fn new(running: &Running) -> HealthReporter {
        let stats = match running {
            Running::Leader(leader) => Some(leader.engine.stats()),
            Running::Follower(_) => None,
        };
        HealthReporter {
            stats,
            told: Vec::new(),
        }
    }

    /// The counters now.
    pub fn take(&mut self) -> Option<Health> {
        let stats = self.stats.clone()?;
        let counts: Vec<(u64, u64)> = stats.step_histogram().collect();
        let step_us = step_times(&counts, &self.told, stats.snapshot().step_last_us);
        self.told = counts.into_iter().map(|(_, count)| count).collect();
        Some(health(&stats.snapshot(), step_us, stats.is_stalled()))
    }
}

/// The times of the steps that `counts` has beyond `told`. A class goes up to a power of two: its middle stands for its
/// steps, and the last step's time is known.
fn step_times(counts: &[(u64, u64)], told: &[u64], last_us: u64) -> Vec<u32> {
    let told = told.iter().copied().chain(std::iter::repeat(0));
    let new: Vec<(u64, u64)> = counts
        .iter()
        .zip(told)
        .map(|(&(bound, count), told)| (bound, count - told))
        .collect();
    let sum: u64 = new.iter().map(|(_, count)| count).sum();
    if sum == 1 {
        return vec![u32::try_from(last_us).unwrap_or(u32::MAX)];
    }
    // Every class keeps its share when there are too many.
    let share = sum.div_ceil(STEP_TIMES_MAX).max(1);
    let middle = |bound: u64| u32::try_from(bound - bound / 4).unwrap_or(u32::MAX);
    new.into_iter()
        .flat_map(|(bound, count)| {
            std::iter::repeat_n(middle(bound), count.div_ceil(share) as usize)
        })
        .collect()
}

fn health(snapshot: &StatsSnapshot, step_us: Vec<u32>, stalled: bool) -> Health {
    let gauge = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    Health {
        steps: snapshot.steps,
        running: gauge(snapshot.running),
        waiting: gauge(snapshot.waiting),
        waiting_tokens: snapshot.waiting_tokens,
        kv_blocks_used: gauge(snapshot.blocks_used),
        kv_blocks_total: gauge(snapshot.blocks_total),
        prefix_queries: snapshot.prefix_queries,
        prefix_hits: snapshot.prefix_hits,
        preemptions: snapshot.preemptions,
        prompt_tokens: snapshot.tokens_in,
        output_tokens: snapshot.tokens_out,
        step_us,
        stalled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_told_once_with_about_its_time() {
        let counts = [(1, 0), (2, 0), (4, 3), (1024, 1)];
        assert_eq!(step_times(&counts, &[], 700), [3, 3, 3, 768]);
        assert_eq!(
            step_times(&counts, &[0, 0, 3, 0], 700),
            [700],
            "the only new step is the last one"
        );
        assert_eq!(step_times(&counts, &[0, 0, 3, 1], 700), [0u32; 0]);
    }

    #[test]
    fn many_steps_are_thinned_out_and_rare_slow_ones_kept() {
        let told = step_times(&[(64, 100_000), (4096, 1)], &[], 50);
        assert!(told.len() <= STEP_TIMES_MAX as usize + 1, "{}", told.len());
        assert_eq!(told.last(), Some(&3072));
    }
}
