//! Products of quantised weights: both formats, ragged groups, slices that begin inside a group.

use super::{SUMS, Twins, bits};
use crate::backend::{Backend, QuantBits, QuantOffset, QuantRow, QuantShape};

/// `(n, k, group, lead)`.
const SHAPES: [(usize, usize, usize, usize); 7] = [
    (1, 1, 32, 0),
    (7, 40, 32, 0),
    (33, 128, 128, 0),
    (20, 96, 64, 48),
    (65, 300, 128, 0),
    (17, 77, 32, 5),
    (130, 256, 64, 0),
];

const ROWS: [usize; 8] = [1, 2, 3, 4, 7, 8, 9, 20];

/// Products near the reference's, of few rows and of many.
pub(super) fn near<B: Backend>(twins: &mut Twins<B>) {
    for (at, (n, k, group, lead)) in SHAPES.into_iter().enumerate() {
        for bits in [QuantBits::Int8, QuantBits::Int4] {
            let shape = QuantShape {
                n,
                k,
                bits,
                group,
                lead,
                offset: QuantOffset::Zeros,
            };
            let weight = twins.quantised(shape, at % 2 == 0);
            for rows in ROWS {
                let x = twins.inputs(rows * k, 1.0);
                let mut out = twins.zeros(rows * n);
                twins
                    .device
                    .linear(rows, &x.device, &weight.0, &mut out.device);
                twins.twin.linear(rows, &x.twin, &weight.1, &mut out.twin);
                // Weights up to 4 that are rounded to bf16 on their way into a product of many rows.
                let tolerance = if twins.promises.rounds {
                    4.0 / 256.0
                } else {
                    SUMS
                };
                twins.compare(
                    &format!("product of {rows} rows with {shape:?}"),
                    &out,
                    rows * n,
                    tolerance,
                );
            }
            if twins.promises.rows_alone {
                rows_alone(twins, shape);
            }
        }
    }
}

fn rows_alone<B: Backend>(twins: &mut Twins<B>, shape: QuantShape) {
    let QuantShape { n, k, .. } = shape;
    let weight = twins.quantised(shape, true).0;
    let values = twins.input_values(20 * k, 1.0);
    let (x, mut out) = (twins.buf(&values), twins.zeros(20 * n));
    twins.device.linear(20, &x.device, &weight, &mut out.device);
    let together = bits(&twins.read(&out.device, 20 * n));
    for count in [1, 2, 5, 8, 9] {
        let part = twins.buf(&values[..count * k]);
        twins
            .device
            .linear(count, &part.device, &weight, &mut out.device);
        let alone = bits(&twins.read(&out.device, count * n));
        assert!(
            alone == together[..count * n],
            "{shape:?}: {count} rows differ from the same among 20"
        );
    }
}

impl<B: Backend> Twins<B> {
    /// A matrix of random numbers, scales and zero points, some scales negative.
    fn quantised(
        &mut self,
        shape: QuantShape,
        bias: bool,
    ) -> (
        B::Linear,
        <crate::backend::reference::ReferenceBackend as Backend>::Linear,
    ) {
        let QuantShape { n, k, bits, .. } = shape;
        let groups = shape.groups();
        let (least, most) = match bits {
            QuantBits::Int8 => (-127, 127),
            QuantBits::Int4 => (0, 15),
        };
        let mut number =
            |least: i64, most: i64| least + (self.random.next() % (most - least + 1) as u64) as i64;
        let q: Vec<i8> = (0..n * k).map(|_| number(least, most) as i8).collect();
        let zeros: Vec<u8> = (0..n * groups)
            .map(|_| {
                if bits == QuantBits::Int4 {
                    number(0, 15) as u8
                } else {
                    0
                }
            })
            .collect();
        let scales = self.random.numbers(n * groups, 0.25 / most as f32);
        let bias = bias.then(|| self.random.numbers(n, 1.0));
        let rows = |i: usize, row: QuantRow<'_>| {
            row.q.copy_from_slice(&q[i * k..][..k]);
            row.scales.copy_from_slice(&scales[i * groups..][..groups]);
            row.zeros.copy_from_slice(&zeros[i * groups..][..groups]);
        };
        (
            self.device
                .pack_quantised(shape, &rows, bias.as_deref())
                .expect("memory for a test"),
            self.twin
                .pack_quantised(shape, &rows, bias.as_deref())
                .expect("memory for a test"),
        )
    }
}
