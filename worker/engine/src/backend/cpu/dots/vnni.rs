//! AVX-512 with VNNI: one instruction multiplies 64 bytes and adds them up by fours.

use std::arch::x86_64::*;

use super::super::simd::Avx512;
use super::{DotTile, Dots};

/// AVX-512 with VNNI: a vector is one register.
#[derive(Clone, Copy)]
pub(in super::super) struct Vnni;

impl Dots for Vnni {
    type Bytes = __m512i;
    type Sums = __m512i;
    type F = Avx512;
    // With more the compiler stores every sum in every turn.
    const ROWS: usize = 10;
    const WHOLE_ROWS: usize = 10;

    #[inline(always)]
    unsafe fn tile(tile: &DotTile, rows: usize) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn compiled(tile: &DotTile, rows: usize) {
            // SAFETY: this function has the path's features; the rest is the trait's.
            unsafe { tile.compute::<Vnni>(rows) }
        }
        // SAFETY: the trait's.
        unsafe { compiled(tile, rows) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: the trait's.
        unsafe { _mm512_load_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const i8) -> __m512i {
        // SAFETY: the trait's.
        unsafe { Self::splat(from.cast()) }
    }
    #[inline(always)]
    unsafe fn nibbles(bytes: __m512i) -> [__m512i; 2] {
        // SAFETY: the trait's.
        unsafe {
            let low = _mm512_set1_epi8(15);
            [
                _mm512_and_si512(bytes, low),
                _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low),
            ]
        }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the trait's.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn splat(from: *const i32) -> __m512i {
        // SAFETY: the trait's.
        unsafe { _mm512_broadcastd_epi32(_mm_castps_si128(_mm_load_ss(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn dot(sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the trait's.
        unsafe { _mm512_dpbusd_epi32(sums, w, x) }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the trait's.
        unsafe { Self::dot(sums, w, x) }
    }
    #[inline(always)]
    unsafe fn times_zeros(zeros: *const u16, x: *const i32) -> __m512i {
        // SAFETY: the trait's.
        unsafe {
            let zeros = _mm512_cvtepu16_epi32(_mm256_load_si256(zeros.cast()));
            _mm512_madd_epi16(zeros, Self::splat(x))
        }
    }
    #[inline(always)]
    unsafe fn to_f32(sums: __m512i) -> __m512 {
        // SAFETY: the trait's.
        unsafe { _mm512_cvtepi32_ps(sums) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        // SAFETY: the trait's.
        unsafe { _mm512_cvtph_ps(_mm256_load_si256(from.cast())) }
    }
}
