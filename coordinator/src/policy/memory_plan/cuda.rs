//! What a rank takes on a GPU. The host's part of a step, the tokenizer and the template helper are in the host's memory
//! and not counted; nor are the driver's context and NCCL's buffers, which are the device's reserve (docs/gpu.md).

use std::borrow::Cow;

use super::part::{F32, Part, Piece};
use super::{BLOCK_TOKENS, RankNeed};
use crate::registry::form::{Form, Grouped, Offset};
use crate::registry::{ModelFacts, WeightTensor};

/// Widths of heads that there are attention kernels for.
pub const HEAD_WIDTHS: [u64; 8] = [16, 32, 64, 80, 96, 112, 128, 256];
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
    let pieces = || facts.tensors.iter().map(|tensor| part.piece(tensor));
    need.weight_bytes = pieces().map(|piece| bytes(&piece)).sum();
    let angles = if part.rotates() { shape.head_width } else { 0 };
    need.workspace_bytes = F32
        * (tokens * (part.activations() + angles) + LOGITS_ROWS * part.logits() + part.slopes());
    let quantised = |piece| matches!(piece, Piece::Matrix { kept: Some(_), .. });
    need.scratch_bytes = scratch_bytes(need, part, pieces().any(quantised));
    need.overhead_bytes = recorded_bytes(need, part);
    need.block_bytes = 2 * BLOCK_TOKENS * shape.layers * part.kv * facts.kv_dtype.bytes();
}

fn bytes(piece: &Piece) -> u64 {
    match *piece {
        Piece::Matrix {
            rows,
            columns,
            kept: Some(form),
        } => columns.most_of(|start, end| quantised(rows, start, end, form)),
        Piece::Matrix { rows, columns, .. } => float(rows, columns.most()),
        Piece::End { rows, columns, .. } => float(rows, columns),
        Piece::Vector(numbers) => F32 * numbers,
    }
}

/// The facts as a GPU has them: there are no products of groups with minima, which become floats when they are loaded.
pub(super) fn as_served(facts: &ModelFacts) -> Cow<'_, ModelFacts> {
    let has_products = |tensor: &WeightTensor| !matches!(tensor.form, Form::Grouped(form) if form.offset == Offset::Mins);
    if facts.tensors.iter().all(has_products) {
        return Cow::Borrowed(facts);
    }
    let mut served = facts.clone();
    for tensor in &mut served.tensors {
        if !has_products(tensor) {
            tensor.form = Form::Unpacked;
        }
    }
    Cow::Owned(served)
}

fn float(rows: u64, columns: u64) -> u64 {
    rows * BF16 * columns.next_multiple_of(ROW_NUMBERS)
}

/// Rows of the columns from `start` on and before `end`: their numbers, and what each group has that they touch.
fn quantised(rows: u64, start: u64, end: u64, form: Grouped) -> u64 {
    let groups = end.div_ceil(form.group) - start / form.group;
    // The zero point of a group of int4 is a byte.
    let of_group = if form.bits == 4 { F32 + 1 } else { F32 };
    let numbers = ((end - start) * form.bits).div_ceil(8);
    rows * (numbers.next_multiple_of(ROW_BYTES) + of_group * groups)
}

/// What cuBLAS, products and attention work in, and the tables that a step uploads.
fn scratch_bytes(need: &RankNeed, part: &Part<'_>, quantised: bool) -> u64 {
    let (tokens, spans) = (
        u64::from(need.step_tokens_max),
        u64::from(need.sequences_max),
    );
    let shape = part.shape;
    let dequantised = if quantised { DEQUANTISED_BYTES } else { 0 };
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
