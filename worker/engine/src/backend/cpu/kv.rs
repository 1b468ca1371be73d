//! The memory of K and V: blocks of 16 tokens, in panels that attention multiplies with.
//!
//! Owns the layout: `[layer][KV head][block]`, and in each place one panel of keys (16 tokens are its rows, the head's
//! width its `k`), the panels of values (16 numbers of the head are the rows, the 16 tokens the `k`) and, where numbers
//! are quantised, a scale per token for its key and one for its value. Widths that are no multiple of 16 are filled up
//! in the values. Owns the step's writing too: each head's columns are rotated and written in one pass. Knows no
//! sequence: which block is whose, the batch says.

use super::attention::HEAD_WIDTH_MAX;
use super::isa::{Isa, Kernel};
use super::memory::Memory;
use super::pool::{Base, Pool};
use super::simd::{LANES, Simd};
use crate::backend::{Batch, DeviceError, Heads, KvDtype, KvShape};
use crate::plan::BLOCK_TOKENS;
use element::KvWrite;
pub(super) use element::{Format, KvElement, Paired};

mod element;

/// Rows of a panel.
pub(super) const PANEL: usize = LANES;
// A block's tokens are the rows of one panel.
const _: () = assert!(BLOCK_TOKENS == PANEL);

/// Numbers written in one step worth waking a helper for.
const PARALLEL_MIN: usize = 16 << 10;

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
    Int8(Memory<i8>),
}

/// One head's blocks of a layer.
#[derive(Clone, Copy)]
pub(super) struct HeadBlocks<'a, E> {
    values: &'a [E],
    width: usize,
}

/// One block of one head.
pub(super) struct HeadBlock<'a, E> {
    /// The panel of its keys.
    pub(super) keys: &'a [E],
    /// The panels of its values.
    pub(super) values: &'a [E],
    /// A scale per token for its key, then one for its value; empty where numbers are not quantised.
    pub(super) scales: &'a [f32],
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
            KvDtype::Int8 => {
                KvValues::Int8(Memory::new(places * place_len::<i8>(shape.head_width))?)
            }
        };
        Ok(CpuKv { shape, values })
    }

    /// See [`crate::backend::Backend::write_kv`].
    pub(super) fn write(&mut self, (isa, pool): (Isa, &Pool), step: Rows<'_>, layer: usize) {
        assert!(
            layer < self.shape.layers
                && step.heads.kv == self.shape.heads
                && step.heads.width == self.shape.head_width
        );
        match &mut self.values {
            KvValues::F32(values) => write(isa, pool, self.shape, values.as_mut(), step, layer),
            KvValues::Bf16(values) => write(isa, pool, self.shape, values.as_mut(), step, layer),
            KvValues::Int8(values) => write(isa, pool, self.shape, values.as_mut(), step, layer),
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
    /// What a block holds.
    pub(super) fn block(self, block: u32) -> HeadBlock<'a, E> {
        let len = place_len::<E>(self.width);
        let place = &self.values[block as usize * len..][..len];
        let (keys, rest) = place.split_at(E::panel_len(self.width));
        let (values, scales) = rest.split_at(values_len::<E>(self.width));
        HeadBlock {
            keys,
            values,
            scales: bytemuck::cast_slice(scales),
        }
    }
}

/// A head's width, filled up to whole panels of values.
pub(super) fn value_width(head_width: usize) -> usize {
    head_width.next_multiple_of(PANEL)
}

/// Bytes of one block over all layers, filled up to whole panels.
pub(super) fn block_bytes(shape: KvShape) -> u64 {
    let bytes = match shape.dtype {
        KvDtype::F32 => 4 * place_len::<f32>(shape.head_width),
        KvDtype::Bf16 => 2 * place_len::<u16>(shape.head_width),
        KvDtype::Int8 => place_len::<i8>(shape.head_width),
    };
    (shape.layers * shape.heads * bytes) as u64
}

/// Numbers of one block of one head.
fn place_len<E: KvElement>(head_width: usize) -> usize {
    E::panel_len(head_width) + values_len::<E>(head_width) + E::SCALES_LEN
}

/// Numbers of one block's panels of values.
fn values_len<E: KvElement>(head_width: usize) -> usize {
    value_width(head_width) / PANEL * E::panel_len(BLOCK_TOKENS)
}

/// A step's rows, to be rotated and written.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) batch: &'a Batch,
    pub(super) heads: Heads,
    /// `[tokens, (q + 2 kv) * d]`, and nobody else's while it is written.
    pub(super) qkv: &'a Base<f32>,
    /// `[tokens, d]`, if there is a rotation.
    pub(super) cos_sin: Option<&'a [f32]>,
}

fn write<E: KvWrite>(
    isa: Isa,
    pool: &Pool,
    shape: KvShape,
    values: &mut [E],
    step: Rows<'_>,
    layer: usize,
) {
    let head_len = shape.blocks * place_len::<E>(step.heads.width);
    let layer = &mut values[layer * shape.heads * head_len..][..shape.heads * head_len];
    let heads = if step.batch.len() * step.heads.qkv_width() < PARALLEL_MIN {
        shape.heads
    } else {
        1
    };
    pool.run_chunks(layer, heads * head_len, &|index, values, _| {
        for (i, values) in values.chunks_exact_mut(head_len).enumerate() {
            let head = index * heads + i;
            isa.run(WriteHead { step, head, values });
        }
    });
}

/// Rotates the columns of one KV head and the query heads that share it, and writes the head's K and V.
struct WriteHead<'a, E> {
    step: Rows<'a>,
    head: usize,
    /// The head's blocks.
    values: &'a mut [E],
}

impl<E: KvWrite> Kernel for WriteHead<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Rows {
            batch,
            heads,
            qkv,
            cos_sin,
        } = self.step;
        let (d, shared_by) = (heads.width, heads.q / heads.kv);
        let place_len = place_len::<E>(d);
        // SAFETY: the columns of a head and of the queries that share it lie inside each row of the batch, and are this
        // call's alone: each head is written once.
        let columns = |row: usize, first: usize, len: usize| unsafe {
            std::slice::from_raw_parts_mut(qkv.at(row * heads.qkv_width() + first), len)
        };
        for span in &batch.spans {
            let blocks = batch.blocks_of(span);
            for (i, row) in span.rows.clone().enumerate() {
                let queries = columns(row, self.head * shared_by * d, shared_by * d);
                let key = columns(row, heads.q_width() + self.head * d, d);
                let value = columns(row, heads.q_width() + heads.kv_width() + self.head * d, d);
                if let Some(cos_sin) = cos_sin {
                    let angles = &cos_sin[row * d..][..d];
                    for head in queries.chunks_exact_mut(d) {
                        rotate(head, angles);
                    }
                    rotate(key, angles);
                }
                let position = span.position + i;
                let block = blocks[position / BLOCK_TOKENS] as usize;
                let place = &mut self.values[block * place_len..][..place_len];
                let (keys, rest) = place.split_at_mut(E::panel_len(d));
                let (values, scales) = rest.split_at_mut(values_len::<E>(d));
                let slot = position % BLOCK_TOKENS;
                let found = [
                    E::write_key(keys, slot, key),
                    E::write_value(values, slot, value),
                ];
                if E::SCALES_LEN > 0 {
                    let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
                    [scales[slot], scales[BLOCK_TOKENS + slot]] = found;
                }
            }
        }
    }
}

/// The rotation of [`crate::backend::Backend::write_kv`].
#[inline(always)]
fn rotate(head: &mut [f32], angles: &[f32]) {
    let half = head.len() / 2;
    let (low, high) = head.split_at_mut(half);
    let pairs = low.iter_mut().zip(high);
    for ((a, b), (cos, sin)) in pairs.zip(angles[..half].iter().zip(&angles[half..])) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
