//! Products of bf16 weights with activations rounded to bf16, by the processor's own products of pairs.
//!
//! Owns how activations are rounded on their way; panels are packed as in [`super::float`].

use super::super::float_tile::Weight;
use super::super::memory::Memory;
use super::super::pair_tile::{PairTile, ROWS, round_row};
use super::super::pool::{Base, Pool};
use super::super::simd::LANES;
use super::activations::Blocks;
use super::walk::Walk;
use super::{Product, room};
use crate::backend::DeviceError;

/// `y[m, n] = round(x)[m, k] W^T + bias`.
///
/// # Errors
/// The scratch memory cannot grow; `y` is then not written.
///
/// # Panics
/// The path has no products of pairs.
pub(super) fn multiply(
    pool: &Pool,
    product: Product<'_>,
    panels: &[u8],
    scratch: &mut Memory<f32>,
) -> Result<(), DeviceError> {
    let Product {
        isa, n, k, m, x, ..
    } = product;
    assert!(isa.multiplies_pairs(), "{isa:?}");
    let (blocks, pairs) = (Blocks::new(m, ROWS), k.div_ceil(2));
    let x = round(
        pool,
        (x, k),
        blocks,
        bytemuck::cast_slice_mut(room(scratch, m * pairs)?),
    );
    let half_len = u16::half_len(k);
    let panel_bytes = 2 * half_len * size_of::<u16>();
    let row_bytes = pairs * size_of::<u32>();
    let walk = Walk::new(
        pool.threads(),
        product,
        blocks,
        row_bytes,
        (panels, panel_bytes),
    );
    walk.run(pool, &|panels| {
        // SAFETY: panels are claimed once. The slices hold all that a tile reads: a panel's halves, which end with the
        // panels, and a block's rows. The path has the tile's features.
        unsafe {
            walk.pass(panels, |meeting| {
                let halves = (n.div_ceil(LANES) - 2 * meeting.panel).min(2);
                let w = &meeting.w[..halves * half_len * size_of::<u16>()];
                let rows = meeting.rows;
                let tile = PairTile {
                    pairs,
                    w: w.as_ptr().cast(),
                    halves,
                    x: x[rows.start * pairs..rows.end * pairs].as_ptr(),
                    sums: meeting.sums,
                    ahead: meeting.ahead,
                };
                tile.compute(rows.len());
            });
        }
    });
    Ok(())
}

/// Rounds `x [m, k]` into blocks `[pairs][rows]`.
fn round<'a>(pool: &Pool, (x, k): (&[f32], usize), blocks: Blocks, to: &'a mut [u32]) -> &'a [u32] {
    let pairs = k.div_ceil(2);
    let base = Base::new(to);
    let block = |i: usize| {
        let rows = blocks.rows(i);
        // SAFETY: a block's own part, which is borrowed for as long as the region runs; the path has the features.
        unsafe {
            let to =
                std::slice::from_raw_parts_mut(base.at(rows.start * pairs), rows.len() * pairs);
            for (i, row) in rows.clone().enumerate() {
                round_row(&x[row * k..][..k], &mut to[i..], rows.len());
            }
        }
    };
    blocks.run(pool, k, &block);
    to
}
