//! The inner loop of bf16 products where the processor multiplies pairs of bf16 at once: a few rows of activations, rounded
//! to bf16, times a panel of 32 rows of bf16 weights.
//!
//! Owns the order of the sums. Panels are those of [`super::float_tile`], whose pairs of columns are what the instruction
//! takes; activations come in blocks of as many rows as a tile takes, `[pairs][rows][2]`, an odd `k` filled up with a zero.
//!
//! An element's sum starts at its initial value and takes pair after pair into one accumulator, of each pair the second
//! product first (`vdpbf16ps`, which takes denormal numbers for zeros): the same bits whatever the tile's shape is.

use super::float_tile::{Ahead, PANEL, ROWS_MAX};
use super::simd::{Avx512, LANES, Simd};

/// Rows of activations of a tile: so many sums stay in registers.
pub(super) const ROWS: usize = 12;

/// `sums[i][r] += sum_k x[i][k] * w[r][k]` of all rows `r` of a panel.
pub(super) struct PairTile {
    /// Pairs of products per sum.
    pub(super) pairs: usize,
    /// The panel, at a multiple of 64, and its halves: 1 or 2.
    pub(super) w: *const u16,
    pub(super) halves: usize,
    /// `[pairs][rows]`, two bf16 each.
    pub(super) x: *const u32,
    /// `[rows][32]`, at a multiple of 64.
    pub(super) sums: *mut f32,
    pub(super) ahead: Ahead,
}

impl PairTile {
    /// Computes a tile of up to [`ROWS`] rows.
    ///
    /// # Safety
    /// The processor has these features; all pointers are good for what the formula reads and writes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
    #[inline(never)]
    pub(super) unsafe fn compute(&self, rows: usize) {
        const { assert!(ROWS <= ROWS_MAX) };
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match (rows, self.halves) {
                    $(
                        // SAFETY: the caller's promise.
                        ($rows, 2) => unsafe { self.columns::<$rows, 2>() },
                        // SAFETY: the caller's promise.
                        ($rows, _) => unsafe { self.columns::<$rows, 1>() },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    }

    /// All columns of a panel of `H` halves.
    #[inline(always)]
    unsafe fn columns<const M: usize, const H: usize>(&self) {
        let turn = H * LANES * 2;
        let ahead_turn = H * self.ahead.share;
        let (mut w, mut x, mut ahead) = (self.w, self.x, self.ahead.at);
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[Avx512::zero(); H]; M];
            for (i, sums) in sums.iter_mut().enumerate() {
                for (h, sum) in sums.iter_mut().enumerate() {
                    *sum = Avx512::load_aligned(self.sums.wrapping_add(i * PANEL + h * LANES));
                }
            }
            for _ in 0..self.pairs {
                let mut weights = [Avx512::zero(); H];
                for (h, weights) in weights.iter_mut().enumerate() {
                    Avx512::prefetch(ahead.wrapping_add(h * self.ahead.line));
                    *weights = Avx512::load_aligned(w.wrapping_add(h * LANES * 2).cast());
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = Avx512::splat_at(x.wrapping_add(i).cast());
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = Avx512::dot_pairs(*sum, weights, x);
                    }
                }
                w = w.wrapping_add(turn);
                x = x.wrapping_add(M);
                ahead = ahead.wrapping_add(ahead_turn);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (h, sum) in sums.iter().enumerate() {
                    Avx512::store(self.sums.wrapping_add(i * PANEL + h * LANES), *sum);
                }
            }
        }
    }
}

/// Rounds the numbers of a row to bf16, ties to even and denormal ones to zero, into `to[0], to[stride], ...`, a pair each.
/// An odd number of them is filled up with a zero.
///
/// # Safety
/// The processor has these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
pub(super) unsafe fn round_row(x: &[f32], to: &mut [u32], stride: usize) {
    let mut to = to.iter_mut().step_by(stride);
    let mut rounded = [0u32; LANES];
    for x in x.chunks(2 * LANES) {
        let mut filled = [0.0; 2 * LANES];
        let from = if x.len() == filled.len() {
            x.as_ptr()
        } else {
            filled[..x.len()].copy_from_slice(x);
            filled.as_ptr()
        };
        // SAFETY: 32 numbers stand at `from`, and `rounded` has room for as many of half their size.
        unsafe {
            let (first, second) = (Avx512::load(from), Avx512::load(from.wrapping_add(LANES)));
            Avx512::store(
                rounded.as_mut_ptr().cast(),
                Avx512::round_pairs(first, second),
            );
        }
        // In this order: a pair that is not there takes no place.
        for (pair, to) in rounded[..x.len().div_ceil(2)].iter().zip(&mut to) {
            *to = *pair;
        }
    }
}
