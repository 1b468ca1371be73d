//! What a rank takes on a GPU. The host's part of a step, the tokenizer and the template helper are in the host's memory
//! and not counted; nor are the driver's context and NCCL's buffers, which are the device's reserve (docs/gpu.md).

use common::wire::message::Quantization;

use super::part::{F32, Part, Piece};
use super::{BLOCK_TOKENS, RankNeed};
use crate::registry::ModelFacts;

/// Widths of heads that there are attention kernels for.
pub const HEAD_WIDTHS: [u64; 8] = [16, 32, 64, 80, 96, 112, 128, 256];
/// Columns of a quantised matrix that share a scale.
const GROUP: u64 = 128;
/// Bytes that a row of a quantised matrix is padded to.
const ROW_BYTES: u64 = 16;
/// Numbers that a row of a bf16 matrix is padded to.
const ROW_NUMBERS: u64 = 8;
const BF16: u64 = 2;
/// Rows whose logits are computed at a time: all that decode, mostly.
const LOGITS_ROWS: u64 = 128;

/// What cuBLAS works in.
const CUBLAS_BYTES: u64 = 32 << 20;
/// Where a slice of a quantised matrix is written out as bf16.
const DEQUANTISED_BYTES: u64 = 32 << 20;
/// Allocations begin at multiples of 256 bytes: so much for 4096 of them.
const ROUNDING_BYTES: u64 = 1 << 20;
/// Wanted rows, draws and drawn tokens.
const DRAWS_BYTES: u64 = 64 << 10;
/// Blocks of threads that decode's attention is spread over, where sequences and heads are fewer.
const ATTENTION_BLOCKS: u64 = 512;
/// Query heads that read a KV head together.
const QUERIES_TOGETHER: u64 = 4;
/// Queries in a tile of prefill's attention.
const TILE_QUERIES: u64 = 64;
/// Integers per sequence in a step's tables, its blocks aside.
const SPAN_INTEGERS: u64 = 9;

/// Kernels of a layer in a step of decodes: 12 calls, of which cuBLAS may make two kernels for each of the 4 products.
const LAYER_NODES: u64 = 16;
/// Sums over ranks of a layer.
const LAYER_SUMS: u64 = 2;
/// Kernels before the first layer and behind the last.
const END_NODES: u64 = 8;
/// What the driver keeps on the device for a recorded kernel. An estimate: another server logs 24 to 28 MiB per recorded
/// step, which is this for some 400 kernels.
const NODE_BYTES: u64 = 64 << 10;
/// Sizes of recorded steps, as [`recordings`] counts them.
const SMALL_STEPS: [u64; 7] = [1, 2, 4, 8, 16, 24, 32];
/// Beyond the small ones, every so many sequences.
const STEP_SEQUENCES: u64 = 16;

/// The bytes of a rank.
pub(super) fn fill(need: &mut RankNeed, facts: &ModelFacts, part: &Part<'_>) {
    let shape = part.shape;
    let tokens = u64::from(need.step_tokens_max);
    let bytes = |tensor| bytes(&part.piece(tensor), facts.quantization);
    need.weight_bytes = facts.tensors.iter().map(bytes).sum();
    let angles = if part.rotates() { shape.head_width } else { 0 };
    need.workspace_bytes = F32
        * (tokens * (part.activations() + angles) + LOGITS_ROWS * part.logits() + part.slopes());
    need.scratch_bytes = scratch_bytes(need, facts, part);
    need.overhead_bytes = recorded_bytes(need, part);
    need.block_bytes = 2 * BLOCK_TOKENS * shape.layers * part.kv * facts.kv_dtype.bytes();
}

fn bytes(piece: &Piece, quantization: Quantization) -> u64 {
    match *piece {
        Piece::Vector(numbers) => F32 * numbers,
        Piece::Matrix {
            rows,
            columns,
            whole,
            sharers,
            end,
        } => {
            let groups = groups(whole, sharers);
            let row = match quantization {
                Quantization::Int8 if !end => columns.next_multiple_of(ROW_BYTES) + F32 * groups,
                // The zero point of a group is a byte.
                Quantization::Int4 if !end => {
                    columns.div_ceil(2).next_multiple_of(ROW_BYTES) + (F32 + 1) * groups
                }
                _ => BF16 * columns.next_multiple_of(ROW_NUMBERS),
            };
            rows * row
        }
    }
}

/// Groups in a row of the rank that has most. Groups are counted in the whole matrix: a rank's columns may begin and end
/// inside one.
fn groups(columns: u64, ranks: u64) -> u64 {
    let of_rank = |rank: u64| {
        let (start, end) = (columns * rank / ranks, columns * (rank + 1) / ranks);
        end.div_ceil(GROUP) - start / GROUP
    };
    (0..ranks).map(of_rank).max().unwrap_or(0)
}

/// What cuBLAS, products and attention work in, and the tables that a step uploads.
fn scratch_bytes(need: &RankNeed, facts: &ModelFacts, part: &Part<'_>) -> u64 {
    let (tokens, spans) = (
        u64::from(need.step_tokens_max),
        u64::from(need.sequences_max),
    );
    let shape = part.shape;
    let dequantised = match facts.quantization {
        Quantization::None => 0,
        Quantization::Int8 | Quantization::Int4 => DEQUANTISED_BYTES,
    };
    let heads = part.q / shape.head_width;
    // A sequence's keys are divided among blocks of threads, each of which keeps a sum, its largest score and its weight.
    let shared = part.kv_heads * (heads / part.kv_heads).div_ceil(QUERIES_TOGETHER);
    let parts = (ATTENTION_BLOCKS / shared).max(spans);
    let split = F32 * heads * (shape.head_width + 2) * parts;
    // The model's own longest sequence, whatever is served.
    let blocks = u64::from(shape.context_max).div_ceil(BLOCK_TOKENS);
    let tables =
        F32 * (2 * tokens + 2 * (tokens / TILE_QUERIES) + SPAN_INTEGERS * spans + spans * blocks);
    CUBLAS_BYTES
        + ROUNDING_BYTES
        + DRAWS_BYTES
        + dequantised
        + BF16 * tokens * part.widest()
        + split
        + tables
}

/// What the driver keeps of recorded steps.
fn recorded_bytes(need: &RankNeed, part: &Part<'_>) -> u64 {
    let sums = if part.ranks > 1 { LAYER_SUMS } else { 0 };
    let nodes = part.shape.layers * (LAYER_NODES + sums) + END_NODES;
    // More decodes than logits fit together are not recorded.
    nodes * NODE_BYTES * recordings(u64::from(need.sequences_max).min(LOGITS_ROWS))
}

/// Steps of different sizes that are recorded for up to so many sequences.
fn recordings(sequences: u64) -> u64 {
    let largest = SMALL_STEPS[SMALL_STEPS.len() - 1];
    let small = SMALL_STEPS.iter().filter(|&&size| size <= sequences);
    small.count() as u64 + sequences.saturating_sub(largest).div_ceil(STEP_SEQUENCES)
}
