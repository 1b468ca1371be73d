//! What a decoder needs of a device: the [`Backend`] trait, about fifteen ops, each with its formula.
//!
//! Owns the trait, the types that cross it and nothing else. Models and layers see only this trait and
//! [`crate::collective::Collective`]; they never see threads, instructions or devices.
//!
//! Shapes. Activations are f32, row-major `[rows, width]`, at the start of a buffer that may be longer (buffers are
//! allocated once for the largest step). All sums are accumulated in f32. "`d`" is the width of a head.
//!
//! Determinism, which every backend owes its callers: a row of an op's result depends on that row's inputs alone, never
//! on how many rows there are or who computes them. Each sum runs in one fixed order; attention advances over the keys
//! in tiles of [`BLOCK_TOKENS`](crate::plan::BLOCK_TOKENS) aligned to absolute position, whatever the span is. A device
//! backend may by default give up the first part for speed, so that a row depends on how many rows there are, and says so.
//!
//! Faults. Ops enqueue work and return nothing: a device that fails keeps its first fault and gives it from the next
//! [`Backend::read`]. Ops may panic on shapes that do not fit together: the callers are the layers, which derive all
//! shapes from a checked [`ModelSpec`](crate::models::spec::ModelSpec) and a checked plan.

#[cfg(test)]
pub mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

mod batch;
mod kv_int8;
mod packed;
mod shapes;

pub use batch::{Batch, BatchSpan};
pub use packed::{PackedBytes, PackedShape, WeakBytes};
pub use shapes::{
    FloatDtype, Heads, KvDtype, KvShape, LinearShape, QuantBits, QuantOffset, QuantShape, Size,
    StepShape, WeightDtype,
};

use kv_int8::quantise_kv;
use std::ops::Range;

/// A device, its memory and its kernels.
pub trait Backend: Send + 'static {
    /// f32 numbers on the device. On host backends it is `AsRef<[f32]> + AsMut<[f32]>`, which host collectives need.
    type Buf: Send;
    /// A weight matrix `[n, k]` in the backend's own packing, with its bias `[n]` if it has one.
    type Linear: Send;
    /// The K and V of all layers and blocks, in the backend's own layout.
    type Kv: Send;

    /// Rows whose logits are computed together: what they take is set aside for good. With a vocabulary of 128k, 32 rows are
    /// 16 MB; a prompt whose every row is scored takes several rounds. Steps of more decodes than this are not recorded.
    const LOGITS_ROWS: usize = 32;
    /// How the matrix that gives the logits is kept where the layers' are quantised, if not as floats: it is the one that
    /// every step reads whole. A tied one is the embedding too.
    const QUANTISED_HEAD: Option<QuantBits> = None;
    /// Whether the device's memory is the host's: then what the host keeps of a step counts as the device's.
    const ON_HOST: bool = true;

    /// Names the kernels, their version and instruction path, for the numerics id: `cpu-1-avx2`. Two backends of one
    /// name give the same bits.
    fn numerics(&self) -> String;

    // Memory.

    /// Sets `bytes` aside, all that later calls of this section and the ops of steps like `step` take: a model is loaded
    /// whole or not at all. Does nothing by default.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn reserve(&mut self, _bytes: u64, _step: &StepShape) -> Result<(), DeviceError> {
        Ok(())
    }

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc(&mut self, len: usize) -> Result<Self::Buf, DeviceError>;

    /// Copies `values` to the start of `buf`.
    fn write(&mut self, values: &[f32], buf: &mut Self::Buf);

    /// Waits for all ops before it and copies the start of `buf` to `out`.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: this or an earlier op failed.
    fn read(&mut self, buf: &Self::Buf, out: &mut [f32]) -> Result<(), DeviceError>;

    /// Packs a weight matrix `[n, k]`, row by row, so that no f32 copy of it need exist. `rows(i, out)` writes the `k`
    /// values of row `i` and may be called in any order, from any thread, once per row.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn pack(
        &mut self,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<Self::Linear, DeviceError>;

    /// Bytes that [`Backend::pack`] takes for a matrix of this shape, bias excluded.
    fn linear_bytes(shape: LinearShape) -> u64;

    /// Whether [`Backend::pack_quantised`] takes matrices of this form: those of a checkpoint that is quantised already are
    /// else packed as floats.
    fn takes_quantised(_shape: QuantShape) -> bool {
        false
    }

    /// Packs a quantised matrix: `rows(i, out)` writes row `i` and may be called in any order, from any thread, once per row.
    /// `x W^T` is then that of the numbers the rows stand for, whatever way the backend computes it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Unsupported`] where the backend has no product for such weights.
    fn pack_quantised(
        &mut self,
        shape: QuantShape,
        _rows: &QuantSource<'_>,
        _bias: Option<&[f32]>,
    ) -> Result<Self::Linear, DeviceError> {
        Err(DeviceError::Unsupported(format!(
            "{} weights",
            shape.bits.name()
        )))
    }

    /// Bytes that [`Backend::pack_quantised`] takes for a matrix of this shape, bias excluded.
    fn quantised_bytes(shape: QuantShape) -> u64 {
        shape.bytes()
    }

    // Packed matrices outside the backend, where they can be used as they lie in a file.

    /// Names how matrices are packed, if [`Backend::map`] takes the bytes of [`Backend::packed`]: those of one name mean the
    /// same to every backend that gives it.
    fn packed_layout(&self) -> Option<String> {
        None
    }

    /// The bytes of a packed matrix, bias excluded.
    fn packed(_matrix: &Self::Linear) -> Option<PackedBytes> {
        None
    }

    /// A matrix of bytes that were packed before, as many as its shape takes, at an address that is a multiple of 64. They
    /// are used where they lie.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Unsupported`] where there is no [`Backend::packed_layout`].
    fn map(
        &mut self,
        _shape: PackedShape,
        _bytes: PackedBytes,
        _bias: Option<&[f32]>,
    ) -> Result<Self::Linear, DeviceError> {
        Err(DeviceError::Unsupported("mapped weights".to_owned()))
    }

    /// Calls `body` once for each number below `items`, on the threads that compute.
    fn in_parallel(&self, items: usize, body: &(dyn Fn(usize) + Sync)) {
        (0..items).for_each(body);
    }

    /// Memory for the K and V of all blocks and layers. The content is not defined before it is written.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Unsupported`] for a number format or a width of heads that the backend
    /// has no attention for.
    fn alloc_kv(&mut self, shape: KvShape) -> Result<Self::Kv, DeviceError>;

    /// Bytes of one KV block over all layers.
    fn kv_block_bytes(shape: KvShape) -> u64 {
        shape.block_bytes()
    }

    /// Bytes of its own that the ops of the largest step take.
    fn scratch_bytes(_step: &StepShape) -> u64 {
        0
    }

    /// Called once per step, before its first op: a device may upload the batch here.
    fn begin_step(&mut self, _batch: &Batch) {}

    // Recorded steps: those of decodes alone, which differ in their numbers but not in their ops.

    /// How many rows a step of `rows` decodes is filled up to, with tokens of no sequence: their spans have no blocks, write
    /// no K and V and attend to nothing. Depends on `rows` alone, so that all ranks do alike.
    fn padded_rows(&self, rows: usize) -> usize {
        rows
    }

    /// Called before the ops of a step of decodes, which is filled up to `rows`. The ops of such a step depend on `rows`
    /// alone, so that a device may record them once and replay them.
    fn begin_decode(&mut self, _rows: usize) -> DecodeOps {
        DecodeOps::Wanted
    }

    /// Called after the ops of a step of decodes. `Wanted`: they were only recorded, and that has failed, so they are to be
    /// called once more.
    ///
    /// Not called when one of them failed: then no step follows, and the recording is left half made for [`Backend::renew`]
    /// or the end of the backend to drop.
    fn end_decode(&mut self) -> DecodeOps {
        DecodeOps::Enqueued
    }

    /// Called when a group of ranks is over and before its [`Collective`](crate::collective::Collective) is dropped: waits
    /// until nothing runs, drops all recordings, draws and faults, and keeps all memory with what lies in it. A group's
    /// recordings hold the group. Does nothing by default.
    fn renew(&mut self) {}

    // Ops, in the order of a forward pass.

    /// `out[t] = W[token(t) - first]`, or zeros where `token(t)` is outside `first .. first + n`: one rank's slice of
    /// the vocabulary. `out` is `[batch.len(), k]`.
    fn embed(&mut self, batch: &Batch, table: &Self::Linear, first: u32, out: &mut Self::Buf);

    /// `out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight`, of `[rows, width]`; `weight` is `[width]`.
    fn rms_norm(
        &mut self,
        size: Size,
        x: &Self::Buf,
        weight: &Self::Buf,
        eps: f32,
        out: &mut Self::Buf,
    );

    /// `out[r] = (x[r] - mean(x[r])) / sqrt(var(x[r]) + eps) * weight + bias`, of `[rows, width]`, the variance
    /// being the biased one (divided by `width`); `weight` and `bias` are `[width]`.
    fn layer_norm(
        &mut self,
        size: Size,
        x: &Self::Buf,
        norm: LayerNorm<'_, Self::Buf>,
        out: &mut Self::Buf,
    );

    /// `out = x W^T + b`: `out[r][i] = sum_j x[r][j] * W[i][j] + b[i]`, of `x [rows, k]` and `out [rows, n]`.
    fn linear(&mut self, rows: usize, x: &Self::Buf, weight: &Self::Linear, out: &mut Self::Buf);

    /// `x = min(max(x, -limit), limit)` over `[rows, width]`.
    fn clamp(&mut self, size: Size, x: &mut Self::Buf, limit: f32);

    /// Copies columns: `to[r][to_columns.start + i] = from[r][from_columns.start + i]` for all rows. `from` is
    /// `[rows, from_width]`, `to` is `[rows, to_width]`; both column ranges are of one length.
    fn copy_columns(&mut self, rows: usize, from: Columns<&Self::Buf>, to: Columns<&mut Self::Buf>);

    /// Rotates the query and key heads of `qkv [batch.len(), (q + 2 kv) * d]` in place, in half-split form, where angles are
    /// given. With `c` and `s` the two halves of `cos_sin[r]` (`[rows, d]`), for each head `h` and `i < d/2`:
    /// `h[i], h[i + d/2] = h[i] * c[i] - h[i + d/2] * s[i], h[i + d/2] * c[i] + h[i] * s[i]`.
    ///
    /// Then rounds the K and V columns to the cache's dtype (to nearest, ties to even; to int8 by each head's largest number)
    /// and writes them to the tokens' places in `layer`: the token at position `p` of a span lies in block `blocks[p / 16]`, slot `p % 16`.
    fn write_kv(
        &mut self,
        batch: &Batch,
        heads: Heads,
        qkv: &mut Self::Buf,
        cos_sin: Option<&Self::Buf>,
        kv: &mut Self::Kv,
        layer: usize,
    );

    /// Causal attention of each span's queries over its sequence, reading K and V from the cache alone. For the token at
    /// position `p`, query head `h` and the KV head `h / (q / kv)`:
    /// `out[h] = sum_j softmax_j(scale * q[h] . k_j + slope[h] * (j - p)) * v_j` over
    /// `max(0, p + 1 - window) <= j <= p`. `out` is `[batch.len(), q * d]`; no slopes is slope 0.
    /// Blocks that lie wholly behind the window are not read.
    fn attention(
        &mut self,
        batch: &Batch,
        attention: &Attention<'_, Self::Buf>,
        kv: &Self::Kv,
        layer: usize,
        out: &mut Self::Buf,
    );

    /// `x += y` over `[rows, width]`.
    fn add(&mut self, size: Size, x: &mut Self::Buf, y: &Self::Buf);

    /// [`Backend::add`], then [`Backend::rms_norm`] of `x` into `y`: the end of one block and the beginning of the next. A
    /// backend may do both to a row while it is near, and gives the same bits.
    fn add_rms_norm(
        &mut self,
        size: Size,
        x: &mut Self::Buf,
        y: &mut Self::Buf,
        weight: &Self::Buf,
        eps: f32,
    ) {
        self.add(size, x, y);
        self.rms_norm(size, x, weight, eps, y);
    }

    /// [`Backend::add`], then [`Backend::layer_norm`] of `x` into `y`.
    fn add_layer_norm(
        &mut self,
        size: Size,
        x: &mut Self::Buf,
        y: &mut Self::Buf,
        norm: LayerNorm<'_, Self::Buf>,
    ) {
        self.add(size, x, y);
        self.layer_norm(size, x, norm, y);
    }

    /// `out[r][i] = silu(gate_up[r][i]) * gate_up[r][width + i]` with `silu(z) = z / (1 + exp(-z))`; `gate_up` is
    /// `[rows, 2 * width]`, `out` is `[rows, width]`.
    fn silu_mul(&mut self, size: Size, gate_up: &Self::Buf, out: &mut Self::Buf);

    /// [`Backend::linear`] into `gate_up`, then [`Backend::silu_mul`] of that; the matrix has `2 * size.width` rows. A backend
    /// may do without `gate_up`, and gives the same bits.
    fn linear_silu_mul(
        &mut self,
        size: Size,
        x: &Self::Buf,
        weight: &Self::Linear,
        gate_up: &mut Self::Buf,
        out: &mut Self::Buf,
    ) {
        self.linear(size.rows, x, weight, gate_up);
        self.silu_mul(size, gate_up, out);
    }

    /// `x = x / 2 * (1 + erf(x / sqrt(2)))` over `[rows, width]`.
    fn gelu(&mut self, size: Size, x: &mut Self::Buf);

    /// `x *= factor` over `[rows, width]`; a factor of 0 gives zeros, whatever `x` held.
    fn scale(&mut self, size: Size, x: &mut Self::Buf, factor: f32);

    /// `out[i] = x[rows[i]]`, rows of `width`.
    fn gather_rows(&mut self, width: usize, x: &Self::Buf, rows: &[u32], out: &mut Self::Buf);

    // Sampling, where the device can.

    /// Whether [`Backend::draw`] works for such a vocabulary. Without it the host reads the logits and chooses.
    fn draws(&self, _vocab: usize) -> bool {
        false
    }

    /// Chooses a token per draw from `logits [rows, vocab]`, as [`sampler::sample`](crate::sampler::sample) does. Called as
    /// often as a step needs; [`Backend::drawn`] gives the tokens of all calls since it was last called.
    fn draw(&mut self, _vocab: usize, _logits: &Self::Buf, _draws: &[Draw]) {}

    /// Waits for the draws and appends their tokens to `out`, in order; [`NOT_FINITE`] for a row with NaN or an infinity.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: this or an earlier op failed.
    fn drawn(&mut self, _out: &mut Vec<u32>) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// What becomes of the ops of a step of decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeOps {
    /// They are to be called, and [`Backend::end_decode`] after them.
    Wanted,
    /// They are enqueued, as called or from a recording: nothing is to be called.
    Enqueued,
}

/// How a token is chosen from a row of logits, where nothing but the row decides: no mask, bias or penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// The row.
    pub row: u32,
    /// 0: the largest logit, the lowest id of equals.
    pub temperature: f32,
    /// 0: all tokens.
    pub top_k: u32,
    /// 1: all tokens.
    pub top_p: f32,
    /// 0: all tokens.
    pub min_p: f32,
    /// The random number, in `[0, 1)`.
    pub u: f64,
}

/// Stands for the token of a row that has none.
pub const NOT_FINITE: u32 = u32::MAX;

/// Writes row `i` of a quantised matrix.
pub type QuantSource<'a> = dyn Fn(usize, QuantRow<'_>) + Sync + 'a;

/// One row of a quantised matrix: `w[j] = scales[g] * (q[j] - zeros[g])`, `g` being the group of column `j`; with
/// [`QuantOffset::Mins`] it is `scales[g] * q[j] + mins[g]`.
#[derive(Debug)]
pub struct QuantRow<'a> {
    /// `[k]`: -128 to 127 for int8, 0 to 15 for int4.
    pub q: &'a mut [i8],
    /// `[groups]`: numbers that f16 has.
    pub scales: &'a mut [f32],
    /// `[groups]`: 0 for int8, 0 to 16 for int4, 8 where the offset is the middle. Not read where there are minima.
    pub zeros: &'a mut [u8],
    /// `[groups]`, numbers that f16 has; empty where the shape has no minima.
    pub mins: &'a mut [f32],
}

impl QuantRow<'_> {
    /// The same row, to be written by a [`QuantSource`].
    pub fn lend(&mut self) -> QuantRow<'_> {
        QuantRow {
            q: self.q,
            scales: self.scales,
            zeros: self.zeros,
            mins: self.mins,
        }
    }
}

/// Writes row `i` of a weight matrix to the slice.
pub type RowSource<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// What [`Backend::attention`] needs beside the cache.
#[derive(Debug)]
pub struct Attention<'a, Buf> {
    /// One rank's heads.
    pub heads: Heads,
    /// The fused rows; only the query heads are read.
    pub qkv: &'a Buf,
    /// Factor of the scores.
    pub scale: f32,
    /// A token sees itself and the `window - 1` before it.
    pub window: Option<usize>,
    /// ALiBi slopes `[q]`, of this rank's query heads.
    pub slopes: Option<&'a Buf>,
}

/// The numbers of a layer norm.
#[derive(Debug)]
pub struct LayerNorm<'a, Buf> {
    /// `[width]`.
    pub weight: &'a Buf,
    /// `[width]`, if the model has it.
    pub bias: Option<&'a Buf>,
    /// Added to the variance.
    pub eps: f32,
}

/// Some columns of a buffer `[rows, width]`.
#[derive(Debug)]
pub struct Columns<Buf> {
    /// The buffer.
    pub buf: Buf,
    /// Numbers per row.
    pub width: usize,
    /// Which columns.
    pub columns: Range<usize>,
}

/// What can go wrong on a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// An allocation was refused.
    #[error("out of memory: the device refused {bytes} bytes")]
    OutOfMemory {
        /// How many were asked for.
        bytes: u64,
    },
    /// The device failed.
    #[error("the device failed: {0}")]
    Failed(String),
    /// The backend cannot do what a model or an option asks for.
    #[error("this device does not serve {0}")]
    Unsupported(String),
}
