//! The inner loop of float products: a few rows of activations times a panel of 32 rows of weights.
//!
//! Owns the layout of such panels and the order of the sums. A panel holds 32 rows in two halves of 16 (the last panel of a
//! matrix one half, where no more rows exist):
//! * f32: `[k][halves][16 rows]`;
//! * bf16: `[k / 2][halves][16 rows][2]`, so that a shift and a mask turn 16 pairs into two vectors. An odd `k` ends in a
//!   pair whose second half is not read.
//!
//! Activations come in blocks of as many rows as a tile takes, `[k][rows]`.
//!
//! An element's sum starts at its initial value and takes the products of `k = 0, 1, 2, ...` one after another into
//! one accumulator: the same bits whatever the tile's shape is.

use half::bf16;

use super::simd::{LANES, Simd};

/// Rows of a panel.
pub(super) const PANEL: usize = 2 * LANES;
/// Most rows of activations of a tile, on any path.
pub(super) const ROWS_MAX: usize = 12;

/// A number format of weights.
pub(super) trait Weight: bytemuck::Pod + Send + Sync {
    /// Columns that lie together.
    const COLUMNS: usize;

    /// Rounds to nearest, ties to even.
    fn round(value: f32) -> Self;

    /// Exact.
    fn widen(self) -> f32;

    /// [`Self::COLUMNS`] vectors of 16 numbers, of 16 rows.
    ///
    /// # Safety
    /// The features of `S`; the address is a multiple of 64 and good for reading.
    unsafe fn load<S: Simd>(from: *const Self, column: usize) -> S::V;

    /// Numbers of 16 rows with this `k`.
    fn half_len(k: usize) -> usize {
        LANES * k.next_multiple_of(Self::COLUMNS)
    }

    /// Where in a panel of so many halves the number `(row, k)` lies.
    #[inline(always)]
    fn place(halves: usize, row: usize, k: usize) -> usize {
        let at = k / Self::COLUMNS * halves + row / LANES;
        (at * LANES + row % LANES) * Self::COLUMNS + k % Self::COLUMNS
    }
}

impl Weight for f32 {
    const COLUMNS: usize = 1;

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32, _: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_aligned(from) }
    }
}

/// bf16 as its bits.
impl Weight for u16 {
    const COLUMNS: usize = 2;

    #[inline(always)]
    fn round(value: f32) -> u16 {
        bf16::from_f32(value).to_bits()
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u16, column: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            match column {
                0 => S::load_even(from),
                _ => S::load_odd(from),
            }
        }
    }
}

/// `sums[i][r] += sum_k x[i][k] * w[r][k]` of all rows `r` of a panel.
pub(super) struct FloatTile<W> {
    /// Products per sum.
    pub(super) k: usize,
    /// The panel, at a multiple of 64, and its halves: 1 or 2.
    pub(super) w: *const W,
    pub(super) halves: usize,
    /// `[k][rows]`.
    pub(super) x: *const f32,
    /// `[rows][32]`, at a multiple of 64.
    pub(super) sums: *mut f32,
    pub(super) ahead: Ahead,
}

/// What to ask memory for while a panel is read.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// From here on, any address,
    pub(super) at: *const u8,
    /// so many 64ths of what is read meanwhile,
    pub(super) share: usize,
    /// and how far the lines are apart that are asked for in one turn.
    pub(super) line: usize,
}

impl<W: Weight> FloatTile<W> {
    /// Computes a tile of up to [`Simd::ROWS`] rows. Instantiated once per path, through [`Simd::float_tile`].
    ///
    /// # Safety
    /// The features of `S`; all pointers are good for what the formula reads and writes.
    #[inline(always)]
    pub(super) unsafe fn compute<S: Simd>(&self, rows: usize) {
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match rows {
                    $(
                        // SAFETY: the caller's promise.
                        $rows if $rows <= const { S::ROWS } => unsafe { self.halves::<S, $rows>() },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    }

    #[inline(always)]
    unsafe fn halves<S: Simd, const M: usize>(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.halves == 2, M <= S::WHOLE_ROWS) {
                (true, true) => self.columns::<S, M, 2, 2>(0),
                (true, false) => (0..2).for_each(|half| self.columns::<S, M, 1, 2>(half)),
                (false, _) => self.columns::<S, M, 1, 1>(0),
            }
        }
    }

    /// All columns of `H` halves of a panel of `ALL`, from `half` on.
    #[inline(always)]
    unsafe fn columns<S: Simd, const M: usize, const H: usize, const ALL: usize>(
        &self,
        half: usize,
    ) {
        let turn = ALL * LANES * W::COLUMNS;
        let turn_bytes = turn * size_of::<W>();
        let ahead_turn = turn_bytes * self.ahead.share / 64;
        let sums_at = self.sums.wrapping_add(half * LANES);
        let mut w = self.w.wrapping_add(half * LANES * W::COLUMNS);
        let (mut x, mut ahead) = (self.x, self.ahead.at);
        // SAFETY: the caller's promise; a pair beyond an odd k is inside the panel, its second half is not used.
        unsafe {
            let mut sums = [[S::zero(); H]; M];
            for (i, sums) in sums.iter_mut().enumerate() {
                for (h, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load_aligned(sums_at.wrapping_add(i * PANEL + h * LANES));
                }
            }
            for _ in 0..self.k / W::COLUMNS {
                for line in 0..turn_bytes / 64 {
                    S::prefetch(ahead.wrapping_add(line * self.ahead.line));
                }
                for column in 0..W::COLUMNS {
                    Self::add_products::<S, M, H>(&mut sums, w, column, x);
                    x = x.wrapping_add(M);
                }
                w = w.wrapping_add(turn);
                ahead = ahead.wrapping_add(ahead_turn);
            }
            for column in 0..self.k % W::COLUMNS {
                Self::add_products::<S, M, H>(&mut sums, w, column, x);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (h, sum) in sums.iter().enumerate() {
                    S::store(sums_at.wrapping_add(i * PANEL + h * LANES), *sum);
                }
            }
        }
    }

    /// `sums[i][h] += w[h] * x[i]`.
    #[inline(always)]
    unsafe fn add_products<S: Simd, const M: usize, const H: usize>(
        sums: &mut [[S::V; H]; M],
        w: *const W,
        column: usize,
        x: *const f32,
    ) {
        // SAFETY: as above.
        unsafe {
            // No closures here: one that is not inlined has none of the path's instructions.
            let mut weights = [S::zero(); H];
            for (h, weights) in weights.iter_mut().enumerate() {
                *weights = W::load::<S>(w.wrapping_add(h * LANES * W::COLUMNS), column);
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = S::splat_at(x.wrapping_add(i));
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = S::fma(weights, x, *sum);
                }
            }
        }
    }
}
