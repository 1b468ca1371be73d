//! What every backend must hold, op by op: results near the reference backend's, and rows that do not depend on the batch.
//!
//! Owns the shapes that are tried: odd sizes, all ratios of heads, windows, slopes, ragged spans. A backend's tests call
//! [`check`] once per instruction path.

mod attention;
mod draws;
mod promises;
mod quantised;

pub use promises::Promises;

use super::reference::ReferenceBackend;
use super::{
    Backend, Batch, BatchSpan, Columns, FloatDtype, Heads, KvDtype, KvShape, LayerNorm,
    LinearShape, Size,
};
use half::bf16;

/// Checks all ops of a backend. `backend` makes a fresh one.
///
/// # Panics
/// On the first difference, naming op, shape and numbers.
pub fn check<B: Backend>(promises: Promises, backend: impl Fn() -> B) {
    let twins = || Twins::new(promises, backend());
    let checks: [fn(&mut Twins<B>); 9] = [
        embedding,
        norms,
        linear,
        linear_silu_mul,
        rope,
        elementwise,
        columns_and_rows,
        memory,
        draws::like_the_sampler,
    ];
    for check in checks {
        check(&mut twins());
    }
    if promises.quantised {
        quantised::near(&mut twins());
    }
    if promises.rows_alone {
        linear_rows(&mut twins());
    }
    for dtype in promises.caches {
        attention::near(&mut twins(), *dtype);
        if promises.rows_alone {
            attention::in_chunks(&mut twins(), *dtype);
        }
    }
}

/// The backend under test beside the reference.
struct Twins<B: Backend> {
    promises: Promises,
    device: B,
    twin: ReferenceBackend,
    random: Random,
}

/// One buffer on each.
struct Both<B: Backend> {
    device: B::Buf,
    twin: Vec<f32>,
}

impl<B: Backend> Twins<B> {
    fn new(promises: Promises, device: B) -> Self {
        Twins {
            promises,
            device,
            twin: ReferenceBackend,
            random: Random(1),
        }
    }

    fn buf(&mut self, values: &[f32]) -> Both<B> {
        let mut device = self.device.alloc(values.len()).expect("memory for a test");
        self.device.write(values, &mut device);
        Both {
            device,
            twin: values.to_vec(),
        }
    }

    fn zeros(&mut self, len: usize) -> Both<B> {
        self.buf(&vec![0.0; len])
    }

    /// Numbers from `-size` to `size`.
    fn random(&mut self, len: usize, size: f32) -> Both<B> {
        let values = self.random.numbers(len, size);
        self.buf(&values)
    }

    /// The same for what goes into a product: where it would be rounded, it is already.
    fn inputs(&mut self, len: usize, size: f32) -> Both<B> {
        let values = self.input_values(len, size);
        self.buf(&values)
    }

    fn input_values(&mut self, len: usize, size: f32) -> Vec<f32> {
        let mut values = self.random.numbers(len, size);
        if self.promises.rounds_inputs {
            for value in &mut values {
                *value = bf16::from_f32(*value).to_f32();
            }
        }
        values
    }

    fn matrix(
        &mut self,
        shape: LinearShape,
        bias: bool,
    ) -> (B::Linear, <ReferenceBackend as Backend>::Linear) {
        let LinearShape { n, k, .. } = shape;
        let weights = self.random.numbers(n * k, 1.0);
        let bias = bias.then(|| self.random.numbers(n, 1.0));
        let rows = |i: usize, out: &mut [f32]| out.copy_from_slice(&weights[i * k..][..k]);
        let device = self
            .device
            .pack(shape, &rows, bias.as_deref())
            .expect("memory for a test");
        (
            device,
            self.twin
                .pack(shape, &rows, bias.as_deref())
                .expect("memory for a test"),
        )
    }

    fn read(&mut self, buf: &B::Buf, len: usize) -> Vec<f32> {
        let mut out = vec![0.0; len];
        self.device.read(buf, &mut out).expect("a working device");
        out
    }

    /// The first `len` numbers agree within `tolerance`, relative to those above 1.
    fn compare(&mut self, what: &str, both: &Both<B>, len: usize, tolerance: f32) {
        let device = self.read(&both.device, len);
        for (i, (found, expected)) in device.iter().zip(&both.twin).enumerate() {
            let off = (found - expected).abs();
            assert!(
                off <= tolerance * expected.abs().max(1.0),
                "{what}: number {i} is {found}, expected {expected}"
            );
        }
    }
}

/// Tolerance of ops without sums.
const POINTWISE: f32 = 2e-6;
/// Tolerance of sums of some hundred products of numbers up to 1.
const SUMS: f32 = 3e-5;

fn embedding<B: Backend>(twins: &mut Twins<B>) {
    for (dtype, n, k) in [
        (FloatDtype::Bf16, 37, 24),
        (FloatDtype::F32, 5, 33),
        (FloatDtype::Bf16, 100, 129),
    ] {
        if !twins.promises.weights.contains(&dtype) {
            continue;
        }
        let table = twins.matrix(LinearShape { n, k, dtype }, false);
        let tokens: Vec<u32> = (95..110)
            .chain([
                0,
                99,
                100,
                100 + n as u32 - 1,
                100 + n as u32,
                u32::MAX >> 1,
            ])
            .collect();
        let batch = Batch {
            positions: vec![0; tokens.len()],
            tokens,
            ..Batch::default()
        };
        let mut out = twins.random(batch.len() * k, 1.0);
        twins.device.begin_step(&batch);
        twins.device.embed(&batch, &table.0, 100, &mut out.device);
        twins.twin.embed(&batch, &table.1, 100, &mut out.twin);
        twins.compare(&format!("embed of [{n}, {k}]"), &out, batch.len() * k, 0.0);
    }
}

fn norms<B: Backend>(twins: &mut Twins<B>) {
    for (rows, width) in [(1, 1), (1, 7), (3, 16), (2, 100), (5, 128), (33, 257)] {
        let size = Size { rows, width };
        let x = twins.random(rows * width, 4.0);
        let (weight, bias) = (twins.random(width, 2.0), twins.random(width, 2.0));
        let mut out = twins.zeros(rows * width);
        twins
            .device
            .rms_norm(size, &x.device, &weight.device, 1e-5, &mut out.device);
        twins
            .twin
            .rms_norm(size, &x.twin, &weight.twin, 1e-5, &mut out.twin);
        let tolerance = twins.promises.left(SUMS);
        twins.compare(
            &format!("rms_norm of {size:?}"),
            &out,
            rows * width,
            tolerance,
        );
        for with_bias in [false, true] {
            let norm = LayerNorm {
                weight: &weight.device,
                bias: with_bias.then_some(&bias.device),
                eps: 1e-5,
            };
            twins
                .device
                .layer_norm(size, &x.device, norm, &mut out.device);
            let norm = LayerNorm {
                weight: &weight.twin,
                bias: with_bias.then_some(&bias.twin),
                eps: 1e-5,
            };
            twins.twin.layer_norm(size, &x.twin, norm, &mut out.twin);
            twins.compare(
                &format!("layer_norm of {size:?}, bias {with_bias}"),
                &out,
                rows * width,
                tolerance,
            );
        }
        rows_stand_alone(
            twins,
            &format!("rms_norm of {size:?}"),
            size,
            |device, size, out| {
                device.rms_norm(size, &x.device, &weight.device, 1e-5, out);
            },
        );
    }
}

fn linear<B: Backend>(twins: &mut Twins<B>) {
    for rows in [1, 2, 3, 5, 12, 13, 33] {
        for (n, k) in [
            (1, 1),
            (7, 8),
            (16, 15),
            (31, 16),
            (33, 100),
            (96, 64),
            (130, 257),
        ] {
            for dtype in twins.promises.weights {
                let dtype = *dtype;
                let weight = twins.matrix(LinearShape { n, k, dtype }, rows % 2 == 1);
                let x = twins.inputs(rows * k, 1.0);
                let mut out = twins.zeros(rows * n);
                twins
                    .device
                    .linear(rows, &x.device, &weight.0, &mut out.device);
                twins.twin.linear(rows, &x.twin, &weight.1, &mut out.twin);
                twins.compare(
                    &format!("linear of {rows} rows, n {n}, k {k}, {dtype:?}"),
                    &out,
                    rows * n,
                    SUMS,
                );
            }
        }
    }
}

/// Each row of a product has the same bits whatever rows are computed with it.
fn linear_rows<B: Backend>(twins: &mut Twins<B>) {
    for (n, k) in [(48, 64), (33, 100), (257, 515)] {
        for dtype in twins.promises.weights {
            let (dtype, rows) = (*dtype, 70);
            let weight = twins.matrix(LinearShape { n, k, dtype }, true);
            let values = twins.input_values(rows * k, 1.0);
            let (x, mut out) = (twins.buf(&values), twins.zeros(rows * n));
            twins
                .device
                .linear(rows, &x.device, &weight.0, &mut out.device);
            let together = bits(&twins.read(&out.device, rows * n));
            for count in [1, 2, 3, 7, 12, 16, 31, 69] {
                for first in [0, rows - count] {
                    let part = twins.buf(&values[first * k..][..count * k]);
                    twins
                        .device
                        .linear(count, &part.device, &weight.0, &mut out.device);
                    let alone = bits(&twins.read(&out.device, count * n));
                    let expected = &together[first * n..][..count * n];
                    assert!(
                        alone == expected,
                        "linear, n {n}, k {k}, {dtype:?}: {count} rows from {first} differ from the same among {rows}"
                    );
                }
            }
        }
    }
}

/// A product of gates and ups has the bits that the two ops give one after another.
fn linear_silu_mul<B: Backend>(twins: &mut Twins<B>) {
    for (width, k) in [(5, 16), (32, 100), (96, 64)] {
        for dtype in twins.promises.weights {
            let (n, dtype) = (2 * width, *dtype);
            let weight = twins.matrix(LinearShape { n, k, dtype }, true);
            for rows in [1, 12, 13, 40] {
                let size = Size { rows, width };
                let x = twins.inputs(rows * k, 1.0);
                let (mut gate_up, mut out) = (twins.zeros(rows * n), twins.zeros(rows * width));
                let device = &mut twins.device;
                device.linear(rows, &x.device, &weight.0, &mut gate_up.device);
                device.silu_mul(size, &gate_up.device, &mut out.device);
                let expected = bits(&twins.read(&out.device, rows * width));
                let (mut gate_up, mut out) = (twins.zeros(rows * n), twins.zeros(rows * width));
                let (gate_up, out) = (&mut gate_up.device, &mut out.device);
                let device = &mut twins.device;
                device.linear_silu_mul(size, &x.device, &weight.0, gate_up, out);
                assert!(
                    bits(&twins.read(out, rows * width)) == expected,
                    "linear_silu_mul of {rows} rows, width {width}, k {k}, {dtype:?}"
                );
            }
        }
    }
}

/// Queries and keys are turned, values are not, and what was turned is written.
fn rope<B: Backend>(twins: &mut Twins<B>) {
    for (rows, q, kv, width) in [(1, 1, 1, 16), (3, 4, 2, 16), (2, 8, 2, 128), (17, 6, 6, 64)] {
        let heads = Heads { q, kv, width };
        let len = rows * heads.qkv_width();
        let batch = Batch {
            tokens: vec![0; rows],
            positions: (0..rows as u32).collect(),
            spans: vec![BatchSpan {
                rows: 0..rows,
                position: 0,
                blocks: 0..2,
            }],
            blocks: vec![2, 1],
        };
        let shape = KvShape {
            layers: 1,
            blocks: 3,
            heads: kv,
            head_width: width,
            dtype: KvDtype::Bf16,
        };
        let mut kv = (
            twins.device.alloc_kv(shape).expect("memory for a test"),
            twins.twin.alloc_kv(shape).expect("memory for a test"),
        );
        let mut x = twins.random(len, 3.0);
        let angles = twins.random(rows * width, 1.0);
        twins.device.begin_step(&batch);
        twins.device.write_kv(
            &batch,
            heads,
            &mut x.device,
            Some(&angles.device),
            &mut kv.0,
            0,
        );
        twins
            .twin
            .write_kv(&batch, heads, &mut x.twin, Some(&angles.twin), &mut kv.1, 0);
        twins.compare(
            &format!("rotation of {rows} rows, {heads:?}"),
            &x,
            len,
            POINTWISE,
        );
    }
}

fn elementwise<B: Backend>(twins: &mut Twins<B>) {
    for (rows, width) in [(1, 1), (1, 9), (3, 16), (2, 100), (7, 352)] {
        let (size, len) = (Size { rows, width }, rows * width);
        let shown = |op: &str| format!("{op} of {size:?}");

        let (mut x, y) = (twins.random(len, 3.0), twins.random(len, 3.0));
        twins.device.add(size, &mut x.device, &y.device);
        twins.twin.add(size, &mut x.twin, &y.twin);
        twins.compare(&shown("add"), &x, len, POINTWISE);

        let (mut sum, weight) = (twins.random(len, 3.0), twins.random(width, 2.0));
        let mut y = twins.random(len, 3.0);
        twins
            .device
            .add_rms_norm(size, &mut sum.device, &mut y.device, &weight.device, 1e-5);
        twins
            .twin
            .add_rms_norm(size, &mut sum.twin, &mut y.twin, &weight.twin, 1e-5);
        twins.compare(&shown("the sum of add_rms_norm"), &sum, len, POINTWISE);
        let tolerance = twins.promises.left(SUMS);
        twins.compare(&shown("add_rms_norm"), &y, len, tolerance);
        for with_bias in [false, true] {
            let mut y = twins.random(len, 3.0);
            let norm = LayerNorm {
                weight: &weight.device,
                bias: with_bias.then_some(&weight.device),
                eps: 1e-5,
            };
            twins
                .device
                .add_layer_norm(size, &mut sum.device, &mut y.device, norm);
            let norm = LayerNorm {
                weight: &weight.twin,
                bias: with_bias.then_some(&weight.twin),
                eps: 1e-5,
            };
            twins
                .twin
                .add_layer_norm(size, &mut sum.twin, &mut y.twin, norm);
            twins.compare(&shown("the sum of add_layer_norm"), &sum, len, POINTWISE);
            twins.compare(&shown("add_layer_norm"), &y, len, 10.0 * tolerance);
        }

        twins.device.clamp(size, &mut x.device, 1.25);
        twins.twin.clamp(size, &mut x.twin, 1.25);
        twins.compare(&shown("clamp"), &x, len, 0.0);

        twins.device.scale(size, &mut x.device, 0.3);
        twins.twin.scale(size, &mut x.twin, 0.3);
        twins.compare(&shown("scale"), &x, len, POINTWISE);

        let mut odd = twins.buf(&vec![f32::NAN; len]);
        twins.device.scale(size, &mut odd.device, 0.0);
        twins.twin.scale(size, &mut odd.twin, 0.0);
        twins.compare(&shown("scale by 0"), &odd, len, 0.0);

        for magnitude in [0.01, 1.0, 8.0, 120.0] {
            let gate_up = twins.random(2 * len, magnitude);
            let mut out = twins.zeros(len);
            twins
                .device
                .silu_mul(size, &gate_up.device, &mut out.device);
            twins.twin.silu_mul(size, &gate_up.twin, &mut out.twin);
            let tolerance = twins.promises.left(POINTWISE);
            twins.compare(&shown("silu_mul"), &out, len, tolerance);

            let mut x = twins.random(len, magnitude);
            twins.device.gelu(size, &mut x.device);
            twins.twin.gelu(size, &mut x.twin);
            twins.compare(&shown("gelu"), &x, len, POINTWISE);
        }
    }
}

fn columns_and_rows<B: Backend>(twins: &mut Twins<B>) {
    for (rows, width, columns, at) in [(1, 8, 3, 5), (5, 33, 17, 0), (4, 64, 64, 0)] {
        let (from, mut to) = (
            twins.random(rows * width, 1.0),
            twins.random(rows * 100, 1.0),
        );
        let (source, target) = (at..at + columns, 30..30 + columns);
        twins.device.copy_columns(
            rows,
            Columns {
                buf: &from.device,
                width,
                columns: source.clone(),
            },
            Columns {
                buf: &mut to.device,
                width: 100,
                columns: target.clone(),
            },
        );
        twins.twin.copy_columns(
            rows,
            Columns {
                buf: &from.twin,
                width,
                columns: source,
            },
            Columns {
                buf: &mut to.twin,
                width: 100,
                columns: target,
            },
        );
        twins.compare(
            &format!("copy_columns of {columns} from {width}"),
            &to,
            rows * 100,
            0.0,
        );
    }
    let (x, picked) = (twins.random(9 * 13, 1.0), [8, 0, 3, 3, 1]);
    let mut out = twins.zeros(picked.len() * 13);
    twins
        .device
        .gather_rows(13, &x.device, &picked, &mut out.device);
    twins.twin.gather_rows(13, &x.twin, &picked, &mut out.twin);
    twins.compare("gather_rows", &out, picked.len() * 13, 0.0);
}

fn memory<B: Backend>(twins: &mut Twins<B>) {
    let mut buf = twins.device.alloc(5).expect("memory for a test");
    assert_eq!(twins.read(&buf, 5), [0.0; 5], "a fresh buffer holds zeros");
    twins.device.write(&[1.0, 2.0, 3.0], &mut buf);
    assert_eq!(twins.read(&buf, 4), [1.0, 2.0, 3.0, 0.0]);
    assert!(twins.device.alloc(0).is_ok(), "an empty buffer is a buffer");
    for dtype in twins.promises.weights {
        assert!(
            B::linear_bytes(LinearShape {
                n: 64,
                k: 64,
                dtype: *dtype,
            }) >= (64 * 64 * dtype.bytes()) as u64
        );
    }
}

/// Each row has the same bits when fewer rows are computed.
fn rows_stand_alone<B: Backend>(
    twins: &mut Twins<B>,
    what: &str,
    size: Size,
    op: impl Fn(&mut B, Size, &mut B::Buf),
) {
    let mut out = twins.zeros(size.rows * size.width);
    op(&mut twins.device, size, &mut out.device);
    let together = bits(&twins.read(&out.device, size.rows * size.width));
    op(&mut twins.device, Size { rows: 1, ..size }, &mut out.device);
    let alone = bits(&twins.read(&out.device, size.width));
    assert!(
        alone == together[..size.width],
        "{what}: the first row alone differs from the same among {}",
        size.rows
    );
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A small generator (SplitMix64), so that a failure repeats.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn numbers(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len)
            .map(|_| ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * size)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_conforms_to_itself() {
        check(Promises::HOST, || ReferenceBackend);
    }
}
