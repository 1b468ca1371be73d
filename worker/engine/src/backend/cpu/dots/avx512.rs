//! AVX-512 (F, BW, VL, DQ): products of 16 bits, made of the even and the odd bytes.

use std::arch::x86_64::*;

use super::super::simd::Avx512;
use super::vnni::Vnni;
use super::{DotTile, Dots};

impl Dots for Avx512 {
    type Bytes = __m512i;
    type Sums = __m512i;
    type F = Avx512;
    // With more the compiler stores every sum in every turn.
    const ROWS: usize = 10;
    const WHOLE_ROWS: usize = 10;

    #[inline(always)]
    unsafe fn tile(tile: &DotTile, rows: usize) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn compiled(tile: &DotTile, rows: usize) {
            // SAFETY: this function has the path's features; the rest is the trait's.
            unsafe { tile.compute::<Avx512>(rows) }
        }
        // SAFETY: the trait's.
        unsafe { compiled(tile, rows) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: the trait's; no instruction here is of VNNI.
        unsafe { Vnni::load(from) }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const i8) -> __m512i {
        // SAFETY: as above.
        unsafe { Vnni::splat_quad(from) }
    }
    #[inline(always)]
    unsafe fn nibbles(bytes: __m512i) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe { Vnni::nibbles(bytes) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: as above.
        unsafe { Vnni::zero() }
    }
    #[inline(always)]
    unsafe fn splat(from: *const i32) -> __m512i {
        // SAFETY: as above.
        unsafe { Vnni::splat(from) }
    }
    #[inline(always)]
    unsafe fn dot(sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the trait's.
        unsafe {
            let w_even = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
            let w_odd = _mm512_srli_epi16::<8>(w);
            let x_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
            let x_odd = _mm512_srai_epi16::<8>(x);
            let even = _mm512_madd_epi16(w_even, x_even);
            let odd = _mm512_madd_epi16(w_odd, x_odd);
            _mm512_add_epi32(_mm512_add_epi32(sums, even), odd)
        }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the trait's. Two products are at most 3810: far from where this instruction saturates.
        unsafe {
            let pairs = _mm512_maddubs_epi16(w, x);
            _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn times_zeros(zeros: *const u16, x: *const i32) -> __m512i {
        // SAFETY: the trait's; no instruction here is of VNNI.
        unsafe { Vnni::times_zeros(zeros, x) }
    }
    #[inline(always)]
    unsafe fn to_f32(sums: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { Vnni::to_f32(sums) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        // SAFETY: as above.
        unsafe { Vnni::load_f16(from) }
    }
}
