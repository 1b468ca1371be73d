//! Products of integers: weights quantised before, activations on their way in.
//!
//! Owns how a quantised row goes into its panel and comes out again.

use half::f16;

use super::super::dot_tile::{DotTile, PANEL, QuantLayout, STEP};
use super::super::dots::{Dots, QUAD};
use super::super::isa::DotKernel;
use super::super::memory::Memory;
use super::super::pool::Pool;
use super::activations::{self, Blocks, Quantised};
use super::walk::Walk;
use super::{Product, room};
use crate::backend::{DeviceError, QuantOffset, QuantRow, QuantShape, QuantSource};

#[cfg(test)]
mod tests;

/// Bytes of the panels.
pub(super) fn bytes(shape: QuantShape) -> usize {
    shape.n.div_ceil(PANEL) * QuantLayout::new(shape).panel_bytes()
}

/// Packs rows into panels, which are zeros before.
pub(super) fn pack(pool: &Pool, shape: QuantShape, rows: &QuantSource<'_>, panels: &mut [u8]) {
    let layout = QuantLayout::new(shape);
    let (k, groups) = (shape.k, layout.groups);
    if layout.panel_bytes() == 0 {
        return;
    }
    pool.run_chunks(panels, layout.panel_bytes(), &|index, panel, _| {
        let mut row = QuantRow {
            q: &mut vec![0; k],
            scales: &mut vec![0.0; groups],
            zeros: &mut vec![0; groups],
            mins: &mut vec![0.0; shape.mins()],
        };
        for r in 0..PANEL.min(shape.n - index * PANEL) {
            rows(index * PANEL + r, row.lend());
            pack_row(&layout, &row, r, panel);
        }
    });
}

fn pack_row(layout: &QuantLayout, row: &QuantRow<'_>, r: usize, panel: &mut [u8]) {
    let (mut q, mut panel) = (&*row.q, panel);
    for group in 0..layout.groups {
        let (head, rest) = panel.split_at_mut(layout.head_bytes());
        let head: &mut [u16] = bytemuck::cast_slice_mut(head);
        head[r] = f16::from_f32(row.scales[group]).to_bits();
        match layout.offset {
            QuantOffset::Middle => {}
            QuantOffset::Zeros => {
                // int8 is kept as q + 128.
                let base = if layout.int4 { 0 } else { 128 };
                head[PANEL + r] = base + u16::from(row.zeros[group]);
            }
            QuantOffset::Mins => head[PANEL + r] = f16::from_f32(row.mins[group]).to_bits(),
        }
        let (values, after) = q.split_at(layout.width(group));
        let steps = values.len().div_ceil(STEP);
        let (columns, next) = rest.split_at_mut(steps * layout.step_bytes());
        let columns: &mut [u32] = bytemuck::cast_slice_mut(columns);
        let (whole, ragged) = values.as_chunks::<STEP>();
        let mut last = [0; STEP];
        last[..ragged.len()].copy_from_slice(ragged);
        let all = whole.iter().chain((!ragged.is_empty()).then_some(&last));
        for (values, step) in all.zip(columns.chunks_exact_mut(layout.step_bytes() / QUAD)) {
            let quad = |at: usize| -> u32 {
                let quad = [values[at], values[at + 1], values[at + 2], values[at + 3]];
                u32::from_le_bytes(quad.map(i8::cast_unsigned))
            };
            if layout.int4 {
                step[r] = quad(0) | quad(QUAD) << 4;
            } else {
                // q + 128 of each byte.
                step[r] = quad(0) ^ 0x8080_8080;
                step[PANEL + r] = quad(QUAD) ^ 0x8080_8080;
            }
        }
        (q, panel) = (after, next);
    }
}

/// The numbers that row `row` stands for.
pub(super) fn row(layout: &QuantLayout, panels: &[u8], row: usize, out: &mut [f32]) {
    let (r, len) = (row % PANEL, layout.panel_bytes());
    let mut panel = &panels[row / PANEL * len..][..len];
    let mut out = out;
    for group in 0..layout.groups {
        let (head, rest) = panel.split_at(layout.head_bytes());
        let head: &[u16] = bytemuck::cast_slice(head);
        let scale = f16::from_bits(head[r]).to_f32();
        let (values, after) = out.split_at_mut(layout.width(group));
        let steps = values.len().div_ceil(STEP);
        let (columns, next) = rest.split_at(steps * layout.step_bytes());
        for (j, value) in values.iter_mut().enumerate() {
            let step = &columns[j / STEP * layout.step_bytes()..][..layout.step_bytes()];
            let (quad, b) = (j % STEP / QUAD, j % QUAD);
            let q = if layout.int4 {
                step[r * QUAD + b] >> (4 * quad) & 15
            } else {
                step[quad * PANEL * QUAD + r * QUAD + b]
            };
            *value = match layout.offset {
                QuantOffset::Middle => scale * f32::from(i16::from(q) - layout.middle()),
                QuantOffset::Zeros => scale * (f32::from(q) - f32::from(head[PANEL + r])),
                QuantOffset::Mins => {
                    let min = f16::from_bits(head[PANEL + r]).to_f32();
                    scale.mul_add(f32::from(q), min)
                }
            };
        }
        (panel, out) = (next, after);
    }
}

/// `y[m, n] = x[m, k] W^T + bias`.
///
/// # Errors
/// The scratch memory cannot grow; `y` is then not written.
pub(super) fn multiply(
    pool: &Pool,
    product: Product<'_>,
    layout: &QuantLayout,
    panels: &[u8],
    scratch: &mut Memory<f32>,
) -> Result<(), DeviceError> {
    let Product { isa, k, m, x, .. } = product;
    let blocks = Blocks::new(m, isa.dot_rows() / layout.parts);
    let scratch = room(scratch, activations::words(layout, m))?;
    let scratch = bytemuck::cast_slice_mut(scratch);
    let x = activations::quantise((isa, pool), layout, (x, k), blocks, scratch);
    let row_bytes = activations::words(layout, 1) * size_of::<f32>();
    let panels = (panels, layout.panel_bytes());
    let walk = Walk::new(pool.threads(), product, blocks, row_bytes, panels);
    walk.run(pool, &|panels| {
        isa.run_dots(Multiply {
            layout,
            x,
            walk: &walk,
            panels,
        });
    });
    Ok(())
}

/// The product of all rows with some panels.
struct Multiply<'a> {
    layout: &'a QuantLayout,
    x: Quantised<'a>,
    walk: &'a Walk<'a>,
    panels: std::ops::Range<usize>,
}

impl DotKernel for Multiply<'_> {
    unsafe fn run<D: Dots>(self) {
        let parts = self.layout.parts;
        // Of a row with its parts.
        let segments = parts * self.layout.segment_count();
        let columns = parts * self.layout.columns();
        // SAFETY: panels are claimed once. The slices hold all that a tile reads; the features are the caller's promise.
        unsafe {
            self.walk.pass(self.panels.clone(), |meeting| {
                let rows = meeting.rows;
                let part = |of_row: usize| rows.start * of_row..rows.end * of_row;
                let tile = DotTile {
                    layout: *self.layout,
                    w: meeting.w[..self.layout.panel_bytes()].as_ptr(),
                    x: self.x.numbers[part(columns)].as_ptr(),
                    x_scales: self.x.scales[part(segments)].as_ptr(),
                    x_offsets: self.x.offsets[part(segments)].as_ptr(),
                    sums: meeting.sums,
                    ahead: meeting.ahead,
                };
                if parts == 1 {
                    D::tile(&tile, rows.len());
                    return;
                }
                // The second parts' sums lie behind those of the first: a tile has room for both.
                let len = rows.len() * PANEL;
                let sums = std::slice::from_raw_parts_mut(meeting.sums, 2 * len);
                sums[len..].fill(0.0);
                D::tile(&tile, 2 * rows.len());
                let sums = std::slice::from_raw_parts_mut(meeting.sums, 2 * len);
                let (first, second) = sums.split_at_mut(len);
                for (first, second) in first.iter_mut().zip(second) {
                    *first += *second;
                }
            });
        }
    }
}
