//! The sampler on rows of logits: greedy, by temperature alone, and with each filter, for vocabularies of 32k and 128k.
//!
//! Run by `cargo bench -p engine --bench sampler`. Rows are of two kinds: `peaked`, as trained models give them, where few
//! tokens hold nearly everything, and `flat`, where a filter leaves tens of thousands.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use engine::backend::Draw;
use engine::sampler::{choose, random};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .without_plots()
        .configure_from_args();
    for (vocab, name) in [(32_000, "32k"), (128_000, "128k")] {
        for (rows, spread) in [("peaked", 3.0), ("flat", 0.5)] {
            let logits = row(vocab, spread);
            let mut group = criterion.benchmark_group(format!("sampler {name} {rows}"));
            for (way, draw) in ways() {
                group.bench_function(BenchmarkId::from_parameter(way), |bencher| {
                    let mut index = 0;
                    bencher.iter(|| {
                        index += 1;
                        let u = random::uniform(7, 0, index);
                        choose(black_box(&logits), &Draw { u, ..draw })
                    });
                });
            }
            group.finish();
        }
    }
    criterion.final_summary();
}

fn ways() -> [(&'static str, Draw); 6] {
    let drawn = Draw {
        row: 0,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        u: 0.0,
    };
    [
        (
            "greedy",
            Draw {
                temperature: 0.0,
                ..drawn
            },
        ),
        ("temperature", drawn),
        (
            "top_p 0.9",
            Draw {
                top_p: 0.9,
                ..drawn
            },
        ),
        ("top_k 40", Draw { top_k: 40, ..drawn }),
        (
            "top_k 1000",
            Draw {
                top_k: 1000,
                ..drawn
            },
        ),
        (
            "min_p 0.05",
            Draw {
                min_p: 0.05,
                ..drawn
            },
        ),
    ]
}

/// Normally distributed logits (sums of twelve even draws).
fn row(vocab: u32, spread: f64) -> Vec<f32> {
    (0..vocab)
        .map(|id| {
            let sum: f64 = (0..12).map(|i| random::uniform(1, id, i)).sum();
            ((sum - 6.0) * spread) as f32
        })
        .collect()
}
