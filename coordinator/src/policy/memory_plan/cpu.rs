//! What a rank takes on a CPU: the same memory holds the device's part and the host's.

use std::collections::BTreeMap;

use super::part::{F32, Part, Piece};
use super::{BLOCK_TOKENS, RankNeed};
use crate::registry::ModelFacts;
use crate::registry::form::{GROUP, Grouped, Offset, stack};

/// Tokenizer, tables and allocator slack of a shard.
const TABLES_BYTES: u64 = 32 << 20;
/// The process that renders a model's chat template; rank 0 starts it with the first conversation.
const CHAT_HELPER_BYTES: u64 = 12 << 20;
/// Query vectors that a thread attends with at a time, or as many as share a KV head.
const ATTENTION_VECTORS: u64 = 48;
/// Numbers of a vector's scores in one part of its context.
const ATTENTION_PART: u64 = 512;
/// Numbers that threads find in the parts of contexts that they divide among them, at most.
const ATTENTION_DIVIDED: u64 = 2 << 20;
/// Threads that attend at a time: more are rare, and take what the tables leave.
const ATTENTION_THREADS: u64 = 16;
/// Rows of a weight matrix, and numbers of a head's values, are padded to whole panels of so many.
const PANEL: u64 = 16;
/// Floats are kept as bf16, whatever the file has.
const WEIGHT_BYTES: u64 = 2;
/// Rows of a quantised matrix are padded to whole panels of so many.
const QUANT_PANEL: u64 = 32;
/// Columns of a group are padded to a multiple of so many.
const GROUP_COLUMNS: u64 = 8;
/// Bytes of a row's scale in a group.
const SCALE_BYTES: u64 = 2;
/// Bytes of a row's zero point or minimum in a group.
const OFFSET_BYTES: u64 = 2;
/// What logits are products with, in a model that is quantised: few bytes are many of those that a step reads.
const HEAD: Grouped = Grouped {
    bits: 8,
    group: GROUP,
    offset: Offset::Middle,
};
/// Rows whose logits are computed at a time.
const LOGITS_ROWS: u64 = 32;

/// The bytes of a rank.
pub(super) fn fill(need: &mut RankNeed, facts: &ModelFacts, part: &Part<'_>) {
    let shape = part.shape;
    let tokens = u64::from(need.step_tokens_max);
    need.weight_bytes = weight_bytes(facts, part);
    // Angles, on the device's side and on the host's; the host's copy of all ranks' logits.
    let angles = if part.rotates() {
        2 * shape.head_width
    } else {
        0
    };
    let per_token = part.activations() + angles;
    let per_row = part.logits() + shape.vocab;
    need.workspace_bytes = F32 * (tokens * per_token + LOGITS_ROWS * per_row + part.slopes());
    // A product of many rows copies its input.
    need.scratch_bytes = F32 * tokens * part.widest();
    // A row of scores and two of outputs per query vector and thread, each a line longer.
    let vectors = ATTENTION_VECTORS.max(shape.heads / shape.kv_heads);
    let values = shape.head_width.next_multiple_of(PANEL);
    let rows = vectors * (ATTENTION_PART + 2 * values + 3 * PANEL);
    let attention = F32 * (ATTENTION_THREADS * rows + ATTENTION_DIVIDED);
    need.overhead_bytes = TABLES_BYTES + CHAT_HELPER_BYTES + attention;
    let numbers = shape.head_width.next_multiple_of(2) + values;
    let token = numbers * facts.kv_dtype.bytes() + 2 * facts.kv_dtype.scale_bytes();
    need.block_bytes = BLOCK_TOKENS * shape.layers * part.kv_heads * token;
}

/// Bytes of all tensors. What is stacked into one matrix is filled up as one.
fn weight_bytes(facts: &ModelFacts, part: &Part<'_>) -> u64 {
    let (mut alone, mut stacks) = (0, BTreeMap::new());
    for tensor in &facts.tensors {
        match (part.piece(tensor), stack(&tensor.name)) {
            (
                Piece::Matrix {
                    rows,
                    columns,
                    kept,
                },
                Some(stack),
            ) => stacks.entry(stack).or_insert((0, columns, kept)).0 += rows,
            (piece, _) => alone += bytes(&piece),
        }
    }
    let stacks = stacks.into_values().map(|(rows, columns, kept)| {
        bytes(&Piece::Matrix {
            rows,
            columns,
            kept,
        })
    });
    alone + stacks.sum::<u64>()
}

fn bytes(piece: &Piece) -> u64 {
    match *piece {
        Piece::Matrix {
            rows,
            columns,
            kept: Some(form),
        } => columns.most_of(|start, end| quantised(rows, start, end, form)),
        Piece::Matrix { rows, columns, .. } => float(rows, columns.most()),
        Piece::End {
            rows,
            columns,
            squeezed: true,
        } => quantised(rows, 0, columns, HEAD),
        Piece::End { rows, columns, .. } => float(rows, columns),
        Piece::Vector(numbers) => F32 * numbers,
    }
}

fn float(rows: u64, columns: u64) -> u64 {
    rows.next_multiple_of(PANEL) * columns.next_multiple_of(2) * WEIGHT_BYTES
}

/// Panels of quantised rows, of the columns from `start` on and before `end`. Each group has its scales, with whatever
/// stands for zero behind them, and its columns filled up, also where only a part of it is here.
fn quantised(rows: u64, start: u64, end: u64, form: Grouped) -> u64 {
    let group = form.group;
    let offsets = match form.offset {
        Offset::Middle => 0,
        Offset::Zeros | Offset::Mins => OFFSET_BYTES,
    };
    let (mut bytes, mut at) = (0, start);
    while at < end {
        let next = end.min((at / group + 1) * group);
        let columns = (next - at).next_multiple_of(GROUP_COLUMNS);
        bytes += QUANT_PANEL * (SCALE_BYTES + offsets) + QUANT_PANEL * columns * form.bits / 8;
        at = next;
    }
    rows.div_ceil(QUANT_PANEL) * bytes
}
