//! The inner loop of integer products: a few rows of quantised activations times a panel of 32 rows of quantised weights.
//!
//! Owns the layout of such panels and of such activations, and the order of the sums.
//!
//! A panel holds 32 rows, group after group. The columns of a group are filled up to a multiple of [`STEP`]; then a group
//! is 32 scales (f16), 32 zero points (u16) or minima (f16) where the offset is not the middle, and its columns:
//! * int8, as `q + 128`: `[columns / 4][2 halves][16 rows][4]`;
//! * int4: `[columns / 8][2 halves][16 rows][4]`: of column `8 s + b`, the low half of byte `b` of step `s`, of column
//!   `8 s + 4 + b` the high half.
//!
//! Activations come in blocks of as many rows as a tile takes: scales `[segments][rows]`, offsets `[segments][rows]`, numbers
//! `[columns / 4][rows][4]`, filled up in the same way. A segment is a group's columns that share a scale of activations.
//!
//! The products of a segment are added up exactly, in integers; then, segment by segment, `sum += integer * (scale of the weights
//! * scale of the activations)`: the same bits whatever the tile's shape is.

use super::dots::{Dots, QUAD};
use super::float_tile::Ahead;
pub(super) use super::float_tile::PANEL;
use super::simd::{LANES, Simd};
use crate::backend::{QuantBits, QuantOffset, QuantShape};

/// Columns that share a scale of activations where those have 8 bits: fewer than share one of weights. One for 128 columns
/// would cost a hundredth of a model's perplexity, more than int8 weights themselves do; int4 is to cost nothing beside its
/// weights.
const INT8_SEGMENT: usize = 64;
const INT4_SEGMENT: usize = 32;
/// Columns that are multiplied in one turn of the loop.
pub(super) const STEP: usize = 2 * QUAD;
/// Bytes of a panel's scales of one group, and of its zero points or minima.
pub(super) const HEAD_BYTES: usize = PANEL * size_of::<u16>();

/// Where the numbers of a panel lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QuantLayout {
    /// Whether a number has 4 bits and not 8.
    pub(super) int4: bool,
    pub(super) offset: QuantOffset,
    pub(super) groups: usize,
    /// Numbers of 8 bits that an activation becomes, each in a row of the tile of its own: one, or for a head a second one for
    /// what the first leaves over, which makes 16 bits. A prompt needs one row of a head's products, so that they cost little.
    pub(super) parts: usize,
    /// Columns of a group that share a scale of activations, from the group's first on; the last may be fewer.
    segment: usize,
    /// Columns of the first group, of those in the middle, of the last: the first may begin late, the last may end early.
    widths: [usize; 3],
}

impl QuantLayout {
    pub(super) fn new(shape: QuantShape) -> QuantLayout {
        let groups = shape.groups();
        let first = shape.k.min(shape.group - shape.lead);
        let last = if groups > 1 {
            (shape.lead + shape.k - 1) % shape.group + 1
        } else {
            first
        };
        QuantLayout {
            int4: shape.bits == QuantBits::Int4,
            offset: shape.offset,
            groups,
            parts: if shape.head { 2 } else { 1 },
            segment: match shape.bits {
                _ if shape.head => shape.group,
                QuantBits::Int8 => INT8_SEGMENT,
                QuantBits::Int4 => INT4_SEGMENT,
            },
            widths: [first, shape.group, last],
        }
    }

    /// What stands for zero of the numbers as they are kept, where it is the middle.
    #[inline(always)]
    pub(super) const fn middle(&self) -> i16 {
        if self.int4 { 8 } else { 128 }
    }

    /// Columns of a group.
    #[inline(always)]
    pub(super) fn width(&self, group: usize) -> usize {
        if group == 0 {
            self.widths[0]
        } else if group + 1 == self.groups {
            self.widths[2]
        } else {
            self.widths[1]
        }
    }

    /// The widths of a group's segments.
    #[inline(always)]
    pub(super) fn segments(&self, group: usize) -> impl Iterator<Item = usize> {
        let (width, segment) = (self.width(group), self.segment);
        (0..width)
            .step_by(segment)
            .map(move |start| segment.min(width - start))
    }

    /// Segments of all groups.
    pub(super) fn segment_count(&self) -> usize {
        let [first, middle, last] = self.widths.map(|width| width.div_ceil(self.segment));
        match self.groups {
            0 => 0,
            1 => first,
            groups => first + middle * (groups - 2) + last,
        }
    }

    /// Columns of all groups, filled up.
    pub(super) fn columns(&self) -> usize {
        let [first, middle, last] = self.widths.map(|width| width.next_multiple_of(STEP));
        match self.groups {
            0 => 0,
            1 => first,
            groups => first + middle * (groups - 2) + last,
        }
    }

    /// Bytes in front of a group's columns.
    #[inline(always)]
    pub(super) fn head_bytes(&self) -> usize {
        match self.offset {
            QuantOffset::Middle => HEAD_BYTES,
            QuantOffset::Zeros | QuantOffset::Mins => 2 * HEAD_BYTES,
        }
    }

    /// Bytes of [`STEP`] columns of a panel.
    #[inline(always)]
    pub(super) fn step_bytes(&self) -> usize {
        if self.int4 {
            PANEL * STEP / 2
        } else {
            PANEL * STEP
        }
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(&self) -> usize {
        self.groups * self.head_bytes() + self.columns() / STEP * self.step_bytes()
    }
}

/// `sums[i][r] += sum_s (sum_j q[r][j] x[i][j] - offset) * scale[r][s] * scale[i][s]` of all rows `r` of a panel.
pub(super) struct DotTile {
    pub(super) layout: QuantLayout,
    /// The panel, at a multiple of 64.
    pub(super) w: *const u8,
    /// The block's numbers, scales and offsets. An offset is what [`QuantOffset`] makes of a segment's sum of activations:
    /// an i32 to begin with, one of 16 bits to be multiplied with the zero points, a f32 to be multiplied with the minima.
    pub(super) x: *const i8,
    pub(super) x_scales: *const f32,
    pub(super) x_offsets: *const i32,
    /// `[rows][32]`, at a multiple of 64.
    pub(super) sums: *mut f32,
    pub(super) ahead: Ahead,
}

impl DotTile {
    /// Computes a tile of up to [`Dots::ROWS`] rows. Instantiated once per path, through [`Dots::tile`].
    ///
    /// # Safety
    /// The features of `D`; all pointers are good for what the formula reads and writes.
    #[inline(always)]
    pub(super) unsafe fn compute<D: Dots>(&self, rows: usize) {
        macro_rules! by_rows {
            ($($rows:literal),*) => {
                match rows {
                    $(
                        // SAFETY: the caller's promise.
                        $rows if $rows <= const { D::ROWS } => unsafe { self.halves::<D, $rows>() },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    }

    #[inline(always)]
    unsafe fn halves<D: Dots, const M: usize>(&self) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self.layout.int4, M <= D::WHOLE_ROWS) {
                (false, true) => self.groups::<D, M, 2, false>(0),
                (true, true) => self.groups::<D, M, 2, true>(0),
                (false, false) => (0..2).for_each(|half| self.groups::<D, M, 1, false>(half)),
                (true, false) => (0..2).for_each(|half| self.groups::<D, M, 1, true>(half)),
            }
        }
    }

    /// All groups of `H` halves of the panel, from `half` on.
    #[inline(always)]
    unsafe fn groups<D: Dots, const M: usize, const H: usize, const INT4: bool>(
        &self,
        half: usize,
    ) {
        let layout = self.layout;
        let (mut w, mut x, mut ahead) = (self.w, self.x, self.ahead.at);
        let step_bytes = if INT4 { PANEL * STEP / 2 } else { PANEL * STEP };
        let ahead_step = step_bytes * self.ahead.share / 64;
        let sums = self.sums.wrapping_add(half * LANES);
        let (mut scales, mut offsets) = (self.x_scales, self.x_offsets);
        for group in 0..layout.groups {
            let head = w.wrapping_add(half * HEAD_BYTES / 2).cast::<u16>();
            let second = head.wrapping_add(PANEL);
            w = w.wrapping_add(layout.head_bytes());
            for columns in layout.segments(group) {
                // SAFETY: the caller's promise; the layout says where each of these lies.
                unsafe {
                    let mut dots = [[D::zero(); H]; M];
                    for (i, dots) in dots.iter_mut().enumerate() {
                        for (h, dot) in dots.iter_mut().enumerate() {
                            let offset = offsets.wrapping_add(i);
                            *dot = match layout.offset {
                                QuantOffset::Middle => D::splat(offset),
                                QuantOffset::Zeros => {
                                    D::times_zeros(second.wrapping_add(h * LANES), offset)
                                }
                                QuantOffset::Mins => D::zero(),
                            };
                        }
                    }
                    for _ in 0..columns.div_ceil(STEP) {
                        let from = w.wrapping_add(half * 64);
                        for line in 0..step_bytes / 64 {
                            D::F::prefetch(ahead.wrapping_add(line * self.ahead.line));
                        }
                        // No closures here: one that is not inlined has none of the path's instructions.
                        let mut quads = [[D::load(from); H]; 2];
                        let [first, second] = &mut quads;
                        for (h, (first, second)) in first.iter_mut().zip(second).enumerate() {
                            let from = from.wrapping_add(h * 64);
                            if INT4 {
                                [*first, *second] = D::nibbles(D::load(from));
                            } else {
                                *first = D::load(from);
                                *second = D::load(from.wrapping_add(PANEL * QUAD));
                            }
                        }
                        for w in quads {
                            for (i, dots) in dots.iter_mut().enumerate() {
                                let x = D::splat_quad(x.wrapping_add(i * QUAD));
                                for (dot, w) in dots.iter_mut().zip(w) {
                                    *dot = if INT4 {
                                        D::dot_nibbles(*dot, w, x)
                                    } else {
                                        D::dot(*dot, w, x)
                                    };
                                }
                            }
                            x = x.wrapping_add(M * QUAD);
                        }
                        w = w.wrapping_add(step_bytes);
                        ahead = ahead.wrapping_add(ahead_step);
                    }
                    // The sums lie in memory: in registers they would push out those of the loop above.
                    let mut widened = [D::load_f16(head); H];
                    for (h, widened) in widened.iter_mut().enumerate() {
                        *widened = D::load_f16(head.wrapping_add(h * LANES));
                    }
                    for (i, dots) in dots.iter().enumerate() {
                        let scale = D::F::splat_at(scales.wrapping_add(i));
                        for h in 0..H {
                            let at = sums.wrapping_add(i * PANEL + h * LANES);
                            let mut sum = D::F::load_aligned(at);
                            sum = D::F::fma(D::to_f32(dots[h]), D::F::mul(widened[h], scale), sum);
                            if layout.offset == QuantOffset::Mins {
                                let min = D::load_f16(second.wrapping_add(h * LANES));
                                let offset = D::F::splat_at(offsets.wrapping_add(i).cast());
                                sum = D::F::fma(min, offset, sum);
                            }
                            D::F::store(at, sum);
                        }
                    }
                }
                scales = scales.wrapping_add(M);
                offsets = offsets.wrapping_add(M);
            }
        }
    }
}
