//! The loops around tiles: which panels and which rows meet when, so that what is read again is still in a near cache.
//!
//! Owns what float and integer products share, and what becomes of sums that are done: they are written, or a gate's and
//! its up's become one number first, so that neither goes to memory. The order of no sum depends on it.

use std::ops::Range;

use super::super::float_tile::{Ahead, PANEL, ROWS_MAX};
use super::super::isa::{Isa, Kernel};
use super::super::ops::SiluMul;
use super::super::pool::{Base, Pool};
use super::super::rows::Combine;
use super::super::simd::{LANES, Simd};
use super::Product;
use super::activations::Blocks;

/// Multiplications worth waking a helper for: some 5 microseconds.
const PARALLEL_MIN: usize = 64 << 10;
/// Bytes of activations that meet a panel before the next: beside panels they fit the L2 cache.
const GROUP_BYTES: usize = 512 << 10;
/// Bytes of panels that a thread claims at a time where groups of rows follow each other: they stay in the L2 cache.
const CLAIM_BYTES: usize = 512 << 10;
/// Claims per thread at least, so that a thread that is held up holds up little.
const CLAIMS: usize = 8;
/// The last part of all panels is claimed in as many times smaller pieces, so that threads are through at about one time.
const LAST_PART: usize = 4;
/// How far ahead of the sums weights are asked for when each is read once: the processor's own prefetching is late.
const AHEAD_BYTES: usize = 4096;

/// The way of all rows past some panels.
pub(super) struct Walk<'a> {
    isa: Isa,
    /// Panel `p` of gates meets the rows together with its panel of ups, `count` further on.
    gated: bool,
    /// Numbers in a row of `y`, and the panels that they come from.
    width: usize,
    count: usize,
    blocks: Blocks,
    /// Blocks of rows that meet a panel before the next.
    at_once: usize,
    bias: Option<&'a [f32]>,
    y: Base<f32>,
    /// All panels, one after another.
    panels: &'a [u8],
    panel_bytes: usize,
    claims: Claims,
}

/// How many panels a thread claims at a time: `large` of the first ones, `small` of the others.
struct Claims {
    first: usize,
    large: usize,
    small: usize,
}

/// A block of rows that meets a panel.
pub(super) struct Meeting<'a> {
    pub(super) panel: usize,
    /// The panel and what lies behind it.
    pub(super) w: &'a [u8],
    pub(super) rows: Range<usize>,
    /// `[rows][32]`, begun.
    pub(super) sums: *mut f32,
    pub(super) ahead: Ahead,
}

/// The sums of a tile.
#[repr(align(64))]
struct Sums([[f32; PANEL]; ROWS_MAX]);

impl Sums {
    const ZERO: Sums = Sums([[0.0; PANEL]; ROWS_MAX]);
}

impl<'a> Walk<'a> {
    /// `row_bytes` is what a row's activations take.
    pub(super) fn new(
        threads: usize,
        product: Product<'a>,
        blocks: Blocks,
        row_bytes: usize,
        (panels, panel_bytes): (&'a [u8], usize),
    ) -> Walk<'a> {
        let Product {
            isa,
            gated,
            n,
            k,
            m,
            bias,
            y,
            ..
        } = product;
        let pieces = if gated { 2 } else { 1 };
        let count = n.div_ceil(PANEL) / pieces;
        let block_bytes = row_bytes * m.div_ceil(blocks.count);
        let at_once = (GROUP_BYTES / block_bytes.max(1)).clamp(1, blocks.count);
        let claims = if m * n * k < PARALLEL_MIN || threads == 1 {
            Claims::all(count)
        } else {
            let kept = CLAIM_BYTES / (pieces * panel_bytes).max(1);
            let most = if at_once < blocks.count {
                kept.max(1)
            } else {
                count
            };
            Claims::new(count, threads, most)
        };
        Walk {
            isa,
            gated,
            width: n / pieces,
            count,
            blocks,
            at_once,
            bias,
            y: Base::new(y),
            panels,
            panel_bytes,
            claims,
        }
    }

    /// Runs `part(panels)` on the pool's threads until all panels are done. A part calls [`Walk::pass`].
    pub(super) fn run(&self, pool: &Pool, part: &(dyn Fn(Range<usize>) + Sync)) {
        pool.run(self.claims.items(self.count), &|item, _| {
            part(self.claims.panels(item, self.count));
        });
    }

    /// Lets all rows meet these panels. `tile` adds up the products of one meeting.
    ///
    /// # Safety
    /// Nobody else writes the columns of these panels.
    #[inline(always)]
    pub(super) unsafe fn pass(&self, panels: Range<usize>, tile: impl Fn(Meeting<'_>)) {
        let (mut sums, mut ups, mut gated) = (Sums::ZERO, Sums::ZERO, Sums::ZERO);
        for first in (0..self.blocks.count).step_by(self.at_once) {
            let group = first..self.blocks.count.min(first + self.at_once);
            for panel in panels.clone() {
                for block in group.clone() {
                    let rows = self.blocks.rows(block);
                    let place = (block - first, group.len());
                    let column = panel * PANEL;
                    let target = Place {
                        y: self.y.at(rows.start * self.width + column),
                        rows: rows.len(),
                        columns: PANEL.min(self.width - column),
                        stride: self.width,
                    };
                    self.isa.run(Ask(target));
                    self.meet(panel, rows.clone(), place, &mut sums, &tile);
                    let done = if self.gated {
                        let up = panel + self.count;
                        self.meet(up, rows.clone(), place, &mut ups, &tile);
                        let len = rows.len();
                        self.isa.run(Combine {
                            op: SiluMul,
                            x: gated.0[..len].as_flattened_mut(),
                            y: sums.0[..len].as_flattened(),
                            z: ups.0[..len].as_flattened(),
                        });
                        &gated
                    } else {
                        &sums
                    };
                    self.isa.run(Put(target, done));
                }
            }
        }
    }

    /// Computes the sums of some rows and a panel, the `place.0`th of `place.1` blocks that it meets in turn.
    #[inline(always)]
    fn meet(
        &self,
        panel: usize,
        rows: Range<usize>,
        place: (usize, usize),
        sums: &mut Sums,
        tile: &impl Fn(Meeting<'_>),
    ) {
        let bias = match self.bias {
            Some(bias) => &bias[panel * PANEL..][..PANEL],
            None => &[0.0; PANEL],
        };
        for sums in &mut sums.0[..rows.len()] {
            sums.copy_from_slice(bias);
        }
        let w = &self.panels[panel * self.panel_bytes..];
        tile(Meeting {
            panel,
            w,
            rows,
            sums: sums.0.as_mut_ptr().cast(),
            ahead: self.ahead(w, place.0, place.1),
        });
    }

    /// A panel read once asks for what lies a little further on. One that several blocks of rows read lies in a near cache
    /// after the first, and each block asks for its share of the next panel.
    fn ahead(&self, w: &[u8], block: usize, blocks: usize) -> Ahead {
        let at = |offset| w.as_ptr().wrapping_add(offset);
        if blocks == 1 {
            Ahead {
                at: at(AHEAD_BYTES),
                share: 64,
                line: 64,
            }
        } else {
            Ahead {
                at: at(self.panel_bytes + self.panel_bytes * block / blocks),
                share: 64_usize.div_ceil(blocks),
                line: 0,
            }
        }
    }
}

impl Claims {
    fn all(count: usize) -> Claims {
        Claims {
            first: count,
            large: count,
            small: 1,
        }
    }

    /// For some threads, `most` panels at a time at most.
    fn new(count: usize, threads: usize, most: usize) -> Claims {
        let large = count.div_ceil(threads * CLAIMS).min(most);
        Claims {
            first: (count - count / LAST_PART) / large * large,
            large,
            small: large.div_ceil(LAST_PART),
        }
    }

    fn items(&self, count: usize) -> usize {
        self.first / self.large + (count - self.first).div_ceil(self.small)
    }

    fn panels(&self, item: usize, count: usize) -> Range<usize> {
        match item.checked_sub(self.first / self.large) {
            None => item * self.large..(item + 1) * self.large,
            Some(item) => {
                let start = self.first + item * self.small;
                start..count.min(start + self.small)
            }
        }
    }
}

/// Where the sums of some rows and a panel go.
#[derive(Clone, Copy)]
struct Place {
    y: *mut f32,
    rows: usize,
    columns: usize,
    /// Numbers from one row to the next.
    stride: usize,
}

/// Asks for the lines that sums will go to: what is stored next would wait behind them for memory.
struct Ask(Place);

impl Kernel for Ask {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Ask(place) = self;
        for row in 0..place.rows {
            for column in (0..place.columns).step_by(LANES) {
                // SAFETY: prefetches may go anywhere; the features are the caller's promise.
                unsafe { S::prefetch(place.y.wrapping_add(row * place.stride + column).cast()) };
            }
        }
    }
}

/// Writes the sums to their place.
struct Put<'a>(Place, &'a Sums);

impl Kernel for Put<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Put(place, sums) = self;
        for (row, sums) in sums.0[..place.rows].iter().enumerate() {
            let y = place.y.wrapping_add(row * place.stride);
            // SAFETY: columns of a panel in `y`, which are this call's alone; the features are the caller's promise.
            unsafe {
                if place.columns == PANEL {
                    for half in (0..PANEL).step_by(LANES) {
                        S::store(y.wrapping_add(half), S::load(sums[half..].as_ptr()));
                    }
                } else {
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), y, place.columns);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_claimed_once_and_the_last_claims_are_small() {
        for count in [1, 2, 5, 16, 63, 64, 80, 176, 1000] {
            for threads in [2, 3, 16] {
                for most in [1, 2, 7, count] {
                    let claims = Claims::new(count, threads, most);
                    let items = claims.items(count);
                    let all = (0..items).flat_map(|item| claims.panels(item, count));
                    assert!(
                        all.eq(0..count),
                        "{count} panels, {threads} threads, {most}"
                    );
                    let last = claims.panels(items - 1, count).len();
                    let even = count.div_ceil(threads * CLAIMS);
                    assert!(
                        last <= even.div_ceil(LAST_PART),
                        "{count}, {threads}, {most}"
                    );
                }
            }
        }
        assert_eq!(Claims::all(9).items(9), 1);
        assert_eq!(Claims::all(9).panels(0, 9), 0..9);
    }
}
