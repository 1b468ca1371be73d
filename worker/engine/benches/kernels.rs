//! The CPU backend's matrix products, by form and rows, against what the machine can do.
//!
//! Prints, beside criterion's report, each kernel's best rate and its share of the measured limit. Run by
//! `cargo bench -p engine --bench kernels`; the threads are all cores, or `TANDEM_BENCH_THREADS`. With
//! `TANDEM_BENCH_FIGURES=1` it times short bursts by hand and prints the figures that have a goal, a line each.

#[path = "support/report.rs"]
mod report;
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use engine::backend::cpu::limits::Limits;
use engine::backend::cpu::{CpuBackend, CpuLinear, Memory, Pool};
use engine::backend::{
    Backend, FloatDtype, LinearShape, PackedBytes, PackedShape, QuantBits, QuantOffset, QuantRow,
    QuantShape,
};
use report::report;
use support::{filled, time};

/// How weights are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Bf16,
    Int8,
    Int4,
    /// int4 as GGUF's Q4_1 has it.
    Int4Mins,
}

/// Copies of a matrix take so many bytes together: more than caches hold.
const ALL_BYTES: u64 = 256 << 20;
/// `(n, k)`: the square that goals are set for, then qkv, gate and up, down, and head of a 1.1B llama.
const SHAPES: [(usize, usize); 5] = [
    (4096, 4096),
    (2560, 2048),
    (11264, 2048),
    (2048, 5632),
    (32000, 2048),
];
fn main() {
    let (pool, limits, mut criterion) = support::begin();
    if std::env::var_os("TANDEM_BENCH_FIGURES").is_some() {
        return figures(&pool, limits);
    }
    for (n, k) in SHAPES {
        for form in [Form::Bf16, Form::Int8, Form::Int4, Form::Int4Mins] {
            products(&mut criterion, &pool, limits, form.shape(n, k));
        }
    }
    criterion.final_summary();
}

impl Form {
    /// Its name in figures.
    fn name(self) -> &'static str {
        match self {
            Form::Bf16 => "bf16",
            Form::Int8 => "int8",
            Form::Int4 => "int4",
            Form::Int4Mins => "int4-mins",
        }
    }

    /// Goals by rows, at 4096 columns on all threads: of the read bandwidth for one row, of the peak of the form's
    /// arithmetic for more.
    fn goals(self) -> [(usize, f64); 3] {
        match self {
            Form::Bf16 => [(1, 0.85), (32, 0.75), (128, 0.75)],
            Form::Int8 => [(1, 0.85), (32, 0.65), (128, 0.75)],
            Form::Int4 | Form::Int4Mins => [(1, 0.85), (32, 0.65), (128, 0.65)],
        }
    }

    fn shape(self, n: usize, k: usize) -> PackedShape {
        let quantised = |bits, group, offset| {
            PackedShape::Quantised(QuantShape {
                n,
                k,
                bits,
                group,
                lead: 0,
                offset,
                head: false,
            })
        };
        match self {
            Form::Bf16 => PackedShape::Float(LinearShape {
                n,
                k,
                dtype: FloatDtype::Bf16,
            }),
            Form::Int8 => quantised(QuantBits::Int8, 128, QuantOffset::Middle),
            Form::Int4 => quantised(QuantBits::Int4, 128, QuantOffset::Middle),
            Form::Int4Mins => quantised(QuantBits::Int4, 32, QuantOffset::Mins),
        }
    }
}

/// A matrix in several copies, each used in its turn, so that all come from memory.
struct Matrices {
    copies: Vec<CpuLinear>,
    bytes: u64,
    next: usize,
}

impl Matrices {
    fn new(backend: &mut CpuBackend, shape: PackedShape) -> Matrices {
        let first = match shape {
            PackedShape::Float(shape) => {
                let row = |row: usize, out: &mut [f32]| {
                    for (i, x) in out.iter_mut().enumerate() {
                        *x = ((row * 31 + i * 17) % 256) as f32 / 256.0 - 0.5;
                    }
                };
                backend.pack(shape, &row, None)
            }
            PackedShape::Quantised(shape) => {
                let row = |row: usize, out: QuantRow<'_>| {
                    for (i, q) in out.q.iter_mut().enumerate() {
                        *q = ((row * 31 + i * 17) % 16) as i8;
                    }
                    out.scales.fill(0.01);
                    out.zeros.fill(8);
                    out.mins.fill(-0.08);
                };
                backend.pack_quantised(shape, &row, None)
            }
        };
        let first = first.expect("memory");
        let bytes = shape.bytes::<CpuBackend>();
        let mut copies = Vec::new();
        for _ in 0..ALL_BYTES.div_ceil(bytes) {
            let mut copy = Memory::<u8>::new(bytes as usize).expect("memory");
            let packed = CpuBackend::packed(&first).expect("bytes");
            copy.as_mut().copy_from_slice(packed.as_ref());
            let copy = backend.map(shape, PackedBytes::whole(copy), None);
            copies.push(copy.expect("memory"));
        }
        Matrices {
            copies,
            bytes,
            next: 0,
        }
    }

    fn turn(&mut self) -> &CpuLinear {
        self.next = (self.next + 1) % self.copies.len();
        &self.copies[self.next]
    }
}

const fn size(shape: PackedShape) -> (usize, usize) {
    match shape {
        PackedShape::Float(LinearShape { n, k, .. })
        | PackedShape::Quantised(QuantShape { n, k, .. }) => (n, k),
    }
}

/// The peak of the arithmetic that a form's products are made of; floats are bf16 here.
fn peak(shape: PackedShape, limits: Limits) -> f64 {
    match shape {
        PackedShape::Float(_) => limits.arithmetic.bf16,
        PackedShape::Quantised(_) => limits.arithmetic.int8,
    }
}

fn products(criterion: &mut Criterion, pool: &Arc<Pool>, limits: Limits, shape: PackedShape) {
    let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
    let (n, k) = size(shape);
    let mut matrices = Matrices::new(&mut backend, shape);
    for m in [1, 8, 32, 128, 512] {
        let x = filled(&mut backend, m * k);
        let mut y = backend.alloc(m * n).expect("memory");
        let flops = 2 * (m * n * k) as u64;
        let seconds = time(
            criterion,
            &format!("product {shape:?}"),
            &format!("m={m}"),
            Throughput::Elements(flops),
            || {
                backend.linear(m, &x, matrices.turn(), &mut y);
                black_box(&y);
            },
        );
        let limits = (peak(shape, limits), limits.read_gb_per_s);
        report(&format!("m={m}"), seconds, flops, matrices.bytes, limits);
    }
}

/// The best time of one run in seconds, of many in a second.
fn best(mut body: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::MAX);
    while begin.elapsed() < Duration::from_secs(1) {
        let start = Instant::now();
        body();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn figures(pool: &Arc<Pool>, limits: Limits) {
    let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
    let (n, k) = SHAPES[0];
    for form in [Form::Bf16, Form::Int8, Form::Int4] {
        let shape = form.shape(n, k);
        let mut matrices = Matrices::new(&mut backend, shape);
        for (m, goal) in form.goals() {
            let x = filled(&mut backend, m * k);
            let mut y = backend.alloc(m * n).expect("memory");
            let seconds = best(|| {
                backend.linear(m, &x, matrices.turn(), &mut y);
                black_box(&y);
            });
            let share = if m == 1 {
                matrices.bytes as f64 / seconds / 1e9 / limits.read_gb_per_s
            } else {
                2.0 * (m * n * k) as f64 / seconds / 1e9 / peak(shape, limits)
            };
            let verdict = if share >= goal { "pass" } else { "short" };
            println!(
                "FIGURE kernel.{}.m{m} {share:.3} {goal} {verdict}",
                form.name()
            );
        }
    }
}
