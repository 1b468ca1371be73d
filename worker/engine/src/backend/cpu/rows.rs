//! The ops that take a step's rows one by one: norms, rotations, activations.
//!
//! Owns their kernels, each on some rows of one width, and the cut of many rows into parts for the threads.

use super::isa::{Isa, Kernel};
use super::pool::Pool;
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

/// Adds up `f` over `x`: four vectors side by side, then the rest one by one. One order for a given width.
///
/// # Safety
/// The features of `S`.
#[inline(always)]
unsafe fn sum_of<S: Simd>(x: &[f32], f: impl Fn(S::V) -> S::V) -> f32 {
    // SAFETY: every load stays inside its chunk; the features are the caller's promise.
    unsafe {
        let mut sums = [S::zero(); 4];
        let mut blocks = x.chunks_exact(4 * LANES);
        for block in &mut blocks {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::add(*sum, f(S::load(block.as_ptr().add(i * LANES))));
            }
        }
        let mut rest = blocks.remainder().chunks_exact(LANES);
        for block in &mut rest {
            sums[0] = S::add(sums[0], f(S::load(block.as_ptr())));
        }
        let tail = rest.remainder();
        if !tail.is_empty() {
            let mut block = [0.0; LANES];
            S::store(block.as_mut_ptr(), f(load_some::<S>(tail)));
            // Lanes beyond the tail hold f(0), which need not be 0.
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

/// `x[i] = f(x[i], y[i], z[i])` for all `i`.
///
/// # Safety
/// The features of `S`.
#[inline(always)]
unsafe fn map<S: Simd>(x: &mut [f32], y: &[f32], z: &[f32], f: impl Fn(S::V, S::V, S::V) -> S::V) {
    let (y, z) = (&y[..x.len()], &z[..x.len()]);
    let whole = x.len() / LANES * LANES;
    // SAFETY: whole vectors inside the slices, then a rest through blocks; the features are the caller's promise.
    unsafe {
        for i in (0..whole).step_by(LANES) {
            let at = x.as_mut_ptr().add(i);
            S::store(
                at,
                f(
                    S::load(at),
                    S::load(y.as_ptr().add(i)),
                    S::load(z.as_ptr().add(i)),
                ),
            );
        }
        let rest = &mut x[whole..];
        if !rest.is_empty() {
            let mut block = [0.0; LANES];
            let result = f(
                load_some::<S>(rest),
                load_some::<S>(&y[whole..]),
                load_some::<S>(&z[whole..]),
            );
            S::store(block.as_mut_ptr(), result);
            rest.copy_from_slice(&block[..rest.len()]);
        }
    }
}

/// See [`crate::backend::Backend::rms_norm`]; `out` holds the rows from `first` on.
pub(super) struct RmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) width: usize,
    pub(super) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, out) in self
            .x
            .chunks_exact(self.width)
            .zip(self.out.chunks_exact_mut(self.width))
        {
            // SAFETY: the features are the caller's promise.
            unsafe {
                let mean_square = sum_of::<S>(x, |x| S::mul(x, x)) / self.width as f32;
                let factor = S::splat(1.0 / (mean_square + self.eps).sqrt());
                map::<S>(out, x, self.weight, |_, x, weight| {
                    S::mul(S::mul(x, factor), weight)
                });
            }
        }
    }
}

/// See [`crate::backend::Backend::layer_norm`].
pub(super) struct LayerNormRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) eps: f32,
    pub(super) width: usize,
    pub(super) out: &'a mut [f32],
}

impl Kernel for LayerNormRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, out) in self
            .x
            .chunks_exact(self.width)
            .zip(self.out.chunks_exact_mut(self.width))
        {
            // SAFETY: the features are the caller's promise.
            unsafe {
                let mean = S::splat(sum_of::<S>(x, |x| x) / self.width as f32);
                let variance = sum_of::<S>(x, |x| S::mul(S::sub(x, mean), S::sub(x, mean)))
                    / self.width as f32;
                let factor = S::splat(1.0 / (variance + self.eps).sqrt());
                map::<S>(out, x, self.weight, |_, x, weight| {
                    S::mul(S::mul(S::sub(x, mean), factor), weight)
                });
                if let Some(bias) = self.bias {
                    map::<S>(out, bias, bias, |out, bias, _| S::add(out, bias));
                }
            }
        }
    }
}

/// See [`crate::backend::Backend::silu_mul`].
pub(super) struct SiluMul<'a> {
    pub(super) gate_up: &'a [f32],
    pub(super) width: usize,
    pub(super) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (gate_up, out) in self
            .gate_up
            .chunks_exact(2 * self.width)
            .zip(self.out.chunks_exact_mut(self.width))
        {
            let (gate, up) = gate_up.split_at(self.width);
            // SAFETY: the features are the caller's promise.
            unsafe {
                map::<S>(out, gate, up, |_, gate, up| {
                    let one_more = S::add(S::splat(1.0), S::exp(S::sub(S::zero(), gate)));
                    S::mul(S::div(gate, one_more), up)
                });
            }
        }
    }
}

/// An op on single numbers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pointwise {
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `min(max(x, -limit), limit)`.
    Clamp(f32),
    /// `x * factor`.
    Scale(f32),
}

/// Applies an op to all numbers.
pub(super) struct Apply<'a> {
    pub(super) op: Pointwise,
    pub(super) x: &'a mut [f32],
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        /// Stands in for operands that an op does not have: at most so many numbers at a time.
        const NOTHING: [f32; 4096] = [0.0; 4096];
        for x in self.x.chunks_mut(NOTHING.len()) {
            // SAFETY: the features are the caller's promise.
            unsafe {
                match self.op {
                    Pointwise::Gelu => map::<S>(x, &NOTHING, &NOTHING, |x, _, _| {
                        let erf = S::erf(S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2)));
                        S::mul(S::mul(x, S::splat(0.5)), S::add(S::splat(1.0), erf))
                    }),
                    // NaN stays: the second operand is given for it.
                    Pointwise::Clamp(limit) => map::<S>(x, &NOTHING, &NOTHING, |x, _, _| {
                        S::min(S::splat(limit), S::max(S::splat(-limit), x))
                    }),
                    Pointwise::Scale(factor) => {
                        map::<S>(x, &NOTHING, &NOTHING, |x, _, _| S::mul(x, S::splat(factor)))
                    }
                }
            }
        }
    }
}

/// `x += y`.
pub(super) struct Add<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) y: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the features are the caller's promise.
        unsafe { map::<S>(self.x, self.y, self.y, |x, y, _| S::add(x, y)) }
    }
}

/// See [`crate::backend::Backend::rope`].
pub(super) struct Rope<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) head_width: usize,
    pub(super) cos_sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.head_width / 2;
        for (row, angles) in self
            .x
            .chunks_exact_mut(self.width)
            .zip(self.cos_sin.chunks_exact(self.head_width))
        {
            let (cos, sin) = (&angles[..half], &angles[half..2 * half]);
            for head in row.chunks_exact_mut(self.head_width).take(self.heads) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

/// Runs a kernel on each part of the rows of `x`.
pub(super) fn apply(isa: Isa, pool: &Pool, size: Size, x: &mut [f32], op: Pointwise) {
    for_rows(pool, size, x, &|_, x| isa.run(Apply { op, x }));
}
