//! Products of quantised weights: all formats, ragged groups, slices that begin inside a group.

use half::f16;

use super::{Both, SUMS, Twins, bits};
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

/// Scales of activations begin at multiples of it from a group's first column on, if not at every one.
const SCALED: usize = 32;

const ROWS: [usize; 8] = [1, 2, 3, 4, 7, 8, 9, 20];

const FORMS: [(QuantBits, QuantOffset); 6] = [
    (QuantBits::Int8, QuantOffset::Middle),
    (QuantBits::Int8, QuantOffset::Zeros),
    (QuantBits::Int8, QuantOffset::Mins),
    (QuantBits::Int4, QuantOffset::Middle),
    (QuantBits::Int4, QuantOffset::Zeros),
    (QuantBits::Int4, QuantOffset::Mins),
];

/// Products near the reference's, of few rows and of many.
pub(super) fn near<B: Backend>(twins: &mut Twins<B>) {
    for (at, (n, k, group, lead)) in SHAPES.into_iter().enumerate() {
        for (bits, offset) in FORMS {
            let shape = QuantShape {
                n,
                k,
                bits,
                group,
                lead,
                offset,
                head: at % 3 == 0,
            };
            if !B::takes_quantised(shape) {
                continue;
            }
            let weight = twins.quantised(shape, at % 2 == 0);
            for rows in ROWS {
                let x = twins.inputs(rows * k, 1.0);
                // Weights up to 4 that are rounded to bf16 on their way into a product of many rows; activations that
                // are off by half a step of 127.
                let tolerance = if twins.promises.rounds {
                    4.0 / 256.0
                } else if twins.promises.steps {
                    0.03
                } else {
                    SUMS
                };
                product(twins, (shape, &weight), rows, &x, tolerance);
                if twins.promises.steps {
                    let x = whole_steps(twins, shape, rows);
                    product(twins, (shape, &weight), rows, &x, SUMS);
                }
            }
            if twins.promises.rows_alone {
                rows_alone(twins, shape);
            }
        }
    }
}

/// A matrix on each backend.
type Matrices<B> = (
    <B as Backend>::Linear,
    <crate::backend::reference::ReferenceBackend as Backend>::Linear,
);

fn product<B: Backend>(
    twins: &mut Twins<B>,
    (shape, weight): (QuantShape, &Matrices<B>),
    rows: usize,
    x: &Both<B>,
    tolerance: f32,
) {
    let mut out = twins.zeros(rows * shape.n);
    twins
        .device
        .linear(rows, &x.device, &weight.0, &mut out.device);
    twins.twin.linear(rows, &x.twin, &weight.1, &mut out.twin);
    let what = format!("product of {rows} rows with {shape:?}");
    twins.compare(&what, &out, rows * shape.n, tolerance);
}

/// Activations that rounding to 127 steps of each group's largest leaves as they are.
fn whole_steps<B: Backend>(twins: &mut Twins<B>, shape: QuantShape, rows: usize) -> Both<B> {
    let mut values = twins.random.numbers(rows * shape.k, 127.0);
    for row in values.chunks_mut(shape.k) {
        for (j, x) in row.iter_mut().enumerate() {
            // From the group's first column here on.
            let into = ((shape.lead + j) % shape.group).min(j);
            *x = if into.is_multiple_of(SCALED) {
                1.0
            } else {
                x.round() / 127.0
            };
        }
    }
    twins.buf(&values)
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
    fn quantised(&mut self, shape: QuantShape, bias: bool) -> Matrices<B> {
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
            .map(|_| match (bits, shape.offset) {
                (QuantBits::Int8, _) => 0,
                (QuantBits::Int4, QuantOffset::Middle) => 8,
                (QuantBits::Int4, _) => number(0, 16) as u8,
            })
            .collect();
        let mut halves = |len: usize, size: f32| -> Vec<f32> {
            let numbers = self.random.numbers(len, size);
            numbers
                .into_iter()
                .map(|x| f16::from_f32(x).to_f32())
                .collect()
        };
        let scales = halves(n * groups, 0.25 / most as f32);
        let mins = halves(n * shape.mins(), 0.25);
        let bias = bias.then(|| self.random.numbers(n, 1.0));
        let rows = |i: usize, row: QuantRow<'_>| {
            row.q.copy_from_slice(&q[i * k..][..k]);
            row.scales.copy_from_slice(&scales[i * groups..][..groups]);
            row.zeros.copy_from_slice(&zeros[i * groups..][..groups]);
            row.mins
                .copy_from_slice(&mins[i * shape.mins()..][..shape.mins()]);
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
