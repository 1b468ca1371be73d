//! Numbers as blocks of a type, in the simplest way that gives valid ones: nothing here is chosen for closeness.

use crate::tensor::TensorType;
use half::{bf16, f16};

/// The numbers as bytes of a type.
///
/// # Panics
/// Where the numbers do not fill whole blocks, or the type is not supported.
#[must_use]
pub fn encode(tensor_type: TensorType, numbers: &[f32]) -> Vec<u8> {
    let block = tensor_type.block_elements().expect("a supported type") as usize;
    assert!(numbers.len().is_multiple_of(block), "{tensor_type}");
    let mut out = Vec::new();
    for numbers in numbers.chunks_exact(block) {
        match tensor_type {
            TensorType::F32 => out.extend(numbers[0].to_le_bytes()),
            TensorType::F16 => put_f16(&mut out, numbers[0]),
            TensorType::Bf16 => out.extend(bf16::from_f32(numbers[0]).to_le_bytes()),
            TensorType::Q8_0 => q8_0(numbers, &mut out),
            TensorType::Q4_0 => q4_0(numbers, &mut out),
            TensorType::Q4_1 => q4_1(numbers, &mut out),
            TensorType::Q4_K => q4_k(numbers, &mut out),
            TensorType::Q6_K => q6_k(numbers, &mut out),
            TensorType::Other(_) => unreachable!("it has no blocks"),
        }
    }
    out
}

fn put_f16(out: &mut Vec<u8>, number: f32) {
    out.extend(f16::from_f32(number).to_le_bytes());
}

/// The number of steps nearest to `x`, which a step of 0 makes 0.
fn steps(x: f32, step: f32, least: f32, most: f32) -> i8 {
    if step == 0.0 {
        return least.max(0.0) as i8;
    }
    (x / step).round().clamp(least, most) as i8
}

/// A number that f16 has.
fn as_f16(number: f32) -> f32 {
    f16::from_f32(number).to_f32()
}

fn largest(numbers: &[f32]) -> f32 {
    let larger = |a: f32, b: &f32| if b.abs() > a.abs() { *b } else { a };
    numbers.iter().fold(0.0, larger)
}

fn ends(numbers: &[f32]) -> (f32, f32) {
    let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
    let most = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (least, most)
}

fn q8_0(numbers: &[f32], out: &mut Vec<u8>) {
    let step = as_f16(largest(numbers).abs() / 127.0);
    put_f16(out, step);
    out.extend(numbers.iter().map(|x| steps(*x, step, -127.0, 127.0) as u8));
}

/// The halves of a block share bytes: the first half has the low nibbles.
fn put_nibbles(out: &mut Vec<u8>, q: &[u8]) {
    let (low, high) = q.split_at(q.len() / 2);
    out.extend(low.iter().zip(high).map(|(low, high)| low | high << 4));
}

fn q4_0(numbers: &[f32], out: &mut Vec<u8>) {
    let step = as_f16(largest(numbers) / -8.0);
    put_f16(out, step);
    let q = numbers
        .iter()
        .map(|x| (steps(*x, step, -8.0, 7.0) + 8) as u8);
    put_nibbles(out, &q.collect::<Vec<_>>());
}

fn q4_1(numbers: &[f32], out: &mut Vec<u8>) {
    let (least, most) = ends(numbers);
    let (step, least) = (as_f16((most - least) / 15.0), as_f16(least));
    put_f16(out, step);
    put_f16(out, least);
    let q = numbers
        .iter()
        .map(|x| steps(*x - least, step, 0.0, 15.0) as u8);
    put_nibbles(out, &q.collect::<Vec<_>>());
}

/// Eight groups of 32, whose scales and minima are six bits of the block's.
fn q4_k(numbers: &[f32], out: &mut Vec<u8>) {
    let groups: Vec<(f32, f32)> = numbers
        .chunks_exact(32)
        .map(|group| {
            let (least, most) = ends(group);
            let least = least.min(0.0);
            ((most.max(least) - least) / 15.0, -least)
        })
        .collect();
    let of = |read: fn(&(f32, f32)) -> f32| groups.iter().map(read).fold(0.0, f32::max) / 63.0;
    let (scale, min) = (as_f16(of(|group| group.0)), as_f16(of(|group| group.1)));
    put_f16(out, scale);
    put_f16(out, min);
    let six = |x: f32, step: f32| steps(x, step, 0.0, 63.0) as u8;
    let scales: Vec<u8> = groups.iter().map(|group| six(group.0, scale)).collect();
    let mins: Vec<u8> = groups.iter().map(|group| six(group.1, min)).collect();
    // Twelve bytes: six bits of the first four scales and minima, above them two bits of the last four, whose low four
    // bits are in the last four bytes.
    out.extend((0..4).map(|i| scales[i] | (scales[i + 4] >> 4) << 6));
    out.extend((0..4).map(|i| mins[i] | (mins[i + 4] >> 4) << 6));
    out.extend((0..4).map(|i| scales[i + 4] & 15 | mins[i + 4] << 4));
    for pair in 0..4 {
        let q: Vec<u8> = (pair * 64..pair * 64 + 64)
            .map(|i| {
                let group = i / 32;
                let (step, least) = (
                    scale * f32::from(scales[group]),
                    min * f32::from(mins[group]),
                );
                steps(numbers[i] + least, step, 0.0, 15.0) as u8
            })
            .collect();
        put_nibbles(out, &q);
    }
}

/// Sixteen groups of 16, whose scales are eight bits of the block's.
fn q6_k(numbers: &[f32], out: &mut Vec<u8>) {
    let groups = numbers.chunks_exact(16);
    let wanted: Vec<f32> = groups.map(|group| largest(group).abs() / 31.0).collect();
    let scale = as_f16(wanted.iter().copied().fold(0.0, f32::max) / 127.0);
    let scales: Vec<i8> = wanted
        .iter()
        .map(|x| steps(*x, scale, 0.0, 127.0))
        .collect();
    let q: Vec<u8> = (0..256)
        .map(|i| (steps(numbers[i], scale * f32::from(scales[i / 16]), -32.0, 31.0) + 32) as u8)
        .collect();
    // Per half: four runs of 32 share 64 bytes of low nibbles and 32 of two high bits.
    let halves = || q.chunks_exact(128);
    for half in halves() {
        out.extend((0..64).map(|i| half[i] & 15 | half[i + 64] << 4));
    }
    for half in halves() {
        out.extend(
            (0..32)
                .map(|i| (0..4).fold(0, |bits, run| bits | half[run * 32 + i] >> 4 << (2 * run))),
        );
    }
    out.extend(scales.iter().map(|scale| *scale as u8));
    put_f16(out, scale);
}
