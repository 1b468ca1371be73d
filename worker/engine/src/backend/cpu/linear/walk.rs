//! The loops around tiles: which panels and which rows meet when, so that what is read again is still in a near cache.
//!
//! Owns what float and integer products share. The order of no sum depends on it.

use std::ops::Range;

use super::super::float_tile::{Ahead, PANEL, ROWS_MAX};
use super::super::pool::{Base, Pool};
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
/// How far ahead of the sums weights are asked for when each is read once: the processor's own prefetching is late.
const AHEAD_BYTES: usize = 4096;

/// The way of all rows past some panels.
pub(super) struct Walk<'a> {
    n: usize,
    blocks: Blocks,
    /// Blocks of rows that meet a panel before the next.
    at_once: usize,
    bias: Option<&'a [f32]>,
    y: Base<f32>,
    /// All panels, one after another.
    panels: &'a [u8],
    panel_bytes: usize,
    /// How many panels a thread claims at a time.
    claim: usize,
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
            n, k, m, bias, y, ..
        } = product;
        let count = n.div_ceil(PANEL);
        let block_bytes = row_bytes * m.div_ceil(blocks.count);
        let at_once = (GROUP_BYTES / block_bytes.max(1)).clamp(1, blocks.count);
        let claim = if m * n * k < PARALLEL_MIN || threads == 1 {
            count
        } else {
            count.div_ceil(threads * CLAIMS)
        };
        let kept = (CLAIM_BYTES / panel_bytes.max(1)).max(1);
        Walk {
            n,
            blocks,
            at_once,
            bias,
            y: Base::new(y),
            panels,
            panel_bytes,
            claim: if at_once < blocks.count {
                claim.min(kept)
            } else {
                claim
            },
        }
    }

    /// Runs `part(panels)` on the pool's threads until all panels are done. A part calls [`Walk::pass`].
    pub(super) fn run(&self, pool: &Pool, part: &(dyn Fn(Range<usize>) + Sync)) {
        let count = self.n.div_ceil(PANEL);
        pool.run(count.div_ceil(self.claim), &|item, _| {
            part(item * self.claim..((item + 1) * self.claim).min(count));
        });
    }

    /// Lets all rows meet these panels. `tile` adds up the products of one meeting.
    ///
    /// # Safety
    /// Nobody else writes the columns of these panels.
    #[inline(always)]
    pub(super) unsafe fn pass(&self, panels: Range<usize>, tile: impl Fn(Meeting<'_>)) {
        let mut sums = Sums([[0.0; PANEL]; ROWS_MAX]);
        for first in (0..self.blocks.count).step_by(self.at_once) {
            let group = first..self.blocks.count.min(first + self.at_once);
            for panel in panels.clone() {
                let w = &self.panels[panel * self.panel_bytes..];
                for block in group.clone() {
                    let rows = self.blocks.rows(block);
                    let bias = match self.bias {
                        Some(bias) => &bias[panel * PANEL..][..PANEL],
                        None => &[0.0; PANEL],
                    };
                    for sums in &mut sums.0[..rows.len()] {
                        sums.copy_from_slice(bias);
                    }
                    tile(Meeting {
                        panel,
                        w,
                        rows: rows.clone(),
                        sums: sums.0.as_mut_ptr().cast(),
                        ahead: self.ahead(w, block - first, group.len()),
                    });
                    let exist = PANEL.min(self.n - panel * PANEL);
                    for (row, sums) in rows.zip(&sums.0) {
                        let y = self.y.at(row * self.n + panel * PANEL);
                        // SAFETY: columns of this panel in `y`, which are this call's alone.
                        unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), y, exist) };
                    }
                }
            }
        }
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
