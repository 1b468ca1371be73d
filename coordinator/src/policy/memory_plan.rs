//! How much memory a replica needs on each rank, and how many sequences then fit: from headers alone.
//!
//! Follows the engine byte for byte (`tests/it/footprint.rs` holds one against the other): query heads, the MLP's middle
//! and the vocabulary are cut among ranks, KV heads too, or repeated when there are fewer than ranks; norms are whole on
//! each rank. Figures are for the rank that has most.

use common::wire::message::DeviceKind;

use super::bytes_text;
use crate::registry::shape::Family;
use crate::registry::tensors::{Slice, WeightTensor};
use crate::registry::{ModelFacts, Shape};

/// Tokens per KV block.
pub const BLOCK_TOKENS: u64 = 16;
/// Most sequences in one step, also for small sizes: candidates of one request run side by side.
const SEQUENCES_MIN: u32 = 64;
/// Tokens in one step on a CPU: prefill is compute-bound from far fewer on, and a long step delays all decodes.
const STEP_TOKENS_CPU: u32 = 512;
/// Tokens in one step on a GPU.
const STEP_TOKENS_CUDA: u32 = 2048;
/// Tokenizer, tables and allocator slack of a shard.
const TABLES_BYTES: u64 = 32 << 20;
/// The process that renders a model's chat template; rank 0 starts it with the first conversation.
const CHAT_HELPER_BYTES: u64 = 12 << 20;
/// Query vectors that a thread of a CPU attends with at a time, or as many as share a KV head.
const ATTENTION_VECTORS: u64 = 24;
/// Threads of a CPU that attend at a time: more are rare, and take what the tables leave.
const ATTENTION_THREADS: u64 = 16;
/// Rows of a weight matrix, and numbers of a head's values, are padded to whole panels of so many.
const PANEL: u64 = 16;
/// Weights are kept as bf16, whatever the file has.
pub const WEIGHT_BYTES: u64 = 2;
/// Rows whose logits are computed at a time.
const LOGITS_ROWS: u64 = 32;

/// What one rank of a replica needs, before its KV pool is sized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankNeed {
    /// Ranks of the group.
    pub ranks: u32,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of activations and logits for the largest step.
    pub workspace_bytes: u64,
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

/// The model cannot be divided among so many ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot be divided among {ranks} shards; choose a workload type with {instead}")]
pub struct Indivisible {
    what: String,
    ranks: u32,
    instead: String,
}

/// What each of `ranks` ranks on devices of `kind` needs for `concurrency` sequences at a time.
///
/// # Errors
/// [`Indivisible`] says how many ranks would do.
pub fn need(
    facts: &ModelFacts,
    kind: DeviceKind,
    ranks: u32,
    concurrency: u32,
) -> Result<RankNeed, Indivisible> {
    let shape = &facts.shape;
    let r = u64::from(ranks);
    let indivisible = |what: String, instead: String| {
        Err(Indivisible {
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
    let part = Part {
        q: shape.heads / r * shape.head_width,
        kv: shape.kv_heads.div_ceil(r) * shape.head_width,
        middle: shape.intermediate.div_ceil(r),
        vocab: shape.vocab.div_ceil(r),
    };
    let weight_bytes: u64 = facts
        .tensors
        .iter()
        .map(|tensor| part.bytes(tensor, shape))
        .sum();
    let step_tokens_max = match kind {
        DeviceKind::Cpu => STEP_TOKENS_CPU,
        DeviceKind::Cuda => STEP_TOKENS_CUDA,
    };
    let sequences_max = concurrency.max(SEQUENCES_MIN);
    let kv_heads = part.kv / shape.head_width;
    let token_numbers =
        shape.head_width.next_multiple_of(2) + shape.head_width.next_multiple_of(PANEL);
    Ok(RankNeed {
        ranks,
        weight_bytes,
        workspace_bytes: part.workspace_bytes(shape, kind, u64::from(step_tokens_max), r),
        overhead_bytes: overhead_bytes(shape, kind, u64::from(facts.context_max)),
        block_bytes: BLOCK_TOKENS
            * shape.layers
            * kv_heads
            * token_numbers
            * facts.kv_dtype.bytes(),
        context_max: facts.context_max,
        step_tokens_max,
        sequences_max,
    })
}

/// What a shard takes beside weights, workspace and KV.
fn overhead_bytes(shape: &Shape, kind: DeviceKind, context: u64) -> u64 {
    let scores = match kind {
        // One row of scores per query vector and thread.
        DeviceKind::Cpu => {
            let vectors = ATTENTION_VECTORS.max(shape.heads / shape.kv_heads);
            4 * ATTENTION_THREADS * vectors * context
        }
        DeviceKind::Cuda => 0,
    };
    TABLES_BYTES + CHAT_HELPER_BYTES + scores
}

/// One rank's widths.
struct Part {
    q: u64,
    kv: u64,
    middle: u64,
    vocab: u64,
}

impl Part {
    /// The buffers of the largest step, as f32.
    fn workspace_bytes(&self, shape: &Shape, kind: DeviceKind, tokens: u64, ranks: u64) -> u64 {
        let qkv = self.q + 2 * self.kv;
        let (gated, rope) = match shape.family {
            Family::Llama => (true, true),
            Family::Mpt => (false, false),
        };
        // The residual stream and what goes through attention and MLP; qkv; attention's output; gate, up and middle.
        let middles = if gated { 3 } else { 1 };
        let mut per_token = 2 * shape.hidden + qkv + self.q + middles * self.middle;
        if shape.qk_norm {
            per_token += shape.hidden;
        }
        if rope {
            // Angles, on the device and on the host.
            per_token += 2 * shape.head_width;
        }
        if kind == DeviceKind::Cpu {
            // A product of many rows copies its input.
            per_token += shape.hidden.max(self.q).max(self.middle);
        }
        // The last hidden states, a rank's logits, all ranks' logits on rank 0, the same on its host.
        let mut per_row = shape.hidden + self.vocab + shape.vocab;
        if ranks > 1 {
            per_row += shape.vocab;
        }
        let slopes = if rope { 0 } else { self.q / shape.head_width };
        4 * (tokens * per_token + LOGITS_ROWS * per_row + slopes)
    }

    fn bytes(&self, tensor: &WeightTensor, shape: &Shape) -> u64 {
        let cut = |whole: u64| match tensor.slice {
            Slice::Whole => whole,
            Slice::Heads => self.q,
            Slice::KvHeads => self.kv,
            Slice::Fused => self.q + 2 * self.kv,
            Slice::Middle => self.middle,
            Slice::Vocabulary => self.vocab,
        };
        let [rows, columns] = match (&tensor.dims[..], tensor.by_columns) {
            (&[rows, columns], true) => [rows, cut(columns)],
            (&[rows, columns], false) => [cut(rows), columns],
            // Norms and biases, as f32. The bias of a product that is summed over ranks is rank 0's, whole.
            (dims, by_columns) => {
                let whole = dims.iter().product::<u64>();
                return 4 * if by_columns { whole } else { cut(whole) };
            }
        };
        debug_assert!(
            rows * columns <= tensor.dims.iter().product::<u64>(),
            "{} of {shape:?}",
            tensor.name
        );
        rows.next_multiple_of(PANEL) * columns.next_multiple_of(2) * WEIGHT_BYTES
    }
}

impl RankNeed {
    /// Blocks of one sequence at the longest context.
    pub fn sequence_blocks(&self) -> u64 {
        u64::from(self.context_max).div_ceil(BLOCK_TOKENS)
    }

    /// Bytes before any KV.
    pub fn fixed_bytes(&self) -> u64 {
        self.weight_bytes + self.workspace_bytes + self.overhead_bytes
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
            bytes_text(self.workspace_bytes + self.overhead_bytes),
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
