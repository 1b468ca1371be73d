//! AVX2 and FMA.

use std::arch::x86_64::*;

use super::{FloatTile, HIGH_HALVES, LANES, Simd, Weight};

/// AVX2 and FMA: a vector is two registers.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2;

impl Simd for Avx2 {
    type V = [__m256; 2];
    const ROWS: usize = 6;
    const WHOLE_ROWS: usize = 2;
    const SUMS: usize = 5;

    #[inline(always)]
    unsafe fn float_tile<W: Weight>(tile: &FloatTile<W>, rows: usize) {
        #[target_feature(enable = "avx2,fma")]
        #[inline(never)]
        unsafe fn compiled<W: Weight>(tile: &FloatTile<W>, rows: usize) {
            // SAFETY: this function has the path's features; the rest is the trait's.
            unsafe { tile.compute::<Avx2>(rows) }
        }
        // SAFETY: the trait's.
        unsafe { compiled(tile, rows) }
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
            let mask = _mm256_set1_epi32(HIGH_HALVES as i32);
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
    unsafe fn load_i8(from: *const i8) -> Self::V {
        // SAFETY: the trait's.
        unsafe {
            let half = |at: usize| {
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(
                    from.wrapping_add(at).cast(),
                )))
            };
            [half(0), half(LANES / 2)]
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
        unsafe { a.map(|a| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(a)))) }
    }
    #[inline(always)]
    unsafe fn copy_sign(a: Self::V, sign: Self::V) -> Self::V {
        // SAFETY: the trait's.
        unsafe {
            let bit = _mm256_set1_ps(-0.0);
            let one = |a, sign| _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
            [one(a[0], sign[0]), one(a[1], sign[1])]
        }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(to: *mut u8, a: Self::V) {
        // SAFETY: the trait's.
        unsafe {
            // The bytes of each half of a register, side by side in its first four.
            let places = _mm256_setr_epi8(
                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, //
                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
            );
            let half = |a: __m256| {
                let bytes = _mm256_shuffle_epi8(_mm256_castps_si256(a), places);
                _mm_unpacklo_epi32(
                    _mm256_castsi256_si128(bytes),
                    _mm256_extracti128_si256::<1>(bytes),
                )
            };
            _mm_storeu_si128(to.cast(), _mm_unpacklo_epi64(half(a[0]), half(a[1])));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the trait's.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
