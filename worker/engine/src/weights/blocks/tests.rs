//! Blocks made by hand, whose numbers follow from the format's description and not from the code here.

use super::*;
use crate::weights::quant::dequantise_row;

fn f16s(numbers: &[f32]) -> Vec<u8> {
    let bytes = numbers.iter().map(|x| f16::from_f32(*x).to_le_bytes());
    bytes.flatten().collect()
}

fn all(tensor_type: TensorType, row: &[u8], len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    dequantise(tensor_type, row, 0, &mut out);
    out
}

/// A row of two blocks: scale 0.5, numbers -16 to 15 (of bytes); scale -2, all 127.
fn two_q8_0() -> Vec<u8> {
    let counted = (0..32).map(|i| (i - 16) as i8 as u8).collect();
    [f16s(&[0.5]), counted, f16s(&[-2.0]), vec![127; 32]].concat()
}

/// Nibbles 0 to 15 for the first 16 numbers, 15 to 0 for the others.
fn counted_nibbles() -> Vec<u8> {
    (0..16).map(|i| i | (15 - i) << 4).collect()
}

#[test]
fn q8_0_is_a_scale_and_32_bytes() {
    let numbers = all(TensorType::Q8_0, &two_q8_0(), 64);
    let expected = (0..32).map(|i| 0.5 * (i - 16) as f32);
    assert_eq!(numbers[..32], expected.collect::<Vec<_>>());
    assert_eq!(numbers[32..], [-254.0; 32]);
}

#[test]
fn q4_0_counts_from_8_and_q4_1_from_its_minimum() {
    let steps = || (0..16).chain((0..16).rev());
    let block = [f16s(&[0.25]), counted_nibbles()].concat();
    let expected: Vec<f32> = steps().map(|q| 0.25 * (q - 8) as f32).collect();
    assert_eq!(all(TensorType::Q4_0, &block, 32), expected);
    let block = [f16s(&[0.25, -3.0]), counted_nibbles()].concat();
    let expected: Vec<f32> = steps().map(|q| 0.25 * q as f32 - 3.0).collect();
    assert_eq!(all(TensorType::Q4_1, &block, 32), expected);
}

#[test]
fn q4_k_has_scales_of_six_bits_for_each_32_numbers() {
    // Scales 1, 2, 3, 63, then 17, 18, 19, 63; minima 4, 5, 6, 7, then 33, 34, 35, 48.
    let scales = [1u8, 2, 3, 63, 17, 18, 19, 63];
    let mins = [4u8, 5, 6, 7, 33, 34, 35, 48];
    let mut packed = vec![
        // Low six bits, and bits 4 and 5 of the later four: 17 = 0b01_0001.
        0b01_000001,
        0b01_000010,
        0b01_000011,
        0b11_111111,
        // 33 = 0b10_0001, 48 = 0b11_0000.
        0b10_000100,
        0b10_000101,
        0b10_000110,
        0b11_000111,
    ];
    // Low four bits of the later scales below those of the minima.
    packed.extend([0x11u8, 0x22, 0x33, 0x0f]);
    // Numbers 0..=31 of each pair of groups are the low nibbles, which count up; the high ones are all 5.
    let nibbles: Vec<u8> = (0..128).map(|i| (i % 16) as u8 | 5 << 4).collect();
    let block = [f16s(&[0.5, 0.25]), packed, nibbles].concat();
    let numbers = all(TensorType::Q4_K, &block, 256);
    for (i, number) in numbers.iter().enumerate() {
        let group = i / 32;
        let q = if group % 2 == 0 { i % 16 } else { 5 } as f32;
        let expected = 0.5 * f32::from(scales[group]) * q - 0.25 * f32::from(mins[group]);
        assert_eq!(*number, expected, "number {i}");
    }
}

#[test]
fn q6_k_has_a_scale_of_eight_bits_for_each_16_numbers() {
    // Number i is to be (i % 64) - 32 steps.
    let q = |i: usize| (i % 64) as u8;
    let mut low = vec![0; 128];
    let mut high = vec![0; 64];
    for half in 0..2 {
        for j in 0..32 {
            let at = |run: usize| q(half * 128 + run * 32 + j);
            low[half * 64 + j] = at(0) & 15 | (at(2) & 15) << 4;
            low[half * 64 + 32 + j] = at(1) & 15 | (at(3) & 15) << 4;
            high[half * 32 + j] = at(0) >> 4 | at(1) >> 4 << 2 | at(2) >> 4 << 4 | at(3) >> 4 << 6;
        }
    }
    let scales: Vec<u8> = (0..16).map(|i| (i as i8 - 8) as u8).collect();
    let block = [low, high, scales, f16s(&[0.125])].concat();
    assert_eq!(block.len(), 210);
    for (i, number) in all(TensorType::Q6_K, &block, 256).iter().enumerate() {
        let expected =
            0.125 * (i as f32 / 16.0).floor().mul_add(1.0, -8.0) * (f32::from(q(i)) - 32.0);
        assert_eq!(*number, expected, "number {i}");
    }
}

#[test]
fn a_part_of_a_row_is_that_part_of_the_whole() {
    let row = two_q8_0();
    let whole = all(TensorType::Q8_0, &row, 64);
    for (first, len) in [(0, 1), (5, 27), (31, 2), (20, 44), (63, 1)] {
        let mut out = vec![0.0; len];
        dequantise(TensorType::Q8_0, &row, first, &mut out);
        assert_eq!(out, whole[first..first + len]);
    }
}

#[test]
fn quantised_columns_stand_for_the_numbers_of_the_blocks() {
    let nibbles = counted_nibbles;
    let q4_0 = [f16s(&[0.25]), nibbles(), f16s(&[-1.5]), nibbles()].concat();
    let q4_1 = [f16s(&[0.25, -3.0]), nibbles(), f16s(&[0.5, 7.0]), nibbles()].concat();
    for (tensor_type, row) in [
        (TensorType::Q8_0, two_q8_0()),
        (TensorType::Q4_0, q4_0),
        (TensorType::Q4_1, q4_1),
    ] {
        let whole = all(tensor_type, &row, 64);
        for columns in [0..64, 0..32, 40..64, 3..50, 31..33] {
            let shape = form(tensor_type).expect("a form").shape(1, &columns);
            let mut out = QuantRow {
                q: &mut vec![0; shape.k],
                scales: &mut vec![0.0; shape.groups()],
                zeros: &mut vec![0; shape.groups()],
                mins: &mut vec![0.0; shape.mins()],
            };
            read_quantised(tensor_type, &row, &columns, out.lend());
            let mut numbers = vec![0.0; shape.k];
            dequantise_row(shape, &out, &mut numbers);
            assert_eq!(numbers, whole[columns], "{tensor_type}");
        }
    }
}
