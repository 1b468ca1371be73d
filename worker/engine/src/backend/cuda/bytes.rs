//! How many bytes things take on a device: the one place that says so, for the backend and for those who plan its memory.
//!
//! Owns formulas alone, none of which depends on the device: a coordinator that has none plans by the same numbers.

use super::step::Capacity;
use crate::backend::{Heads, LinearShape, QuantBits, QuantShape, StepShape};

/// What cuBLAS works in: the size that its manual recommends for sm_90, where it wants most.
pub(super) const BLAS_WORKSPACE: u64 = 32 << 20;

/// What is lost between places: up to 255 bytes each, of some 4000 places.
pub(super) const ROUNDING: u64 = 1 << 20;

/// Draws, their results and the rows whose logits are wanted.
pub(super) const SMALL: u64 = 64 << 10;

/// Widened rows of a quantised matrix, a slice at a time: small enough to stay in the second-level cache of an A100 or
/// H100 until the product has read it.
pub(super) const WIDENED: u64 = 32 << 20;

/// Thread blocks that a decode's attention is split into, about: four for each multiprocessor of an H100 (132), five of
/// an A100 (108). A fixed number, so that the sums do not depend on the device.
const SPLIT_BLOCKS: usize = 512;

/// Most parts of one sequence: each part's result is read once more.
const SPLITS_MAX: usize = 64;

/// Query heads that share a block's loads of K and V.
const SHARING: usize = 4;

/// Numbers from one row of a bf16 matrix to the next: rows begin at 16 bytes.
pub(super) const fn row_numbers(k: usize) -> usize {
    k.next_multiple_of(8)
}

/// Bytes from one row of a quantised matrix to the next.
pub(super) const fn row_bytes(k: usize, bits: QuantBits) -> usize {
    match bits {
        QuantBits::Int8 => k.next_multiple_of(16),
        QuantBits::Int4 => k.div_ceil(2).next_multiple_of(16),
    }
}

/// A matrix of [`LinearShape`], bias excluded.
pub(super) const fn linear(shape: LinearShape) -> u64 {
    (shape.n * row_numbers(shape.k) * shape.dtype.bytes()) as u64
}

/// Numbers, scales (f32) and, for int4, zero points (one byte each), bias excluded.
pub(super) const fn quantised(shape: QuantShape) -> u64 {
    let of_group = match shape.bits {
        QuantBits::Int8 => 4,
        QuantBits::Int4 => 5,
    };
    (shape.n * (row_bytes(shape.k, shape.bits) + of_group * shape.groups())) as u64
}

/// Blocks of the grid that one span and one split take.
pub(super) const fn split_blocks(heads: Heads) -> usize {
    heads.kv * (heads.q / heads.kv).div_ceil(SHARING)
}

/// Into how many parts each sequence of a decode's attention is split. `spans` counts the sequences, filled up as recorded
/// steps are, so that a step has the same sums recorded or not.
pub(super) fn splits(spans: usize, heads: Heads) -> usize {
    let blocks = filled_up(spans) * split_blocks(heads);
    (SPLIT_BLOCKS / blocks).clamp(1, SPLITS_MAX)
}

/// The unfinished results of split attention.
pub(super) fn partial(spans: usize, heads: Heads, splits: usize) -> u64 {
    (4 * spans * heads.q * splits * (heads.width + 2)) as u64
}

/// How many rows a decode of `rows` is filled up to. Few sizes, so that few steps are recorded; near ones, so that little is
/// computed in vain.
pub(super) fn filled_up(rows: usize) -> usize {
    match rows {
        0..=16 => rows.next_power_of_two(),
        17..=32 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(16),
    }
}

/// Activations rounded to bf16 for a product.
pub(super) const fn rounded(rows: usize, k: usize) -> u64 {
    2 * (rows * k) as u64
}

/// All that the ops of a step up to `step` take beside its buffers.
pub(super) fn scratch(step: &StepShape) -> u64 {
    BLAS_WORKSPACE
        + ROUNDING
        + SMALL
        + if step.quantised > 0 { WIDENED } else { 0 }
        + rounded(step.rows, step.width)
        + partial_most(step)
        + Capacity::of(step).bytes()
}

/// The most that [`partial`] is, for any number of spans up to the step's.
pub(super) fn partial_most(step: &StepShape) -> u64 {
    let numbers = (SPLIT_BLOCKS / split_blocks(step.heads)).max(step.spans);
    partial(numbers, step.heads, 1)
}

/// Widths of heads that attention has kernels for.
pub(super) const HEAD_WIDTHS: [usize; 8] = [16, 32, 64, 80, 96, 112, 128, 256];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{FloatDtype, QuantOffset};

    #[test]
    fn the_bytes_of_llama_2_7b_add_up_by_hand() {
        let dtype = FloatDtype::Bf16;
        assert_eq!(
            linear(LinearShape {
                n: 12288,
                k: 4096,
                dtype
            }),
            100_663_296
        );
        assert_eq!(linear(LinearShape { n: 3, k: 5, dtype }), 3 * 8 * 2);
        let shape = QuantShape {
            n: 4096,
            k: 11008,
            bits: QuantBits::Int8,
            group: 128,
            lead: 0,
            offset: QuantOffset::Middle,
            head: false,
        };
        assert_eq!(quantised(shape), 4096 * (11008 + 4 * 86));
        let shape = QuantShape {
            bits: QuantBits::Int4,
            k: 11000,
            lead: 64,
            ..shape
        };
        assert_eq!(quantised(shape), 4096 * (5504 + 5 * 87));
        let step = StepShape {
            rows: 2048,
            spans: 64,
            logits_rows: 128,
            width: 11008,
            quantised: 0,
            heads: Heads {
                q: 32,
                kv: 32,
                width: 128,
            },
            vocab: 32000,
            context_max: 4096,
            blocks: 9999,
        };
        let arrays = 4 * (2 * 2048 + 2 * 32 + 9 * 64 + 64 * 256);
        let expected = (33 << 20) + (64 << 10) + 2 * 2048 * 11008 + 4 * 64 * 32 * 130 + arrays;
        assert_eq!(scratch(&step), expected);
        assert_eq!(
            scratch(&StepShape {
                quantised: 1,
                ..step
            }),
            expected + (32 << 20)
        );
    }

    #[test]
    fn unfinished_attention_of_any_step_fits_what_is_set_aside() {
        for heads in [(1, 1), (4, 4), (8, 1), (32, 32), (64, 8), (48, 1), (5, 5)] {
            let heads = Heads {
                q: heads.0,
                kv: heads.1,
                width: 64,
            };
            for spans_max in [1, 3, 20, 256] {
                let step = StepShape {
                    rows: 512,
                    spans: spans_max,
                    logits_rows: 1,
                    width: 1,
                    quantised: 0,
                    heads,
                    vocab: 1,
                    context_max: 1,
                    blocks: 1,
                };
                for spans in 1..=spans_max {
                    assert!(
                        partial(spans, heads, splits(spans, heads)) <= partial_most(&step),
                        "{spans} of {spans_max} spans, {heads:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn steps_are_filled_up_by_little() {
        let sizes: Vec<usize> = (1..=70).map(filled_up).collect();
        for (rows, size) in (1..).zip(&sizes) {
            assert!((rows..2 * rows).contains(size), "{rows} rows become {size}");
            assert_eq!(filled_up(*size), *size);
        }
        let mut distinct = sizes.clone();
        distinct.dedup();
        assert_eq!(distinct, [1, 2, 4, 8, 16, 24, 32, 48, 64, 80]);
    }
}
