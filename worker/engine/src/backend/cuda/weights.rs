//! Weight matrices on the device: bf16, or quantised by groups.
//!
//! Owns their layout and the way there: rows are made by several threads, rounded into pinned memory and copied while the
//! next ones are made. No matrix is ever whole on the host.

use super::CudaBackend;
use super::arena::Place;
use super::buffer::CudaBuf;
use super::bytes;
use super::error::CudaError;
use super::pointer::Ptr;
use super::staging::SLOT_BYTES;
use crate::backend::{LinearShape, QuantBits, QuantRow, QuantShape, QuantSource, RowSource};
use half::bf16;
use std::num::NonZero;

/// Threads that make rows; more would wait for the copies.
const THREADS_MAX: usize = 8;

/// Fewer bytes are made by the caller's thread: starting others would take longer.
const SHARED_BYTES_MIN: usize = 64 << 10;

/// A weight matrix `[n, k]` with its bias.
#[derive(Debug)]
pub struct CudaLinear {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) matrix: Matrix,
    pub(super) bias: Option<CudaBuf>,
}

/// How the numbers are kept.
#[derive(Debug)]
pub(super) enum Matrix {
    /// Rows of [`bytes::row_numbers`].
    Bf16(Place),
    /// Rows of [`bytes::row_bytes`], the even column of int4 low.
    Quantised {
        shape: QuantShape,
        q: Place,
        /// f32 `[n, groups]`.
        scales: Place,
        /// u8 `[n, groups]`; int4 alone.
        zeros: Option<Place>,
    },
}

impl CudaLinear {
    /// The bias, or null.
    pub(super) fn bias(&self) -> Ptr<f32> {
        self.bias
            .as_ref()
            .map_or(Ptr::NULL, |bias| bias.floats(self.n))
    }
}

impl CudaBackend {
    pub(super) fn pack_bf16(
        &mut self,
        LinearShape { n, k, .. }: LinearShape,
        rows: &RowSource<'_>,
    ) -> Result<Place, CudaError> {
        let numbers = bytes::row_numbers(k);
        let place = self.arena.take(2 * (n * numbers) as u64)?;
        self.upload_rows(n, 2 * numbers, place.start, &|first, memory| {
            let mut values = vec![0.0; k];
            for (row, out) in (first..).zip(memory.chunks_exact_mut(2 * numbers)) {
                rows(row, &mut values);
                let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
                let (numbers, padding) = out.split_at_mut(k);
                for (out, value) in numbers.iter_mut().zip(&values) {
                    *out = bf16::from_f32(*value);
                }
                padding.fill(bf16::ZERO);
            }
        })?;
        Ok(place)
    }

    pub(super) fn pack_groups(
        &mut self,
        shape: QuantShape,
        rows: &QuantSource<'_>,
    ) -> Result<Matrix, CudaError> {
        let QuantShape { n, k, bits, .. } = shape;
        let (row_bytes, groups) = (bytes::row_bytes(k, bits), shape.groups());
        let place = self.arena.take((n * row_bytes) as u64)?;
        let scales_place = self.arena.take(4 * (n * groups) as u64)?;
        let zeros_place = match bits {
            QuantBits::Int8 => None,
            QuantBits::Int4 => Some(self.arena.take((n * groups) as u64)?),
        };
        // Scales and zeros follow a row's numbers in what is made, and are parted from them on the host: they are few.
        let made_bytes = row_bytes + 5 * groups;
        let (mut scales, mut zeros) = (
            Vec::with_capacity(4 * n * groups),
            Vec::with_capacity(n * groups),
        );
        let mut made = vec![0; rows_at_once(made_bytes).min(n) * made_bytes];
        for first in (0..n).step_by(rows_at_once(made_bytes)) {
            let count = rows_at_once(made_bytes).min(n - first);
            let made = &mut made[..count * made_bytes];
            share(made, made_bytes, first, &|first, made| {
                let (mut q, mut scales, mut zeros) =
                    (vec![0; k], vec![0.0; groups], vec![0; groups]);
                for (row, made) in (first..).zip(made.chunks_exact_mut(made_bytes)) {
                    rows(
                        row,
                        QuantRow {
                            q: &mut q,
                            scales: &mut scales,
                            zeros: &mut zeros,
                            mins: &mut [],
                        },
                    );
                    let (numbers, of_groups) = made.split_at_mut(row_bytes);
                    pack_numbers(&q, bits, numbers);
                    of_groups[..4 * groups].copy_from_slice(bytemuck::cast_slice(&scales));
                    of_groups[4 * groups..].copy_from_slice(&zeros);
                }
            });
            for row in made.chunks_exact(made_bytes) {
                scales.extend_from_slice(&row[row_bytes..][..4 * groups]);
                zeros.extend_from_slice(&row[row_bytes + 4 * groups..]);
            }
            let to = place.start + (first * row_bytes) as u64;
            self.staging
                .fill(&self.stream, count * row_bytes, to, |memory| {
                    for (out, row) in memory
                        .chunks_exact_mut(row_bytes)
                        .zip(made.chunks_exact(made_bytes))
                    {
                        out.copy_from_slice(&row[..row_bytes]);
                    }
                })?;
        }
        self.staging
            .upload(&self.stream, &scales, scales_place.start)?;
        if let Some(place) = &zeros_place {
            self.staging.upload(&self.stream, &zeros, place.start)?;
        }
        Ok(Matrix::Quantised {
            shape,
            q: place,
            scales: scales_place,
            zeros: zeros_place,
        })
    }

    /// Has `make` fill pinned memory with rows from a first one on, piece by piece, and copies them to `to`.
    fn upload_rows(
        &mut self,
        n: usize,
        row_bytes: usize,
        to: u64,
        make: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<(), CudaError> {
        let at_once = rows_at_once(row_bytes);
        for first in (0..n).step_by(at_once) {
            let bytes = at_once.min(n - first) * row_bytes;
            let to = to + (first * row_bytes) as u64;
            self.staging.fill(&self.stream, bytes, to, |memory| {
                share(memory, row_bytes, first, make)
            })?;
        }
        Ok(())
    }
}

/// Rows of one piece of pinned memory.
fn rows_at_once(row_bytes: usize) -> usize {
    (SLOT_BYTES / row_bytes.max(1)).max(1)
}

/// Divides the rows of `memory`, the first of which is row `first`, among threads.
fn share(
    memory: &mut [u8],
    row_bytes: usize,
    first: usize,
    make: &(dyn Fn(usize, &mut [u8]) + Sync),
) {
    let threads = std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(THREADS_MAX);
    if memory.len() < SHARED_BYTES_MIN || threads == 1 {
        return make(first, memory);
    }
    let rows = (memory.len() / row_bytes).div_ceil(threads);
    std::thread::scope(|scope| {
        for (i, part) in memory.chunks_mut(rows * row_bytes).enumerate() {
            scope.spawn(move || make(first + i * rows, part));
        }
    });
}

/// A row's numbers as the kernels read them; what is behind them is zero.
fn pack_numbers(q: &[i8], bits: QuantBits, out: &mut [u8]) {
    out.fill(0);
    match bits {
        QuantBits::Int8 => out[..q.len()].copy_from_slice(bytemuck::cast_slice(q)),
        QuantBits::Int4 => {
            for (out, pair) in out.iter_mut().zip(q.chunks(2)) {
                let high = pair.get(1).copied().unwrap_or(0);
                *out = (pair[0] as u8 & 15) | (high as u8) << 4;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_packed_with_the_even_column_low() {
        let mut out = [0xff; 4];
        pack_numbers(&[1, 15, 7], QuantBits::Int4, &mut out);
        assert_eq!(out, [0xf1, 0x07, 0, 0]);
        pack_numbers(&[-1, 127], QuantBits::Int8, &mut out);
        assert_eq!(out, [0xff, 0x7f, 0, 0]);
    }

    #[test]
    fn each_row_is_made_once_by_whichever_thread() {
        for rows in [1, 2, 7, 64, 1000] {
            let mut memory = vec![0; rows * 160];
            share(&mut memory, 160, 5, &|first, part| {
                for (row, out) in (first..).zip(part.chunks_exact_mut(160)) {
                    out[0] += row as u8;
                    out[1] += 1;
                }
            });
            for (row, out) in (5usize..).zip(memory.chunks_exact(160)) {
                assert_eq!((out[0], out[1]), (row as u8, 1), "row {row} of {rows}");
            }
        }
    }
}
