//! Products of floats: bf16 and f32 weights, activations as they are.
//!
//! Owns how rows go into panels and come out again.

use super::super::float_tile::{FloatTile, PANEL, Weight};
use super::super::isa::Kernel;
use super::super::memory::Memory;
use super::super::pool::Pool;
use super::super::simd::{LANES, Simd};
use super::activations::{self, Blocks};
use super::walk::Walk;
use super::{Product, room};
use crate::backend::{DeviceError, RowSource};

/// Bytes of the panels.
pub(super) fn bytes<W: Weight>(n: usize, k: usize) -> usize {
    n.div_ceil(LANES) * W::half_len(k) * size_of::<W>()
}

/// Packs rows into panels, which are zeros before.
pub(super) fn pack<W: Weight>(
    pool: &Pool,
    (n, k): (usize, usize),
    rows: &RowSource<'_>,
    panels: &mut [W],
) {
    if k == 0 {
        return;
    }
    let len = W::half_len(k);
    pool.run_chunks(panels, 2 * len, &|index, panel, _| {
        let (mut values, halves) = (vec![0.0; k], panel.len() / len);
        for row in 0..PANEL.min(n - index * PANEL) {
            rows(index * PANEL + row, &mut values);
            for (i, value) in values.iter().enumerate() {
                panel[W::place(halves, row, i)] = W::round(*value);
            }
        }
    });
}

/// Copies row `row`, widened.
pub(super) fn row<W: Weight>(panels: &[W], k: usize, row: usize, out: &mut [f32]) {
    let (len, start) = (W::half_len(k), row / PANEL * 2 * W::half_len(k));
    let panel = &panels[start..panels.len().min(start + 2 * len)];
    let halves = panel.len() / len.max(1);
    for (i, out) in out[..k].iter_mut().enumerate() {
        *out = panel[W::place(halves, row % PANEL, i)].widen();
    }
}

/// `y[m, n] = x[m, k] W^T + bias`.
///
/// # Errors
/// The scratch memory cannot grow; `y` is then not written.
pub(super) fn multiply<W: Weight>(
    pool: &Pool,
    product: Product<'_>,
    panels: &[u8],
    scratch: &mut Memory<f32>,
) -> Result<(), DeviceError> {
    let Product {
        isa, n, k, m, x, ..
    } = product;
    let blocks = Blocks::new(m, isa.float_rows());
    // One row is its own block.
    let x = if m == 1 {
        x
    } else {
        activations::turn(pool, (x, k), blocks, room(scratch, m * k)?)
    };
    let panel_bytes = 2 * W::half_len(k) * size_of::<W>();
    let row_bytes = k * size_of::<f32>();
    let walk = Walk::new(
        pool.threads(),
        product,
        blocks,
        row_bytes,
        (panels, panel_bytes),
    );
    walk.run(pool, &|panels| {
        isa.run(Multiply::<W> {
            k,
            halves: n.div_ceil(LANES),
            x,
            walk: &walk,
            panels,
            of: std::marker::PhantomData,
        });
    });
    Ok(())
}

/// The product of all rows with some panels.
struct Multiply<'a, W> {
    k: usize,
    /// Halves of all panels together.
    halves: usize,
    x: &'a [f32],
    walk: &'a Walk<'a>,
    panels: std::ops::Range<usize>,
    of: std::marker::PhantomData<W>,
}

impl<W: Weight> Kernel for Multiply<'_, W> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let k = self.k;
        // SAFETY: panels are claimed once. The slices hold all that a tile reads: a panel's halves, which end with the
        // panels, and a block's rows; the features are the caller's promise.
        unsafe {
            self.walk.pass(self.panels.clone(), |meeting| {
                let halves = (self.halves - 2 * meeting.panel).min(2);
                let w = &meeting.w[..halves * W::half_len(k) * size_of::<W>()];
                let rows = meeting.rows;
                let tile = FloatTile {
                    k,
                    w: w.as_ptr().cast::<W>(),
                    halves,
                    x: self.x[rows.start * k..rows.end * k].as_ptr(),
                    sums: meeting.sums,
                    ahead: meeting.ahead,
                };
                S::float_tile(&tile, rows.len());
            });
        }
    }
}
