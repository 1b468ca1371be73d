//! The naive twin of every device backend: plain loops over f32, meant to be obviously right.
//!
//! Owns no speed. Tests compare the other backends with it op by op (`conformance`) and the whole forward pass with the
//! goldens of transformers.

use super::{
    Attention, Backend, Batch, Columns, DeviceError, FloatDtype, Heads, KvDtype, KvShape,
    LayerNorm, LinearShape, QuantRow, QuantShape, QuantSource, RowSource, Size, quantise_kv,
};
use crate::plan::BLOCK_TOKENS;
use crate::weights::quant::dequantise_row;
use half::bf16;

/// The reference backend. It has no state: one thread, plain vectors.
#[derive(Debug, Default)]
pub struct ReferenceBackend;

/// A weight matrix, widened to f32 after rounding to its dtype, or dequantised.
#[derive(Debug)]
pub struct ReferenceLinear {
    n: usize,
    k: usize,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// K and V as `[layer, block, K or V, slot, head, d]`, widened to f32 after rounding to the cache's dtype.
#[derive(Debug)]
pub struct ReferenceKv {
    shape: KvShape,
    values: Vec<f32>,
}

impl ReferenceKv {
    /// Start of one head's K (`side` 0) or V (`side` 1).
    fn at(&self, layer: usize, block: u32, side: usize, slot: usize, head: usize) -> usize {
        let block = layer * self.shape.blocks + block as usize;
        (((block * 2 + side) * BLOCK_TOKENS + slot) * self.shape.heads + head)
            * self.shape.head_width
    }
}

impl Backend for ReferenceBackend {
    type Buf = Vec<f32>;
    type Linear = ReferenceLinear;
    type Kv = ReferenceKv;

    fn numerics(&self) -> String {
        "reference-1".to_owned()
    }

    fn alloc(&mut self, len: usize) -> Result<Vec<f32>, DeviceError> {
        zeros(len)
    }

    fn write(&mut self, values: &[f32], buf: &mut Vec<f32>) {
        buf[..values.len()].copy_from_slice(values);
    }

    fn read(&mut self, buf: &Vec<f32>, out: &mut [f32]) -> Result<(), DeviceError> {
        out.copy_from_slice(&buf[..out.len()]);
        Ok(())
    }

    fn pack(
        &mut self,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<ReferenceLinear, DeviceError> {
        let LinearShape { n, k, dtype } = shape;
        let mut weight = zeros(n * k)?;
        for (i, row) in weight.chunks_exact_mut(k).enumerate() {
            rows(i, row);
            if dtype == FloatDtype::Bf16 {
                row.iter_mut().for_each(|value| *value = round_bf16(*value));
            }
        }
        Ok(ReferenceLinear {
            n,
            k,
            weight,
            bias: bias.map(<[f32]>::to_vec),
        })
    }

    fn linear_bytes(shape: LinearShape) -> u64 {
        4 * shape.n as u64 * shape.k as u64
    }

    fn takes_quantised(_: QuantShape) -> bool {
        true
    }

    fn pack_quantised(
        &mut self,
        shape: QuantShape,
        rows: &QuantSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<ReferenceLinear, DeviceError> {
        let QuantShape { n, k, .. } = shape;
        let mut weight = zeros(n * k)?;
        let groups = shape.groups();
        let mut lent = QuantRow {
            q: &mut vec![0; k],
            scales: &mut vec![0.0; groups],
            zeros: &mut vec![0; groups],
            mins: &mut vec![0.0; shape.mins()],
        };
        for (i, row) in weight.chunks_exact_mut(k).enumerate() {
            rows(i, lent.lend());
            dequantise_row(shape, &lent, row);
        }
        Ok(ReferenceLinear {
            n,
            k,
            weight,
            bias: bias.map(<[f32]>::to_vec),
        })
    }

    fn quantised_bytes(shape: QuantShape) -> u64 {
        4 * shape.n as u64 * shape.k as u64
    }

    fn alloc_kv(&mut self, shape: KvShape) -> Result<ReferenceKv, DeviceError> {
        let values =
            zeros(2 * shape.layers * shape.blocks * BLOCK_TOKENS * shape.heads * shape.head_width)?;
        Ok(ReferenceKv { shape, values })
    }

    fn embed(&mut self, batch: &Batch, table: &ReferenceLinear, first: u32, out: &mut Vec<f32>) {
        for (token, out) in batch.tokens.iter().zip(out.chunks_exact_mut(table.k)) {
            match token
                .checked_sub(first)
                .map(|row| row as usize)
                .filter(|row| *row < table.n)
            {
                Some(row) => out.copy_from_slice(&table.weight[row * table.k..][..table.k]),
                None => out.fill(0.0),
            }
        }
    }

    fn rms_norm(
        &mut self,
        size: Size,
        x: &Vec<f32>,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        for (x, out) in rows(x, size).zip(rows_mut(out, size)) {
            let mean_square = x.iter().map(|x| x * x).sum::<f32>() / size.width as f32;
            let factor = 1.0 / (mean_square + eps).sqrt();
            for i in 0..size.width {
                out[i] = x[i] * factor * weight[i];
            }
        }
    }

    fn layer_norm(
        &mut self,
        size: Size,
        x: &Vec<f32>,
        norm: LayerNorm<'_, Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        for (x, out) in rows(x, size).zip(rows_mut(out, size)) {
            let mean = x.iter().sum::<f32>() / size.width as f32;
            let variance =
                x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / size.width as f32;
            let factor = 1.0 / (variance + norm.eps).sqrt();
            for i in 0..size.width {
                out[i] =
                    (x[i] - mean) * factor * norm.weight[i] + norm.bias.map_or(0.0, |bias| bias[i]);
            }
        }
    }

    fn linear(&mut self, rows: usize, x: &Vec<f32>, weight: &ReferenceLinear, out: &mut Vec<f32>) {
        let ReferenceLinear { n, k, weight, bias } = weight;
        for (x, out) in x.chunks_exact(*k).zip(out.chunks_exact_mut(*n)).take(rows) {
            for i in 0..*n {
                out[i] = dot(x, &weight[i * k..][..*k]) + bias.as_ref().map_or(0.0, |bias| bias[i]);
            }
        }
    }

    fn clamp(&mut self, size: Size, x: &mut Vec<f32>, limit: f32) {
        all_mut(x, size)
            .iter_mut()
            .for_each(|x| *x = x.clamp(-limit, limit));
    }

    fn copy_columns(&mut self, rows: usize, from: Columns<&Vec<f32>>, to: Columns<&mut Vec<f32>>) {
        for r in 0..rows {
            let values = &from.buf[r * from.width..][from.columns.clone()];
            to.buf[r * to.width..][to.columns.clone()].copy_from_slice(values);
        }
    }

    fn write_kv(
        &mut self,
        batch: &Batch,
        heads: Heads,
        qkv: &mut Vec<f32>,
        cos_sin: Option<&Vec<f32>>,
        kv: &mut ReferenceKv,
        layer: usize,
    ) {
        let d = heads.width;
        if let Some(cos_sin) = cos_sin {
            rotate(batch.len(), heads, qkv, cos_sin);
        }
        for span in &batch.spans {
            let blocks = batch.blocks_of(span);
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.position + i;
                let Some(&block) = blocks.get(position / BLOCK_TOKENS) else {
                    continue;
                };
                let slot = position % BLOCK_TOKENS;
                let keys_and_values =
                    &qkv[row * heads.qkv_width()..][..heads.qkv_width()][heads.q_width()..];
                for (i, vector) in keys_and_values.chunks_exact(d).enumerate() {
                    let at = kv.at(layer, block, i / heads.kv, slot, i % heads.kv);
                    round(kv.shape.dtype, vector, &mut kv.values[at..at + d]);
                }
            }
        }
    }

    fn attention(
        &mut self,
        batch: &Batch,
        attention: &Attention<'_, Vec<f32>>,
        kv: &ReferenceKv,
        layer: usize,
        out: &mut Vec<f32>,
    ) {
        let heads = attention.heads;
        let d = heads.width;
        let mut scores = Vec::new();
        for span in &batch.spans {
            let blocks = batch.blocks_of(span);
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.position + i;
                if blocks.is_empty() {
                    out[row * heads.q_width()..][..heads.q_width()].fill(0.0);
                    continue;
                }
                let first = attention
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window));
                for head in 0..heads.q {
                    let kv_head = head / (heads.q / heads.kv);
                    let at = |key: usize, side: usize| {
                        kv.at(
                            layer,
                            blocks[key / BLOCK_TOKENS],
                            side,
                            key % BLOCK_TOKENS,
                            kv_head,
                        )
                    };
                    let query = &attention.qkv[row * heads.qkv_width() + head * d..][..d];
                    let slope = attention.slopes.map_or(0.0, |slopes| slopes[head]);
                    scores.clear();
                    for key in first..=position {
                        let distance = (position - key) as f32;
                        scores.push(
                            attention.scale * dot(query, &kv.values[at(key, 0)..][..d])
                                - slope * distance,
                        );
                    }
                    softmax(&mut scores);
                    let out = &mut out[row * heads.q_width() + head * d..][..d];
                    out.fill(0.0);
                    for (key, weight) in (first..=position).zip(&scores) {
                        for (out, value) in out.iter_mut().zip(&kv.values[at(key, 1)..][..d]) {
                            *out += weight * value;
                        }
                    }
                }
            }
        }
    }

    fn add(&mut self, size: Size, x: &mut Vec<f32>, y: &Vec<f32>) {
        all_mut(x, size)
            .iter_mut()
            .zip(y)
            .for_each(|(x, y)| *x += y);
    }

    fn silu_mul(&mut self, size: Size, gate_up: &Vec<f32>, out: &mut Vec<f32>) {
        let gate_up = rows(
            gate_up,
            Size {
                rows: size.rows,
                width: 2 * size.width,
            },
        );
        for (gate_up, out) in gate_up.zip(rows_mut(out, size)) {
            let (gate, up) = gate_up.split_at(size.width);
            for i in 0..size.width {
                out[i] = gate[i] / (1.0 + (-gate[i]).exp()) * up[i];
            }
        }
    }

    fn gelu(&mut self, size: Size, x: &mut Vec<f32>) {
        all_mut(x, size).iter_mut().for_each(|x| *x = gelu(*x));
    }

    fn scale(&mut self, size: Size, x: &mut Vec<f32>, factor: f32) {
        if factor == 0.0 {
            all_mut(x, size).fill(0.0);
        }
        all_mut(x, size).iter_mut().for_each(|x| *x *= factor);
    }

    fn gather_rows(&mut self, width: usize, x: &Vec<f32>, rows: &[u32], out: &mut Vec<f32>) {
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[*row as usize * width..][..width]);
        }
    }
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`, through f64.
#[must_use]
pub fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    (x / 2.0 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

/// The error function by its Taylor series: `2 / sqrt(pi) * sum_n (-1)^n x^(2n+1) / (n! (2n+1))`. Beyond 4 it is 1 within
/// half a unit of f32.
fn erf(x: f64) -> f64 {
    if x.is_nan() || x.abs() >= 4.0 {
        return if x.is_nan() { x } else { x.signum() };
    }
    let (mut power, mut sum) = (x, x);
    for n in 1..80 {
        let n = f64::from(n);
        power *= -x * x / n;
        sum += power / (2.0 * n + 1.0);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn round_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Eight sums side by side, so that the compiler may use vectors; added up in one fixed order.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (x, y) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f32 = x
        .remainder()
        .iter()
        .zip(y.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in x.zip(y) {
        for lane in 0..8 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores
        .iter_mut()
        .for_each(|score| *score = (*score - largest).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= sum);
}

/// Writes one key or value as the cache's dtype has it.
fn round(dtype: KvDtype, vector: &[f32], out: &mut [f32]) {
    match dtype {
        KvDtype::F32 => out.copy_from_slice(vector),
        KvDtype::Bf16 => {
            for (out, x) in out.iter_mut().zip(vector) {
                *out = round_bf16(*x);
            }
        }
        KvDtype::Int8 => {
            let mut q = vec![0; vector.len()];
            let scale = quantise_kv(vector, &mut q);
            for (out, q) in out.iter_mut().zip(q) {
                *out = f32::from(q) * scale;
            }
        }
    }
}

/// Turns the query and key heads of each row by its angles.
fn rotate(rows: usize, heads: Heads, qkv: &mut [f32], cos_sin: &[f32]) {
    let (d, half) = (heads.width, heads.width / 2);
    for (row, angles) in qkv
        .chunks_exact_mut(heads.qkv_width())
        .zip(cos_sin.chunks_exact(d))
        .take(rows)
    {
        let (cos, sin) = angles.split_at(half);
        for head in row.chunks_exact_mut(d).take(heads.q + heads.kv) {
            for i in 0..half {
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * cos[i] - b * sin[i];
                head[i + half] = b * cos[i] + a * sin[i];
            }
        }
    }
}

fn rows(x: &[f32], size: Size) -> impl Iterator<Item = &[f32]> {
    x.chunks_exact(size.width).take(size.rows)
}

fn rows_mut(x: &mut [f32], size: Size) -> impl Iterator<Item = &mut [f32]> {
    x.chunks_exact_mut(size.width).take(size.rows)
}

fn all_mut(x: &mut [f32], size: Size) -> &mut [f32] {
    &mut x[..size.rows * size.width]
}

/// Zeros, with an error in place of an abort where memory is short.
fn zeros(len: usize) -> Result<Vec<f32>, DeviceError> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(len)
        .map_err(|_| DeviceError::OutOfMemory {
            bytes: 4 * len as u64,
        })?;
    values.resize(len, 0.0);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_equals_published_values() {
        for (x, expected) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813),
            (1.0, 0.842_700_792_950),
            (2.0, 0.995_322_265_019),
            (3.5, 0.999_999_256_902),
        ] {
            assert!(
                (erf(x) - expected).abs() < 1e-9,
                "erf({x}) = {}, expected {expected}",
                erf(x)
            );
            assert!((erf(-x) + expected).abs() < 1e-9);
        }
        assert_eq!(erf(9.0), 1.0);
        assert!(erf(f64::NAN).is_nan());
    }
}
