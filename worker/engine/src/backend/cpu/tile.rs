//! The inner loop of attention: a few rows of queries or of scores times a few panels of 16 rows of keys or values.
//!
//! Owns the panel layout and the order of the sums. A panel holds 16 rows `w` of a matrix, `k` numbers each:
//! * f32: `[k][16 rows]`;
//! * bf16: `[k / 2][16 rows][2]`, so that a shift and a mask turn 16 pairs into two vectors. An odd `k` ends in a pair
//!   whose second half is not read.
//!
//! A block of keys is such a panel (16 tokens are the rows, the head's width is `k`), and so is a block
//! of values (16 numbers of the head are the rows, the 16 tokens are `k`).
//!
//! An element's sum starts at its initial value and takes the products of `k = 0, 1, 2, ...` one after another into
//! one accumulator: the same bits whatever the tile's shape is, and also when the sum is continued by a later call.

use half::bf16;

use super::simd::{LANES, Simd};

/// Rows of a panel.
pub(super) const PANEL: usize = LANES;
/// Most panels of a tile, on any path.
pub(super) const TILE_PANELS_MAX: usize = 4;

/// A number format of panels.
pub(super) trait Element: bytemuck::Pod + Send + Sync {
    /// Whether `k` comes in pairs.
    const PAIRED: bool;

    /// Rounds to nearest, ties to even.
    fn round(value: f32) -> Self;

    /// Numbers in a panel of this `k`.
    fn panel_len(k: usize) -> usize {
        PANEL
            * if Self::PAIRED {
                k.next_multiple_of(2)
            } else {
                k
            }
    }

    /// Where in a panel the number `(row, k)` lies.
    #[inline(always)]
    fn place(row: usize, k: usize) -> usize {
        if Self::PAIRED {
            (k / 2 * PANEL + row) * 2 + k % 2
        } else {
            k * PANEL + row
        }
    }
}

impl Element for f32 {
    const PAIRED: bool = false;

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
}

/// bf16 as its bits.
impl Element for u16 {
    const PAIRED: bool = true;

    #[inline(always)]
    fn round(value: f32) -> u16 {
        bf16::from_f32(value).to_bits()
    }
}

/// `y[i][16 p + r] = init[i][16 p + r] + sum_k x[i][k] * w[p][r][k]`.
#[derive(Clone, Copy)]
pub(super) struct Tile<E> {
    /// Products per sum.
    pub(super) k: usize,
    /// Where each panel begins: multiples of 64.
    pub(super) w: [*const E; TILE_PANELS_MAX],
    /// The first row of activations, and the distance between rows.
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    /// The first row of initial values (null: zeros), and the distance between rows.
    pub(super) init: *const f32,
    pub(super) init_stride: usize,
    /// The first row of results, and the distance between rows.
    pub(super) y: *mut f32,
    pub(super) y_stride: usize,
    /// What to prefetch while each panel is read: what is read next, or any address.
    pub(super) next: [*const E; TILE_PANELS_MAX],
}

/// How many rows of activations a tile takes at most on this path.
pub(super) const fn tile_rows<S: Simd>() -> usize {
    S::ROWS
}

/// How many panels a tile of so many rows takes at once: as many as there are registers for.
pub(super) const fn tile_panels<S: Simd>(rows: usize) -> usize {
    match S::SUMS / rows {
        0 | 1 => 1,
        2 | 3 => 2,
        _ => TILE_PANELS_MAX,
    }
}

/// Cuts `rows` into tiles as equal as can be: gives the rows of tile `i` of `count`.
pub(super) fn tile_bounds(rows: usize, i: usize, count: usize) -> std::ops::Range<usize> {
    rows * i / count..rows * (i + 1) / count
}

impl<E: Element> Tile<E> {
    /// Computes a tile of `rows` rows and `panels` panels: `panels` is 1 or [`tile_panels`] of `rows`, and `rows` is at
    /// most [`tile_rows`]. Instantiated once per path, through [`Simd::tile`].
    ///
    /// # Safety
    /// The features of `S`; all pointers are good for what the formula reads and writes; `y` overlaps nothing but an
    /// `init` equal to it.
    #[inline(always)]
    pub(super) unsafe fn compute<S: Simd>(&self, rows: usize, panels: usize) {
        debug_assert!(
            rows >= 1
                && rows <= tile_rows::<S>()
                && (panels == 1 || panels == tile_panels::<S>(rows))
        );
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match (rows, panels) {
                    $(
                        // SAFETY: the caller's promise.
                        ($rows, 1) if $rows <= const { tile_rows::<S>() } => unsafe { self.fixed::<S, 1, $rows>() },
                        ($rows, _) if $rows <= const { tile_rows::<S>() } => match const { tile_panels::<S>($rows) } {
                            // SAFETY: as above.
                            4 => unsafe { self.fixed::<S, 4, $rows>() },
                            // SAFETY: as above.
                            2 => unsafe { self.fixed::<S, 2, $rows>() },
                            _ => unreachable!("a tile of {panels} panels"),
                        },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    }

    #[inline(always)]
    unsafe fn fixed<S: Simd, const P: usize, const M: usize>(&self) {
        // SAFETY: the caller's promise covers all addresses: rows below M, panels below P, k below self.k.
        unsafe {
            let mut sums = [[S::zero(); P]; M];
            if !self.init.is_null() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (p, sum) in sums.iter_mut().enumerate() {
                        *sum = S::load(self.init.wrapping_add(i * self.init_stride + p * PANEL));
                    }
                }
            }
            if E::PAIRED {
                self.paired::<S, P, M>(&mut sums);
            } else {
                self.single::<S, P, M>(&mut sums);
            }
            for (i, sums) in sums.iter().enumerate() {
                for (p, sum) in sums.iter().enumerate() {
                    S::store(self.y.wrapping_add(i * self.y_stride + p * PANEL), *sum);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn paired<S: Simd, const P: usize, const M: usize>(&self, sums: &mut [[S::V; P]; M]) {
        // SAFETY: as above; a pair beyond an odd k is inside the panel, its second half is not used.
        unsafe {
            let w: [*const u16; P] = std::array::from_fn(|p| self.w[p].cast());
            let next: [*const u16; P] = std::array::from_fn(|p| self.next[p].cast());
            let x: [*const f32; M] =
                std::array::from_fn(|i| self.x.wrapping_add(i * self.x_stride));
            for pair in 0..self.k / 2 {
                let (k, at) = (pair.wrapping_mul(2), pair.wrapping_mul(2 * PANEL));
                let mut weights = [S::zero(); P];
                for p in 0..P {
                    S::prefetch(next[p].wrapping_add(at).cast());
                    weights[p] = S::load_even(w[p].wrapping_add(at));
                }
                Self::add_products::<S, P, M>(sums, weights, x, k);
                for p in 0..P {
                    weights[p] = S::load_odd(w[p].wrapping_add(at));
                }
                Self::add_products::<S, P, M>(sums, weights, x, k.wrapping_add(1));
            }
            if self.k % 2 == 1 {
                let last = self.k - 1;
                let weights =
                    std::array::from_fn(|p| S::load_even(w[p].wrapping_add(last * PANEL)));
                Self::add_products::<S, P, M>(sums, weights, x, last);
            }
        }
    }

    #[inline(always)]
    unsafe fn single<S: Simd, const P: usize, const M: usize>(&self, sums: &mut [[S::V; P]; M]) {
        // SAFETY: as above.
        unsafe {
            let w: [*const f32; P] = std::array::from_fn(|p| self.w[p].cast());
            let next: [*const f32; P] = std::array::from_fn(|p| self.next[p].cast());
            let x: [*const f32; M] =
                std::array::from_fn(|i| self.x.wrapping_add(i * self.x_stride));
            for k in 0..self.k {
                let at = k.wrapping_mul(PANEL);
                let mut weights = [S::zero(); P];
                for p in 0..P {
                    S::prefetch(next[p].wrapping_add(at).cast());
                    weights[p] = S::load_aligned(w[p].wrapping_add(at));
                }
                Self::add_products::<S, P, M>(sums, weights, x, k);
            }
        }
    }

    /// `sums[i][p] += weights[p] * x[i][k]`.
    #[inline(always)]
    unsafe fn add_products<S: Simd, const P: usize, const M: usize>(
        sums: &mut [[S::V; P]; M],
        weights: [S::V; P],
        x: [*const f32; M],
        k: usize,
    ) {
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: as above.
            unsafe {
                let x = S::splat_at(x.wrapping_add(k));
                for (sum, weights) in sums.iter_mut().zip(weights) {
                    *sum = S::fma(weights, x, *sum);
                }
            }
        }
    }
}
