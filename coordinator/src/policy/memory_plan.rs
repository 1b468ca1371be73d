//! How much memory a replica needs on each rank, and how many sequences then fit: from headers alone.
//!
//! Follows the engine byte for byte (`tests/it/footprint.rs` holds one against the other): query heads, the MLP's middle
//! and the vocabulary are cut among ranks, KV heads too, or repeated when there are fewer than ranks; norms are whole on
//! each rank. Figures are for the rank that has most. What kinds of devices have of their own is in `cpu` and `cuda`.

mod cpu;
pub mod cuda;
mod part;

use std::borrow::Cow;

use common::wire::message::{DeviceKind, KvDtype};

use super::bytes_text;
use crate::registry::{ModelFacts, Shape};
use part::Part;

/// Tokens per KV block.
pub const BLOCK_TOKENS: u64 = 16;
/// Most sequences in one step, also for small sizes: candidates of one request run side by side.
const SEQUENCES_MIN: u32 = 64;
/// Tokens in one step on a CPU: prefill is compute-bound from far fewer on, and a long step delays all decodes.
const STEP_TOKENS_CPU: u32 = 512;
/// Tokens in one step on a GPU.
const STEP_TOKENS_CUDA: u32 = 2048;

/// What one rank of a replica needs, before its KV pool is sized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankNeed {
    /// Ranks of the group.
    pub ranks: u32,
    /// Numbers in its matrices, in whatever form they are kept.
    pub parameters: u64,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of activations and logits for the largest step.
    pub workspace_bytes: u64,
    /// Bytes that the device's products and attention take of their own for the largest step.
    pub scratch_bytes: u64,
    /// Bytes of everything else.
    pub overhead_bytes: u64,
    /// Bytes of K and V of 16 tokens, all layers.
    pub block_bytes: u64,
    /// Longest sequence served.
    pub context_max: u32,
    /// Most tokens in one step.
    pub step_tokens_max: u32,
    /// Most sequences in one step.
    pub sequences_max: u32,
}

/// A rank's memory, KV pool included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The fixed part.
    pub need: RankNeed,
    /// KV blocks in the pool, the null block included.
    pub kv_blocks: u32,
}

/// Why a model cannot be had in this way on any device of the kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPlan {
    /// Not among so many ranks.
    #[error("{what} cannot be divided among {ranks} shards; choose a workload type with {instead}")]
    Indivisible {
        /// Heads or columns.
        what: String,
        /// Into how many.
        ranks: u32,
        /// How many would do.
        instead: String,
    },
    /// The kind of device has no kernels for it.
    #[error("{0}")]
    Unserved(String),
}

/// What each of `ranks` ranks on devices of `kind` needs for `concurrency` sequences at a time.
///
/// # Errors
/// [`NoPlan`] says what would do.
pub fn need(
    facts: &ModelFacts,
    kind: DeviceKind,
    ranks: u32,
    concurrency: u32,
) -> Result<RankNeed, NoPlan> {
    let facts = &*match kind {
        DeviceKind::Cpu => Cow::Borrowed(facts),
        DeviceKind::Cuda => cuda::as_served(facts),
    };
    let shape = &facts.shape;
    check_division(shape, ranks)?;
    check_kernels(facts, kind)?;
    let step_tokens_max = match kind {
        DeviceKind::Cpu => STEP_TOKENS_CPU,
        DeviceKind::Cuda => STEP_TOKENS_CUDA,
    };
    let mut need = RankNeed {
        ranks,
        parameters: 0,
        weight_bytes: 0,
        workspace_bytes: 0,
        scratch_bytes: 0,
        overhead_bytes: 0,
        block_bytes: 0,
        context_max: facts.context_max,
        step_tokens_max,
        sequences_max: concurrency.max(SEQUENCES_MIN),
    };
    let part = Part::of(facts, ranks);
    need.parameters = part.parameters(facts);
    match kind {
        DeviceKind::Cpu => cpu::fill(&mut need, facts, &part),
        DeviceKind::Cuda => cuda::fill(&mut need, facts, &part),
    }
    Ok(need)
}

fn check_division(shape: &Shape, ranks: u32) -> Result<(), NoPlan> {
    let r = u64::from(ranks);
    let indivisible = |what: String, instead: String| {
        Err(NoPlan::Indivisible {
            what,
            ranks,
            instead,
        })
    };
    if !shape.heads.is_multiple_of(r) {
        return indivisible(
            format!("{} attention heads", shape.heads),
            format!("a divisor of {} shards", shape.heads),
        );
    }
    if !shape.kv_heads.is_multiple_of(r) && !r.is_multiple_of(shape.kv_heads) {
        let instead = format!("a divisor or a multiple of {} shards", shape.kv_heads);
        return indivisible(format!("{} KV heads", shape.kv_heads), instead);
    }
    if shape.intermediate < r || shape.vocab < r {
        return indivisible(
            format!("{} columns of the MLP", shape.intermediate.min(shape.vocab)),
            "fewer shards".into(),
        );
    }
    Ok(())
}

/// What a worker would refuse once it is asked: better said before.
fn check_kernels(facts: &ModelFacts, kind: DeviceKind) -> Result<(), NoPlan> {
    let unserved = |what: String| Err(NoPlan::Unserved(what));
    if let Some((tensor, form)) = facts.otherwise_quantised() {
        return unserved(format!(
            "the weights of {} are in {} already ({tensor}) and are not changed to {}; leave quantization out, or \
             give a model in bf16, f16 or f32",
            facts.model,
            form.name(),
            facts.quantization.name()
        ));
    }
    match kind {
        DeviceKind::Cuda if facts.kv_dtype != KvDtype::Bf16 => unserved(format!(
            "keys and values in {} are served on CPUs alone; leave kv_dtype out for bf16",
            facts.kv_dtype.name()
        )),
        DeviceKind::Cuda if !cuda::HEAD_WIDTHS.contains(&facts.shape.head_width) => {
            unserved(format!(
                "heads of {} numbers are not served on GPUs, which have kernels for {}",
                facts.shape.head_width,
                cuda::HEAD_WIDTHS.map(|width| width.to_string()).join(", ")
            ))
        }
        _ => Ok(()),
    }
}

impl RankNeed {
    /// Blocks of one sequence at the longest context.
    pub fn sequence_blocks(&self) -> u64 {
        u64::from(self.context_max).div_ceil(BLOCK_TOKENS)
    }

    /// Bytes before any KV.
    pub fn fixed_bytes(&self) -> u64 {
        self.weight_bytes + self.workspace_bytes + self.scratch_bytes + self.overhead_bytes
    }

    /// Bytes with KV for this many sequences at the longest context.
    pub fn bytes_for(&self, sequences: u64) -> u64 {
        self.fixed_bytes() + (1 + sequences * self.sequence_blocks()) * self.block_bytes
    }

    /// Least bytes that serve at all: one sequence at the longest context.
    pub fn least_bytes(&self) -> u64 {
        self.bytes_for(1)
    }

    /// Bytes of K and V of one token, all layers.
    pub fn token_bytes(&self) -> u64 {
        self.block_bytes / BLOCK_TOKENS
    }

    /// The longest context of which one sequence fits into `budget`, in whole blocks; 0 when the weights alone do not.
    pub fn context_within(&self, budget: u64) -> u64 {
        let blocks = budget.saturating_sub(self.fixed_bytes()) / self.block_bytes;
        (blocks.saturating_sub(1) * BLOCK_TOKENS).min(u64::from(self.context_max))
    }

    /// Sizes the KV pool: for `concurrency` sequences at the longest context, or as many blocks as `budget` has room
    /// for. `None` when not even one sequence fits.
    pub fn fit(self, budget: u64, concurrency: u32) -> Option<MemoryPlan> {
        if self.least_bytes() > budget {
            return None;
        }
        let wanted = 1 + u64::from(concurrency) * self.sequence_blocks();
        let possible = (budget - self.fixed_bytes()) / self.block_bytes;
        let kv_blocks = u32::try_from(wanted.min(possible)).unwrap_or(u32::MAX);
        Some(MemoryPlan {
            need: self,
            kv_blocks,
        })
    }

    /// Bytes that a device of `budget` bytes has left for K and V.
    pub fn kv_left(&self, budget: u64) -> u64 {
        budget.saturating_sub(self.fixed_bytes())
    }

    /// Sequences at the longest context that fit into `budget` at a time.
    pub fn sequences_within(&self, budget: u64) -> u64 {
        let blocks = self.kv_left(budget) / self.block_bytes;
        blocks.saturating_sub(1) / self.sequence_blocks()
    }

    /// The parts in words.
    pub fn text(&self) -> String {
        format!(
            "{} of weights + {} of workspace + {} of KV for one sequence of {} tokens",
            bytes_text(self.weight_bytes),
            bytes_text(self.fixed_bytes() - self.weight_bytes),
            bytes_text((1 + self.sequence_blocks()) * self.block_bytes),
            self.context_max
        )
    }
}

impl MemoryPlan {
    /// Bytes of the KV pool.
    pub fn kv_bytes(&self) -> u64 {
        u64::from(self.kv_blocks) * self.need.block_bytes
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.need.fixed_bytes() + self.kv_bytes()
    }

    /// Sequences at the longest context that fit at a time.
    pub fn concurrency(&self) -> u64 {
        (u64::from(self.kv_blocks) - 1) / self.need.sequence_blocks()
    }
}

#[cfg(test)]
mod tests;
