//! AVX-512 (F, BW, VL, DQ).

use std::arch::x86_64::*;

use super::{FloatTile, HIGH_HALVES, Simd, Weight};

/// AVX-512: a vector is one register.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    const ROWS: usize = 12;
    const WHOLE_ROWS: usize = 12;
    const SUMS: usize = 24;

    #[inline(always)]
    unsafe fn float_tile<W: Weight>(tile: &FloatTile<W>, rows: usize) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        #[inline(never)]
        unsafe fn compiled<W: Weight>(tile: &FloatTile<W>, rows: usize) {
            // SAFETY: this function has the path's features; the rest is the trait's.
            unsafe { tile.compute::<Avx512>(rows) }
        }
        // SAFETY: the trait's.
        unsafe { compiled(tile, rows) }
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
                _mm512_set1_epi32(HIGH_HALVES as i32),
            ))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::V {
        // SAFETY: the trait's.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
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
    unsafe fn store_low_bytes(to: *mut u8, a: Self::V) {
        // SAFETY: the trait's.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(a))) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the trait's.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn round_pairs(first: Self::V, second: Self::V) -> Self::V {
        // SAFETY: the trait's; a vector is 64 bytes, of which any are valid.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(sums: Self::V, w: Self::V, x: Self::V) -> Self::V {
        // SAFETY: as above.
        unsafe {
            let [w, x] = [w, x].map(|bits| std::mem::transmute::<__m512, __m512bh>(bits));
            _mm512_dpbf16_ps(sums, w, x)
        }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        // SAFETY: the trait's.
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        // SAFETY: the trait's.
        unsafe {
            let a = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }
}
