//! Sixteen f32 at a time: the only vocabulary of the kernels, once per instruction path.
//!
//! Owns the instructions. A vector has 16 lanes on every path (two registers with AVX2), so that the kernels, the
//! packed layouts and the order of every sum are the same everywhere; only the portable path rounds between a product
//! and its addition.

// Instructions have no safety story of their own beyond the trait's: the processor has them, pointers are good for what
// is read or written.
#![allow(clippy::missing_safety_doc)]

use half::bf16;

use super::float_tile::{FloatTile, Weight};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
pub(super) use portable::Portable;

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// The operations on vectors of [`LANES`] numbers.
///
/// # Safety
/// All functions: the processor has the path's features, the caller is compiled with them, and pointers are good for
/// reading or writing the lanes (for prefetches any address is).
///
/// What inner loops call reckons addresses with `wrapping_add` and reads by plain instructions: the checks that builds
/// with debug assertions put around `add`, `*` and unaligned loads would halve the speed of tests that run models.
pub(super) trait Simd: Copy + 'static {
    /// The vector.
    type V: Copy;
    /// Rows of a tile of one panel: so many sums stay in registers beside what they are made of.
    const ROWS: usize;
    /// Rows of activations up to which a tile takes all 32 rows of a panel at once, and not 16.
    const WHOLE_ROWS: usize;
    /// Sums of a tile of several panels, which need more registers for weights.
    const SUMS: usize;

    /// [`FloatTile::compute`] for this path: the one large piece of code, called and not inlined.
    unsafe fn float_tile<W: Weight>(tile: &FloatTile<W>, rows: usize);

    unsafe fn splat(x: f32) -> Self::V;
    /// One number in all lanes.
    unsafe fn splat_at(from: *const f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, x: Self::V);
    /// From an address that is a multiple of 64.
    unsafe fn load_aligned(from: *const f32) -> Self::V;
    /// The even ones of 32 bf16 at a multiple of 64, widened.
    unsafe fn load_even(from: *const u16) -> Self::V;
    /// The odd ones of 32 bf16 at a multiple of 64, widened.
    unsafe fn load_odd(from: *const u16) -> Self::V;
    /// 16 int8, as f32.
    unsafe fn load_i8(from: *const i8) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The larger one; `b` if either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; `b` if either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The bits, shifted left by 23.
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V;
    /// `|a|` with the sign of `sign`.
    unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V;
    /// The lowest byte of each lane's bits: 16 bytes.
    unsafe fn store_low_bytes(to: *mut u8, a: Self::V);
    /// Asks for the line of memory at `at`.
    unsafe fn prefetch(at: *const u8);

    /// 32 numbers rounded to bf16, ties to even and denormal ones to zero: the bits of 16 pairs of neighbours. Here and in
    /// [`Simd::dot_pairs`] the processor of an AVX-512 path multiplies pairs; other paths have slow twins of it for tests.
    #[inline(always)]
    unsafe fn round_pairs(first: Self::V, second: Self::V) -> Self::V {
        let (mut numbers, mut pairs) = ([0.0; 2 * LANES], [0.0; LANES]);
        // SAFETY: as for this function; the arrays have room.
        unsafe {
            Self::store(numbers.as_mut_ptr(), first);
            Self::store(numbers.as_mut_ptr().wrapping_add(LANES), second);
            for (pair, two) in pairs.iter_mut().zip(numbers.chunks_exact(2)) {
                let [low, high] =
                    [two[0], two[1]].map(|x| u32::from(bf16::from_f32(flush(x)).to_bits()));
                *pair = f32::from_bits(high << 16 | low);
            }
            Self::load(pairs.as_ptr())
        }
    }

    /// `sums + w[1] x[1] + w[0] x[0]` of 16 pairs of bf16 given by their bits, each sum rounded, denormal numbers zeros.
    #[inline(always)]
    unsafe fn dot_pairs(sums: Self::V, w: Self::V, x: Self::V) -> Self::V {
        let [mut sum, mut a, mut b] = [[0.0; LANES]; 3];
        let widen = |bits: f32| {
            let bits = bits.to_bits();
            [
                f32::from_bits(bits << 16),
                f32::from_bits(bits & HIGH_HALVES),
            ]
            .map(flush)
        };
        // SAFETY: as for this function; the arrays have room.
        unsafe {
            Self::store(sum.as_mut_ptr(), sums);
            Self::store(a.as_mut_ptr(), w);
            Self::store(b.as_mut_ptr(), x);
            for (sum, (a, b)) in sum.iter_mut().zip(a.into_iter().zip(b)) {
                let ([a0, a1], [b0, b1]) = (widen(a), widen(b));
                *sum = flush(a1.mul_add(b1, flush(*sum)));
                *sum = flush(a0.mul_add(b0, *sum));
            }
            Self::load(sum.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: as for this function.
        unsafe { Self::splat(0.0) }
    }

    /// The sum of the lanes, halves upon halves.
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        // SAFETY: as for this function.
        unsafe { Self::fold(a, |x, y| x + y) }
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        // SAFETY: as for this function.
        unsafe { Self::fold(a, f32::max) }
    }

    #[inline(always)]
    unsafe fn fold(a: Self::V, join: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: as for this function; the array has room for all lanes.
        unsafe { Self::store(lanes.as_mut_ptr(), a) };
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = join(lanes[i], lanes[i + half]);
            }
            half /= 2;
        }
        lanes[0]
    }

    /// `e^a`, within 2 units in the last place; 0 below -87, NaN for NaN.
    #[inline(always)]
    unsafe fn exp(a: Self::V) -> Self::V {
        // SAFETY: as for this function.
        unsafe {
            // The second operand is given for NaN.
            let a = Self::min(Self::splat(88.7), Self::max(Self::splat(-87.3), a));
            // Adding and taking away 1.5 * 2^23 rounds to an integer.
            let magic = Self::splat(12_582_912.0);
            let n = Self::sub(
                Self::fma(a, Self::splat(std::f32::consts::LOG2_E), magic),
                magic,
            );
            // a - n ln 2, with ln 2 in two parts: the first has few enough bits for exact products.
            let r = Self::fma(n, Self::splat(-355.0 / 512.0), a);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [
                1.398_2e-3,
                8.333_452e-3,
                4.166_579_6e-2,
                1.666_666_5e-1,
                0.5,
            ] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let p = Self::add(Self::fma(p, Self::mul(r, r), r), Self::splat(1.0));
            // n may be 128, one more than an exponent holds: multiply by half of 2^n twice over.
            let power = Self::shift_to_exponent(Self::add(n, Self::splat(8_388_608.0 + 126.0)));
            Self::mul(Self::mul(p, power), Self::splat(2.0))
        }
    }

    /// The error function, within 2e-7 (Abramowitz and Stegun 7.1.26).
    #[inline(always)]
    unsafe fn erf(a: Self::V) -> Self::V {
        // SAFETY: as for this function.
        unsafe {
            let one = Self::splat(1.0);
            let x = Self::copy_sign(a, one);
            let t = Self::div(one, Self::fma(x, Self::splat(0.327_591_1), one));
            let mut p = Self::splat(1.061_405_4);
            for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
                p = Self::fma(p, t, Self::splat(c));
            }
            let tail = Self::exp(Self::sub(Self::zero(), Self::mul(x, x)));
            Self::copy_sign(Self::sub(one, Self::mul(Self::mul(p, t), tail)), a)
        }
    }
}

/// Zero for a denormal number, of the same sign.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0_f32.copysign(x)
    } else {
        x
    }
}

/// The odd one of a pair of bf16, which is a f32 when the other is masked away.
const HIGH_HALVES: u32 = 0xffff_0000;
