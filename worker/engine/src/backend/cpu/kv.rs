//! The memory of K and V: blocks of 16 tokens, in panels that attention multiplies with like weights.
//!
//! Owns the layout: `[layer][KV head][block]`, and in each place one panel of keys (16 tokens are its rows, the head's
//! width its `k`) and the panels of values (16 numbers of the head are the rows, the 16 tokens the `k`). Widths that
//! are no multiple of 16 are filled up in the values. Knows no sequence: which block is whose, the batch says.

use super::attention::HEAD_WIDTH_MAX;
use super::memory::Memory;
use super::pool::Pool;
use super::simd::LANES;
use half::bf16;

use crate::backend::{Batch, DeviceError, Heads, KvDtype, KvShape};
use crate::plan::BLOCK_TOKENS;

/// Rows of a panel.
pub(super) const PANEL: usize = LANES;
// A block's tokens are the rows of one panel.
const _: () = assert!(BLOCK_TOKENS == PANEL);

/// Numbers written in one step worth waking a helper for.
const PARALLEL_MIN: usize = 32 << 10;

/// The K and V of all layers and blocks.
#[derive(Debug)]
pub struct CpuKv {
    pub(super) shape: KvShape,
    pub(super) values: KvValues,
}

/// The pool's memory, by its format.
#[derive(Debug)]
pub(super) enum KvValues {
    F32(Memory<f32>),
    Bf16(Memory<u16>),
}

/// A number format of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    Bf16,
}

/// A number of the cache. A panel has 16 rows of `k` numbers each:
/// * f32: `[k][16 rows]`;
/// * bf16: `[k / 2][16 rows][2]`, so that a shift and a mask turn 16 pairs into two vectors. An odd `k` ends in a pair
///   whose second half is not read.
pub(super) trait KvElement: bytemuck::Pod + Send + Sync {
    /// What it is.
    const FORMAT: Format;

    /// Rounds to nearest, ties to even.
    fn round(value: f32) -> Self;

    /// Numbers in a panel of this `k`.
    fn panel_len(k: usize) -> usize {
        match Self::FORMAT {
            Format::F32 => PANEL * k,
            Format::Bf16 => PANEL * k.next_multiple_of(2),
        }
    }

    /// Where in a panel the number `(row, k)` lies.
    #[inline(always)]
    fn place(row: usize, k: usize) -> usize {
        match Self::FORMAT {
            Format::F32 => k * PANEL + row,
            Format::Bf16 => (k / 2 * PANEL + row) * 2 + k % 2,
        }
    }
}

impl KvElement for f32 {
    const FORMAT: Format = Format::F32;

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
}

/// bf16 as its bits.
impl KvElement for u16 {
    const FORMAT: Format = Format::Bf16;

    #[inline(always)]
    fn round(value: f32) -> u16 {
        bf16::from_f32(value).to_bits()
    }
}

/// One head's blocks of a layer.
#[derive(Clone, Copy)]
pub(super) struct HeadBlocks<'a, E> {
    values: &'a [E],
    width: usize,
}

impl CpuKv {
    /// Memory for the pool, see [`crate::backend::Backend::alloc_kv`].
    pub(super) fn new(shape: KvShape) -> Result<CpuKv, DeviceError> {
        if shape.head_width > HEAD_WIDTH_MAX {
            return Err(DeviceError::Unsupported(format!(
                "heads of {} numbers: a CPU has attention for {HEAD_WIDTH_MAX} at most",
                shape.head_width
            )));
        }
        let places = shape.layers * shape.heads * shape.blocks;
        let values = match shape.dtype {
            KvDtype::F32 => {
                KvValues::F32(Memory::new(places * place_len::<f32>(shape.head_width))?)
            }
            KvDtype::Bf16 => {
                KvValues::Bf16(Memory::new(places * place_len::<u16>(shape.head_width))?)
            }
        };
        Ok(CpuKv { shape, values })
    }

    /// See [`crate::backend::Backend::write_kv`].
    pub(super) fn write(
        &mut self,
        pool: &Pool,
        batch: &Batch,
        heads: Heads,
        qkv: &[f32],
        layer: usize,
    ) {
        assert!(
            layer < self.shape.layers
                && heads.kv == self.shape.heads
                && heads.width == self.shape.head_width
        );
        match &mut self.values {
            KvValues::F32(values) => {
                write(pool, self.shape, values.as_mut(), batch, heads, qkv, layer)
            }
            KvValues::Bf16(values) => {
                write(pool, self.shape, values.as_mut(), batch, heads, qkv, layer)
            }
        }
    }
}

/// The blocks of one head in one layer.
pub(super) fn head_blocks<E: KvElement>(
    shape: KvShape,
    values: &[E],
    layer: usize,
    head: usize,
) -> HeadBlocks<'_, E> {
    let len = shape.blocks * place_len::<E>(shape.head_width);
    HeadBlocks {
        values: &values[(layer * shape.heads + head) * len..][..len],
        width: shape.head_width,
    }
}

impl<'a, E: KvElement> HeadBlocks<'a, E> {
    /// The panel of a block's keys, then its panels of values.
    pub(super) fn block(self, block: u32) -> (&'a [E], &'a [E]) {
        let len = place_len::<E>(self.width);
        self.values[block as usize * len..][..len].split_at(E::panel_len(self.width))
    }
}

/// A head's width, filled up to whole panels of values.
pub(super) fn value_width(head_width: usize) -> usize {
    head_width.next_multiple_of(PANEL)
}

/// Bytes of one block over all layers, filled up to whole panels.
pub(super) fn block_bytes(shape: KvShape) -> u64 {
    let numbers = match shape.dtype {
        KvDtype::F32 => place_len::<f32>(shape.head_width),
        KvDtype::Bf16 => place_len::<u16>(shape.head_width),
    };
    (shape.layers * shape.heads * numbers * shape.dtype.bytes()) as u64
}

/// Numbers of one block of one head.
fn place_len<E: KvElement>(head_width: usize) -> usize {
    E::panel_len(head_width) + value_width(head_width) / PANEL * E::panel_len(BLOCK_TOKENS)
}

fn write<E: KvElement>(
    pool: &Pool,
    shape: KvShape,
    values: &mut [E],
    batch: &Batch,
    heads: Heads,
    qkv: &[f32],
    layer: usize,
) {
    let (d, place_len) = (heads.width, place_len::<E>(heads.width));
    let head_len = shape.blocks * place_len;
    let layer = &mut values[layer * shape.heads * head_len..][..shape.heads * head_len];
    let write_head = |head: usize, values: &mut [E], _: usize| {
        for span in &batch.spans {
            let blocks = batch.blocks_of(span);
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.position + i;
                let slot = position % BLOCK_TOKENS;
                let block = blocks[position / BLOCK_TOKENS] as usize;
                let row = &qkv[row * heads.qkv_width()..][..heads.qkv_width()];
                let key = &row[heads.q_width() + head * d..][..d];
                let value = &row[heads.q_width() + heads.kv_width() + head * d..][..d];
                let (keys, values) =
                    values[block * place_len..][..place_len].split_at_mut(E::panel_len(d));
                for (i, x) in key.iter().enumerate() {
                    keys[E::place(slot, i)] = E::round(*x);
                }
                for (panel, x) in values
                    .chunks_exact_mut(E::panel_len(BLOCK_TOKENS))
                    .zip(value.chunks(PANEL))
                {
                    for (i, x) in x.iter().enumerate() {
                        panel[E::place(i, slot)] = E::round(*x);
                    }
                }
            }
        }
    };
    if batch.len() * heads.kv_width() < PARALLEL_MIN {
        for (head, values) in layer.chunks_exact_mut(head_len).enumerate() {
            write_head(head, values, 0);
        }
    } else {
        pool.run_chunks(layer, head_len, &write_head);
    }
}
