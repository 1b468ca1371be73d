//! Sixteen f32 at a time: the only vocabulary of the kernels, once per instruction path.
//!
//! Owns the instructions. A vector has 16 lanes on every path (two registers with AVX2), so that the kernels, the
//! packed layouts and the order of every sum are the same everywhere; only the portable path rounds between a product
//! and its addition.

// Instructions have no safety story of their own beyond the trait's: the processor has them, pointers are good for what
// is read or written.
#![allow(clippy::missing_safety_doc)]

use super::tile::{Element, Tile};

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
    /// Sums of a tile of several panels, which need more registers for weights.
    const SUMS: usize;

    /// [`Tile::compute`] for this path: the one large piece of code, called and not inlined.
    unsafe fn tile<E: Element>(tile: &Tile<E>, rows: usize, panels: usize);

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
    /// Asks for the line of memory at `at`.
    unsafe fn prefetch(at: *const u8);

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

/// Plain loops over arrays.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Lane by lane.
#[inline(always)]
fn each(f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

// SAFETY notes are the trait's: pointers are good for 16 (32 bf16) numbers.
impl Simd for Portable {
    type V = [f32; LANES];
    const ROWS: usize = 2;
    const SUMS: usize = 1;

    #[inline(never)]
    unsafe fn tile<E: Element>(tile: &Tile<E>, rows: usize, panels: usize) {
        // SAFETY: the trait's.
        unsafe { tile.compute::<Self>(rows, panels) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn splat_at(from: *const f32) -> Self::V {
        // SAFETY: the trait's.
        [unsafe { *from }; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the trait's.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::V) {
        // SAFETY: the trait's.
        unsafe { to.cast::<Self::V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_aligned(from: *const f32) -> Self::V {
        // SAFETY: the trait's.
        unsafe { Self::load(from) }
    }
    #[inline(always)]
    unsafe fn load_even(from: *const u16) -> Self::V {
        // SAFETY: the trait's.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(pairs[i] << 16))
    }
    #[inline(always)]
    unsafe fn load_odd(from: *const u16) -> Self::V {
        // SAFETY: the trait's.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(pairs[i] & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Rounded twice: without the instruction a true fused product is a slow function call.
        each(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
        each(|i| f32::from_bits(a[i].to_bits() << 23))
    }
    #[inline(always)]
    unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V {
        each(|i| a[i].copysign(sign[i]))
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::tile::{Element, Tile};
    use super::{LANES, Simd};
    use std::arch::x86_64::*;

    const HIGH_HALVES: i32 = 0xffff_0000_u32 as i32;

    /// AVX2 and FMA: a vector is two registers.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    impl Simd for Avx2 {
        type V = [__m256; 2];
        const ROWS: usize = 6;
        const SUMS: usize = 5;

        #[inline(always)]
        unsafe fn tile<E: Element>(tile: &Tile<E>, rows: usize, panels: usize) {
            #[target_feature(enable = "avx2,fma")]
            #[inline(never)]
            unsafe fn compiled<E: Element>(tile: &Tile<E>, rows: usize, panels: usize) {
                // SAFETY: this function has the path's features; the rest is the trait's.
                unsafe { tile.compute::<Avx2>(rows, panels) }
            }
            // SAFETY: the trait's.
            unsafe { compiled(tile, rows, panels) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn splat_at(from: *const f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe { Self::splat(_mm_cvtss_f32(_mm_load_ss(from))) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                [
                    _mm256_loadu_ps(from),
                    _mm256_loadu_ps(from.wrapping_add(LANES / 2)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: Self::V) {
            // SAFETY: the trait's.
            unsafe {
                _mm256_storeu_ps(to, x[0]);
                _mm256_storeu_ps(to.wrapping_add(LANES / 2), x[1]);
            }
        }
        #[inline(always)]
        unsafe fn load_aligned(from: *const f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                [
                    _mm256_load_ps(from),
                    _mm256_load_ps(from.wrapping_add(LANES / 2)),
                ]
            }
        }
        #[inline(always)]
        unsafe fn load_even(from: *const u16) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                let half = |at: usize| {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_load_si256(
                        from.wrapping_add(at).cast(),
                    )))
                };
                [half(0), half(LANES)]
            }
        }
        #[inline(always)]
        unsafe fn load_odd(from: *const u16) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                let mask = _mm256_set1_epi32(HIGH_HALVES);
                let half = |at: usize| {
                    _mm256_castsi256_ps(_mm256_and_si256(
                        _mm256_load_si256(from.wrapping_add(at).cast()),
                        mask,
                    ))
                };
                [half(0), half(LANES)]
            }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                [
                    _mm256_fmadd_ps(a[0], b[0], c[0]),
                    _mm256_fmadd_ps(a[1], b[1], c[1]),
                ]
            }
        }
        #[inline(always)]
        unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                a.map(|a| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(a))))
            }
        }
        #[inline(always)]
        unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                let bit = _mm256_set1_ps(-0.0);
                let one =
                    |a, sign| _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
                [one(a[0], sign[0]), one(a[1], sign[1])]
            }
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the trait's.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
    }

    /// AVX-512: a vector is one register.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const ROWS: usize = 12;
        const SUMS: usize = 24;

        #[inline(always)]
        unsafe fn tile<E: Element>(tile: &Tile<E>, rows: usize, panels: usize) {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            #[inline(never)]
            unsafe fn compiled<E: Element>(tile: &Tile<E>, rows: usize, panels: usize) {
                // SAFETY: this function has the path's features; the rest is the trait's.
                unsafe { tile.compute::<Avx512>(rows, panels) }
            }
            // SAFETY: the trait's.
            unsafe { compiled(tile, rows, panels) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn splat_at(from: *const f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe { Self::splat(_mm_cvtss_f32(_mm_load_ss(from))) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: Self::V) {
            // SAFETY: the trait's.
            unsafe { _mm512_storeu_ps(to, x) }
        }
        #[inline(always)]
        unsafe fn load_aligned(from: *const f32) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_load_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_even(from: *const u16) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_load_si512(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn load_odd(from: *const u16) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                _mm512_castsi512_ps(_mm512_and_si512(
                    _mm512_load_si512(from.cast()),
                    _mm512_set1_epi32(HIGH_HALVES),
                ))
            }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn shift_to_exponent(a: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(a))) }
        }
        #[inline(always)]
        unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V {
            // SAFETY: the trait's.
            unsafe {
                let bit = _mm512_set1_ps(-0.0);
                _mm512_or_ps(_mm512_andnot_ps(bit, a), _mm512_and_ps(bit, sign))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the trait's.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel, Path};
    use super::*;

    /// Applies exp or erf to 16 numbers.
    struct Apply {
        x: [f32; LANES],
        erf: bool,
    }

    impl Kernel for Apply {
        type Output = [f32; LANES];

        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: the arrays have 16 numbers; the features are the caller's promise.
            unsafe {
                let x = S::load(self.x.as_ptr());
                S::store(
                    out.as_mut_ptr(),
                    if self.erf { S::erf(x) } else { S::exp(x) },
                );
            }
            out
        }
    }

    fn apply(isa: Isa, erf: bool, xs: &[f32]) -> Vec<f32> {
        xs.chunks(LANES)
            .flat_map(|chunk| {
                let x = std::array::from_fn(|i| chunk[i.min(chunk.len() - 1)]);
                isa.run(Apply { x, erf })[..chunk.len()].to_vec()
            })
            .collect()
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let xs: Vec<f32> = (-86_900..=88_600).map(|i| i as f32 * 1e-3 + 1e-4).collect();
        for isa in Path::ALL.into_iter().filter_map(Isa::new) {
            for (x, y) in xs.iter().zip(apply(isa, false, &xs)) {
                let expected = f64::from(*x).exp();
                assert!(
                    (f64::from(y) / expected - 1.0).abs() < 2.5e-7,
                    "{isa:?}: exp({x}) = {y}, expected {expected}"
                );
            }
            assert_eq!(apply(isa, false, &[0.0]), [1.0]);
            assert_eq!(
                apply(isa, false, &[-88.0, -1e30, f32::NEG_INFINITY]),
                [0.0; 3]
            );
        }
    }

    #[test]
    fn erf_is_within_three_in_ten_million() {
        for isa in Path::ALL.into_iter().filter_map(Isa::new) {
            let step = 1e-2f64;
            let xs: Vec<f32> = (0..=400).map(|i| (f64::from(i) * step) as f32).collect();
            let (positive, negative) = (
                apply(isa, true, &xs),
                apply(isa, true, &xs.iter().map(|x| -x).collect::<Vec<_>>()),
            );
            // The integral of 2 / sqrt(pi) * exp(-t^2), by Simpson's rule.
            let slope = |t: f64| std::f64::consts::FRAC_2_SQRT_PI * (-t * t).exp();
            let mut expected = 0.0;
            for (i, (y, z)) in positive.into_iter().zip(negative).enumerate() {
                assert!(
                    (f64::from(y) - expected).abs() < 3e-7,
                    "{isa:?}: erf({}) = {y}, expected {expected}",
                    xs[i]
                );
                assert_eq!(z, -y);
                let t = i as f64 * step;
                expected += step / 6.0 * (slope(t) + 4.0 * slope(t + step / 2.0) + slope(t + step));
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        for isa in Path::ALL.into_iter().filter_map(Isa::new) {
            assert!(apply(isa, true, &[f32::NAN])[0].is_nan(), "{isa:?}");
            assert!(apply(isa, false, &[f32::NAN])[0].is_nan(), "{isa:?}");
        }
    }
}
