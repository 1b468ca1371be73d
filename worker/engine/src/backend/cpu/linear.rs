//! Weight matrices: packed into panels when loaded, multiplied with the rows of a step.
//!
//! Owns the loops around [`Tile`]: which panels and which rows meet when, so that what is read again is still in a near
//! cache. They do not touch the order of any sum.

use super::isa::{Isa, Kernel};
use super::memory::Memory;
use super::pool::{Base, Pool};
use super::simd::Simd;
use super::tile::{
    Element, PANEL, TILE_PANELS_MAX, TILE_ROWS_MAX, Tile, tile_bounds, tile_panels, tile_rows,
};
use crate::backend::{DeviceError, FloatDtype, LinearShape, PackedBytes, PackedShape, RowSource};

#[cfg(test)]
mod tests;

/// Products per sum before the next panel is taken, where several tiles share a panel: a piece of the panel (16 KiB of
/// bf16) and a tile's activations (12 KiB) fit the L1 cache together.
const K_BLOCK: usize = 512;
/// Rows of activations that meet a piece of a panel before the next: their blocks (192 KiB) fit the L2 cache.
const GROUP_ROWS: usize = 96;
/// Multiplications worth waking a helper for: some 5 microseconds.
const PARALLEL_MIN: usize = 64 << 10;
/// How far ahead of the sums weights are asked for when they come from memory: with several streams the processor's
/// own prefetching is late.
const AHEAD_BYTES: usize = 1024;

/// A weight matrix `[n, k]` in panels of 16 rows, the last one filled up with zeros, and its bias.
#[derive(Debug)]
pub struct CpuLinear {
    /// Rows: outputs.
    pub(super) n: usize,
    /// Columns: inputs.
    pub(super) k: usize,
    dtype: FloatDtype,
    panels: PackedBytes,
    /// As long as the panels have rows.
    bias: Option<Memory<f32>>,
}

impl CpuLinear {
    /// Packs a matrix, see [`crate::backend::Backend::pack`].
    pub(super) fn pack(
        pool: &Pool,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        let LinearShape { n, k, dtype } = shape;
        let mut panels = Memory::<u8>::new(CpuLinear::bytes(shape) as usize)?;
        match dtype {
            FloatDtype::F32 => pack_panels::<f32>(pool, n, k, rows, panels.as_mut()),
            FloatDtype::Bf16 => pack_panels::<u16>(pool, n, k, rows, panels.as_mut()),
        }
        CpuLinear::map(PackedShape::Float(shape), PackedBytes::whole(panels), bias)
    }

    /// A matrix of bytes that were packed before, see [`crate::backend::Backend::map`].
    pub(super) fn map(
        shape: PackedShape,
        panels: PackedBytes,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        let PackedShape::Float(LinearShape { n, k, dtype }) = shape else {
            return Err(DeviceError::Unsupported("quantised weights".to_owned()));
        };
        let bias = bias.map(|bias| padded(bias, n)).transpose()?;
        Ok(CpuLinear {
            n,
            k,
            dtype,
            panels,
            bias,
        })
    }

    /// The bytes of the panels.
    pub(super) fn packed(&self) -> PackedBytes {
        self.panels.clone()
    }

    /// Bytes of the panels.
    pub(super) fn bytes(shape: LinearShape) -> u64 {
        let numbers = match shape.dtype {
            FloatDtype::F32 => <f32 as Element>::panel_len(shape.k),
            FloatDtype::Bf16 => <u16 as Element>::panel_len(shape.k),
        };
        (shape.n.div_ceil(PANEL) * numbers * shape.dtype.bytes()) as u64
    }

    /// Copies row `row`, widened.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        fn copy<E: Element>(panels: &[E], k: usize, row: usize, out: &mut [f32]) {
            let panel = &panels[row / PANEL * E::panel_len(k)..][..E::panel_len(k)];
            for (i, out) in out[..k].iter_mut().enumerate() {
                *out = panel[E::place(row % PANEL, i)].widen();
            }
        }
        let panels = self.panels.as_ref();
        match self.dtype {
            FloatDtype::F32 => copy::<f32>(bytemuck::cast_slice(panels), self.k, row, out),
            FloatDtype::Bf16 => copy::<u16>(bytemuck::cast_slice(panels), self.k, row, out),
        }
    }

    /// `y[m, n] = x[m, k] W^T + bias`. `scratch` holds copies of the activations and grows when it must.
    ///
    /// # Errors
    /// The scratch memory cannot grow; `y` is then not written.
    pub(super) fn multiply(
        &self,
        (isa, pool): (Isa, &Pool),
        m: usize,
        x: &[f32],
        y: &mut [f32],
        scratch: &mut Memory<f32>,
    ) -> Result<(), DeviceError> {
        assert!(x.len() >= m * self.k && y.len() >= m * self.n);
        if m == 0 {
            return Ok(());
        }
        let blocked = m > TILE_ROWS_MAX;
        if blocked {
            copy_blocked(pool, m, self.k, x, scratch)?;
        }
        let x = if blocked { scratch.as_ref() } else { x };
        let panels = self.panels.as_ref();
        match self.dtype {
            FloatDtype::F32 => {
                let panels = bytemuck::cast_slice::<u8, f32>(panels);
                self.multiply_panels(isa, pool, panels, m, (x, blocked), y)
            }
            FloatDtype::Bf16 => {
                let panels = bytemuck::cast_slice::<u8, u16>(panels);
                self.multiply_panels(isa, pool, panels, m, (x, blocked), y)
            }
        }
        Ok(())
    }

    fn multiply_panels<E: Element>(
        &self,
        isa: Isa,
        pool: &Pool,
        panels: &[E],
        m: usize,
        (x, blocked): (&[f32], bool),
        y: &mut [f32],
    ) {
        let count = self.n.div_ceil(PANEL);
        let parts = if m * self.n * self.k < PARALLEL_MIN || pool.threads() == 1 {
            1
        } else {
            pool.threads() * 8
        };
        // Whole groups of panels: a tile of few rows takes several panels at once.
        let part = count.div_ceil(parts).next_multiple_of(TILE_PANELS_MAX);
        let y = Base::new(&mut y[..m * self.n]);
        let bias = self.bias.as_ref().map(AsRef::as_ref);
        pool.run(count.div_ceil(part), &|item, _| {
            let range = item * part..((item + 1) * part).min(count);
            isa.run(Multiply {
                n: self.n,
                k: self.k,
                m,
                panels,
                bias,
                x,
                blocked,
                y: &y,
                range,
            });
        });
    }
}

fn pack_panels<E: Element>(
    pool: &Pool,
    n: usize,
    k: usize,
    rows: &RowSource<'_>,
    panels: &mut [u8],
) {
    let len = E::panel_len(k);
    if k == 0 {
        return;
    }
    pool.run_chunks(
        bytemuck::cast_slice_mut::<u8, E>(panels),
        len,
        &|index, panel, _| {
            let mut values = vec![0.0; k];
            for row in 0..PANEL.min(n - index * PANEL) {
                rows(index * PANEL + row, &mut values);
                for (i, value) in values.iter().enumerate() {
                    panel[E::place(row, i)] = E::round(*value);
                }
            }
        },
    );
}

fn padded(values: &[f32], n: usize) -> Result<Memory<f32>, DeviceError> {
    let mut memory = Memory::new(n.next_multiple_of(PANEL))?;
    memory.as_mut()[..n].copy_from_slice(&values[..n]);
    Ok(memory)
}

/// Bytes that copies of `m` rows of `k` activations take.
pub(super) fn scratch_bytes(m: usize, k: usize) -> u64 {
    let numbers = if m > TILE_ROWS_MAX { m * k } else { 0 };
    (numbers * size_of::<f32>()) as u64
}

/// Copies `x [m, k]` to `[k blocks][m][K_BLOCK]` (the last block narrower): rows that lie a power of two apart would
/// chase each other out of the caches.
fn copy_blocked(
    pool: &Pool,
    m: usize,
    k: usize,
    x: &[f32],
    to: &mut Memory<f32>,
) -> Result<(), DeviceError> {
    if to.as_ref().len() < m * k {
        *to = Memory::new((m * k).next_power_of_two())?;
    }
    let copy = |index: usize, block: &mut [f32], _: usize| {
        let start = index * K_BLOCK;
        let width = K_BLOCK.min(k - start);
        for (row, to) in block.chunks_exact_mut(width).enumerate() {
            to.copy_from_slice(&x[row * k + start..][..width]);
        }
    };
    if k > 0 {
        pool.run_chunks(&mut to.as_mut()[..m * k], m * K_BLOCK, &copy);
    }
    Ok(())
}

/// The product of all rows with some panels.
struct Multiply<'a, E> {
    n: usize,
    k: usize,
    m: usize,
    panels: &'a [E],
    bias: Option<&'a [f32]>,
    x: &'a [f32],
    /// `x` is `[k blocks][m][K_BLOCK]`, not `[m][k]`.
    blocked: bool,
    /// `[m, n]`; this kernel alone writes the columns of its panels.
    y: &'a Base<f32>,
    range: std::ops::Range<usize>,
}

impl<E: Element> Kernel for Multiply<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let whole = self.n / PANEL;
        // SAFETY: the features are the caller's promise; see `piece` for the rest.
        unsafe {
            let full = self.range.start..self.range.end.min(whole);
            self.whole_panels::<S>(full);
            if self.range.end > whole {
                self.last_panel::<S>(whole);
            }
        }
    }
}

impl<E: Element> Multiply<'_, E> {
    /// Panels whose 16 rows all exist: the sums lie in `y` while they grow.
    #[inline(always)]
    unsafe fn whole_panels<S: Simd>(&self, range: std::ops::Range<usize>) {
        let k_block = if self.blocked { K_BLOCK } else { self.k.max(1) };
        let groups = self.m.div_ceil(GROUP_ROWS);
        for group in (0..groups).map(|i| tile_bounds(self.m, i, groups)) {
            let tiles = group.len().div_ceil(tile_rows::<S>());
            // With no products there are still sums to begin.
            for k in (0..self.k.max(1)).step_by(k_block) {
                let mut panel = range.start;
                // Panels that all tiles can take at once.
                let step = tile_panels::<S>(group.len().div_ceil(tiles));
                let step = if tile_panels::<S>(group.len() / tiles) == step {
                    step
                } else {
                    1
                };
                while panel < range.end {
                    let panels = if range.end - panel >= step { step } else { 1 };
                    for i in 0..tiles {
                        let rows = tile_bounds(group.len(), i, tiles);
                        let rows = group.start + rows.start..group.start + rows.end;
                        let y = self.y.at(rows.start * self.n + panel * PANEL);
                        // SAFETY: these rows and panels exist, and this kernel alone writes their place in `y`.
                        unsafe { self.piece::<S>(k, panel, panels, rows, (y, self.n), y) };
                    }
                    panel += panels;
                }
            }
        }
    }

    /// The last panel, of which `n % 16` rows exist: the sums grow beside `y`.
    #[inline(always)]
    unsafe fn last_panel<S: Simd>(&self, panel: usize) {
        let k_block = if self.blocked { K_BLOCK } else { self.k.max(1) };
        let tiles = self.m.div_ceil(tile_rows::<S>());
        let mut sums = [0.0f32; TILE_ROWS_MAX * PANEL];
        for rows in (0..tiles).map(|i| tile_bounds(self.m, i, tiles)) {
            for k in (0..self.k.max(1)).step_by(k_block) {
                let sums = sums.as_mut_ptr();
                // SAFETY: the panel exists, filled up with zeros, and the sums have room for a tile.
                unsafe { self.piece::<S>(k, panel, 1, rows.clone(), (sums, PANEL), sums) };
            }
            for (row, sums) in rows.zip(sums.chunks_exact(PANEL)) {
                let exist = self.n - panel * PANEL;
                let y = self.y.at(row * self.n + panel * PANEL);
                // SAFETY: the rest of the row's columns, which this kernel alone writes.
                unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), y, exist) };
            }
        }
    }

    /// Takes the sums of a tile from product `k` to the end of the block.
    ///
    /// # Safety
    /// `y`, rows `stride` apart, is this tile's alone; `init` is `y`.
    #[inline(always)]
    unsafe fn piece<S: Simd>(
        &self,
        k: usize,
        panel: usize,
        panels: usize,
        rows: std::ops::Range<usize>,
        (y, stride): (*mut f32, usize),
        init: *const f32,
    ) {
        let (x, x_stride, count) = if self.blocked {
            let width = K_BLOCK.min(self.k - k);
            (
                &self.x[self.m * k + rows.start * width..][..rows.len() * width],
                width,
                width,
            )
        } else {
            (
                &self.x[rows.start * self.k..][..rows.len() * self.k],
                self.k,
                self.k,
            )
        };
        let len = E::panel_len(self.k);
        let weights = &self.panels[panel * len..][..panels * len];
        let (init, init_stride) = match self.bias {
            _ if k > 0 => (init, stride),
            Some(bias) => (bias[panel * PANEL..][..panels * PANEL].as_ptr(), 0),
            None => (std::ptr::null(), 0),
        };
        // `k` is even: K_BLOCK is.
        let w: [*const E; TILE_PANELS_MAX] = std::array::from_fn(|p| {
            let panel = p.min(panels - 1) * len;
            weights.as_ptr().wrapping_add(panel + k * PANEL)
        });
        let tile = Tile {
            k: count,
            w,
            x: x.as_ptr(),
            x_stride,
            init,
            init_stride,
            y,
            y_stride: stride,
            next: w.map(|w| w.wrapping_add(AHEAD_BYTES / size_of::<E>())),
        };
        // SAFETY: the slices above hold all that the tile reads; `y` is the caller's promise.
        unsafe { S::tile(&tile, rows.len(), panels) }
    }
}
