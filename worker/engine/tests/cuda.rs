//! Whole models on emulated devices: logits near the CPU backend's, recorded steps with the bits of others, and the same
//! results whatever order a device's streams take.
#![cfg(feature = "cuda")]

mod support;

use engine::backend::cuda::{CudaBackend, CudaDevice, CudaOptions, GraphStore};
use engine::backend::{Backend, KvDtype, WeightDtype};
use engine::collective::Collective;
use engine::collective::solo::Solo;
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{Logits, StepPlan};
use serde::Deserialize;
use std::sync::Arc;
use support::{AllLogits, Cut, Sequence, cpu, models, plans};

const EAGER: CudaOptions = CudaOptions {
    graphs: false,
    batch_invariant: false,
};
const RECORDED: CudaOptions = CudaOptions {
    graphs: true,
    batch_invariant: false,
};
const INVARIANT: CudaOptions = CudaOptions {
    graphs: true,
    batch_invariant: true,
};

/// How far logits may be off, as those with a bf16 cache from transformers' are.
const LOGIT: f32 = 0.15;

/// Steps whose best token leads by more must choose it.
const MARGIN: f32 = 0.2;

fn cuda(options: CudaOptions) -> CudaBackend {
    cuda_rig::preload();
    let device = CudaDevice::open(0).expect("an emulated device");
    CudaBackend::new(device, options).expect("a backend")
}

/// Some of the goldens' prompts, the longest among them, with up to 20 of their outputs.
fn sequences(model: &str) -> Vec<Sequence> {
    let path = models().join("golden").join(model).join("golden.json");
    let text = std::fs::read_to_string(path).expect("recorded");
    let golden: Golden = serde_json::from_str(&text).expect("recorded");
    let sequence = |prompt: Prompt| {
        let outputs = &prompt.output_ids[..prompt.output_ids.len().min(20)];
        Sequence {
            prefill: prompt.input_ids.len(),
            tokens: [&prompt.input_ids, outputs].concat(),
        }
    };
    let some = golden.float32.into_iter().skip(1).step_by(3);
    some.map(sequence).collect()
}

#[derive(Deserialize)]
struct Golden {
    float32: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    input_ids: Vec<u32>,
    output_ids: Vec<u32>,
}

const CUT: Cut = Cut {
    chunk: 33,
    step_tokens: 60,
};

/// The logits of all tokens of some sequences, run together.
fn logits<B: Backend>(model: &str, backend: B, weights: WeightDtype) -> AllLogits
where
    Solo: Collective<B::Buf>,
{
    let checkpoint = Checkpoint::open(&models().join(model)).expect("a good checkpoint");
    let sequences = sequences(model);
    let (plans, blocks) = plans(
        &sequences,
        CUT,
        checkpoint.spec.window.map(|window| window as u32),
    );
    let mut runner = load(&checkpoint, backend, weights, blocks);
    let mut logits: AllLogits = vec![Vec::new(); sequences.len()];
    for (mut plan, places) in plans {
        // Steps of decodes alone ask for what decodes ask for: so they may be recorded.
        if plan.spans.iter().all(|span| span.len == 1) {
            plan.spans
                .iter_mut()
                .for_each(|span| span.logits = Logits::Last);
        }
        run(&mut runner, &plan, |span, row| {
            logits[places[span]].push(row.to_vec())
        });
    }
    logits
}

fn load<B: Backend>(
    checkpoint: &Checkpoint,
    backend: B,
    weights: WeightDtype,
    blocks: u32,
) -> ModelRunner<B, Solo>
where
    Solo: Collective<B::Buf>,
{
    let options = RunnerOptions {
        weight_dtype: weights,
        kv_dtype: KvDtype::Bf16,
        blocks,
        step_tokens_max: CUT.step_tokens as u32,
        spans_max: 16,
        generation: 1,
    };
    ModelRunner::load(checkpoint, &options, backend, Solo::new(), &mut |_| {}).expect("loads")
}

fn run<B: Backend>(
    runner: &mut ModelRunner<B, Solo>,
    plan: &StepPlan,
    mut take: impl FnMut(usize, &[f32]),
) where
    Solo: Collective<B::Buf>,
{
    runner
        .run(plan, |row, values| take(row.span, values))
        .expect("runs");
}

/// Logits are near the CPU backend's, and where the best token leads, it is the same.
fn near_the_cpu(model: &str, options: CudaOptions) {
    let expected = logits(model, cpu(), WeightDtype::Bf16);
    let found = logits(model, cuda(options), WeightDtype::Bf16);
    let mut worst = 0.0f32;
    for (sequence, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert_eq!(expected.len(), found.len());
        for (token, (expected, found)) in expected.iter().zip(found).enumerate() {
            let off = expected.iter().zip(found).map(|(x, y)| (x - y).abs());
            let off = off.fold(0.0f32, |most, off| {
                if off.is_nan() {
                    f32::INFINITY
                } else {
                    most.max(off)
                }
            });
            worst = worst.max(off);
            assert!(
                off <= LOGIT,
                "{model}, {options:?}, sequence {sequence}, token {token}: logits are off by {off}"
            );
            let (best, lead) = best(expected);
            assert!(
                lead <= MARGIN || self::best(found).0 == best,
                "{model}, {options:?}, sequence {sequence}, token {token}: the best token leads by {lead} and is another"
            );
        }
    }
    println!("{model}, {options:?}: logits are off by {worst} at most");
}

/// The best token, and by how much it leads.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    (order[0], logits[order[0]] - logits[order[1]])
}

#[test]
fn llama_is_near_the_cpu() {
    near_the_cpu("tiny-llama", EAGER);
}

#[test]
fn mistral_is_near_the_cpu() {
    near_the_cpu("tiny-mistral", EAGER);
}

#[test]
fn mpt_is_near_the_cpu() {
    near_the_cpu("tiny-mpt", EAGER);
}

#[test]
fn batch_invariant_models_are_near_the_cpu() {
    near_the_cpu("tiny-mistral", INVARIANT);
}

#[test]
fn recorded_steps_have_the_bits_of_others() {
    for model in ["tiny-llama", "tiny-mpt"] {
        let recorded = cuda(RECORDED);
        let graphs: Arc<GraphStore> = recorded.graphs();
        let found = logits(model, recorded, WeightDtype::Bf16);
        assert!(graphs.recorded() > 0, "{model}: steps are recorded");
        assert!(
            found == logits(model, cuda(EAGER), WeightDtype::Bf16),
            "{model}: recorded steps differ"
        );
    }
}
