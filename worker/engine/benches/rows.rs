//! The CPU backend's small ops at the shape of a 1.1B llama, by rows: what a step spends beside products and attention.
//!
//! Prints, beside criterion's report, the best time of one call and the bytes it goes through per second. Run by
//! `cargo bench -p engine --bench rows`; the threads are all cores, or `TANDEM_BENCH_THREADS`.

mod support;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use engine::backend::cpu::{CpuBackend, Pool};
use engine::backend::{Backend, Batch, BatchSpan, Heads, KvDtype, KvShape, Size};
use support::{filled, time};

const HIDDEN: usize = 2048;
const MIDDLE: usize = 5632;
const HEADS: Heads = Heads {
    q: 32,
    kv: 4,
    width: 64,
};
/// A decode, many decodes, a prompt.
const ROWS: [usize; 3] = [1, 32, 512];

fn main() {
    let (pool, _, mut criterion) = support::begin();
    for rows in ROWS {
        norms(&mut criterion, &pool, rows);
        activations(&mut criterion, &pool, rows);
        for dtype in [KvDtype::Bf16, KvDtype::Int8] {
            writes(&mut criterion, &pool, rows, dtype);
        }
    }
    criterion.final_summary();
}

fn norms(criterion: &mut Criterion, pool: &Arc<Pool>, rows: usize) {
    let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
    let size = Size {
        rows,
        width: HIDDEN,
    };
    let [mut x, mut y] = [(); 2].map(|()| filled(&mut backend, rows * HIDDEN));
    let weight = filled(&mut backend, HIDDEN);
    measure(criterion, "sum and norm", rows, 2 * rows * HIDDEN, || {
        backend.add_rms_norm(size, &mut x, &mut y, &weight, 1e-5);
        black_box(&y);
    });
}

fn activations(criterion: &mut Criterion, pool: &Arc<Pool>, rows: usize) {
    let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
    let size = Size {
        rows,
        width: MIDDLE,
    };
    let gate_up = filled(&mut backend, 2 * rows * MIDDLE);
    let mut out = filled(&mut backend, rows * MIDDLE);
    measure(criterion, "SwiGLU", rows, 3 * rows * MIDDLE, || {
        backend.silu_mul(size, &gate_up, &mut out);
        black_box(&out);
    });
    measure(criterion, "GELU", rows, 2 * rows * MIDDLE, || {
        backend.gelu(size, &mut out);
        black_box(&out);
    });
}

/// Rotation and cache write of one token of each of so many sequences, or of a whole prompt.
fn writes(criterion: &mut Criterion, pool: &Arc<Pool>, rows: usize, dtype: KvDtype) {
    let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
    let (sequences, tokens) = if rows > 32 { (1, rows) } else { (rows, 1) };
    let blocks = tokens.div_ceil(16);
    let shape = KvShape {
        layers: 1,
        blocks: 1 + sequences * blocks,
        heads: HEADS.kv,
        head_width: HEADS.width,
        dtype,
    };
    let mut kv = backend.alloc_kv(shape).expect("memory");
    let batch = Batch {
        tokens: vec![0; rows],
        positions: vec![0; rows],
        spans: (0..sequences)
            .map(|sequence| BatchSpan {
                rows: sequence * tokens..(sequence + 1) * tokens,
                position: 0,
                blocks: sequence * blocks..(sequence + 1) * blocks,
            })
            .collect(),
        blocks: (1..=(sequences * blocks) as u32).collect(),
    };
    let mut qkv = filled(&mut backend, rows * HEADS.qkv_width());
    // These shrink what they turn: rotated again and again it stays finite.
    let angles = filled(&mut backend, rows * HEADS.width);
    let name = format!("rotation and write, {}", dtype.name());
    measure(criterion, &name, rows, rows * HEADS.qkv_width(), || {
        backend.write_kv(&batch, HEADS, &mut qkv, Some(&angles), &mut kv, 0);
        black_box(&kv);
    });
}

fn measure(criterion: &mut Criterion, name: &str, rows: usize, numbers: usize, body: impl FnMut()) {
    let bytes = 4 * numbers as u64;
    let row = format!("{rows} rows");
    let seconds = time(criterion, name, &row, Throughput::Bytes(bytes), body);
    if seconds < f64::MAX {
        println!(
            "{name}, {row}: {:.1} microseconds, {:.1} GB/s\n",
            seconds * 1e6,
            bytes as f64 / seconds / 1e9
        );
    }
}
