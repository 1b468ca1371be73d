//! Helpers of the engine's integration tests: sequences become plans, ranks run as threads, logits come back.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod groups;
pub mod naive;
pub mod quantiser;
pub mod ready;
pub mod recorder;
pub mod short;

use engine::backend::cpu::{CpuBackend, Isa, Path as InstructionPath, Pool};
use engine::backend::{Backend, KvDtype, WeightDtype};
use engine::collective::{AbortHandle, Collective, CollectiveError};
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{BLOCK_TOKENS, Logits, NULL_BLOCK, Span, StepPlan, first_visible_block};
use engine::runner::{PoolRows, Runner};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};

/// A CPU backend with one thread, as each rank of a test has, and the fastest instructions that round no activation: what
/// it computes is near transformers' f32.
pub fn cpu() -> CpuBackend {
    let mut exact = InstructionPath::ALL
        .into_iter()
        .filter(|path| *path != InstructionPath::Avx512Bf16);
    cpu_on(exact.find_map(Isa::new).expect("a portable path"))
}

/// The same with the instructions that a worker takes, which may round activations to bf16.
pub fn cpu_as_served() -> CpuBackend {
    cpu_on(Isa::detect())
}

fn cpu_on(isa: Isa) -> CpuBackend {
    let pool = Pool::new(1, &[]).expect("a thread");
    CpuBackend::with_isa(pool, isa).expect("memory for a test")
}

/// Where the tiny models and their goldens lie.
pub fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models")
}

/// Tokens to be run through a model: the first `prefill` in chunks, the others one by one.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    pub prefill: usize,
}

/// How sequences are cut into steps.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    pub chunk: usize,
    pub step_tokens: usize,
}

/// The plans that run all sequences together. Blocks are given out as they are needed, so that the sequences' blocks are
/// mixed; those behind the window are taken away again. With each plan, the sequence of each span; with all, the blocks
/// of the pool.
pub fn plans(
    sequences: &[Sequence],
    cut: Cut,
    window: Option<u32>,
) -> (Vec<(StepPlan, Vec<usize>)>, u32) {
    let mut tables = vec![Vec::new(); sequences.len()];
    let mut done = vec![0usize; sequences.len()];
    let (mut plans, mut next_block) = (Vec::new(), 1u32);
    while done
        .iter()
        .zip(sequences)
        .any(|(done, sequence)| *done < sequence.tokens.len())
    {
        let mut plan = StepPlan {
            step: plans.len() as u64 + 1,
            generation: 1,
            ..StepPlan::default()
        };
        let mut places = Vec::new();
        for (i, sequence) in sequences.iter().enumerate() {
            let (done, table) = (&mut done[i], &mut tables[i]);
            let left = match sequence.prefill.saturating_sub(*done) {
                0 => usize::from(*done < sequence.tokens.len()),
                prefill => prefill.min(cut.chunk),
            };
            let len = left.min(cut.step_tokens - plan.tokens.len());
            if len == 0 {
                continue;
            }
            while table.len() * BLOCK_TOKENS < *done + len {
                table.push(next_block);
                next_block += 1;
            }
            let visible = first_visible_block(*done, window);
            let visible_only =
                |(i, block): (usize, &u32)| if i < visible { NULL_BLOCK } else { *block };
            let blocks = table.iter().enumerate().map(visible_only).collect();
            plan.tokens
                .extend_from_slice(&sequence.tokens[*done..*done + len]);
            plan.spans.push(Span {
                position: *done as u32,
                len: len as u32,
                logits: Logits::All,
                blocks,
            });
            places.push(i);
            *done += len;
        }
        plans.push((plan, places));
    }
    (plans, next_block)
}

/// How a model is run.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub ranks: u32,
    pub weights: WeightDtype,
    pub kv: KvDtype,
    pub cut: Cut,
}

impl Setup {
    /// The goldens' setup: bf16 weights, chunks of 48 tokens.
    pub fn new(ranks: u32, kv: KvDtype) -> Setup {
        Setup {
            ranks,
            weights: WeightDtype::Bf16,
            kv,
            cut: Cut {
                chunk: 48,
                step_tokens: 300,
            },
        }
    }
}

/// Logits by sequence and token.
pub type AllLogits = Vec<Vec<Vec<f32>>>;

/// Runs the sequences on a group of ranks, each a thread with its own backend.
pub fn run<B: Backend>(
    dir: &Path,
    setup: Setup,
    backend: impl Fn() -> B + Sync,
    sequences: &[Sequence],
) -> AllLogits
where
    B::Buf: AsRef<[f32]> + AsMut<[f32]>,
{
    let checkpoint = Checkpoint::open(dir).expect("a good checkpoint");
    let (plans, blocks) = plans(
        sequences,
        setup.cut,
        checkpoint.spec.window.map(|window| window as u32),
    );
    let options = RunnerOptions {
        weight_dtype: setup.weights,
        kv_dtype: setup.kv,
        blocks,
        step_tokens_max: setup.cut.step_tokens as u32,
        spans_max: sequences.len() as u32,
        generation: 1,
    };
    let rank = |collective: Threads| {
        let mut runner =
            ModelRunner::load(&checkpoint, &options, backend(), collective, &mut |_| {})
                .expect("loads");
        let mut logits: AllLogits = vec![Vec::new(); sequences.len()];
        for (plan, places) in &plans {
            runner
                .run(plan, |row, values| {
                    logits[places[row.span]].push(values.to_vec())
                })
                .expect("runs");
        }
        logits
    };
    std::thread::scope(|scope| {
        let group = Threads::group(setup.ranks);
        let ranks: Vec<_> = group
            .into_iter()
            .map(|collective| scope.spawn(|| rank(collective)))
            .collect();
        let mut logits = ranks.into_iter().map(|rank| rank.join().expect("no panic"));
        logits.next().expect("rank 0")
    })
}

/// The embeddings of some prompts, computed in chunks on a group of ranks.
pub fn embed<B: Backend>(
    dir: &Path,
    setup: Setup,
    backend: impl Fn() -> B + Sync,
    prompts: &[Vec<u32>],
) -> Vec<Vec<f64>>
where
    B::Buf: AsRef<[f32]> + AsMut<[f32]>,
{
    let checkpoint = Checkpoint::open(dir).expect("a good checkpoint");
    let sequences: Vec<Sequence> = prompts
        .iter()
        .map(|tokens| Sequence {
            tokens: tokens.clone(),
            prefill: tokens.len(),
        })
        .collect();
    let window = checkpoint.spec.window.map(|window| window as u32);
    let (mut plans, blocks) = plans(&sequences, setup.cut, window);
    for span in plans.iter_mut().flat_map(|(plan, _)| &mut plan.spans) {
        span.logits = Logits::Hidden;
    }
    let options = RunnerOptions {
        weight_dtype: setup.weights,
        kv_dtype: setup.kv,
        blocks,
        step_tokens_max: setup.cut.step_tokens as u32,
        spans_max: sequences.len() as u32,
        generation: 1,
    };
    let rank = |collective: Threads| {
        let leads = collective.0.rank == 0;
        let mut runner =
            ModelRunner::load(&checkpoint, &options, backend(), collective, &mut |_| {})
                .expect("loads");
        let mut sums = vec![Vec::new(); sequences.len()];
        for (plan, places) in &plans {
            let pools: Vec<PoolRows<'_>> = places
                .iter()
                .enumerate()
                .filter(|_| leads)
                .map(|(span, &place)| PoolRows {
                    span,
                    sum: &sums[place],
                })
                .collect();
            let ticket = runner.submit(plan, &[], &[], &pools).expect("runs");
            let output = runner.collect(ticket).expect("there");
            for (sum, &place) in output.pools.drain(..).zip(places) {
                sums[place] = sum.expect("finite");
            }
        }
        sums
    };
    let sums = std::thread::scope(|scope| {
        let group = Threads::group(setup.ranks);
        let ranks: Vec<_> = group
            .into_iter()
            .map(|collective| scope.spawn(|| rank(collective)))
            .collect();
        let mut sums = ranks.into_iter().map(|rank| rank.join().expect("no panic"));
        sums.next().expect("rank 0")
    });
    let mean = |(sum, tokens): (&Vec<f64>, &Vec<u32>)| {
        sum.iter().map(|sum| sum / tokens.len() as f64).collect()
    };
    sums.iter().zip(prompts).map(mean).collect()
}

/// A shard group of threads of one process.
pub struct Threads(Exchange);

impl Threads {
    /// The ends of all ranks.
    pub fn group(ranks: u32) -> Vec<Threads> {
        Exchange::group(ranks).into_iter().map(Threads).collect()
    }
}

/// Where the threads of a group meet.
#[derive(Clone)]
pub struct Exchange {
    pub rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    barrier: Barrier,
    parts: Vec<Mutex<Vec<f32>>>,
}

impl Exchange {
    /// The ends of all ranks.
    pub fn group(ranks: u32) -> Vec<Exchange> {
        let parts = (0..ranks).map(|_| Mutex::default()).collect();
        let shared = Arc::new(Shared {
            barrier: Barrier::new(ranks as usize),
            parts,
        });
        (0..ranks as usize)
            .map(|rank| Exchange {
                rank,
                shared: Arc::clone(&shared),
            })
            .collect()
    }

    pub fn ranks(&self) -> usize {
        self.shared.parts.len()
    }

    /// Sums of all ranks' numbers, in rank order.
    pub fn sum(&self, values: &mut [f32]) {
        let own = values.to_vec();
        self.meet(&own, |parts| {
            for (i, out) in values.iter_mut().enumerate() {
                *out = parts.iter().map(|part| part[i]).sum();
            }
        });
    }

    /// The ranks' columns side by side, on rank 0.
    pub fn gather(&self, part: &[f32], rows: usize, widths: &[usize], out: &mut [f32]) {
        let (rank, whole) = (self.rank, widths.iter().sum::<usize>());
        self.meet(&part[..rows * widths[rank]], |parts| {
            let mut at = 0;
            for (part, width) in parts.iter().zip(widths).filter(|_| rank == 0) {
                for row in 0..rows {
                    out[row * whole + at..][..*width]
                        .copy_from_slice(&part[row * width..][..*width]);
                }
                at += width;
            }
        });
    }

    /// Everybody lays down his part; then everybody sees all parts.
    fn meet(&self, part: &[f32], see: impl FnOnce(&[Vec<f32>])) {
        *self.shared.parts[self.rank].lock().expect("not poisoned") = part.to_vec();
        self.shared.barrier.wait();
        let parts: Vec<Vec<f32>> = self
            .shared
            .parts
            .iter()
            .map(|part| part.lock().expect("not poisoned").clone())
            .collect();
        see(&parts);
        self.shared.barrier.wait();
    }
}

impl<Buf: AsRef<[f32]> + AsMut<[f32]>> Collective<Buf> for Threads {
    fn rank(&self) -> u32 {
        self.0.rank as u32
    }

    fn ranks(&self) -> u32 {
        self.0.ranks() as u32
    }

    fn all_reduce_sum(&mut self, buf: &mut Buf, len: usize) -> Result<(), CollectiveError> {
        self.0.sum(&mut buf.as_mut()[..len]);
        Ok(())
    }

    fn gather_columns(
        &mut self,
        part: &Buf,
        rows: usize,
        widths: &[usize],
        out: &mut Buf,
    ) -> Result<(), CollectiveError> {
        self.0.gather(part.as_ref(), rows, widths, out.as_mut());
        Ok(())
    }

    fn send_plan(&mut self, _plan: &[u8]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn recv_plan(&mut self, _plan: &mut Vec<u8>) -> Result<(), CollectiveError> {
        Err(CollectiveError::OutOfStep(
            "each thread makes its own plans".to_owned(),
        ))
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(|| ())
    }
}
