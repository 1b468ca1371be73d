//! What the benches of kernels share: the pool, the machine's limits and timing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use engine::backend::Backend;
use engine::backend::cpu::limits::Limits;
use engine::backend::cpu::{CpuBackend, CpuBuf, Isa, Pool, allowed_cores};

/// Starts the threads, measures the limits and says them.
pub fn begin() -> (Arc<Pool>, Limits, Criterion) {
    let cores = allowed_cores();
    let threads = std::env::var("TANDEM_BENCH_THREADS")
        .ok()
        .and_then(|threads| threads.parse().ok())
        .unwrap_or(cores.len());
    let pool = Pool::new(threads, &cores).expect("threads start");
    pool.pin_caller();
    let limits = Limits::measure(Isa::detect(), &pool).expect("memory");
    println!(
        "{} on {threads} threads: {:.1} GFLOP/s of f32, {:.1} of bf16, {:.1} GOP/s of int8, {:.1} GB/s read",
        Isa::detect().path().name(),
        limits.arithmetic.f32,
        limits.arithmetic.bf16,
        limits.arithmetic.int8,
        limits.read_gb_per_s
    );
    let criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    (pool, limits, criterion)
}

/// A buffer of numbers between -0.5 and 0.5.
pub fn filled(backend: &mut CpuBackend, len: usize) -> CpuBuf {
    let values: Vec<f32> = (0..len)
        .map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5)
        .collect();
    let mut buf = backend.alloc(len).expect("memory");
    backend.write(&values, &mut buf);
    buf
}

/// Lets criterion time `body`; gives the best time of one run in seconds.
pub fn time(
    criterion: &mut Criterion,
    group: &str,
    name: &str,
    throughput: Throughput,
    mut body: impl FnMut(),
) -> f64 {
    let mut best = f64::MAX;
    let mut group = criterion.benchmark_group(group);
    group.throughput(throughput);
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|runs| {
            let mut total = Duration::ZERO;
            for _ in 0..runs {
                let start = Instant::now();
                body();
                let taken = start.elapsed();
                best = best.min(taken.as_secs_f64());
                total += taken;
            }
            total
        });
    });
    group.finish();
    best
}
