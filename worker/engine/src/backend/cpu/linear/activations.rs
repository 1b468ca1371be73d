//! Activations on their way into a product: copied, and for integer products quantised, into blocks of as many rows as a
//! tile takes, in the order in which the tile reads them.
//!
//! Owns the rule by which activations are quantised: one scale per row and segment of the weights' columns, the largest
//! magnitude of which is 127 steps; numbers are rounded to nearest, ties to even. Where a row has a second part, that holds
//! what the first leaves over, in steps 254 times as fine. A segment with NaN or an infinity gets the scale NaN, one of
//! vanishing numbers 0. A row's numbers depend on that row alone.

use super::super::dot_tile::{QuantLayout, STEP};
use super::super::dots::QUAD;
use super::super::isa::{Isa, Kernel};
use super::super::pool::{Base, Pool};
use super::super::simd::{LANES, Simd};
use crate::backend::QuantOffset;

/// Numbers worth waking a helper for.
const PARALLEL_MIN: usize = 16 << 10;
/// Most columns of a segment.
const SEGMENT_MAX: usize = 128;
/// Largest magnitude of a segment that is nothing: smaller ones have no exact inverse.
const VANISHING: f32 = 1e-30;
/// Added to a number of magnitude below 2^22, it leaves the nearest integer in the lowest bits.
const ROUNDER: f32 = 12_582_912.0;
/// Steps of the second part in one of the first, of which at most half is left over: 127 both ways.
const FINER: f32 = 254.0;

/// How `rows` rows are cut into blocks of at most `most`, as equal as can be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    rows: usize,
    pub(super) count: usize,
}

impl Blocks {
    pub(super) fn new(rows: usize, most: usize) -> Blocks {
        Blocks {
            rows,
            count: rows.div_ceil(most),
        }
    }

    /// The rows of block `i`.
    pub(super) fn rows(&self, i: usize) -> std::ops::Range<usize> {
        self.rows * i / self.count..self.rows * (i + 1) / self.count
    }

    /// Runs `block` for all blocks, of `k` numbers a row: on the pool's threads where that is worth it.
    pub(super) fn run(&self, pool: &Pool, k: usize, block: &(dyn Fn(usize) + Sync)) {
        if self.rows * k < PARALLEL_MIN {
            (0..self.count).for_each(block);
        } else {
            pool.run(self.count, &|i, _| block(i));
        }
    }
}

/// Copies `x [m, k]` into blocks `[k][rows]`.
pub(super) fn turn<'a>(
    pool: &Pool,
    (x, k): (&[f32], usize),
    blocks: Blocks,
    to: &'a mut [f32],
) -> &'a [f32] {
    /// Columns taken at a time: a line of each row, which goes into lines that are still near.
    const COLUMNS: usize = 16;
    let base = Base::new(to);
    let block = |i: usize| {
        let rows = blocks.rows(i);
        let count = rows.len();
        // SAFETY: a block's own part, which is borrowed for as long as the region runs.
        let to = unsafe { std::slice::from_raw_parts_mut(base.at(rows.start * k), count * k) };
        let x = &x[rows.start * k..rows.end * k];
        for (part, to) in to.chunks_mut(count * COLUMNS).enumerate() {
            for i in 0..count {
                let x = &x[i * k + part * COLUMNS..][..to.len() / count];
                for (x, to) in x.iter().zip(to[i..].iter_mut().step_by(count)) {
                    *to = *x;
                }
            }
        }
    };
    blocks.run(pool, k, &block);
    to
}

/// Quantised activations: for each block its scales `[segments][rows]`, offsets `[segments][rows]` and numbers. Second parts
/// follow as further rows of the block.
#[derive(Clone, Copy)]
pub(super) struct Quantised<'a> {
    pub(super) scales: &'a [f32],
    pub(super) offsets: &'a [i32],
    pub(super) numbers: &'a [i8],
}

/// How many words of 4 bytes `m` rows take.
pub(super) fn words(layout: &QuantLayout, m: usize) -> usize {
    m * layout.parts * (2 * layout.segment_count() + layout.columns() / QUAD)
}

/// Quantises `x [m, k]` into [`words`] words.
pub(super) fn quantise<'a>(
    (isa, pool): (Isa, &Pool),
    layout: &QuantLayout,
    (x, k): (&[f32], usize),
    blocks: Blocks,
    to: &'a mut [u32],
) -> Quantised<'a> {
    // Of a row with its parts.
    let segments = layout.parts * layout.segment_count();
    let quads = layout.parts * layout.columns() / QUAD;
    let (scales, rest) = to.split_at_mut(blocks.rows * segments);
    let (offsets, numbers) = rest.split_at_mut(blocks.rows * segments);
    {
        let (scales, offsets) = (Base::new(scales), Base::new(offsets));
        let numbers = Base::new(numbers);
        let block = |i: usize| {
            let rows = blocks.rows(i);
            let part = |base: &Base<u32>, of_row: usize| {
                // SAFETY: a block's own part of each array, which is borrowed for as long as the region runs.
                unsafe {
                    std::slice::from_raw_parts_mut(
                        base.at(rows.start * of_row),
                        rows.len() * of_row,
                    )
                }
            };
            isa.run(Block {
                layout,
                x: &x[rows.start * k..rows.end * k],
                rows: rows.len(),
                scales: part(&scales, segments),
                offsets: part(&offsets, segments),
                numbers: part(&numbers, quads),
            });
        };
        blocks.run(pool, k, &block);
    }
    Quantised {
        scales: bytemuck::cast_slice(scales),
        offsets: bytemuck::cast_slice(offsets),
        numbers: bytemuck::cast_slice(numbers),
    }
}

/// Quantises one block.
struct Block<'a> {
    layout: &'a QuantLayout,
    x: &'a [f32],
    rows: usize,
    scales: &'a mut [u32],
    offsets: &'a mut [u32],
    numbers: &'a mut [u32],
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (layout, k) = (self.layout, self.x.len() / self.rows);
        let rows = layout.parts * self.rows;
        let mut quads = [[0u32; SEGMENT_MAX / QUAD]; 2];
        for (i, mut x) in self.x.chunks_exact(k.max(1)).enumerate() {
            let mut first = 0;
            let widths = (0..layout.groups).flat_map(|group| layout.segments(group));
            for (segment, width) in widths.enumerate() {
                let (values, rest) = x.split_at(width);
                x = rest;
                // SAFETY: the features are the caller's promise.
                let parts = unsafe {
                    if layout.parts == 1 {
                        quantise_segment::<S, 1>(values, &mut quads)
                    } else {
                        quantise_segment::<S, 2>(values, &mut quads)
                    }
                };
                let count = values.len().next_multiple_of(STEP) / QUAD;
                let numbers = &mut self.numbers[first * rows..(first + count) * rows];
                for part in 0..layout.parts {
                    let (scale, sum) = parts[part];
                    let row = part * self.rows + i;
                    self.scales[segment * rows + row] = scale.to_bits();
                    self.offsets[segment * rows + row] = offset(layout, scale, sum);
                    for (to, quad) in numbers[row..].iter_mut().step_by(rows).zip(&quads[part]) {
                        *to = *quad;
                    }
                }
                first += count;
            }
        }
    }
}

/// What a segment's sum of integers becomes, see [`DotTile`](super::super::dot_tile::DotTile).
#[inline(always)]
fn offset(layout: &QuantLayout, scale: f32, sum: i32) -> u32 {
    match layout.offset {
        QuantOffset::Middle => (-i32::from(layout.middle()) * sum).cast_unsigned(),
        QuantOffset::Zeros => (-sum).cast_unsigned() & 0xffff,
        QuantOffset::Mins => (scale * sum as f32).to_bits(),
    }
}

/// Writes the integers of `P` parts, filled up with zeros; gives their scales and sums.
#[inline(always)]
unsafe fn quantise_segment<S: Simd, const P: usize>(
    values: &[f32],
    quads: &mut [[u32; SEGMENT_MAX / QUAD]; 2],
) -> [(f32, i32); 2] {
    let mut padded = [0.0; SEGMENT_MAX];
    let vectors = values.len().div_ceil(LANES);
    let from = if values.len().is_multiple_of(LANES) {
        values.as_ptr()
    } else {
        padded[..values.len()].copy_from_slice(values);
        padded.as_ptr()
    };
    // SAFETY: `from` is good for all vectors, `quads` has room for as many; the features are the caller's promise.
    unsafe {
        let one = S::splat(1.0);
        let (mut largest, mut broken) = (S::zero(), S::zero());
        for i in 0..vectors {
            let x = S::load(from.wrapping_add(i * LANES));
            largest = S::max(S::copy_sign(x, one), largest);
            // NaN of NaN and of infinities, else 0.
            broken = S::fma(x, S::zero(), broken);
        }
        let (largest, broken) = (S::largest(largest), S::sum(broken));
        let inverse = if largest < VANISHING || broken.is_nan() {
            0.0
        } else {
            127.0 / largest
        };
        let (factor, rounder) = (S::splat(inverse), S::splat(ROUNDER));
        let finer = S::splat(FINER);
        let mut sums = [S::zero(); 2];
        for i in 0..vectors {
            let mut steps = S::mul(S::load(from.wrapping_add(i * LANES)), factor);
            for (sums, quads) in sums.iter_mut().zip(quads.iter_mut()).take(P) {
                let rounded = S::add(steps, rounder);
                let whole = S::sub(rounded, rounder);
                *sums = S::add(*sums, whole);
                S::store_low_bytes(
                    quads.as_mut_ptr().wrapping_add(i * LANES / QUAD).cast(),
                    rounded,
                );
                steps = S::mul(S::sub(steps, whole), finer);
            }
        }
        let scale = if inverse == 0.0 {
            broken
        } else {
            largest / 127.0
        };
        // Exact: integers far below 2^24.
        let first = (scale, S::sum(sums[0]) as i32);
        if P == 1 {
            [first; 2]
        } else {
            [first, (scale / FINER, S::sum(sums[1]) as i32)]
        }
    }
}
