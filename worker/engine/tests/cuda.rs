//! Whole models on emulated devices: logits near the CPU backend's, recorded steps with the bits of others, and the same
//! results whatever order a device's streams take.
#![cfg(feature = "cuda")]

mod support;

use engine::backend::cuda::{CudaBackend, CudaDevice, CudaOptions, GraphStore};
use engine::backend::reference::ReferenceBackend;
use engine::backend::{Backend, KvDtype, WeightDtype};
use engine::collective::Collective;
use engine::collective::solo::Solo;
use engine::engine::{Engine, EngineConfig, EngineEnd};
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{Logits, StepPlan};
use engine::request::{Candidate, EndReason, Event, Request, Sampling};
use engine::scheduler::Backlog;
use serde::Deserialize;
use std::hash::{DefaultHasher, Hasher};
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
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

/// Which of the goldens' prompts are run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Prompts {
    /// A third of them, the longest among them, with up to 20 of their outputs.
    Some,
    /// The three shortest, with up to 8.
    Short,
}

fn sequences(model: &str, prompts: Prompts) -> Vec<Sequence> {
    let path = models().join("golden").join(model).join("golden.json");
    let text = std::fs::read_to_string(path).expect("recorded");
    let golden: Golden = serde_json::from_str(&text).expect("recorded");
    let sequence = |prompt: &Prompt, outputs: usize| {
        let outputs = &prompt.output_ids[..prompt.output_ids.len().min(outputs)];
        Sequence {
            prefill: prompt.input_ids.len(),
            tokens: [&prompt.input_ids, outputs].concat(),
        }
    };
    let mut all = golden.float32;
    if prompts == Prompts::Some {
        let some = all.iter().skip(1).step_by(3);
        return some.map(|prompt| sequence(prompt, 20)).collect();
    }
    all.sort_by_key(|prompt| prompt.input_ids.len());
    all[..3].iter().map(|prompt| sequence(prompt, 8)).collect()
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
fn logits<B: Backend>(model: &str, prompts: Prompts, backend: B, weights: WeightDtype) -> AllLogits
where
    Solo: Collective<B::Buf>,
{
    logits_then(model, prompts, backend, weights, || {})
}

/// The same; `then` happens before the backend is gone.
fn logits_then<B: Backend>(
    model: &str,
    prompts: Prompts,
    backend: B,
    weights: WeightDtype,
    then: impl FnOnce(),
) -> AllLogits
where
    Solo: Collective<B::Buf>,
{
    let checkpoint = Checkpoint::open(&models().join(model)).expect("a good checkpoint");
    let sequences = sequences(model, prompts);
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
    then();
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
    let expected = logits(model, Prompts::Some, cpu(), WeightDtype::Bf16);
    let found = logits(model, Prompts::Some, cuda(options), WeightDtype::Bf16);
    near((model, LOGIT), &format!("{options:?}"), &expected, &found);
}

fn near((model, within): (&str, f32), how: &str, expected: &AllLogits, found: &AllLogits) {
    let mut worst = 0.0f32;
    for (sequence, (expected, found)) in expected.iter().zip(found).enumerate() {
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
                off <= within,
                "{model}, {how}, sequence {sequence}, token {token}: logits are off by {off}"
            );
            let (best, lead) = best(expected);
            assert!(
                lead <= MARGIN || self::best(found).0 == best,
                "{model}, {how}, sequence {sequence}, token {token}: the best token leads by {lead} and is another"
            );
        }
    }
    println!("{model}, {how}: logits are off by {worst} at most");
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
fn quantised_weights_are_near_the_reference() {
    // The coarser weights are, the more a model makes of the rounding of keys and values.
    for (weights, within) in [(WeightDtype::Int8, LOGIT), (WeightDtype::Int4, 0.25)] {
        let expected = logits("tiny-llama", Prompts::Short, ReferenceBackend, weights);
        for options in [EAGER, INVARIANT] {
            let found = logits("tiny-llama", Prompts::Short, cuda(options), weights);
            near(
                ("tiny-llama", within),
                &format!("{weights:?}, {options:?}"),
                &expected,
                &found,
            );
        }
    }
}

#[test]
fn recorded_steps_have_the_bits_of_others() {
    for model in ["tiny-llama", "tiny-mpt"] {
        let recorded = cuda(RECORDED);
        let graphs: Arc<GraphStore> = recorded.graphs();
        let found = logits_then(model, Prompts::Short, recorded, WeightDtype::Bf16, || {
            assert!(graphs.recorded() > 0, "{model}: steps are recorded");
        });
        assert!(
            found == logits(model, Prompts::Short, cuda(EAGER), WeightDtype::Bf16),
            "{model}: recorded steps differ"
        );
    }
}

/// Seeds of the order in which a device's streams and blocks run.
const ORDERS: u32 = 20;

/// A sum over the bits of all logits.
fn fingerprint(logits: &AllLogits) -> u64 {
    let mut hasher = DefaultHasher::new();
    for value in logits.iter().flatten().flatten() {
        hasher.write_u32(value.to_bits());
    }
    hasher.finish()
}

#[test]
#[ignore = "run by the test below, once for each order"]
fn one_order_of_a_device() {
    println!(
        "fingerprint {:016x}",
        fingerprint(&logits(
            "tiny-mpt",
            Prompts::Short,
            cuda(RECORDED),
            WeightDtype::Bf16
        ))
    );
}

#[test]
fn a_device_may_run_its_streams_in_any_order() {
    // A real device's order cannot be chosen.
    if cuda_rig::on_hardware() {
        return;
    }
    cuda_rig::library();
    let program = std::env::current_exe().expect("this program");
    let run = |seed: u32| {
        let output = Command::new(&program)
            .args([
                "one_order_of_a_device",
                "--exact",
                "--ignored",
                "--nocapture",
            ])
            .env("CUDA_EMU_SEED", seed.to_string())
            .output()
            .expect("a child");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let fingerprint = said
            .lines()
            .find_map(|line| line.split_once("fingerprint "))
            .map(|(_, of)| of.to_owned());
        fingerprint.unwrap_or_else(|| {
            panic!(
                "order {seed}: {said}{}",
                String::from_utf8_lossy(&output.stderr)
            )
        })
    };
    let first = run(1);
    for seed in 2..=ORDERS {
        assert_eq!(
            run(seed),
            first,
            "order {seed} gives other logits than the first"
        );
    }
}

/// How an engine runs requests.
#[derive(Debug, Clone, Copy)]
struct Way {
    spans_max: u32,
    chunk_tokens_max: u32,
    blocks: u32,
}

const ALONE: Way = Way {
    spans_max: 1,
    chunk_tokens_max: 40,
    blocks: 100,
};

/// Prompts that begin alike, so that their blocks are shared.
fn requests() -> Vec<Request> {
    let request = |key: u64| Request {
        key,
        prompt: (0..20)
            .chain((0..5 * key as u32).map(|i| 31 * key as u32 + i))
            .map(|token| 3 + token % 500)
            .collect(),
        candidates: vec![Candidate::default()],
        sampling: Sampling {
            temperature: if key.is_multiple_of(3) { 0.0 } else { 0.9 },
            top_p: if key.is_multiple_of(2) { 0.9 } else { 1.0 },
            seed: key,
            ..Sampling::default()
        },
        tokens_max: 18,
        stop_ids: Vec::new(),
        prompt_logprobs: None,
        embedding: false,
        deadline: None,
    };
    (0..6).map(request).collect()
}

/// The tokens of each request, with the prompt tokens that were cached and how often a sequence was preempted.
fn answers(way: Way, twice: bool) -> (Vec<Vec<u32>>, u32, u64) {
    let checkpoint = Checkpoint::open(&models().join("tiny-llama")).expect("a good checkpoint");
    let options = RunnerOptions {
        weight_dtype: WeightDtype::Bf16,
        kv_dtype: KvDtype::Bf16,
        blocks: way.blocks,
        step_tokens_max: 64,
        spans_max: way.spans_max,
        generation: 1,
    };
    let runner = ModelRunner::load(
        &checkpoint,
        &options,
        cuda(INVARIANT),
        Solo::new(),
        &mut |_| {},
    )
    .expect("loads");
    let config = EngineConfig {
        name: "engine".into(),
        generation: 1,
        prefix_salt: Vec::new(),
        chunk_tokens_max: way.chunk_tokens_max,
        backlog: Backlog {
            tokens: 1 << 20,
            sequences: 1 << 10,
        },
    };
    let (events_in, events) = mpsc::channel();
    // Shut while requests are handed in, so that the engine has all of them after its first step at the latest.
    let gate = Arc::new(Mutex::new(()));
    let sink = {
        let gate = gate.clone();
        Box::new(move |events| {
            drop(gate.lock());
            drop(events_in.send(events));
        })
    };
    let engine = Engine::spawn(Box::new(runner), config, sink, Box::new(drop)).expect("a thread");
    let (mut tokens, mut cached) = (Vec::new(), 0);
    for _ in 0..=u32::from(twice) {
        let requests = requests();
        (tokens, cached) = (vec![Vec::new(); requests.len()], 0);
        let mut owed = requests.len();
        let shut = gate.lock();
        requests
            .into_iter()
            .for_each(|request| engine.submit(request).expect("taken"));
        drop(shut);
        while owed > 0 {
            for event in events
                .recv_timeout(Duration::from_secs(120))
                .expect("every request ends")
            {
                match event {
                    Event::Token { key, id, .. } => tokens[key as usize].push(id),
                    Event::Ended {
                        reason,
                        cached_tokens,
                        ..
                    } => {
                        assert!(matches!(reason, EndReason::Length), "{reason:?}");
                        cached += cached_tokens;
                        owed -= 1;
                    }
                    other => panic!("{other:?} was not asked for"),
                }
            }
        }
    }
    let preemptions = engine.stats().snapshot().preemptions;
    engine.stop();
    assert!(matches!(engine.wait(), EngineEnd::Stopped));
    (tokens, cached, preemptions)
}

#[test]
fn batch_invariant_tokens_are_the_same_alone_batched_preempted_and_on_cached_blocks() {
    let (expected, _, preemptions) = answers(ALONE, false);
    assert_eq!(preemptions, 0);
    assert!(expected.iter().all(|tokens| tokens.len() == 18));
    let batched = Way {
        spans_max: 6,
        chunk_tokens_max: 7,
        ..ALONE
    };
    assert!(
        answers(batched, false).0 == expected,
        "batched, in small chunks"
    );
    let (tokens, cached, _) = answers(batched, true);
    assert!(
        tokens == expected && cached > 0,
        "on {cached} cached tokens"
    );
    // Too few blocks for all at once.
    let (tokens, _, preemptions) = answers(
        Way {
            blocks: 12,
            ..batched
        },
        false,
    );
    assert!(
        tokens == expected && preemptions > 0,
        "{preemptions} preemptions"
    );
}
