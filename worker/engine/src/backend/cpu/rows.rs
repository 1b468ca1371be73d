//! The ops that take a step's rows one by one: norms, activations.
//!
//! Owns their kernels, each on some rows of one width, and the cut of many rows into parts for the threads.

use super::isa::{Isa, Kernel};
use super::ops::{Add, Normalize, Op, Scale, SiluMul, SquareFrom};
use super::pool::{Base, Pool};
use super::simd::{LANES, Simd};
use crate::backend::Size;

/// Numbers worth waking a helper for, and a thread's part at least.
const PART: usize = 16 << 10;

/// Runs `body(first row, rows' numbers)` over all rows of `x [rows, width]`, on several threads if there are many.
pub(super) fn for_rows(
    pool: &Pool,
    size: Size,
    x: &mut [f32],
    body: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    if size.rows == 0 || size.width == 0 {
        return;
    }
    let rows = PART.div_ceil(size.width);
    pool.run_chunks(
        &mut x[..size.rows * size.width],
        rows * size.width,
        &|index, part, _| body(index * rows, part),
    );
}

/// Runs `body(row of x, row of y)` over all rows of two operands `[rows, width]`, one after another: the second half of a
/// body finds its row in the nearest cache.
pub(super) fn for_row_pairs(
    pool: &Pool,
    size: Size,
    x: &mut [f32],
    y: &mut [f32],
    body: &(dyn Fn(&mut [f32], &mut [f32]) + Sync),
) {
    let y = Base::new(&mut y[..size.rows * size.width]);
    for_rows(pool, size, x, &|first, x| {
        for (i, x) in x.chunks_exact_mut(size.width).enumerate() {
            // SAFETY: inside the second operand; a row's body runs once, and no other has this row.
            let y = unsafe {
                std::slice::from_raw_parts_mut(y.at((first + i) * size.width), size.width)
            };
            body(x, y);
        }
    });
}

/// Adds up `op(x)`: four vectors side by side, then the rest. One order for a given width.
///
/// # Safety
/// The features of `S`.
#[inline(always)]
unsafe fn sum_of<S: Simd, O: Op>(x: &[f32], op: O) -> f32 {
    // SAFETY: every load stays inside its chunk; the features are the caller's promise.
    unsafe {
        let mut sums = [S::zero(); 4];
        let mut blocks = x.chunks_exact(4 * LANES);
        for block in &mut blocks {
            for (i, sum) in sums.iter_mut().enumerate() {
                let x = S::load(block.as_ptr().wrapping_add(i * LANES));
                *sum = S::add(*sum, op.of::<S>(x, x, x));
            }
        }
        let mut rest = blocks.remainder().chunks_exact(LANES);
        for block in &mut rest {
            let x = S::load(block.as_ptr());
            sums[0] = S::add(sums[0], op.of::<S>(x, x, x));
        }
        let tail = rest.remainder();
        if !tail.is_empty() {
            let x = load_some::<S>(tail);
            let mut block = [0.0; LANES];
            S::store(block.as_mut_ptr(), op.of::<S>(x, x, x));
            // Lanes beyond the tail hold op(0), which need not be 0.
            block[tail.len()..].fill(0.0);
            sums[1] = S::add(sums[1], S::load(block.as_ptr()));
        }
        S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    }
}

/// Loads fewer numbers than lanes; the others are 0.
#[inline(always)]
unsafe fn load_some<S: Simd>(x: &[f32]) -> S::V {
    let mut block = [0.0; LANES];
    block[..x.len()].copy_from_slice(x);
    // SAFETY: the block has all lanes; the features are the caller's promise.
    unsafe { S::load(block.as_ptr()) }
}

/// `x[i] = op(x[i], y[i], z[i])` for all `i`. Ops of fewer operands are given one of their others again.
///
/// # Safety
/// The features of `S`; `y` and `z` are as long as `x`, and may be `x`.
#[inline(always)]
unsafe fn map<S: Simd, O: Op>(x: *mut f32, y: *const f32, z: *const f32, len: usize, op: O) {
    let whole = len / LANES * LANES;
    // SAFETY: whole vectors inside the operands, then a rest through blocks; the features are the caller's promise.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            let x = x.wrapping_add(i);
            S::store(
                x,
                op.of::<S>(
                    S::load(x),
                    S::load(y.wrapping_add(i)),
                    S::load(z.wrapping_add(i)),
                ),
            );
        }
        let rest = len - whole;
        if rest > 0 {
            let some = |from: *const f32| {
                load_some::<S>(std::slice::from_raw_parts(from.wrapping_add(whole), rest))
            };
            let mut block = [0.0; LANES];
            S::store(block.as_mut_ptr(), op.of::<S>(some(x), some(y), some(z)));
            std::ptr::copy_nonoverlapping(block.as_ptr(), x.wrapping_add(whole), rest);
        }
    }
}

/// `x = op(x)`.
pub(super) struct Apply<'a, O> {
    pub(super) op: O,
    pub(super) x: &'a mut [f32],
}

impl<O: Op> Kernel for Apply<'_, O> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let x = self.x.as_mut_ptr();
        // SAFETY: one slice three times; the features are the caller's promise.
        unsafe { map::<S, O>(x, x, x, self.x.len(), self.op) }
    }
}

/// `x = op(x, y, z)`.
pub(super) struct Combine<'a, O> {
    pub(super) op: O,
    pub(super) x: &'a mut [f32],
    pub(super) y: &'a [f32],
    pub(super) z: &'a [f32],
}

impl<O: Op> Kernel for Combine<'_, O> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.x.len();
        let (y, z) = (&self.y[..len], &self.z[..len]);
        // SAFETY: three slices of one length; the features are the caller's promise.
        unsafe { map::<S, O>(self.x.as_mut_ptr(), y.as_ptr(), z.as_ptr(), len, self.op) }
    }
}

/// See [`crate::backend::Backend::rms_norm`], of the rows of `out`.
pub(super) struct RmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.weight.len();
        for (x, out) in self
            .x
            .chunks_exact(width)
            .zip(self.out.chunks_exact_mut(width))
        {
            // SAFETY: the features are the caller's promise.
            unsafe {
                let mean_square = sum_of::<S, _>(x, SquareFrom(0.0)) / width as f32;
                let op = Normalize(0.0, 1.0 / (mean_square + self.eps).sqrt());
                Combine {
                    op,
                    x: out,
                    y: x,
                    z: self.weight,
                }
                .run::<S>();
            }
        }
    }
}

/// See [`crate::backend::Backend::layer_norm`], of the rows of `out`.
pub(super) struct LayerNormRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for LayerNormRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.weight.len();
        for (x, out) in self
            .x
            .chunks_exact(width)
            .zip(self.out.chunks_exact_mut(width))
        {
            // SAFETY: the features are the caller's promise.
            unsafe {
                let mean = sum_of::<S, _>(x, Scale(1.0)) / width as f32;
                let variance = sum_of::<S, _>(x, SquareFrom(mean)) / width as f32;
                let op = Normalize(mean, 1.0 / (variance + self.eps).sqrt());
                Combine {
                    op,
                    x: out,
                    y: x,
                    z: self.weight,
                }
                .run::<S>();
                if let Some(bias) = self.bias {
                    Combine {
                        op: Add,
                        x: out,
                        y: bias,
                        z: bias,
                    }
                    .run::<S>();
                }
            }
        }
    }
}

/// See [`crate::backend::Backend::silu_mul`], of the rows of `out`.
pub(super) struct SiluMulRows<'a> {
    pub(super) gate_up: &'a [f32],
    pub(super) width: usize,
    pub(super) out: &'a mut [f32],
}

impl Kernel for SiluMulRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.gate_up.chunks_exact(2 * self.width);
        for (gate_up, out) in rows.zip(self.out.chunks_exact_mut(self.width)) {
            let (gate, up) = gate_up.split_at(self.width);
            // SAFETY: the features are the caller's promise.
            unsafe {
                Combine {
                    op: SiluMul,
                    x: out,
                    y: gate,
                    z: up,
                }
                .run::<S>()
            };
        }
    }
}

/// Applies an op to all numbers of the rows of `x`.
pub(super) fn apply(isa: Isa, pool: &Pool, size: Size, x: &mut [f32], op: impl Op) {
    for_rows(pool, size, x, &|_, x| isa.run(Apply { op, x }));
}
