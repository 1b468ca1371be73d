//! What a scheduler is made for: sizes and limits that agree with each other.

use super::limits::blocks_most;
use crate::runner::Geometry;

/// What a scheduler is made for.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Sizes of the model and its memory.
    pub(super) geometry: Geometry,
    /// Generation of the shard group, put on every plan.
    pub(super) generation: u64,
    /// Key of the prefix cache: see [`PrefixHasher`](crate::kv::prefix::PrefixHasher).
    pub(super) prefix_salt: Vec<u8>,
    /// Most tokens of one sequence in one step.
    pub(super) chunk_tokens_max: u32,
}

impl SchedulerConfig {
    /// A configuration whose limits agree: a chunk fits a step, and a step has a token for each sequence.
    pub fn new(
        geometry: Geometry,
        generation: u64,
        prefix_salt: Vec<u8>,
        chunk_tokens_max: u32,
    ) -> Self {
        let step_tokens_max = geometry.step_tokens_max.max(1);
        let spans_max = geometry.spans_max.clamp(1, step_tokens_max);
        SchedulerConfig {
            geometry: Geometry {
                step_tokens_max,
                spans_max,
                ..geometry
            },
            generation,
            prefix_salt,
            chunk_tokens_max: chunk_tokens_max.clamp(1, step_tokens_max),
        }
    }

    /// Most blocks that a sequence of `len` tokens holds at once.
    pub(super) fn blocks_most(&self, len: usize) -> usize {
        blocks_most(len, self.chunk_tokens_max as usize, self.geometry.window)
    }
}
