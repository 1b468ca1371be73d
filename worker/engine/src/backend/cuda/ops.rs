//! The [`Backend`] trait on a device: memory, and the ops that are one launch each.
//!
//! Owns how a launch is spread over the device. Products, attention and sampling have files of their own.

use super::arena::Place;
use super::buffer::{CudaBuf, Form};
use super::error::CudaError;
use super::kernels::Launch;
use super::pointer::{Ptr, PtrMut};
use super::step::{Array, Capacity};
use super::weights::Matrix;
use super::{CudaBackend, CudaLinear, bytes};
use crate::backend::{
    Attention, Backend, Batch, Columns, DecodeOps, DeviceError, Draw, FloatDtype, Heads, KvDtype,
    KvShape, LayerNorm, LinearShape, QuantOffset, QuantShape, QuantSource, RowSource, Size,
    StepShape,
};
use half::bf16;
use std::sync::Arc;

/// Threads of a block of most kernels.
const THREADS: u32 = 256;

/// Numbers that a thread takes at a time.
const VECTOR: usize = 4;

/// Blocks of a launch over numbers: enough to fill any device several times; each then walks on.
const BLOCKS_MAX: usize = 1 << 14;

/// K and V of all layers: `[layer][block][K, V][head][16 tokens][d]` in bf16, so that a page of one head is contiguous.
#[derive(Debug)]
pub struct CudaKv {
    shape: KvShape,
    place: Place,
}

impl CudaKv {
    pub(super) fn layer(&self, layer: usize) -> PtrMut<bf16> {
        assert!(
            layer < self.shape.layers,
            "layer {layer} of {}",
            self.shape.layers
        );
        let layer_bytes =
            self.shape.block_bytes() / self.shape.layers as u64 * self.shape.blocks as u64;
        PtrMut::new(self.place.start + layer as u64 * layer_bytes)
    }
}

impl CudaBackend {
    /// A launch over numbers, each by itself.
    pub(super) fn flat(&self, numbers: usize) -> Launch<'_> {
        let blocks = numbers.div_ceil(VECTOR * THREADS as usize).min(BLOCKS_MAX);
        self.grid([blocks, 1, 1], THREADS, 0)
    }

    /// A launch over rows, long ones in pieces.
    pub(super) fn by_rows(&self, rows: usize, width: usize) -> Launch<'_> {
        self.grid(
            [rows, width.div_ceil(VECTOR * THREADS as usize), 1],
            THREADS,
            0,
        )
    }

    /// A launch of one block a row, with a thread for each vector of it.
    fn block_a_row(&self, size: Size) -> Launch<'_> {
        let threads = size
            .width
            .div_ceil(VECTOR)
            .next_multiple_of(32)
            .clamp(32, 1024);
        self.grid([size.rows, 1, 1], threads as u32, 0)
    }

    pub(super) fn grid(&self, grid: [usize; 3], threads: u32, shared: u32) -> Launch<'_> {
        let grid = grid.map(|blocks| u32::try_from(blocks).expect("a grid of the device"));
        Launch {
            stream: self.stream(),
            grid,
            threads,
            shared,
        }
    }

    /// One of the step's arrays on the device.
    pub(super) fn array<T>(&mut self, array: Array) -> Result<Ptr<T>, CudaError> {
        let (start, _) = self
            .scratch
            .arrays
            .at_least(&mut self.arena, self.step.capacity.bytes())?;
        Ok(Ptr::new(start + self.step.offset(array)))
    }

    /// Brings the batch to the device.
    fn upload_batch(&mut self, batch: &Batch) -> Result<(), CudaError> {
        let capacity = self.step.capacity.fitting(batch);
        let (start, moved) = self
            .scratch
            .arrays
            .at_least(&mut self.arena, capacity.bytes())?;
        self.step.capacity = capacity;
        self.step.fill(batch, self.options.batch_invariant);
        self.forget_recorded(moved);
        self.staging.upload(&self.stream, self.step.bytes(), start)
    }

    fn read_buffer(&mut self, buf: &CudaBuf, out: &mut [f32]) -> Result<(), CudaError> {
        if out.is_empty() {
            return self.staging.settle(&self.stream);
        }
        match buf.form() {
            Form::F32 => {
                let from = buf.floats(out.len()).address();
                let out: &mut [u8] = bytemuck::cast_slice_mut(out);
                self.staging
                    .download(&self.stream, from, out.len(), |at, bytes| {
                        out[at..at + bytes.len()].copy_from_slice(bytes)
                    })
            }
            Form::Bf16 => {
                let from = buf.halves(out.len()).address();
                self.staging
                    .download(&self.stream, from, 2 * out.len(), |at, bytes| {
                        let halves: &[bf16] = bytemuck::cast_slice(bytes);
                        out[at / 2..]
                            .iter_mut()
                            .zip(halves)
                            .for_each(|(out, half)| *out = half.to_f32());
                    })
            }
        }
    }

    fn new_buffer(&mut self, len: usize) -> Result<CudaBuf, CudaError> {
        let place = self.arena.take(4 * len as u64)?;
        self.stream.clear(place.start, 4 * len)?;
        Ok(CudaBuf::new(place, len, &self.stream))
    }

    fn upload_bias(&mut self, bias: Option<&[f32]>) -> Result<Option<CudaBuf>, CudaError> {
        let Some(values) = bias else { return Ok(None) };
        let buf = CudaBuf::new(
            self.arena.take(4 * values.len() as u64)?,
            values.len(),
            &self.stream,
        );
        self.staging
            .upload(&self.stream, bytemuck::cast_slice(values), buf.start())?;
        Ok(Some(buf))
    }

    fn gather(
        &mut self,
        width: usize,
        x: Ptr<f32>,
        rows: &[u32],
        out: PtrMut<f32>,
    ) -> Result<(), CudaError> {
        let Some(first) = rows.first() else {
            return Ok(());
        };
        let launch = self.by_rows(rows.len(), width);
        let consecutive = rows
            .iter()
            .zip(*first..)
            .all(|(row, expected)| *row == expected);
        if consecutive {
            // Nothing to upload, so that it can be recorded.
            return self.device.kernels.gather_rows(
                launch,
                out,
                x,
                Ptr::NULL,
                *first as i32,
                width as i32,
            );
        }
        let (wanted, at_once) = self.wanted_rows()?;
        for (i, rows) in rows.chunks(at_once).enumerate() {
            self.staging
                .upload(&self.stream, bytemuck::cast_slice(rows), wanted.address())?;
            let (launch, out) = (
                self.by_rows(rows.len(), width),
                out.add(i * at_once * width),
            );
            self.device
                .kernels
                .gather_rows(launch, out, x, wanted.read(), 0, width as i32)?;
        }
        Ok(())
    }
}

impl Backend for CudaBackend {
    type Buf = CudaBuf;
    type Linear = CudaLinear;
    type Kv = CudaKv;

    /// Reading the head's weights costs more than what more rows take.
    const LOGITS_ROWS: usize = 128;
    const ON_HOST: bool = false;

    fn numerics(&self) -> String {
        self.numerics.clone()
    }

    fn reserve(&mut self, bytes: u64, step: &StepShape) -> Result<(), DeviceError> {
        self.arena.reserve(bytes)?;
        self.step.capacity = Capacity::of(step);
        self.decodes_max = Some(step.spans.min(step.rows));
        Ok(self.scratch.set_aside(&mut self.arena, step)?)
    }

    fn alloc(&mut self, len: usize) -> Result<CudaBuf, DeviceError> {
        Ok(self.new_buffer(len)?)
    }

    fn write(&mut self, values: &[f32], buf: &mut CudaBuf) {
        let to = buf.fill_floats(values.len()).address();
        let result = self
            .staging
            .upload(&self.stream, bytemuck::cast_slice(values), to);
        self.note(result);
    }

    fn read(&mut self, buf: &CudaBuf, out: &mut [f32]) -> Result<(), DeviceError> {
        let result = self.read_buffer(buf, out);
        self.note(result);
        self.sound()
    }

    fn pack(
        &mut self,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear, DeviceError> {
        if shape.dtype != FloatDtype::Bf16 {
            let what = "weights in f32; it keeps bf16, int8 and int4";
            return Err(DeviceError::Unsupported(what.to_owned()));
        }
        let matrix = Matrix::Bf16(self.pack_bf16(shape, rows)?);
        Ok(CudaLinear {
            n: shape.n,
            k: shape.k,
            matrix,
            bias: self.upload_bias(bias)?,
        })
    }

    fn linear_bytes(shape: LinearShape) -> u64 {
        bytes::linear(shape)
    }

    fn takes_quantised(shape: QuantShape) -> bool {
        shape.offset != QuantOffset::Mins
    }

    fn pack_quantised(
        &mut self,
        shape: QuantShape,
        rows: &QuantSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CudaLinear, DeviceError> {
        if !Self::takes_quantised(shape) {
            let name = shape.bits.name();
            let form = format!("{name} weights whose groups have minima instead of zero points");
            return Err(DeviceError::Unsupported(form));
        }
        let matrix = self.pack_groups(shape, rows)?;
        Ok(CudaLinear {
            n: shape.n,
            k: shape.k,
            matrix,
            bias: self.upload_bias(bias)?,
        })
    }

    fn quantised_bytes(shape: QuantShape) -> u64 {
        bytes::quantised(shape)
    }

    fn alloc_kv(&mut self, shape: KvShape) -> Result<CudaKv, DeviceError> {
        if shape.dtype != KvDtype::Bf16 {
            return Err(DeviceError::Unsupported(format!(
                "a cache of {}; it keeps bf16",
                shape.dtype.name()
            )));
        }
        if !bytes::HEAD_WIDTHS.contains(&shape.head_width) {
            return Err(DeviceError::Unsupported(format!(
                "heads of width {}; its attention has kernels for {:?}",
                shape.head_width,
                bytes::HEAD_WIDTHS
            )));
        }
        let place = self.arena.take(shape.block_bytes() * shape.blocks as u64)?;
        Ok(CudaKv { shape, place })
    }

    fn scratch_bytes(step: &StepShape) -> u64 {
        bytes::scratch(step)
    }

    fn begin_step(&mut self, batch: &Batch) {
        self.abandon_recording();
        let result = self.upload_batch(batch);
        self.note(result);
    }

    fn padded_rows(&self, rows: usize) -> usize {
        // Where nothing is to be recorded, rows in vain would only cost time. By what was chosen, not by what became of
        // it: all ranks must do alike.
        if !self.options.graphs {
            return rows;
        }
        let filled_up = bytes::filled_up(rows);
        self.decodes_max
            .map_or(filled_up, |most| filled_up.min(most))
            .max(rows)
    }

    fn begin_decode(&mut self, rows: usize) -> DecodeOps {
        if self.begin_recorded(rows) {
            DecodeOps::Enqueued
        } else {
            DecodeOps::Wanted
        }
    }

    fn end_decode(&mut self) -> DecodeOps {
        if self.end_recorded() {
            DecodeOps::Enqueued
        } else {
            DecodeOps::Wanted
        }
    }

    fn renew(&mut self) {
        self.abandon_recording();
        // The old group's watchdog may close its store late, and only its own.
        self.graphs.destroy_all();
        self.graphs = Arc::default();
        self.grouped = false;
        self.fault = None;
        // A device that failed fails here too.
        let settled = self.staging.settle(&self.stream);
        self.draws.forget();
        self.note(settled);
    }

    fn embed(&mut self, batch: &Batch, table: &CudaLinear, first: u32, out: &mut CudaBuf) {
        let Matrix::Bf16(place) = &table.matrix else {
            panic!("an embedding table is kept in bf16");
        };
        let (n, k, ld) = (
            table.n as i32,
            table.k as i32,
            bytes::row_numbers(table.k) as i32,
        );
        let (from, out) = (
            Ptr::new(place.start),
            out.fill_floats(batch.len() * table.k),
        );
        let result = self.array(Array::Tokens).and_then(|tokens| {
            let launch = self.by_rows(batch.len(), table.k);
            self.device
                .kernels
                .embed(launch, out, from, tokens, first, n, k, ld)
        });
        self.note(result);
    }

    fn rms_norm(&mut self, size: Size, x: &CudaBuf, weight: &CudaBuf, eps: f32, out: &mut CudaBuf) {
        let (x, weight, out) = (
            x.floats(numbers(size)),
            weight.floats(size.width),
            out.fill_halves(numbers(size)),
        );
        let result = self.device.kernels.rms_norm(
            self.block_a_row(size),
            out,
            x,
            weight,
            size.width as i32,
            eps,
        );
        self.note(result);
    }

    fn layer_norm(
        &mut self,
        size: Size,
        x: &CudaBuf,
        norm: LayerNorm<'_, CudaBuf>,
        out: &mut CudaBuf,
    ) {
        let (x, out) = (x.floats(numbers(size)), out.fill_halves(numbers(size)));
        let (weight, bias) = (
            norm.weight.floats(size.width),
            norm.bias.map_or(Ptr::NULL, |bias| bias.floats(size.width)),
        );
        let launch = self.block_a_row(size);
        let result = self.device.kernels.layer_norm(
            launch,
            out,
            x,
            weight,
            bias,
            size.width as i32,
            norm.eps,
        );
        self.note(result);
    }

    fn linear(&mut self, rows: usize, x: &CudaBuf, weight: &CudaLinear, out: &mut CudaBuf) {
        let result = self.product(rows, x, weight, out);
        self.note(result);
    }

    fn clamp(&mut self, size: Size, x: &mut CudaBuf, limit: f32) {
        let n = numbers(size);
        let result = self
            .device
            .kernels
            .clamp(self.flat(n), x.change_floats(n), n as i64, limit);
        self.note(result);
    }

    fn copy_columns(&mut self, rows: usize, from: Columns<&CudaBuf>, to: Columns<&mut CudaBuf>) {
        assert!(
            from.columns.end <= from.width
                && to.columns.end <= to.width
                && from.columns.len() == to.columns.len(),
            "columns {:?} of {} to {:?} of {}",
            from.columns,
            from.width,
            to.columns,
            to.width
        );
        let launch = self.by_rows(rows, from.columns.len());
        let (to_width, to_first) = (to.width as i32, to.columns.start as i32);
        let (from_width, from_first) = (from.width as i32, from.columns.start as i32);
        let (count, read) = (from.columns.len() as i32, rows * from.width);
        let to = to.buf.change_floats(rows * to.width);
        let kernels = &self.device.kernels;
        let result = match from.buf.form() {
            Form::F32 => {
                let from = from.buf.floats(read);
                kernels.copy_columns(
                    launch, to, to_width, to_first, from, from_width, from_first, count,
                )
            }
            Form::Bf16 => {
                let from = from.buf.halves(read);
                kernels.copy_columns_bf16(
                    launch, to, to_width, to_first, from, from_width, from_first, count,
                )
            }
        };
        self.note(result);
    }

    fn write_kv(
        &mut self,
        batch: &Batch,
        heads: Heads,
        qkv: &mut CudaBuf,
        cos_sin: Option<&CudaBuf>,
        kv: &mut CudaKv,
        layer: usize,
    ) {
        /// Heads that a block takes.
        const HEADS: usize = 8;
        let (cache, rows) = (kv.layer(layer), batch.len());
        let qkv = qkv.change_floats(rows * heads.qkv_width());
        let cos_sin = cos_sin.map_or(Ptr::NULL, |angles| angles.floats(rows * heads.width));
        let (q, kv_heads, width) = (heads.q as i32, heads.kv as i32, heads.width as i32);
        let result = self.array(Array::Slots).and_then(|slots| {
            let launch = self.grid(
                [rows, (heads.q + 2 * heads.kv).div_ceil(HEADS), 1],
                THREADS,
                0,
            );
            self.device
                .kernels
                .rope_write_kv(launch, qkv, cache, cos_sin, slots, q, kv_heads, width)
        });
        self.note(result);
    }

    fn attention(
        &mut self,
        batch: &Batch,
        attention: &Attention<'_, CudaBuf>,
        kv: &CudaKv,
        layer: usize,
        out: &mut CudaBuf,
    ) {
        let result = self.attend(batch, attention, kv.layer(layer).read(), out);
        self.note(result);
    }

    fn add(&mut self, size: Size, x: &mut CudaBuf, y: &CudaBuf) {
        let n = numbers(size);
        let result =
            self.device
                .kernels
                .add(self.flat(n), x.change_floats(n), y.floats(n), n as i64);
        self.note(result);
    }

    fn silu_mul(&mut self, size: Size, gate_up: &CudaBuf, out: &mut CudaBuf) {
        let (gate_up, out) = (
            gate_up.floats(2 * numbers(size)),
            out.fill_halves(numbers(size)),
        );
        let launch = self.by_rows(size.rows, size.width);
        let result =
            self.device
                .kernels
                .silu_mul(launch, out, gate_up, size.rows as i32, size.width as i32);
        self.note(result);
    }

    fn gelu(&mut self, size: Size, x: &mut CudaBuf) {
        let n = numbers(size);
        let result = self
            .device
            .kernels
            .gelu(self.flat(n), x.change_floats(n), n as i64);
        self.note(result);
    }

    fn scale(&mut self, size: Size, x: &mut CudaBuf, factor: f32) {
        let n = numbers(size);
        let x = if factor == 0.0 {
            x.fill_floats(n)
        } else {
            x.change_floats(n)
        };
        let result = self.device.kernels.scale(self.flat(n), x, n as i64, factor);
        self.note(result);
    }

    fn gather_rows(&mut self, width: usize, x: &CudaBuf, rows: &[u32], out: &mut CudaBuf) {
        let most = rows.iter().max().map_or(0, |row| *row as usize + 1);
        let (x, out) = (x.floats(most * width), out.fill_floats(rows.len() * width));
        let result = self.gather(width, x, rows, out);
        self.note(result);
    }

    fn draws(&self, vocab: usize) -> bool {
        vocab <= super::sampling::VOCAB_MAX
    }

    fn draw(&mut self, vocab: usize, logits: &CudaBuf, draws: &[Draw]) {
        let result = self.enqueue_draws(vocab, logits, draws);
        self.note(result);
    }

    fn drawn(&mut self, out: &mut Vec<u32>) -> Result<(), DeviceError> {
        let result = self.draws.take(out);
        self.note(result);
        self.sound()
    }
}

fn numbers(size: Size) -> usize {
    size.rows * size.width
}
