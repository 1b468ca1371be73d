//! The CPU backend: packed weights, paged attention and row ops on a pool of threads.
//!
//! Owns how the ops of [`Backend`] are laid over the kernels. The kernels are written once over vectors of 16 numbers
//! (`simd`) and compiled for each instruction path (`isa`); the choice falls once, when the backend is made. Rows
//! have the same bits whatever the batch, the chunks and the threads are, and the same on all machines of one path.
//!
//! Read in this order: `simd`, `dots`, `isa`, `float_tile`, `pair_tile` and `dot_tile` (the inner loops), `linear`, `kv`,
//! `attention`, `rows`, `ops`, `pool`. Unsafe code stands in these, in `thread` and in `limits`, nowhere else.

use std::sync::Arc;

use super::{
    Attention, Backend, Batch, Columns, DeviceError, Heads, KvShape, LayerNorm, LinearShape,
    PackedBytes, PackedShape, QuantBits, QuantOffset, QuantShape, QuantSource, RowSource, Size,
    StepShape,
};
use attention::AttentionSpace;
use kv::Rows;
use ops::{Add, Clamp, Gelu, Scale};
use pool::Base;
use rows::{Combine, LayerNormRows, RmsNorm, SiluMulRows, for_row_pairs, for_rows};

#[allow(unsafe_code)]
mod attention;
#[allow(unsafe_code)]
mod dot_tile;
#[allow(unsafe_code)]
mod dots;
#[allow(unsafe_code)]
mod float_tile;
#[allow(unsafe_code)]
mod isa;
#[allow(unsafe_code)]
mod kv;
#[allow(unsafe_code)]
pub mod limits;
#[allow(unsafe_code)]
mod linear;
mod memory;
#[allow(unsafe_code)]
mod ops;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod pair_tile;
#[allow(unsafe_code)]
mod pool;
#[allow(unsafe_code)]
mod rows;
#[allow(unsafe_code)]
mod simd;
#[allow(unsafe_code)]
mod thread;

#[cfg(test)]
mod tests;

pub use isa::{Isa, Path};
pub use kv::CpuKv;
pub use linear::CpuLinear;
pub use memory::{CpuBuf, Memory};
pub use pool::Pool;
pub use thread::{allowed_cores, bind_thread};

/// Counts changes of the kernels that change any bit of a result.
const KERNELS_VERSION: u32 = 3;
/// Counts changes of the bytes that a matrix is packed to: those of another layout are never mapped.
pub const LAYOUT_VERSION: u32 = 2;

/// One engine's view of the processor: the instruction path, the shared threads, and scratch memory of its own.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    pool: Arc<Pool>,
    /// A copy of the activations in another order, see [`linear`].
    blocked: Memory<f32>,
    attention: AttentionSpace,
    fault: Option<DeviceError>,
    /// The thread that runs steps is on its core.
    pinned: bool,
}

impl CpuBackend {
    /// A backend that computes on `pool`'s threads with the fastest instructions of this processor.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn new(pool: Arc<Pool>) -> Result<CpuBackend, DeviceError> {
        CpuBackend::with_isa(pool, Isa::detect())
    }

    /// As [`CpuBackend::new`], with a given instruction path.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn with_isa(pool: Arc<Pool>, isa: Isa) -> Result<CpuBackend, DeviceError> {
        Ok(CpuBackend {
            isa,
            pool,
            blocked: Memory::new(0)?,
            attention: AttentionSpace::default(),
            fault: None,
            pinned: false,
        })
    }

    /// The instruction path in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Keeps the first fault for the next [`Backend::read`].
    fn note(&mut self, done: Result<(), DeviceError>) {
        if let Err(fault) = done {
            self.fault.get_or_insert(fault);
        }
    }
}

impl Backend for CpuBackend {
    type Buf = CpuBuf;
    type Linear = CpuLinear;
    type Kv = CpuKv;

    const QUANTISED_HEAD: Option<QuantBits> = Some(QuantBits::Int8);

    fn numerics(&self) -> String {
        format!("cpu-{KERNELS_VERSION}-{}", self.isa.path().name())
    }

    fn alloc(&mut self, len: usize) -> Result<CpuBuf, DeviceError> {
        Memory::new(len)
    }

    fn write(&mut self, values: &[f32], buf: &mut CpuBuf) {
        buf.as_mut()[..values.len()].copy_from_slice(values);
    }

    fn read(&mut self, buf: &CpuBuf, out: &mut [f32]) -> Result<(), DeviceError> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        out.copy_from_slice(&buf.as_ref()[..out.len()]);
        Ok(())
    }

    fn pack(
        &mut self,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        CpuLinear::pack(&self.pool, shape, rows, bias)
    }

    fn linear_bytes(shape: LinearShape) -> u64 {
        CpuLinear::bytes(shape)
    }

    fn pack_quantised(
        &mut self,
        shape: QuantShape,
        rows: &QuantSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        if !CpuBackend::takes_quantised(shape) {
            return Err(DeviceError::Unsupported(format!(
                "{} weights in groups of {} with {:?}",
                shape.bits.name(),
                shape.group,
                shape.offset
            )));
        }
        CpuLinear::pack_quantised(&self.pool, shape, rows, bias)
    }

    fn takes_quantised(shape: QuantShape) -> bool {
        let has_mins = shape.offset == QuantOffset::Mins;
        matches!(shape.group, 32 | 64 | 128)
            && shape.lead < shape.group
            && !(shape.bits == QuantBits::Int8 && has_mins)
    }

    fn quantised_bytes(shape: QuantShape) -> u64 {
        CpuLinear::quantised_bytes(shape)
    }

    fn packed_layout(&self) -> Option<String> {
        Some(format!("cpu-{LAYOUT_VERSION}"))
    }

    fn packed(matrix: &CpuLinear) -> Option<PackedBytes> {
        Some(matrix.packed())
    }

    fn map(
        &mut self,
        shape: PackedShape,
        bytes: PackedBytes,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        CpuLinear::map(shape, bytes, bias)
    }

    fn in_parallel(&self, items: usize, body: &(dyn Fn(usize) + Sync)) {
        self.pool.run(items, &|item, _| body(item));
    }

    fn alloc_kv(&mut self, shape: KvShape) -> Result<CpuKv, DeviceError> {
        CpuKv::new(shape)
    }

    fn kv_block_bytes(shape: KvShape) -> u64 {
        kv::block_bytes(shape)
    }

    fn scratch_bytes(step: &StepShape) -> u64 {
        linear::scratch_bytes(step.rows, step.width)
    }

    /// The first step finds the engine's own thread: it computes beside the pool's helpers.
    fn begin_step(&mut self, _batch: &Batch) {
        if !self.pinned {
            self.pool.pin_caller();
            self.pinned = true;
        }
    }

    fn embed(&mut self, batch: &Batch, table: &CpuLinear, first: u32, out: &mut CpuBuf) {
        let size = Size {
            rows: batch.len(),
            width: table.k,
        };
        for_rows(&self.pool, size, out.as_mut(), &|row, out| {
            for (token, out) in batch.tokens[row..]
                .iter()
                .zip(out.chunks_exact_mut(table.k))
            {
                match token
                    .checked_sub(first)
                    .map(|row| row as usize)
                    .filter(|row| *row < table.n)
                {
                    Some(row) => table.row(row, out),
                    None => out.fill(0.0),
                }
            }
        });
    }

    fn rms_norm(&mut self, size: Size, x: &CpuBuf, weight: &CpuBuf, eps: f32, out: &mut CpuBuf) {
        let (isa, x, weight) = (self.isa, x.as_ref(), &weight.as_ref()[..size.width]);
        for_rows(&self.pool, size, out.as_mut(), &|row, out| {
            isa.run(RmsNorm {
                x: &x[row * size.width..],
                weight,
                eps,
                out,
            });
        });
    }

    fn layer_norm(
        &mut self,
        size: Size,
        x: &CpuBuf,
        norm: LayerNorm<'_, CpuBuf>,
        out: &mut CpuBuf,
    ) {
        let (isa, width, x) = (self.isa, size.width, x.as_ref());
        let weight = &norm.weight.as_ref()[..width];
        let bias = norm.bias.map(|bias| &bias.as_ref()[..width]);
        let eps = norm.eps;
        for_rows(&self.pool, size, out.as_mut(), &|row, out| {
            isa.run(LayerNormRows {
                x: &x[row * width..],
                weight,
                bias,
                eps,
                out,
            });
        });
    }

    fn linear(&mut self, rows: usize, x: &CpuBuf, weight: &CpuLinear, out: &mut CpuBuf) {
        let done = weight.multiply(
            (self.isa, &self.pool),
            rows,
            x.as_ref(),
            out.as_mut(),
            &mut self.blocked,
        );
        self.note(done);
    }

    fn clamp(&mut self, size: Size, x: &mut CpuBuf, limit: f32) {
        rows::apply(self.isa, &self.pool, size, x.as_mut(), Clamp(limit));
    }

    fn copy_columns(&mut self, rows: usize, from: Columns<&CpuBuf>, to: Columns<&mut CpuBuf>) {
        let (source, columns, width) = (from.buf.as_ref(), from.columns, from.width);
        let (to_columns, to_width) = (to.columns, to.width);
        for_rows(
            &self.pool,
            Size {
                rows,
                width: to_width,
            },
            to.buf.as_mut(),
            &|row, to| {
                for (to, from) in to
                    .chunks_exact_mut(to_width)
                    .zip(source[row * width..].chunks(width))
                {
                    to[to_columns.clone()].copy_from_slice(&from[columns.clone()]);
                }
            },
        );
    }

    fn write_kv(
        &mut self,
        batch: &Batch,
        heads: Heads,
        qkv: &mut CpuBuf,
        cos_sin: Option<&CpuBuf>,
        kv: &mut CpuKv,
        layer: usize,
    ) {
        let qkv = Base::new(&mut qkv.as_mut()[..batch.len() * heads.qkv_width()]);
        let rows = Rows {
            batch,
            heads,
            qkv: &qkv,
            cos_sin: cos_sin.map(AsRef::as_ref),
        };
        kv.write((self.isa, &self.pool), rows, layer);
    }

    fn attention(
        &mut self,
        batch: &Batch,
        attention: &Attention<'_, CpuBuf>,
        kv: &CpuKv,
        layer: usize,
        out: &mut CpuBuf,
    ) {
        self.attention.run(
            (self.isa, &self.pool),
            batch,
            attention,
            kv,
            layer,
            out.as_mut(),
        );
    }

    fn add(&mut self, size: Size, x: &mut CpuBuf, y: &CpuBuf) {
        let (isa, y) = (self.isa, y.as_ref());
        for_rows(&self.pool, size, x.as_mut(), &|row, x| {
            let y = &y[row * size.width..];
            isa.run(Combine {
                op: Add,
                x,
                y,
                z: y,
            });
        });
    }

    fn add_rms_norm(
        &mut self,
        size: Size,
        x: &mut CpuBuf,
        y: &mut CpuBuf,
        weight: &CpuBuf,
        eps: f32,
    ) {
        let (isa, weight) = (self.isa, &weight.as_ref()[..size.width]);
        for_row_pairs(&self.pool, size, x.as_mut(), y.as_mut(), &|x, y| {
            isa.run(Combine {
                op: Add,
                x: &mut *x,
                y: &*y,
                z: &*y,
            });
            isa.run(RmsNorm {
                x,
                weight,
                eps,
                out: y,
            });
        });
    }

    fn add_layer_norm(
        &mut self,
        size: Size,
        x: &mut CpuBuf,
        y: &mut CpuBuf,
        norm: LayerNorm<'_, CpuBuf>,
    ) {
        let (isa, eps) = (self.isa, norm.eps);
        let weight = &norm.weight.as_ref()[..size.width];
        let bias = norm.bias.map(|bias| &bias.as_ref()[..size.width]);
        for_row_pairs(&self.pool, size, x.as_mut(), y.as_mut(), &|x, y| {
            isa.run(Combine {
                op: Add,
                x: &mut *x,
                y: &*y,
                z: &*y,
            });
            isa.run(LayerNormRows {
                x,
                weight,
                bias,
                eps,
                out: y,
            });
        });
    }

    fn silu_mul(&mut self, size: Size, gate_up: &CpuBuf, out: &mut CpuBuf) {
        let (isa, width, gate_up) = (self.isa, size.width, gate_up.as_ref());
        for_rows(&self.pool, size, out.as_mut(), &|row, out| {
            isa.run(SiluMulRows {
                gate_up: &gate_up[2 * row * width..],
                width,
                out,
            });
        });
    }

    fn linear_silu_mul(
        &mut self,
        size: Size,
        x: &CpuBuf,
        weight: &CpuLinear,
        gate_up: &mut CpuBuf,
        out: &mut CpuBuf,
    ) {
        if !weight.is_gated(size.rows) {
            self.linear(size.rows, x, weight, gate_up);
            return self.silu_mul(size, gate_up, out);
        }
        let done = weight.multiply_gated(
            (self.isa, &self.pool),
            size.rows,
            x.as_ref(),
            out.as_mut(),
            &mut self.blocked,
        );
        self.note(done);
    }

    fn gelu(&mut self, size: Size, x: &mut CpuBuf) {
        rows::apply(self.isa, &self.pool, size, x.as_mut(), Gelu);
    }

    fn scale(&mut self, size: Size, x: &mut CpuBuf, factor: f32) {
        if factor == 0.0 {
            x.as_mut()[..size.rows * size.width].fill(0.0);
        }
        rows::apply(self.isa, &self.pool, size, x.as_mut(), Scale(factor));
    }

    fn gather_rows(&mut self, width: usize, x: &CpuBuf, rows: &[u32], out: &mut CpuBuf) {
        let x = x.as_ref();
        for (row, out) in rows.iter().zip(out.as_mut().chunks_exact_mut(width)) {
            out.copy_from_slice(&x[*row as usize * width..][..width]);
        }
    }
}
