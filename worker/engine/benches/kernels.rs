//! The CPU backend's matrix products, by rows, against what the machine can do.
//!
//! Prints, beside criterion's report, each kernel's best rate and its share of the measured limit. Run by
//! `cargo bench -p engine --bench kernels`; the threads are all cores, or `TANDEM_BENCH_THREADS`.

mod support;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use engine::backend::cpu::limits::Limits;
use engine::backend::cpu::{CpuBackend, Pool};
use engine::backend::{Backend, FloatDtype, LinearShape};
use support::{filled, report, time};

/// The up projection of a 1.1B llama: larger than most caches.
const SHAPE: LinearShape = LinearShape {
    n: 5632,
    k: 2048,
    dtype: FloatDtype::Bf16,
};

fn main() {
    let (pool, limits, mut criterion) = support::begin();
    products(&mut criterion, &pool, limits);
    criterion.final_summary();
}

fn products(criterion: &mut Criterion, pool: &Arc<Pool>, limits: Limits) {
    let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
    let LinearShape { n, k, dtype } = SHAPE;
    let rows = |row: usize, out: &mut [f32]| {
        for (i, x) in out.iter_mut().enumerate() {
            *x = ((row * 31 + i * 17) % 256) as f32 / 256.0 - 0.5;
        }
    };
    let weight = backend.pack(SHAPE, &rows, None).expect("memory");
    let weight_bytes = CpuBackend::linear_bytes(SHAPE);
    for m in [1, 8, 32, 128] {
        let x = filled(&mut backend, m * k);
        let mut y = backend.alloc(m * n).expect("memory");
        let flops = 2 * (m * n * k) as u64;
        let seconds = time(
            criterion,
            &format!("product {n}x{k} {dtype:?}"),
            &format!("m={m}"),
            Throughput::Elements(flops),
            || {
                backend.linear(m, &x, &weight, &mut y);
                black_box(&y);
            },
        );
        report(&format!("m={m}"), seconds, flops, weight_bytes, limits);
    }
}
