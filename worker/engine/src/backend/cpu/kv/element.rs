//! The number formats of the cache: how a panel of each lies, and how one token's key and value get into it.
//!
//! Plain loops without branches on numbers: they are compiled inside a kernel, with the instructions of its path.

use super::PANEL;
use crate::backend::quantise_kv;
use crate::plan::BLOCK_TOKENS;

/// A number format of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Format {
    F32,
    Bf16,
    /// As bf16, for paths that multiply pairs of them.
    Pairs,
    Int8,
}

/// A number of the cache. A panel has 16 rows of `k` numbers each:
/// * f32, int8: `[k][16 rows]`;
/// * bf16: `[k / 2][16 rows][2]`, so that a shift and a mask turn 16 pairs into two vectors. An odd `k` ends in a pair
///   whose second half is not read.
pub(in super::super) trait KvElement: bytemuck::Pod + Send + Sync {
    /// What it is.
    const FORMAT: Format;
    /// Numbers of a block's scales: an f32 per token for K and for V, or none.
    const SCALES_LEN: usize;

    /// Numbers in a panel of this `k`.
    fn panel_len(k: usize) -> usize {
        match Self::FORMAT {
            Format::F32 | Format::Int8 => PANEL * k,
            Format::Bf16 | Format::Pairs => PANEL * k.next_multiple_of(2),
        }
    }
}

/// A number of the cache as steps write it.
pub(in super::super) trait KvWrite: KvElement {
    /// Writes row `slot` of a panel of keys, rounded to nearest, ties to even. Gives its scale.
    fn write_key(panel: &mut [Self], slot: usize, key: &[f32]) -> f32;

    /// Writes number `slot` of all rows of a block's panels of values, likewise.
    fn write_value(panels: &mut [Self], slot: usize, value: &[f32]) -> f32;
}

impl KvElement for f32 {
    const FORMAT: Format = Format::F32;
    const SCALES_LEN: usize = 0;
}

impl KvWrite for f32 {
    #[inline(always)]
    fn write_key(panel: &mut [f32], slot: usize, key: &[f32]) -> f32 {
        for (column, x) in panel.chunks_exact_mut(PANEL).zip(key) {
            column[slot] = *x;
        }
        1.0
    }

    #[inline(always)]
    fn write_value(panels: &mut [f32], slot: usize, value: &[f32]) -> f32 {
        let panels = panels.chunks_exact_mut(PANEL * BLOCK_TOKENS);
        for (panel, x) in panels.zip(value.chunks(PANEL)) {
            panel[slot * PANEL..][..x.len()].copy_from_slice(x);
        }
        1.0
    }
}

/// bf16 as its bits.
impl KvElement for u16 {
    const FORMAT: Format = Format::Bf16;
    const SCALES_LEN: usize = 0;
}

/// bf16 as its bits, seen by a path that multiplies pairs.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub(in super::super) struct Paired(u16);

impl KvElement for Paired {
    const FORMAT: Format = Format::Pairs;
    const SCALES_LEN: usize = 0;
}

impl KvWrite for u16 {
    #[inline(always)]
    fn write_key(panel: &mut [u16], slot: usize, key: &[f32]) -> f32 {
        let pairs: &mut [u32] = bytemuck::cast_slice_mut(panel);
        for (column, x) in pairs.chunks_exact_mut(PANEL).zip(key.chunks(2)) {
            let second = x.get(1).map_or(0, |x| round_bf16(*x));
            column[slot] = round_bf16(x[0]) | second << 16;
        }
        1.0
    }

    #[inline(always)]
    fn write_value(panels: &mut [u16], slot: usize, value: &[f32]) -> f32 {
        let pairs: &mut [u32] = bytemuck::cast_slice_mut(panels);
        let (shift, other) = match slot % 2 {
            0 => (0, 0xffff_0000),
            _ => (16, 0xffff),
        };
        let panels = pairs.chunks_exact_mut(PANEL * BLOCK_TOKENS / 2);
        for (panel, x) in panels.zip(value.chunks(PANEL)) {
            for (pair, x) in panel[slot / 2 * PANEL..][..PANEL].iter_mut().zip(x) {
                *pair = *pair & other | round_bf16(*x) << shift;
            }
        }
        1.0
    }
}

impl KvElement for i8 {
    const FORMAT: Format = Format::Int8;
    const SCALES_LEN: usize = 2 * BLOCK_TOKENS * size_of::<f32>();
}

impl KvWrite for i8 {
    #[inline(always)]
    fn write_key(panel: &mut [i8], slot: usize, key: &[f32]) -> f32 {
        let columns = panel
            .chunks_exact_mut(PANEL)
            .map(|column| &mut column[slot]);
        quantise_kv(key, columns)
    }

    #[inline(always)]
    fn write_value(panels: &mut [i8], slot: usize, value: &[f32]) -> f32 {
        let panels = panels.chunks_exact_mut(PANEL * BLOCK_TOKENS);
        quantise_kv(
            value,
            panels.flat_map(|panel| &mut panel[slot * PANEL..][..PANEL]),
        )
    }
}

/// The nearest bf16, ties to even, as its bits; NaN stays one.
#[inline(always)]
fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() {
        bits >> 16 | 0x40
    } else {
        rounded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn bf16_is_rounded_as_elsewhere() {
        let odd = [
            0.0,
            -0.0,
            1.0,
            f32::MAX,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1e-40,
        ];
        let many = (0..1 << 16).map(|i: u32| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        for x in odd.into_iter().chain(many) {
            let expected = u32::from(bf16::from_f32(x).to_bits());
            assert_eq!(round_bf16(x), expected, "{x}");
        }
    }
}
