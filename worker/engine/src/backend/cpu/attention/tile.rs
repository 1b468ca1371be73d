//! The one inner loop of attention: a few vectors times a few panels, over one block of keys or many blocks of values.
//!
//! Owns the order of the sums. An element's sum takes the products of all steps' `k = 0, 1, 2, ...` one after another
//! into one accumulator, whatever the tile's shape is.

use super::super::isa::Kernel;
use super::super::kv::{Format, KvElement, PANEL};
use super::super::simd::Simd;
use super::STRIDE;

/// Most vectors of a tile, on any path.
pub(super) const ROWS_MAX: usize = 12;

/// How many blocks of values ahead of the sums lines are asked for: a block is done in less time than memory answers.
pub(super) const AHEAD: usize = 4;

/// Where pairs are multiplied, activations are pairs too, and `k` counts those.
///
/// `y[i][16 p + r] = sum_s sum_k x[i][16 s + k] * w[s][p][r][k]`.
///
/// For scores there is one step and panel `p` is block `p` of keys; for outputs step `s` is a block of values and `p` its
/// panel.
pub(super) struct Tile<'a, E> {
    pub(super) rows: usize,
    /// See [`panels_of`].
    pub(super) panels: usize,
    /// Where each block's first panel begins; beyond those in use, what is read next.
    pub(super) blocks: &'a [*const E],
    pub(super) over: Over,
    /// `[rows]` of the activations, [`STRIDE`] apart.
    pub(super) x: *const f32,
    pub(super) y: *mut f32,
    pub(super) y_stride: usize,
}

/// What the sums run over.
#[derive(Clone, Copy)]
pub(super) enum Over {
    /// The numbers of a head: panels are blocks of keys.
    Width(usize),
    /// The tokens of blocks, fewer in the last: panels are neighbours in each block, from a given number on.
    Tokens {
        count: usize,
        first: usize,
        panel_len: usize,
    },
}

/// Most vectors of a tile on this path.
pub(super) const fn tile_rows<S: Simd>() -> usize {
    S::ROWS
}

/// How many panels a tile of so many vectors takes at once, of those left: as many as there are registers for, beside
/// one number of each panel.
pub(super) const fn panels_of<S: Simd>(rows: usize, left: usize) -> usize {
    let mut panels = 8;
    while panels > 1
        && (panels * rows > S::SUMS || panels * (rows + 1) > S::SUMS + 2 || panels > left)
    {
        panels /= 2;
    }
    panels
}

impl<E: KvElement> Kernel for Tile<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        macro_rules! by_shape {
            ($($rows:literal: $($panels:literal),*;)*) => {
                match (self.rows, self.panels) {
                    $($(
                        // SAFETY: the caller's promise.
                        ($rows, $panels) if $rows <= const { tile_rows::<S>() } && $panels <= const { panels_of::<S>($rows, 8) } => unsafe {
                            self.fixed::<S, $panels, $rows>()
                        },
                    )*)*
                    (rows, panels) => unreachable!("a tile of {rows} rows and {panels} panels"),
                }
            };
        }
        by_shape!(
            1: 1, 2, 4, 8;
            2: 1, 2, 4, 8;
            3: 1, 2, 4;
            4: 1, 2, 4;
            5: 1, 2, 4;
            6: 1, 2;
            7: 1, 2;
            8: 1, 2;
            9: 1, 2;
            10: 1, 2;
            11: 1, 2;
            12: 1, 2;
        )
    }
}

impl<E: KvElement> Tile<'_, E> {
    #[inline(always)]
    unsafe fn fixed<S: Simd, const P: usize, const M: usize>(&self) {
        // SAFETY: the caller's promise covers all addresses: rows below M, panels below P, steps and k as given.
        unsafe {
            let mut sums = [[S::zero(); P]; M];
            match self.over {
                Over::Width(width) => {
                    let w = std::array::from_fn(|p| self.blocks[p]);
                    let next = std::array::from_fn(|p| self.blocks[P + p]);
                    Self::add::<S, P, M>(&mut sums, w, next, self.x, width);
                }
                Over::Tokens {
                    count,
                    first,
                    panel_len,
                } => {
                    for (step, token) in (0..count).step_by(PANEL).enumerate() {
                        let of = |block: *const E| {
                            std::array::from_fn(|p| block.wrapping_add(first + p * panel_len))
                        };
                        let (w, next) = (of(self.blocks[step]), of(self.blocks[step + AHEAD]));
                        let x = self.x.wrapping_add(if E::FORMAT == Format::Pairs {
                            token / 2
                        } else {
                            token
                        });
                        Self::add::<S, P, M>(&mut sums, w, next, x, PANEL.min(count - token));
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (p, sum) in sums.iter().enumerate() {
                    S::store(self.y.wrapping_add(i * self.y_stride + p * PANEL), *sum);
                }
            }
        }
    }

    /// Adds the products of `k` numbers of each panel, and asks for the lines of what is read next.
    #[inline(always)]
    unsafe fn add<S: Simd, const P: usize, const M: usize>(
        sums: &mut [[S::V; P]; M],
        w: [*const E; P],
        next: [*const E; P],
        x: *const f32,
        k: usize,
    ) {
        // SAFETY: as above; a pair beyond an odd k is inside the panel, its second half is not used.
        unsafe {
            match E::FORMAT {
                Format::F32 => {
                    let w = w.map(<*const E>::cast::<f32>);
                    for k in 0..k {
                        let at = k.wrapping_mul(PANEL);
                        let mut weights = [S::zero(); P];
                        for p in 0..P {
                            S::prefetch(next[p].wrapping_add(at).cast());
                            weights[p] = S::load_aligned(w[p].wrapping_add(at));
                        }
                        add_products::<S, P, M>(sums, weights, x.wrapping_add(k));
                    }
                }
                Format::Int8 => {
                    let w = w.map(<*const E>::cast::<i8>);
                    for k in 0..k {
                        let at = k.wrapping_mul(PANEL);
                        let mut weights = [S::zero(); P];
                        for p in 0..P {
                            // Four of these are a line.
                            if k % 4 == 0 {
                                S::prefetch(next[p].wrapping_add(at).cast());
                            }
                            weights[p] = S::load_i8(w[p].wrapping_add(at));
                        }
                        add_products::<S, P, M>(sums, weights, x.wrapping_add(k));
                    }
                }
                Format::Pairs => {
                    let w = w.map(<*const E>::cast::<u16>);
                    for pair in 0..k / 2 {
                        let at = pair.wrapping_mul(2 * PANEL);
                        let mut weights = [S::zero(); P];
                        for p in 0..P {
                            S::prefetch(next[p].wrapping_add(at).cast());
                            weights[p] = S::load_aligned(w[p].wrapping_add(at).cast());
                        }
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let x = x.wrapping_add(i.wrapping_mul(STRIDE).wrapping_add(pair));
                            let x = S::splat_at(x);
                            for (sum, weights) in sums.iter_mut().zip(weights) {
                                *sum = S::dot_pairs(*sum, weights, x);
                            }
                        }
                    }
                    if k % 2 == 1 {
                        // The same sum as with a zero for the other number, which may be no number here.
                        let pair = k / 2;
                        let mut weights = [S::zero(); P];
                        for p in 0..P {
                            weights[p] = S::load_even(w[p].wrapping_add(pair * 2 * PANEL));
                        }
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let x = *x.wrapping_add(i * STRIDE + pair);
                            let x = S::splat(f32::from_bits(x.to_bits() << 16));
                            for (sum, weights) in sums.iter_mut().zip(weights) {
                                *sum = S::dot_pairs(*sum, weights, x);
                            }
                        }
                    }
                }
                Format::Bf16 => {
                    let w = w.map(<*const E>::cast::<u16>);
                    for pair in 0..k / 2 {
                        let (k, at) = (pair.wrapping_mul(2), pair.wrapping_mul(2 * PANEL));
                        let mut weights = [S::zero(); P];
                        for p in 0..P {
                            S::prefetch(next[p].wrapping_add(at).cast());
                            weights[p] = S::load_even(w[p].wrapping_add(at));
                        }
                        add_products::<S, P, M>(sums, weights, x.wrapping_add(k));
                        for p in 0..P {
                            weights[p] = S::load_odd(w[p].wrapping_add(at));
                        }
                        add_products::<S, P, M>(sums, weights, x.wrapping_add(k.wrapping_add(1)));
                    }
                    if k % 2 == 1 {
                        let last = k - 1;
                        let weights =
                            std::array::from_fn(|p| S::load_even(w[p].wrapping_add(last * PANEL)));
                        add_products::<S, P, M>(sums, weights, x.wrapping_add(last));
                    }
                }
            }
        }
    }
}

/// `sums[i][p] += weights[p] * x[i]`.
#[inline(always)]
unsafe fn add_products<S: Simd, const P: usize, const M: usize>(
    sums: &mut [[S::V; P]; M],
    weights: [S::V; P],
    x: *const f32,
) {
    for (i, sums) in sums.iter_mut().enumerate() {
        // SAFETY: as above.
        unsafe {
            let x = S::splat_at(x.wrapping_add(i.wrapping_mul(STRIDE)));
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = S::fma(weights, x, *sum);
            }
        }
    }
}
