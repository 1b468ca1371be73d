//! AVX2, FMA and F16C: products of 16 bits, made of the even and the odd bytes.

use std::arch::x86_64::*;

use super::super::simd::Avx2;
use super::{DotTile, Dots};

impl Dots for Avx2 {
    type Bytes = [__m256i; 2];
    type Sums = [__m256i; 2];
    type F = Avx2;
    const ROWS: usize = 4;
    const WHOLE_ROWS: usize = 1;

    #[inline(always)]
    unsafe fn tile(tile: &DotTile, rows: usize) {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn compiled(tile: &DotTile, rows: usize) {
            // SAFETY: this function has the path's features; the rest is the trait's.
            unsafe { tile.compute::<Avx2>(rows) }
        }
        // SAFETY: the trait's.
        unsafe { compiled(tile, rows) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> [__m256i; 2] {
        // SAFETY: the trait's.
        unsafe {
            [
                _mm256_load_si256(from.cast()),
                _mm256_load_si256(from.wrapping_add(32).cast()),
            ]
        }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const i8) -> [__m256i; 2] {
        // SAFETY: the trait's.
        unsafe { Self::splat(from.cast()) }
    }
    #[inline(always)]
    unsafe fn nibbles(bytes: [__m256i; 2]) -> [[__m256i; 2]; 2] {
        // SAFETY: the trait's.
        unsafe {
            let low = _mm256_set1_epi8(15);
            let high = [
                _mm256_srli_epi16::<4>(bytes[0]),
                _mm256_srli_epi16::<4>(bytes[1]),
            ];
            [
                [
                    _mm256_and_si256(bytes[0], low),
                    _mm256_and_si256(bytes[1], low),
                ],
                [
                    _mm256_and_si256(high[0], low),
                    _mm256_and_si256(high[1], low),
                ],
            ]
        }
    }
    #[inline(always)]
    unsafe fn zero() -> [__m256i; 2] {
        // SAFETY: the trait's.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(from: *const i32) -> [__m256i; 2] {
        // SAFETY: the trait's.
        unsafe { [_mm256_broadcastd_epi32(_mm_castps_si128(_mm_load_ss(from.cast()))); 2] }
    }
    #[inline(always)]
    unsafe fn dot(sums: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        #[inline(always)]
        unsafe fn half(sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
            // SAFETY: the trait's.
            unsafe {
                let w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
                let w_odd = _mm256_srli_epi16::<8>(w);
                let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
                let x_odd = _mm256_srai_epi16::<8>(x);
                let even = _mm256_madd_epi16(w_even, x_even);
                let odd = _mm256_madd_epi16(w_odd, x_odd);
                _mm256_add_epi32(_mm256_add_epi32(sums, even), odd)
            }
        }
        // SAFETY: the trait's.
        unsafe { [half(sums[0], w[0], x[0]), half(sums[1], w[1], x[1])] }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: [__m256i; 2], w: [__m256i; 2], x: [__m256i; 2]) -> [__m256i; 2] {
        #[inline(always)]
        unsafe fn half(sums: __m256i, w: __m256i, x: __m256i) -> __m256i {
            // SAFETY: the trait's. Two products are at most 3810: far from where this instruction saturates.
            unsafe {
                let pairs = _mm256_maddubs_epi16(w, x);
                _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        }
        // SAFETY: the trait's.
        unsafe { [half(sums[0], w[0], x[0]), half(sums[1], w[1], x[1])] }
    }
    #[inline(always)]
    unsafe fn times_zeros(zeros: *const u16, x: *const i32) -> [__m256i; 2] {
        // SAFETY: the trait's.
        unsafe {
            let x = Self::splat(x)[0];
            let half = |from: *const u16| {
                let zeros = _mm256_cvtepu16_epi32(_mm_load_si128(from.cast()));
                _mm256_madd_epi16(zeros, x)
            };
            [half(zeros), half(zeros.wrapping_add(8))]
        }
    }
    #[inline(always)]
    unsafe fn to_f32(sums: [__m256i; 2]) -> [__m256; 2] {
        // SAFETY: the trait's.
        unsafe { [_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])] }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> [__m256; 2] {
        // SAFETY: the trait's.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_load_si128(from.cast())),
                _mm256_cvtph_ps(_mm_load_si128(from.wrapping_add(8).cast())),
            ]
        }
    }
}
