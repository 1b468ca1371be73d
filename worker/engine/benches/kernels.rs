//! The CPU backend's heavy kernels against what the machine can do: matrix products by rows, decode attention.
//!
//! Prints, beside criterion's report, each kernel's best rate and its share of the measured limit. Run by
//! `cargo bench -p engine --bench kernels`; the threads are all cores, or `TANDEM_BENCH_THREADS`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use engine::backend::cpu::limits::Limits;
use engine::backend::cpu::{CpuBackend, CpuBuf, Isa, Pool};
use engine::backend::{
    Attention, Backend, Batch, BatchSpan, FloatDtype, Heads, KvDtype, KvShape, LinearShape,
};

/// The up projection of a 1.1B llama: larger than most caches.
const SHAPE: LinearShape = LinearShape {
    n: 5632,
    k: 2048,
    dtype: FloatDtype::Bf16,
};

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::var("TANDEM_BENCH_THREADS")
        .ok()
        .and_then(|threads| threads.parse().ok())
        .unwrap_or(cores);
    let pool = Pool::new(threads, &[]).expect("threads start");
    let limits = Limits::measure(Isa::detect(), &pool).expect("memory");
    println!(
        "{} on {threads} threads: {:.1} GFLOP/s, {:.1} GB/s read",
        Isa::detect().path().name(),
        limits.gflops,
        limits.read_gb_per_s
    );
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
        .configure_from_args();
    products(&mut criterion, &pool, limits);
    decode_attention(&mut criterion, &pool, limits);
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

fn decode_attention(criterion: &mut Criterion, pool: &Arc<Pool>, limits: Limits) {
    /// Sequences in the batch, and tokens of each in the cache: more bytes than caches hold.
    const SEQUENCES: usize = 8;
    const CONTEXT: usize = 4096;
    let blocks = CONTEXT / 16;
    for (name, heads) in [
        (
            "32 heads of 128",
            Heads {
                q: 32,
                kv: 32,
                width: 128,
            },
        ),
        (
            "32 heads of 128 sharing 8",
            Heads {
                q: 32,
                kv: 8,
                width: 128,
            },
        ),
        (
            "32 heads of 64 sharing 4",
            Heads {
                q: 32,
                kv: 4,
                width: 64,
            },
        ),
    ] {
        let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
        let shape = KvShape {
            layers: 1,
            blocks: 1 + SEQUENCES * blocks,
            heads: heads.kv,
            head_width: heads.width,
            dtype: KvDtype::Bf16,
        };
        let mut kv = backend.alloc_kv(shape).expect("memory");
        let all = batch(SEQUENCES, blocks, 0, CONTEXT);
        let mut rows = filled(&mut backend, all.len() * heads.qkv_width());
        backend.write_kv(&all, heads, &mut rows, None, &mut kv, 0);
        let decode = batch(SEQUENCES, blocks, CONTEXT - 1, 1);
        let mut out = backend.alloc(SEQUENCES * heads.q_width()).expect("memory");
        let attention = Attention {
            heads,
            qkv: &rows,
            scale: 0.1,
            window: None,
            slopes: None,
        };
        let bytes = shape.block_bytes() * (SEQUENCES * blocks) as u64;
        let flops = (4 * SEQUENCES * CONTEXT * heads.q_width()) as u64;
        let seconds = time(
            criterion,
            "decode attention",
            name,
            Throughput::Bytes(bytes),
            || {
                backend.attention(&decode, &attention, &kv, 0, &mut out);
                black_box(&out);
            },
        );
        report(name, seconds, flops, bytes, limits);
    }
}

/// `len` tokens of each sequence from `position` on.
fn batch(sequences: usize, blocks: usize, position: usize, len: usize) -> Batch {
    let mut batch = Batch::default();
    for sequence in 0..sequences {
        let (row, first) = (batch.tokens.len(), sequence * blocks);
        batch.tokens.resize(row + len, 0);
        batch
            .positions
            .extend(position as u32..(position + len) as u32);
        batch
            .blocks
            .extend(1 + first as u32..1 + (first + blocks) as u32);
        batch.spans.push(BatchSpan {
            rows: row..row + len,
            position,
            blocks: first..first + blocks,
        });
    }
    batch
}

fn filled(backend: &mut CpuBackend, len: usize) -> CpuBuf {
    let values: Vec<f32> = (0..len)
        .map(|i| ((i * 7919) % 1000) as f32 / 1000.0 - 0.5)
        .collect();
    let mut buf = backend.alloc(len).expect("memory");
    backend.write(&values, &mut buf);
    buf
}

/// Lets criterion time `body`; gives the best time of one run in seconds.
fn time(
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

fn report(name: &str, seconds: f64, flops: u64, bytes: u64, limits: Limits) {
    if seconds == f64::MAX {
        return;
    }
    let (gflops, gb_per_s) = (flops as f64 / seconds / 1e9, bytes as f64 / seconds / 1e9);
    println!(
        "{name}: {gflops:.1} GFLOP/s ({:.0} % of peak), {gb_per_s:.1} GB/s ({:.0} % of peak)\n",
        100.0 * gflops / limits.gflops,
        100.0 * gb_per_s / limits.read_gb_per_s
    );
}
