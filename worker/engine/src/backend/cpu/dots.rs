//! Sixteen sums of products of bytes at a time: the vocabulary of the integer products, once per instruction path.
//!
//! Owns the instructions. Weights are unsigned bytes, activations signed ones, and a sum takes four products at a time: a
//! "quad" of columns. The sums are exact on every path, so that the paths differ in nothing but speed.

// Instructions have no safety story of their own beyond the trait's: the processor has them, pointers are good for what
// is read.
#![allow(clippy::missing_safety_doc)]

use super::dot_tile::DotTile;
use super::simd::Simd;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(target_arch = "x86_64")]
pub(super) use vnni::Vnni;

/// Columns whose products a sum takes at a time.
pub(super) const QUAD: usize = 4;

/// The operations on 64 bytes and on 16 sums.
///
/// # Safety
/// All functions: the processor has the path's features, the caller is compiled with them, and pointers are good for
/// reading.
pub(super) trait Dots: Copy + 'static {
    /// Sixteen quads of bytes: four neighbouring columns of each of 16 rows.
    type Bytes: Copy;
    /// Sixteen i32.
    type Sums: Copy;
    /// The same path's f32.
    type F: Simd;
    /// Rows of activations of a tile: so many sums stay in registers.
    const ROWS: usize;
    /// Rows of activations up to which a tile takes all 32 rows of a panel at once, and not 16.
    const WHOLE_ROWS: usize;

    /// [`DotTile::compute`] for this path: the one large piece of code, called and not inlined.
    unsafe fn tile(tile: &DotTile, rows: usize);

    /// From an address that is a multiple of 64.
    unsafe fn load(from: *const u8) -> Self::Bytes;
    /// One quad in all places.
    unsafe fn splat_quad(from: *const i8) -> Self::Bytes;
    /// The low and the high half of each byte.
    unsafe fn nibbles(bytes: Self::Bytes) -> [Self::Bytes; 2];
    unsafe fn zero() -> Self::Sums;
    /// One number in all places.
    unsafe fn splat(from: *const i32) -> Self::Sums;
    /// `sums[i] + w[4 i] x[4 i] + ... + w[4 i + 3] x[4 i + 3]`, of unsigned `w` and signed `x` from -127 on.
    unsafe fn dot(sums: Self::Sums, w: Self::Bytes, x: Self::Bytes) -> Self::Sums;
    /// The same where no `w` is above 15.
    unsafe fn dot_nibbles(sums: Self::Sums, w: Self::Bytes, x: Self::Bytes) -> Self::Sums;
    /// 16 zero points (at a multiple of 32), times a number of 16 bits.
    unsafe fn times_zeros(zeros: *const u16, x: *const i32) -> Self::Sums;
    /// Exact below 2^24.
    unsafe fn to_f32(sums: Self::Sums) -> <Self::F as Simd>::V;
    /// 16 f16 at a multiple of 32, widened.
    unsafe fn load_f16(from: *const u16) -> <Self::F as Simd>::V;
}
