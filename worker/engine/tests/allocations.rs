//! What a step of decodes allocates, once buffers have grown: nothing. Alone in its process: it counts every allocation of
//! every thread.

mod support;

use std::alloc::System;
use std::sync::Barrier;

use engine::backend::cpu::{CpuBackend, Pool};
use engine::backend::{KvDtype, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{Logits, Span, StepPlan};
use engine::request::Sampling;
use engine::runner::{Runner, SampleRow};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::models;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const SEQUENCES: u32 = 4;
const PROMPT: u32 = 20;
/// Blocks of a sequence: room for the prompt and all steps.
const BLOCKS: u32 = 4;
/// Steps until buffers have grown, and steps that are counted.
const WARM: u32 = 4;
const COUNTED: u32 = 16;

/// `len` tokens of each sequence from `position` on.
fn plan(position: u32, len: u32) -> StepPlan {
    let spans = (0..SEQUENCES).map(|sequence| Span {
        position,
        len,
        logits: Logits::Last,
        blocks: (1 + sequence * BLOCKS..1 + (sequence + 1) * BLOCKS).collect(),
    });
    StepPlan {
        step: u64::from(position) + 1,
        generation: 1,
        tokens: (0..SEQUENCES * len).map(|i| 3 + i * 31 % 2000).collect(),
        spans: spans.collect(),
    }
}

/// Runs one step; gives how often it allocated.
fn step(
    runner: &mut ModelRunner<CpuBackend, Solo>,
    plan: &StepPlan,
    samples: &[SampleRow<'_>],
) -> usize {
    let region = Region::new(ALLOCATOR);
    let ticket = runner.submit(plan, samples, &[], &[]).expect("runs");
    let output = runner.collect(ticket).expect("there");
    let change = region.change();
    assert_eq!(output.samples.len(), samples.len());
    change.allocations + change.reallocations
}

/// How many of the counted steps allocate: of those with samples, and of those without.
fn decode(weight_dtype: WeightDtype, kv_dtype: KvDtype) -> [usize; 2] {
    let checkpoint = Checkpoint::open(&models().join("tiny-llama")).expect("a good checkpoint");
    let options = RunnerOptions {
        weight_dtype,
        kv_dtype,
        blocks: 1 + SEQUENCES * BLOCKS,
        step_tokens_max: SEQUENCES * PROMPT,
        spans_max: SEQUENCES,
        generation: 1,
    };
    let pool = Pool::new(2, &[]).expect("threads");
    // A thread that begins allocates: both are there before anything is counted.
    let both = Barrier::new(2);
    pool.run(2, &|_, _| {
        both.wait();
    });
    let backend = CpuBackend::new(pool).expect("memory for a test");
    let mut runner =
        ModelRunner::load(&checkpoint, &options, backend, Solo::new(), &mut |_| {}).expect("loads");
    let sampled = Sampling {
        temperature: 0.7,
        top_p: 0.9,
        ..Sampling::default()
    };
    let greedy = Sampling {
        temperature: 0.0,
        ..Sampling::default()
    };
    let samples: Vec<SampleRow<'_>> = (0..SEQUENCES as usize)
        .map(|span| SampleRow {
            span,
            sampling: [&sampled, &greedy][span % 2],
            candidate: 0,
            output_index: 0,
            prompt: &[],
            outputs: &[],
            mask: None,
        })
        .collect();
    step(&mut runner, &plan(0, PROMPT), &samples);
    let mut position = PROMPT;
    let mut next = || {
        position += 1;
        plan(position - 1, 1)
    };
    for _ in 0..WARM {
        step(&mut runner, &next(), &samples);
    }
    [&samples[..], &[]].map(|samples| {
        let steps = (0..COUNTED).map(|_| step(&mut runner, &next(), samples));
        steps.filter(|allocations| *allocations > 0).count()
    })
}

#[test]
fn a_step_of_decodes_allocates_nothing() {
    for (weights, kv) in [
        (WeightDtype::Bf16, KvDtype::Bf16),
        (WeightDtype::Bf16, KvDtype::Int8),
        (WeightDtype::Int8, KvDtype::Bf16),
        (WeightDtype::Int4, KvDtype::Bf16),
    ] {
        // What the process does beside may fall into one of them.
        let over = decode(weights, kv);
        assert!(
            over.iter().all(|steps| *steps <= 1),
            "weights {weights:?}, kv {kv:?}: {over:?} of {COUNTED} steps allocate"
        );
    }
}
