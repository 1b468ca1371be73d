//! ggml's quantised blocks: a row of a GGUF tensor is whole blocks, one behind the other.
//!
//! Blocks of 32 numbers with one scale are groups of the logical form (see [`QuantRow`]) and are given as they are;
//! blocks of 256 with scales of scales become floats.

use super::form::ReadyForm;
use crate::backend::{QuantBits, QuantOffset, QuantRow};
use gguf::TensorType;
use half::f16;
use std::ops::Range;

#[cfg(test)]
mod tests;

/// Numbers of a block of the simple types.
const SMALL: usize = 32;
/// Numbers of a block of the `K` types.
const LARGE: usize = 256;

/// The logical form of a type's blocks, where they have one.
pub(super) const fn form(tensor_type: TensorType) -> Option<ReadyForm> {
    let (bits, offset) = match tensor_type {
        TensorType::Q8_0 => (QuantBits::Int8, QuantOffset::Middle),
        TensorType::Q4_0 => (QuantBits::Int4, QuantOffset::Middle),
        TensorType::Q4_1 => (QuantBits::Int4, QuantOffset::Mins),
        _ => return None,
    };
    Some(ReadyForm {
        bits,
        group: SMALL,
        offset,
    })
}

/// The numbers from column `first` of a row on.
///
/// # Panics
/// Past the row's end, or for a type that has no blocks.
pub(super) fn dequantise(tensor_type: TensorType, row: &[u8], first: usize, out: &mut [f32]) {
    let decode: fn(&[u8], &mut [f32; LARGE]) = match tensor_type {
        TensorType::Q8_0 => |block, out| small(block, out, q8_0),
        TensorType::Q4_0 => |block, out| small(block, out, q4_0),
        TensorType::Q4_1 => |block, out| small(block, out, q4_1),
        TensorType::Q4_K => q4_k,
        TensorType::Q6_K => q6_k,
        other => panic!("{other} has no blocks"),
    };
    let (len, bytes) = sizes(tensor_type);
    let mut numbers = [0.0; LARGE];
    let (mut at, mut rest) = (first, out);
    while !rest.is_empty() {
        let (block, inside) = (at / len, at % len);
        decode(&row[block * bytes..][..bytes], &mut numbers);
        let (part, after) = rest.split_at_mut(rest.len().min(len - inside));
        part.copy_from_slice(&numbers[inside..inside + part.len()]);
        at += part.len();
        rest = after;
    }
}

/// The columns `columns` of a row as they are quantised.
///
/// # Panics
/// Past the row's end, or for a type that has no [`form`].
pub(super) fn read_quantised(
    tensor_type: TensorType,
    row: &[u8],
    columns: &Range<usize>,
    out: QuantRow<'_>,
) {
    let (_, bytes) = sizes(tensor_type);
    let first = columns.start / SMALL;
    for group in first..columns.end.div_ceil(SMALL) {
        let block = Small::of(tensor_type, &row[group * bytes..][..bytes]);
        out.scales[group - first] = block.scale;
        out.zeros[group - first] = block.zero;
        if let Some(min) = block.min {
            out.mins[group - first] = min;
        }
        let start = group * SMALL;
        let own = start.max(columns.start)..(start + SMALL).min(columns.end);
        out.q[own.start - columns.start..own.end - columns.start]
            .copy_from_slice(&block.q[own.start - start..own.end - start]);
    }
}

/// Numbers and bytes of a type's blocks.
fn sizes(tensor_type: TensorType) -> (usize, usize) {
    let elements = tensor_type.block_elements().unwrap_or(1);
    let bytes = tensor_type.block_bytes().unwrap_or(1);
    (elements as usize, bytes as usize)
}

/// A block of one scale.
struct Small {
    q: [i8; SMALL],
    scale: f32,
    zero: u8,
    min: Option<f32>,
}

impl Small {
    fn of(tensor_type: TensorType, block: &[u8]) -> Small {
        match tensor_type {
            TensorType::Q8_0 => q8_0(block),
            TensorType::Q4_0 => q4_0(block),
            TensorType::Q4_1 => q4_1(block),
            other => panic!("blocks of {other} have no logical form"),
        }
    }
}

/// A scale, then 32 numbers.
fn q8_0(block: &[u8]) -> Small {
    Small {
        q: std::array::from_fn(|i| block[2 + i] as i8),
        scale: number(block),
        zero: 0,
        min: None,
    }
}

/// A scale, then 16 bytes of nibbles.
fn q4_0(block: &[u8]) -> Small {
    Small {
        q: nibbles(&block[2..]),
        scale: number(block),
        zero: 8,
        min: None,
    }
}

/// A scale, the minimum, then 16 bytes of nibbles.
fn q4_1(block: &[u8]) -> Small {
    Small {
        q: nibbles(&block[4..]),
        scale: number(block),
        zero: 0,
        min: Some(number(&block[2..])),
    }
}

fn number(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The first half of the numbers are the low nibbles.
fn nibbles(bytes: &[u8]) -> [i8; SMALL] {
    std::array::from_fn(|i| match i {
        0..16 => (bytes[i] & 15) as i8,
        _ => (bytes[i - 16] >> 4) as i8,
    })
}

fn small(block: &[u8], out: &mut [f32; LARGE], read: fn(&[u8]) -> Small) {
    let Small {
        q,
        scale,
        zero,
        min,
    } = read(block);
    for (out, q) in out.iter_mut().zip(q) {
        *out = match min {
            Some(min) => scale.mul_add(f32::from(q), min),
            None => scale * f32::from(i16::from(q) - i16::from(zero)),
        };
    }
}

/// Scale and minimum of the block; six bits of each for eight groups of 32, in 12 bytes; then nibbles, 64 numbers in 32
/// bytes, the low ones first.
fn q4_k(block: &[u8], out: &mut [f32; LARGE]) {
    let (scale, min) = (number(block), number(&block[2..]));
    let (packed, nibbles) = (&block[4..16], &block[16..144]);
    for group in 0..8 {
        let (steps, least) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ),
        };
        let (step, least) = (scale * f32::from(steps), min * f32::from(least));
        let bytes = &nibbles[group / 2 * 32..][..32];
        for (out, byte) in out[group * 32..][..32].iter_mut().zip(bytes) {
            let q = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            *out = step * f32::from(q) - least;
        }
    }
}

/// Two halves of 128 numbers, of which 64 bytes are the low four bits and 32 the high two; then eight bits of scale for each
/// 16 numbers, and the block's scale.
fn q6_k(block: &[u8], out: &mut [f32; LARGE]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (scales, scale) = (&rest[..16], number(&rest[16..]));
    for (i, out) in out.iter_mut().enumerate() {
        let (half, run, j) = (i / 128, i % 128 / 32, i % 32);
        let low = low[half * 64 + run % 2 * 32 + j] >> (run / 2 * 4) & 15;
        let high = high[half * 32 + j] >> (run * 2) & 3;
        let q = f32::from((low | high << 4) as i8 - 32);
        *out = scale * f32::from(scales[i / 16] as i8) * q;
    }
}
