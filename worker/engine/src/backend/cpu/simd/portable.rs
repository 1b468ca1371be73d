//! Plain loops, for the compiler to make of what it can.

use super::{FloatTile, HIGH_HALVES, LANES, Simd, Weight};

/// Plain loops over arrays.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

/// Lane by lane.
#[inline(always)]
fn each(f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type V = [f32; LANES];
    const ROWS: usize = 2;
    const WHOLE_ROWS: usize = 0;
    const SUMS: usize = 1;

    #[inline(never)]
    unsafe fn float_tile<W: Weight>(tile: &FloatTile<W>, rows: usize) {
        // SAFETY: the trait's.
        unsafe { tile.compute::<Self>(rows) }
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
        check_aligned(from.cast());
        // SAFETY: the trait's.
        unsafe { Self::load(from) }
    }
    #[inline(always)]
    unsafe fn load_even(from: *const u16) -> Self::V {
        check_aligned(from.cast());
        // SAFETY: the trait's.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(pairs[i] << 16))
    }
    #[inline(always)]
    unsafe fn load_odd(from: *const u16) -> Self::V {
        check_aligned(from.cast());
        // SAFETY: the trait's.
        let pairs = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        each(|i| f32::from_bits(pairs[i] & HIGH_HALVES))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::V {
        // SAFETY: the trait's.
        let numbers = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        each(|i| f32::from(numbers[i]))
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
    unsafe fn store_low_bytes(to: *mut u8, a: Self::V) {
        // SAFETY: the trait's.
        unsafe {
            to.cast::<[u8; LANES]>().write(a.map(|a| a.to_bits() as u8));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}

/// Wider paths fault on other addresses: tests of this one, which every machine has, show that there are none.
#[inline(always)]
fn check_aligned(from: *const u8) {
    debug_assert!(
        from.addr().is_multiple_of(64),
        "a vector is read from an address that is no multiple of 64"
    );
}
