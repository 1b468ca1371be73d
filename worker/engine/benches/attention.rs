//! The CPU backend's attention against what the machine can do: decodes against the bandwidth, prompts against the peak.
//!
//! Prints, beside criterion's report, each case's best rate and its share of the measured limit. Run by
//! `cargo bench -p engine --bench attention`; the threads are all cores, or `TANDEM_BENCH_THREADS`. With
//! `TANDEM_BENCH_FIGURES` it prints the figures that have a goal and nothing else.

#[path = "support/report.rs"]
mod report;
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use engine::backend::cpu::limits::Limits;
use engine::backend::cpu::{CpuBackend, CpuBuf, CpuKv, Isa, Pool, allowed_cores};
use engine::backend::{Attention, Backend, Batch, BatchSpan, Heads, KvDtype, KvShape};
use report::report;
use support::{filled, time};

/// Heads as models have them.
const SHAPES: [(&str, Heads); 3] = [
    ("32 heads of 128", heads(32, 32, 128)),
    ("32 heads of 128 sharing 8", heads(32, 8, 128)),
    ("32 heads of 64 sharing 4", heads(32, 4, 64)),
];

/// Sequences, and tokens of each in the cache: more bytes than caches hold, in many sequences and in one.
const DECODES: [(usize, usize); 2] = [(8, 4096), (1, 16384)];

/// Tokens of a prompt.
const PROMPTS: [usize; 2] = [512, 2048];

const fn heads(q: usize, kv: usize, width: usize) -> Heads {
    Heads { q, kv, width }
}

/// Fraction of the read bandwidth that decodes are to reach, and the names of the figures, in the order of the shapes.
const GOAL: f64 = 0.6;
const FIGURES: [&str; 3] = ["mha", "gqa8", "gqa4"];
/// Times that a figure and the bandwidth beside it are measured: both change with what else the machine does.
const ROUNDS: usize = 5;
/// Runs of a round, of which the best counts.
const RUNS: usize = 12;

fn main() {
    if std::env::var_os("TANDEM_BENCH_FIGURES").is_some() {
        return figures();
    }
    let (pool, limits, mut criterion) = support::begin();
    for (name, heads) in SHAPES {
        for dtype in [KvDtype::Bf16, KvDtype::Int8] {
            for (sequences, context) in DECODES {
                let scene = Scene::new(&pool, heads, dtype, sequences, context);
                let name = format!("{sequences} x {context}, {name}, {}", dtype.name());
                scene.decode(&mut criterion, &name, limits);
            }
        }
        for tokens in PROMPTS {
            let scene = Scene::new(&pool, heads, KvDtype::Bf16, 1, tokens);
            scene.prefill(&mut criterion, &format!("{tokens}, {name}"), limits);
        }
    }
    criterion.final_summary();
}

/// Prints the fraction of the bandwidth that decodes reach, the middle one of some rounds.
fn figures() {
    let cores = allowed_cores();
    let pool = Pool::new(cores.len(), &cores).expect("threads start");
    pool.pin_caller();
    for ((_, heads), name) in SHAPES.into_iter().zip(FIGURES) {
        let (sequences, context) = DECODES[0];
        let mut scene = Scene::new(&pool, heads, KvDtype::Bf16, sequences, context);
        let (decode, bytes) = (scene.last_tokens(), scene.bytes() as f64);
        let mut fractions: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let runs = (0..RUNS).map(|_| {
                    let start = Instant::now();
                    scene.attend(&decode);
                    start.elapsed().as_secs_f64()
                });
                let seconds = runs.fold(f64::MAX, f64::min);
                let limits = Limits::measure(Isa::detect(), &pool).expect("memory");
                bytes / seconds / 1e9 / limits.read_gb_per_s
            })
            .collect();
        fractions.sort_by(f64::total_cmp);
        let value = fractions[ROUNDS / 2];
        let verdict = if value >= GOAL { "pass" } else { "short" };
        println!("FIGURE attention.decode.{name} {value:.2} {GOAL} {verdict}");
    }
}

/// Sequences of one length in a cache, and their rows of qkv.
struct Scene {
    backend: CpuBackend,
    heads: Heads,
    sequences: usize,
    context: usize,
    shape: KvShape,
    kv: CpuKv,
    rows: CpuBuf,
    out: CpuBuf,
}

impl Scene {
    fn new(
        pool: &Arc<Pool>,
        heads: Heads,
        dtype: KvDtype,
        sequences: usize,
        context: usize,
    ) -> Scene {
        let mut backend = CpuBackend::new(Arc::clone(pool)).expect("memory");
        let shape = KvShape {
            layers: 1,
            blocks: 1 + sequences * context / 16,
            heads: heads.kv,
            head_width: heads.width,
            dtype,
        };
        let mut kv = backend.alloc_kv(shape).expect("memory");
        let all = batch(sequences, context, 0..context);
        let mut rows = filled(&mut backend, all.len() * heads.qkv_width());
        backend.write_kv(&all, heads, &mut rows, None, &mut kv, 0);
        let out = backend.alloc(all.len() * heads.q_width()).expect("memory");
        Scene {
            backend,
            heads,
            sequences,
            context,
            shape,
            kv,
            rows,
            out,
        }
    }

    /// The last token of each sequence.
    fn last_tokens(&self) -> Batch {
        batch(self.sequences, self.context, self.context - 1..self.context)
    }

    /// What a step of decodes reads.
    fn bytes(&self) -> u64 {
        CpuBackend::kv_block_bytes(self.shape) * (self.sequences * self.context / 16) as u64
    }

    fn decode(mut self, criterion: &mut Criterion, name: &str, limits: Limits) {
        let (decode, bytes) = (self.last_tokens(), self.bytes());
        let flops = (4 * self.sequences * self.context * self.heads.q_width()) as u64;
        let work = Throughput::Bytes(bytes);
        let seconds = time(criterion, "decode attention", name, work, || {
            self.attend(&decode);
        });
        report(
            name,
            seconds,
            flops,
            bytes,
            (limits.arithmetic.f32, limits.read_gb_per_s),
        );
    }

    /// All tokens of a sequence, each of which sees half of them in the mean.
    fn prefill(mut self, criterion: &mut Criterion, name: &str, limits: Limits) {
        let prompt = batch(self.sequences, self.context, 0..self.context);
        let pairs = self.sequences * self.context * (self.context + 1) / 2;
        let flops = (4 * pairs * self.heads.q_width()) as u64;
        let work = Throughput::Elements(flops);
        let seconds = time(criterion, "prefill attention", name, work, || {
            self.attend(&prompt);
        });
        report(
            name,
            seconds,
            flops,
            0,
            (limits.arithmetic.f32, limits.read_gb_per_s),
        );
    }

    fn attend(&mut self, batch: &Batch) {
        let attention = Attention {
            heads: self.heads,
            qkv: &self.rows,
            scale: 0.1,
            window: None,
            slopes: None,
        };
        self.backend
            .attention(batch, &attention, &self.kv, 0, &mut self.out);
        black_box(&self.out);
    }
}

/// Tokens of some positions of each sequence.
fn batch(sequences: usize, context: usize, positions: std::ops::Range<usize>) -> Batch {
    let (mut batch, blocks) = (Batch::default(), context / 16);
    for sequence in 0..sequences {
        let (row, first) = (batch.tokens.len(), sequence * blocks);
        batch.tokens.resize(row + positions.len(), 0);
        batch
            .positions
            .extend(positions.start as u32..positions.end as u32);
        batch
            .blocks
            .extend(1 + first as u32..1 + (first + blocks) as u32);
        batch.spans.push(BatchSpan {
            rows: row..row + positions.len(),
            position: positions.start,
            blocks: first..first + blocks,
        });
    }
    batch
}
