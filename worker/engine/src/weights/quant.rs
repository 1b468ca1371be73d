//! Quantised weights: the one logical form (see [`QuantRow`]), and how the numbers of a checkpoint come into it.
//!
//! Owns the choice of scales, which is made while a model is loaded, and the way back to floats. Knows no files, ranks or
//! backends: a backend packs [`QuantRow`]s as it likes.
//!
//! Groups are counted over the columns of the whole matrix. A rank that has some of the columns therefore has the very
//! numbers that one rank alone would have; its first and last group may be parts of whole ones.

use crate::backend::{QuantBits, QuantOffset, QuantRow, QuantShape};
use half::f16;
use std::ops::Range;

/// Columns of a group. Published int4 checkpoints mostly have 128: a scale and a zero point are a twelfth of the bytes of
/// the int4 numbers they are for. Groups of 32 lie closer to the numbers and are a third more bytes, where bytes are time.
pub const GROUP: usize = 128;

/// Counts changes of what [`quantise`] gives, for the numerics id.
pub const VERSION: u32 = 2;

/// How many steps int4's number of the largest magnitude lies below the zero point. At 8 it is met exactly and little is
/// cut off; above, it is cut off to 8, and all others lie closer to their steps. The least squared error decides: on normal
/// numbers it is 0.68 of that of one scale that reaches 7 steps both ways. Further candidates gain less than a hundredth.
const INT4_REACH: [f32; 4] = [8.0, 8.5, 9.0, 9.5];

/// Rounds numbers of magnitude below 2^22 to integers, ties to even, when it is added and subtracted again: vector code on
/// every processor, unlike `round_ties_even`.
const ROUNDER: f32 = 12_582_912.0;

/// Quantises one group: `q` gets as many numbers as `values` has. Gives the group's scale and zero point.
///
/// int8: zero point 0, the largest magnitude is 127 steps. int4: zero point 8, the number of the largest magnitude lies
/// below it, so that a group of which that is positive has a negative scale. The scale is a number that f16 has, the next
/// one away from zero, so that nothing is cut off for its sake. A group with NaN, an infinity or numbers that such a scale
/// does not reach (some 500,000) gets the scale NaN, so that a broken checkpoint shows; one of vanishing numbers (below
/// 1e-36) gets 0.
///
/// # Panics
/// When `q` is shorter than `values`.
pub fn quantise(bits: QuantBits, values: &[f32], q: &mut [i8]) -> (f32, u8) {
    let q = &mut q[..values.len()];
    let larger = |a: f32, b: &f32| if b.abs() > a.abs() { *b } else { a };
    let largest = values.iter().fold(0.0, larger);
    let (zero, least, most) = match bits {
        QuantBits::Int8 => (0, -127.0, 127.0),
        QuantBits::Int4 => (8, -8.0, 7.0),
    };
    let finite = values.iter().all(|x| x.is_finite());
    // Smaller scales have no exact inverse.
    if !finite || largest.abs() < 128.0 * f32::MIN_POSITIVE {
        q.fill(zero);
        return (if finite { 0.0 } else { f32::NAN }, zero as u8);
    }
    let nearest = |steps: f32| steps.clamp(least, most) + ROUNDER - ROUNDER;
    let scale = match bits {
        QuantBits::Int8 => away_to_f16(largest.abs() / 127.0),
        QuantBits::Int4 => {
            let scales = INT4_REACH.map(|reach| away_to_f16(largest / -reach));
            let error = |scale: f32| squares(values, 1.0 / scale, nearest) * (scale * scale);
            let [first, others @ ..] = scales;
            let mut best = (error(first), first);
            for scale in others {
                let error = error(scale);
                if error < best.0 {
                    best = (error, scale);
                }
            }
            best.1
        }
    };
    if !scale.is_finite() {
        q.fill(zero);
        return (f32::NAN, zero as u8);
    }
    let inverse = 1.0 / scale;
    for (q, x) in q.iter_mut().zip(values) {
        *q = nearest(x * inverse) as i8 + zero;
    }
    (scale, zero as u8)
}

/// The nearest number that f16 has and that is not nearer to zero.
fn away_to_f16(x: f32) -> f32 {
    let near = f16::from_f32(x);
    if near.to_f32().abs() < x.abs() {
        f16::from_bits(near.to_bits() + 1).to_f32()
    } else {
        near.to_f32()
    }
}

/// Sum of squares of what rounding takes from the numbers, in steps.
fn squares(values: &[f32], inverse: f32, nearest: impl Fn(f32) -> f32) -> f32 {
    let square = |x: f32| {
        let steps = x * inverse;
        let off = steps - nearest(steps);
        off * off
    };
    // Eight sums side by side, so that it is vector code.
    let (chunks, rest) = values.as_chunks::<8>();
    let mut lanes = [0.0f32; 8];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += square(*x);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|x| square(*x)).sum::<f32>()
}

/// Shape of a quantised matrix of `n` rows that has these columns of the whole one.
#[must_use]
pub const fn shape(bits: QuantBits, n: usize, columns: &Range<usize>) -> QuantShape {
    QuantShape {
        n,
        k: columns.end - columns.start,
        bits,
        group: GROUP,
        lead: columns.start % GROUP,
        offset: QuantOffset::Middle,
        head: false,
    }
}

/// Quantises the columns `columns` of a row of `width` numbers. `read(first, out)` gives the row's numbers from column
/// `first` on; it is asked for the whole of each group that the columns touch.
///
/// # Panics
/// When the columns are outside the row, or `row` is not of the shape that [`shape`] gives.
pub fn quantise_row(
    bits: QuantBits,
    width: usize,
    columns: &Range<usize>,
    read: impl Fn(usize, &mut [f32]),
    row: QuantRow<'_>,
) {
    let (mut values, mut numbers) = ([0.0; GROUP], [0; GROUP]);
    let first = columns.start / GROUP;
    for group in first..columns.end.div_ceil(GROUP) {
        let whole = group * GROUP..width.min((group + 1) * GROUP);
        let values = &mut values[..whole.len()];
        read(whole.start, values);
        let (scale, zero) = quantise(bits, values, &mut numbers);
        (row.scales[group - first], row.zeros[group - first]) = (scale, zero);
        let own = whole.start.max(columns.start)..whole.end.min(columns.end);
        row.q[own.start - columns.start..own.end - columns.start]
            .copy_from_slice(&numbers[own.start - whole.start..own.end - whole.start]);
    }
}

/// The numbers that a quantised row stands for, `[k]`.
pub fn dequantise_row(shape: QuantShape, row: &QuantRow<'_>, out: &mut [f32]) {
    for (j, (out, q)) in out.iter_mut().zip(&*row.q).enumerate() {
        let group = (shape.lead + j) / shape.group;
        *out = match shape.offset {
            QuantOffset::Mins => row.scales[group].mul_add(f32::from(*q), row.mins[group]),
            QuantOffset::Middle | QuantOffset::Zeros => {
                row.scales[group] * (i32::from(*q) - i32::from(row.zeros[group])) as f32
            }
        };
    }
}

#[cfg(test)]
mod tests;
