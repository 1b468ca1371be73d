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
//! in tiles of [`BLOCK_TOKENS`](crate::plan::BLOCK_TOKENS) aligned to absolute position, whatever the span is.
//!
//! Faults. Ops enqueue work and return nothing: a device that fails keeps its first fault and gives it from the next
//! [`Backend::read`]. Ops may panic on shapes that do not fit together: the callers are the layers, which derive all
//! shapes from a checked [`ModelSpec`](crate::models::spec::ModelSpec) and a checked plan.

#[cfg(test)]
pub mod conformance;
pub mod cpu;
pub mod reference;

mod batch;
mod shapes;

pub use batch::{Batch, BatchSpan};
pub use shapes::{Heads, KvDtype, KvShape, LinearShape, Size, WeightDtype};

use std::ops::Range;

/// A device, its memory and its kernels.
pub trait Backend: Send + 'static {
    /// f32 numbers on the device. On host backends it is `AsRef<[f32]> + AsMut<[f32]>`, which host collectives need.
    type Buf: Send;
    /// A weight matrix `[n, k]` in the backend's own packing, with its bias `[n]` if it has one.
    type Linear: Send;
    /// The K and V of all layers and blocks, in the backend's own layout.
    type Kv: Send;

    /// Names the kernels, their version and instruction path, for the numerics id: `cpu-1-avx2`. Two backends of one
    /// name give the same bits.
    fn numerics(&self) -> String;

    // Memory.

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

    /// Memory for the K and V of all blocks and layers. The content is not defined before it is written.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn alloc_kv(&mut self, shape: KvShape) -> Result<Self::Kv, DeviceError>;

    /// Bytes of one KV block over all layers.
    fn kv_block_bytes(shape: KvShape) -> u64 {
        shape.block_bytes()
    }

    /// Bytes of its own that the ops of a step take: of up to `rows` rows, of which the widest that is multiplied has
    /// `width` numbers.
    fn scratch_bytes(_rows: usize, _width: usize) -> u64 {
        0
    }

    /// Called once per step, before its first op: a device may upload the batch here.
    fn begin_step(&mut self, _batch: &Batch) {}

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

    /// Rotates the first `heads` heads of each row of `x [rows, width]` in place, in half-split form. With `c` and `s`
    /// the two halves of `cos_sin[r]` (`[rows, d]`), for each head `h` and `i < d/2`:
    /// `h[i], h[i + d/2] = h[i] * c[i] - h[i + d/2] * s[i], h[i + d/2] * c[i] + h[i] * s[i]`.
    fn rope(
        &mut self,
        size: Size,
        x: &mut Self::Buf,
        heads: usize,
        head_width: usize,
        cos_sin: &Self::Buf,
    );

    /// Rounds the K and V columns of `qkv [batch.len(), (q + 2 kv) * d]` to the cache's dtype (to nearest, ties to even)
    /// and writes them to the tokens' places in `layer`: the token at position `p` of a span lies in block
    /// `blocks[p / 16]`, slot `p % 16`.
    fn write_kv(
        &mut self,
        batch: &Batch,
        heads: Heads,
        qkv: &Self::Buf,
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

    /// `out[r][i] = silu(gate_up[r][i]) * gate_up[r][width + i]` with `silu(z) = z / (1 + exp(-z))`; `gate_up` is
    /// `[rows, 2 * width]`, `out` is `[rows, width]`.
    fn silu_mul(&mut self, size: Size, gate_up: &Self::Buf, out: &mut Self::Buf);

    /// `x = x / 2 * (1 + erf(x / sqrt(2)))` over `[rows, width]`.
    fn gelu(&mut self, size: Size, x: &mut Self::Buf);

    /// `x *= factor` over `[rows, width]`; a factor of 0 gives zeros, whatever `x` held.
    fn scale(&mut self, size: Size, x: &mut Self::Buf, factor: f32);

    /// `out[i] = x[rows[i]]`, rows of `width`.
    fn gather_rows(&mut self, width: usize, x: &Self::Buf, rows: &[u32], out: &mut Self::Buf);
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
}
