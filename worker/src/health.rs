//! A leader's counters as the wire carries them.
//!
//! Owns what was reported last, since step times are told once. What the numbers mean is the engine's part.

use std::sync::Arc;

use common::wire::message::Health;
use engine::stats::{Stats, StatsSnapshot};

use crate::open::Running;

/// Reads an engine's counters.
pub struct HealthReporter {
    stats: Option<Arc<Stats>>,
    /// Steps whose times are told.
    told: u64,
}

impl HealthReporter {
    /// Reports on a shard; ranks above 0 have nothing to tell, since rank 0 waits for them in every step.
    pub fn new(running: &Running) -> HealthReporter {
        let stats = match running {
            Running::Leader(leader) => Some(leader.engine.stats()),
            Running::Follower(_) => None,
        };
        HealthReporter { stats, told: 0 }
    }

    /// The counters now.
    pub fn take(&mut self) -> Option<Health> {
        let stats = self.stats.clone()?;
        let (step_us, told) = stats.step_times_us(self.told);
        self.told = told;
        Some(health(&stats.snapshot(), step_us, stats.is_stalled()))
    }
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
