//! The arithmetic of single numbers: what a row op does to each, on all paths.

use super::simd::Simd;

/// An op on vectors of up to three operands. A trait and not closures: a closure that the compiler does not inline is
/// compiled without the instructions of its path.
pub(super) trait Op: Copy + Sync {
    /// The result. Ops of fewer operands leave the others alone. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The features of `S`.
    unsafe fn of<S: Simd>(self, x: S::V, y: S::V, z: S::V) -> S::V;
}

/// `(x - mean)^2`.
#[derive(Clone, Copy)]
pub(super) struct SquareFrom(pub(super) f32);

impl Op for SquareFrom {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, x: S::V, _: S::V, _: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let Self(mean) = self;
            let distance = S::sub(x, S::splat(mean));
            S::mul(distance, distance)
        }
    }
}

/// `(y - mean) * factor * z`.
#[derive(Clone, Copy)]
pub(super) struct Normalize(pub(super) f32, pub(super) f32);

impl Op for Normalize {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, _: S::V, y: S::V, z: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let Self(mean, factor) = self;
            S::mul(S::mul(S::sub(y, S::splat(mean)), S::splat(factor)), z)
        }
    }
}

/// `x + y`.
#[derive(Clone, Copy)]
pub(super) struct Add;

impl Op for Add {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, x: S::V, y: S::V, _: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::add(x, y) }
    }
}

/// `y / (1 + exp(-y)) * z`.
#[derive(Clone, Copy)]
pub(super) struct SiluMul;

impl Op for SiluMul {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, _: S::V, y: S::V, z: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let exp = S::exp(S::sub(S::zero(), y));
            S::mul(S::div(y, S::add(S::splat(1.0), exp)), z)
        }
    }
}

/// `x / 2 * (1 + erf(x / sqrt(2)))`.
#[derive(Clone, Copy)]
pub(super) struct Gelu;

impl Op for Gelu {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, x: S::V, _: S::V, _: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let erf = S::erf(S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2)));
            S::mul(S::mul(x, S::splat(0.5)), S::add(S::splat(1.0), erf))
        }
    }
}

/// `min(max(x, -limit), limit)`; NaN stays.
#[derive(Clone, Copy)]
pub(super) struct Clamp(pub(super) f32);

impl Op for Clamp {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, x: S::V, _: S::V, _: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::min(S::splat(self.0), S::max(S::splat(-self.0), x)) }
    }
}

/// `x * factor`.
#[derive(Clone, Copy)]
pub(super) struct Scale(pub(super) f32);

impl Op for Scale {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, x: S::V, _: S::V, _: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::mul(x, S::splat(self.0)) }
    }
}
