//! Products of activations with weight matrices.
//!
//! Owns which kernel makes a product: cuBLAS for bf16; for quantised weights our own where rows are few, else they are
//! widened to bf16, a slice at a time, for cuBLAS. Where rows must not depend on each other, one kernel makes all.

use super::CudaBackend;
use super::blas::Product;
use super::buffer::{CudaBuf, Form};
use super::bytes;
use super::error::CudaError;
use super::kernels::Kernels;
use super::pointer::{Ptr, PtrMut};
use super::weights::{CudaLinear, Matrix};
use crate::backend::{QuantBits, QuantShape};
use half::bf16;

/// Rows up to which quantised weights are read as they are.
const FEW_ROWS: usize = 8;

/// Side of the invariant kernel's tiles.
const TILE: usize = 64;

/// Its threads, and those of the kernels for few rows.
const THREADS: u32 = 128;

/// Its stages, and the bytes of a tile of bf16 whose rows are padded by 16 bytes.
const STAGES: usize = 4;
const TILE_BYTES: usize = TILE * (TILE + 8) * 2;

/// Its shared memory, as `gemm_mma.cu` lays it out.
const SHARED_BF16: u32 = (STAGES * 2 * TILE_BYTES) as u32;
const SHARED_W8: u32 = (STAGES * (TILE_BYTES + TILE * TILE) + TILE_BYTES) as u32;
const SHARED_W4: u32 = (STAGES * (TILE_BYTES + TILE * TILE / 2) + TILE_BYTES) as u32;

/// Lets the kernels take the shared memory that they need.
pub(super) fn allow_shared(kernels: &Kernels) -> Result<(), CudaError> {
    kernels.gemm_bf16.allow_shared(SHARED_BF16)?;
    kernels.gemm_w8.allow_shared(SHARED_W8)?;
    kernels.gemm_w4.allow_shared(SHARED_W4)
}

/// Where the rows of a product are, and what they are multiplied with beside the numbers.
#[derive(Clone, Copy)]
struct Operands {
    rows: usize,
    n: usize,
    k: usize,
    x: Ptr<bf16>,
    bias: Ptr<f32>,
    out: PtrMut<f32>,
}

/// A quantised matrix, or rows of it from some row on.
#[derive(Clone, Copy)]
struct Groups {
    shape: QuantShape,
    q: u64,
    scales: Ptr<f32>,
    zeros: Ptr<u8>,
}

impl Groups {
    /// The matrix without its first rows.
    fn after(self, rows: usize) -> Groups {
        let Groups {
            shape,
            q,
            scales,
            zeros,
        } = self;
        let groups = rows * shape.groups();
        Groups {
            shape,
            q: q + (rows * bytes::row_bytes(shape.k, shape.bits)) as u64,
            scales: Ptr::new(scales.address() + 4 * groups as u64),
            zeros: Ptr::new(zeros.address() + groups as u64),
        }
    }
}

/// What a kernel of quantised weights is told of their sizes: rows, n, k, bytes of a row of the matrix, group, lead.
fn counts(operands: Operands, shape: QuantShape) -> [i32; 6] {
    let Operands { rows, n, k, .. } = operands;
    let QuantShape {
        bits, group, lead, ..
    } = shape;
    [rows, n, k, bytes::row_bytes(k, bits), group, lead].map(|number| number as i32)
}

impl CudaBackend {
    pub(super) fn product(
        &mut self,
        rows: usize,
        x: &CudaBuf,
        weight: &CudaLinear,
        out: &mut CudaBuf,
    ) -> Result<(), CudaError> {
        let (n, k) = (weight.n, weight.k);
        if rows == 0 {
            return Ok(());
        }
        let x = self.rounded(x, rows, k)?;
        let operands = Operands {
            rows,
            n,
            k,
            x,
            bias: weight.bias(),
            out: out.fill_floats(rows * n),
        };
        match &weight.matrix {
            Matrix::Bf16(place) if self.options.batch_invariant => {
                self.invariant_bf16(operands, Ptr::new(place.start))
            }
            Matrix::Bf16(place) => {
                self.blas_product(operands, n, Ptr::new(place.start))?;
                self.add_bias(operands)
            }
            Matrix::Quantised {
                shape,
                q,
                scales,
                zeros,
            } => {
                let groups = Groups {
                    shape: *shape,
                    q: q.start,
                    scales: Ptr::new(scales.start),
                    zeros: zeros
                        .as_ref()
                        .map_or(Ptr::NULL, |zeros| Ptr::new(zeros.start)),
                };
                if self.options.batch_invariant {
                    self.invariant_groups(operands, groups)
                } else if rows <= FEW_ROWS {
                    self.few_rows(operands, groups)
                } else {
                    self.widened(operands, groups)?;
                    self.add_bias(operands)
                }
            }
        }
    }

    /// The rows in bf16: as they are, or rounded into scratch memory.
    fn rounded(&mut self, x: &CudaBuf, rows: usize, k: usize) -> Result<Ptr<bf16>, CudaError> {
        if x.form() == Form::Bf16 {
            return Ok(x.halves(rows * k));
        }
        let n = rows * k;
        let (start, moved) = self
            .scratch
            .rounded
            .at_least(&mut self.arena, bytes::rounded(rows, k))?;
        self.forget_recorded(moved);
        let out = PtrMut::new(start);
        self.device
            .kernels
            .to_bf16(self.flat(n), out, x.floats(n), n as i64)?;
        Ok(out.read())
    }

    /// A product with some rows of a matrix, whose results are some columns of `operands.out`.
    fn blas_product(
        &mut self,
        operands: Operands,
        out_width: usize,
        w: Ptr<bf16>,
    ) -> Result<(), CudaError> {
        let Operands {
            rows, n, k, x, out, ..
        } = operands;
        let (start, _) = self
            .scratch
            .workspace
            .at_least(&mut self.arena, bytes::BLAS_WORKSPACE)?;
        self.blas.set_workspace(start, bytes::BLAS_WORKSPACE)?;
        let shape = Product {
            rows,
            n,
            k,
            ld: bytes::row_numbers(k),
            out_width,
        };
        self.blas.product(shape, x, w, out)
    }

    fn add_bias(&self, operands: Operands) -> Result<(), CudaError> {
        let Operands {
            rows, n, bias, out, ..
        } = operands;
        if bias.address() == 0 {
            return Ok(());
        }
        self.device
            .kernels
            .add_bias(self.by_rows(rows, n), out, bias, rows as i32, n as i32)
    }

    fn invariant_bf16(&self, operands: Operands, w: Ptr<bf16>) -> Result<(), CudaError> {
        let Operands {
            rows,
            n,
            k,
            x,
            bias,
            out,
        } = operands;
        let launch = self.grid(
            [rows.div_ceil(TILE), n.div_ceil(TILE), 1],
            THREADS,
            SHARED_BF16,
        );
        let (ldx, ldw) = (k as i32, bytes::row_numbers(k) as i32);
        self.device.kernels.gemm_bf16(
            launch,
            out,
            x,
            w,
            bias,
            rows as i32,
            n as i32,
            k as i32,
            ldx,
            ldw,
        )
    }

    fn invariant_groups(&self, operands: Operands, groups: Groups) -> Result<(), CudaError> {
        let Operands {
            rows,
            n,
            x,
            bias,
            out,
            ..
        } = operands;
        let Groups {
            shape,
            q,
            scales,
            zeros,
        } = groups;
        let [rows_i, n_i, k_i, ldq, group, lead] = counts(operands, shape);
        let grid = [rows.div_ceil(TILE), n.div_ceil(TILE), 1];
        let kernels = &self.device.kernels;
        match shape.bits {
            QuantBits::Int8 => {
                let launch = self.grid(grid, THREADS, SHARED_W8);
                kernels.gemm_w8(
                    launch,
                    out,
                    x,
                    Ptr::new(q),
                    scales,
                    bias,
                    rows_i,
                    n_i,
                    k_i,
                    k_i,
                    ldq,
                    group,
                    lead,
                )
            }
            QuantBits::Int4 => {
                let launch = self.grid(grid, THREADS, SHARED_W4);
                kernels.gemm_w4(
                    launch,
                    out,
                    x,
                    Ptr::new(q),
                    scales,
                    zeros,
                    bias,
                    rows_i,
                    n_i,
                    k_i,
                    k_i,
                    ldq,
                    group,
                    lead,
                )
            }
        }
    }

    fn few_rows(&self, operands: Operands, groups: Groups) -> Result<(), CudaError> {
        let Operands {
            rows,
            n,
            x,
            bias,
            out,
            ..
        } = operands;
        let Groups {
            shape,
            q,
            scales,
            zeros,
        } = groups;
        let [rows_i, n_i, k_i, ldq, group, lead] = counts(operands, shape);
        // Rows of the matrix that a block takes.
        let of_block = if rows <= 2 { 8 } else { 16 };
        let launch = self.grid([n.div_ceil(of_block), 1, 1], THREADS, 0);
        let kernels = &self.device.kernels;
        match shape.bits {
            QuantBits::Int8 => {
                let kernel = match rows {
                    1 => Kernels::gemv_w8_r1,
                    2 => Kernels::gemv_w8_r2,
                    3 | 4 => Kernels::gemv_w8_r4,
                    _ => Kernels::gemv_w8_r8,
                };
                kernel(
                    kernels,
                    launch,
                    out,
                    x,
                    Ptr::new(q),
                    scales,
                    bias,
                    rows_i,
                    n_i,
                    k_i,
                    ldq,
                    group,
                    lead,
                )
            }
            QuantBits::Int4 => {
                let kernel = match rows {
                    1 => Kernels::gemv_w4_r1,
                    2 => Kernels::gemv_w4_r2,
                    3 | 4 => Kernels::gemv_w4_r4,
                    _ => Kernels::gemv_w4_r8,
                };
                kernel(
                    kernels,
                    launch,
                    out,
                    x,
                    Ptr::new(q),
                    scales,
                    zeros,
                    bias,
                    rows_i,
                    n_i,
                    k_i,
                    ldq,
                    group,
                    lead,
                )
            }
        }
    }

    /// Widens a slice of the matrix's rows, multiplies with it, and so on.
    fn widened(&mut self, operands: Operands, groups: Groups) -> Result<(), CudaError> {
        let Operands { n, k, out, .. } = operands;
        let ld = bytes::row_numbers(k);
        let (start, moved) = self
            .scratch
            .widened
            .at_least(&mut self.arena, bytes::WIDENED)?;
        self.forget_recorded(moved);
        let at_once = slice_rows(ld);
        for first in (0..n).step_by(at_once) {
            let slice = Operands {
                n: at_once.min(n - first),
                out: out.add(first),
                ..operands
            };
            self.widen(groups.after(first), slice.n, PtrMut::new(start))?;
            self.blas_product(slice, n, Ptr::new(start))?;
        }
        Ok(())
    }

    fn widen(&self, groups: Groups, rows: usize, out: PtrMut<bf16>) -> Result<(), CudaError> {
        let Groups {
            shape,
            q,
            scales,
            zeros,
        } = groups;
        let QuantShape {
            k,
            bits,
            group,
            lead,
            ..
        } = shape;
        let [n, k, ldq, ld, group, lead] = [
            rows,
            k,
            bytes::row_bytes(k, bits),
            bytes::row_numbers(k),
            group,
            lead,
        ]
        .map(|number| number as i32);
        let launch = self.grid([rows, 1, 1], 256, 0);
        match bits {
            QuantBits::Int8 => self.device.kernels.dequant_w8(
                launch,
                out,
                Ptr::new(q),
                scales,
                n,
                k,
                ldq,
                ld,
                group,
                lead,
            ),
            QuantBits::Int4 => self.device.kernels.dequant_w4(
                launch,
                out,
                Ptr::new(q),
                scales,
                zeros,
                n,
                k,
                ldq,
                ld,
                group,
                lead,
            ),
        }
    }
}

/// Rows that are widened at once: whole tiles of the products behind.
const fn slice_rows(ld: usize) -> usize {
    let rows = bytes::WIDENED as usize / (2 * ld);
    if rows > TILE {
        rows / TILE * TILE
    } else if rows > 0 {
        rows
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_fit_their_memory() {
        for ld in [8, 136, 4096, 11008, 28672, 1 << 20] {
            let rows = slice_rows(ld);
            assert!(
                2 * rows * ld <= bytes::WIDENED as usize,
                "{rows} rows of {ld}"
            );
            assert!(
                rows.is_multiple_of(TILE) || ld > 1 << 17,
                "{rows} rows of {ld}"
            );
        }
    }
}
