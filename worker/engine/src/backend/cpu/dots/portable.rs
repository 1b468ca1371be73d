//! Plain loops, for the compiler to make of what it can.

use half::f16;

use super::super::simd::{LANES, Portable};
use super::{DotTile, Dots, QUAD};

impl Dots for Portable {
    type Bytes = [[u8; QUAD]; LANES];
    type Sums = [i32; LANES];
    type F = Portable;
    const ROWS: usize = 2;
    const WHOLE_ROWS: usize = 0;

    #[inline(never)]
    unsafe fn tile(tile: &DotTile, rows: usize) {
        // SAFETY: the trait's.
        unsafe { tile.compute::<Self>(rows) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Bytes {
        debug_assert!(
            from.addr().is_multiple_of(64),
            "weights lie at multiples of 64"
        );
        // SAFETY: the trait's.
        unsafe { from.cast::<Self::Bytes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_quad(from: *const i8) -> Self::Bytes {
        // SAFETY: the trait's.
        [unsafe { from.cast::<[u8; QUAD]>().read_unaligned() }; LANES]
    }
    #[inline(always)]
    unsafe fn nibbles(bytes: Self::Bytes) -> [Self::Bytes; 2] {
        [
            bytes.map(|quad| quad.map(|byte| byte & 15)),
            bytes.map(|quad| quad.map(|byte| byte >> 4)),
        ]
    }
    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(from: *const i32) -> Self::Sums {
        // SAFETY: the trait's.
        [unsafe { from.read_unaligned() }; LANES]
    }
    #[inline(always)]
    unsafe fn dot(mut sums: Self::Sums, w: Self::Bytes, x: Self::Bytes) -> Self::Sums {
        for (sum, (w, x)) in sums.iter_mut().zip(w.iter().zip(&x)) {
            for (w, x) in w.iter().zip(x) {
                *sum += i32::from(*w) * i32::from(x.cast_signed());
            }
        }
        sums
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: Self::Sums, w: Self::Bytes, x: Self::Bytes) -> Self::Sums {
        // SAFETY: the trait's.
        unsafe { Self::dot(sums, w, x) }
    }
    #[inline(always)]
    unsafe fn times_zeros(zeros: *const u16, x: *const i32) -> Self::Sums {
        // SAFETY: the trait's.
        let (zeros, x) = unsafe { (zeros.cast::<[u16; LANES]>().read(), x.read_unaligned()) };
        zeros.map(|zero| i32::from(zero) * i32::from(x as i16))
    }
    #[inline(always)]
    unsafe fn to_f32(sums: Self::Sums) -> [f32; LANES] {
        sums.map(|sum| sum as f32)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> [f32; LANES] {
        // SAFETY: the trait's.
        let bits = unsafe { from.cast::<[u16; LANES]>().read() };
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }
}
