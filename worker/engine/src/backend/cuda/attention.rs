//! Attention: spans of one token go to the kernel that splits their keys, others to the kernel for many queries.
//!
//! Owns the choice among the kernels of one width of heads each, and their shared memory.

use super::CudaBackend;
use super::buffer::CudaBuf;
use super::bytes;
use super::error::CudaError;
use super::kernels::{Function, Kernels, Launch};
use super::pointer::{Ptr, PtrMut};
use super::step::Array;
use crate::backend::{Attention, Batch};
use half::bf16;

const THREADS: u32 = 128;

/// `attend_split_d..(partial, qkv, cache, rows, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale, splits)`.
type Split = fn(
    &Kernels,
    Launch<'_>,
    PtrMut<f32>,
    Ptr<f32>,
    Ptr<bf16>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<f32>,
    i32,
    i32,
    i32,
    f32,
    i32,
) -> Result<(), CudaError>;

/// `attend_tile_d..(out, qkv, cache, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale)`.
type Tile = fn(
    &Kernels,
    Launch<'_>,
    PtrMut<bf16>,
    Ptr<f32>,
    Ptr<bf16>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<i32>,
    Ptr<f32>,
    i32,
    i32,
    i32,
    f32,
) -> Result<(), CudaError>;

/// The kernels for heads of this width.
fn kernels_of(width: usize) -> (Split, Tile) {
    match width {
        16 => (Kernels::attend_split_d16, Kernels::attend_tile_d16),
        32 => (Kernels::attend_split_d32, Kernels::attend_tile_d32),
        64 => (Kernels::attend_split_d64, Kernels::attend_tile_d64),
        80 => (Kernels::attend_split_d80, Kernels::attend_tile_d80),
        96 => (Kernels::attend_split_d96, Kernels::attend_tile_d96),
        112 => (Kernels::attend_split_d112, Kernels::attend_tile_d112),
        128 => (Kernels::attend_split_d128, Kernels::attend_tile_d128),
        256 => (Kernels::attend_split_d256, Kernels::attend_tile_d256),
        other => panic!("a cache of heads of width {other} was refused"),
    }
}

/// Shared memory of the kernel for many queries: two buffers of K and of V, their rows padded by 16 bytes.
const fn tile_shared(width: usize) -> u32 {
    let keys = if width > 128 { 32 } else { 64 };
    (2 * 2 * keys * (width + 8) * 2) as u32
}

/// Lets the kernels take the shared memory that they need.
pub(super) fn allow_shared(kernels: &Kernels) -> Result<(), CudaError> {
    let tiles: [&Function; bytes::HEAD_WIDTHS.len()] = [
        &kernels.attend_tile_d16,
        &kernels.attend_tile_d32,
        &kernels.attend_tile_d64,
        &kernels.attend_tile_d80,
        &kernels.attend_tile_d96,
        &kernels.attend_tile_d112,
        &kernels.attend_tile_d128,
        &kernels.attend_tile_d256,
    ];
    tiles
        .into_iter()
        .zip(bytes::HEAD_WIDTHS)
        .try_for_each(|(kernel, width)| kernel.allow_shared(tile_shared(width)))
}

impl CudaBackend {
    pub(super) fn attend(
        &mut self,
        batch: &Batch,
        attention: &Attention<'_, CudaBuf>,
        cache: Ptr<bf16>,
        out: &mut CudaBuf,
    ) -> Result<(), CudaError> {
        let Attention {
            heads,
            scale,
            window,
            ..
        } = *attention;
        let (split, tile) = kernels_of(heads.width);
        let qkv = attention.qkv.floats(batch.len() * heads.qkv_width());
        let slopes = attention
            .slopes
            .map_or(Ptr::NULL, |slopes| slopes.floats(heads.q));
        let out = out.fill_halves(batch.len() * heads.q_width());
        let (q, kv, window) = (
            heads.q as i32,
            heads.kv as i32,
            window.map_or(0, |window| window as i32),
        );
        let tables = self.array(Array::Tables)?;
        if self.step.ones > 0 {
            let (spans, splits) = (self.step.ones, self.step.splits(heads));
            let [rows, lens, starts] = [
                self.array(Array::OneRows)?,
                self.array(Array::OneLens)?,
                self.array(Array::OneTables)?,
            ];
            let bytes = bytes::partial(spans, heads, splits);
            let (start, moved) = self.scratch.partial.at_least(&mut self.arena, bytes)?;
            self.forget_recorded(moved);
            let partial = PtrMut::new(start);
            let kernels = &self.device.kernels;
            let launch = self.grid([spans, bytes::split_blocks(heads), splits], THREADS, 0);
            let parts = splits as i32;
            split(
                kernels, launch, partial, qkv, cache, rows, lens, tables, starts, slopes, q, kv,
                window, scale, parts,
            )?;
            let threads = (heads.width / 2).next_multiple_of(32) as u32;
            let launch = self.grid([spans, heads.q, 1], threads, 0);
            kernels.attend_combine(
                launch,
                out,
                partial.read(),
                rows,
                q,
                heads.width as i32,
                parts,
            )?;
        }
        if self.step.tiles > 0 {
            let [tiles, rows, positions, lens, starts] = [
                self.array(Array::Tiles)?,
                self.array(Array::ManyRows)?,
                self.array(Array::ManyPositions)?,
                self.array(Array::ManyLens)?,
                self.array(Array::ManyTables)?,
            ];
            let launch = self.grid(
                [self.step.tiles, heads.q, 1],
                THREADS,
                tile_shared(heads.width),
            );
            let kernels = &self.device.kernels;
            tile(
                kernels, launch, out, qkv, cache, tiles, rows, positions, lens, tables, starts,
                slopes, q, kv, window, scale,
            )?;
        }
        Ok(())
    }
}
