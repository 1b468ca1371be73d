//! Models whose weights are quantised while they are loaded: near the model they were made of, the same on any number of
//! ranks, and on a CPU near what the reference makes of the same weights.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{Backend, KvDtype, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{Footprint, ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use support::{AllLogits, Sequence, Setup, cpu, models, run};

const NAMES: [&str; 3] = ["tiny-llama", "tiny-mistral", "tiny-mpt"];

fn options(weight_dtype: WeightDtype) -> RunnerOptions {
    RunnerOptions {
        weight_dtype,
        kv_dtype: KvDtype::Bf16,
        blocks: 9,
        step_tokens_max: 40,
        spans_max: 3,
        generation: 1,
    }
}

fn logits(name: &str, weights: WeightDtype, ranks: u32) -> AllLogits {
    on(name, weights, ranks, || ReferenceBackend)
}

fn on<B: Backend<Buf: AsRef<[f32]> + AsMut<[f32]>>>(
    name: &str,
    weights: WeightDtype,
    ranks: u32,
    backend: impl Fn() -> B + Sync,
) -> AllLogits {
    let setup = Setup {
        weights,
        ..Setup::new(ranks, KvDtype::F32)
    };
    let sequence = |len: u32, first: u32| Sequence {
        tokens: (0..len).map(|i| (first + i * 37) % 2048).collect(),
        prefill: len as usize,
    };
    let sequences = [sequence(30, 5), sequence(9, 400)];
    run(&models().join(name), setup, backend, &sequences)
}

/// Root of the mean square of the differences, as a share of the spread of the second ones.
fn distance(a: &AllLogits, b: &AllLogits) -> f64 {
    let numbers = |all: &AllLogits| -> Vec<f64> {
        let rows = all.iter().flatten();
        rows.flatten().map(|x| f64::from(*x)).collect()
    };
    let (a, b) = (numbers(a), numbers(b));
    let mean = b.iter().sum::<f64>() / b.len() as f64;
    let off: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    let spread: f64 = b.iter().map(|b| (b - mean).powi(2)).sum();
    (off / spread).sqrt()
}

#[test]
fn quantised_models_stay_near_the_one_they_were_made_of() {
    for name in NAMES {
        let bf16 = logits(name, WeightDtype::Bf16, 1);
        for (weights, bound) in [(WeightDtype::Int8, 0.02), (WeightDtype::Int4, 0.3)] {
            let off = distance(&logits(name, weights, 1), &bf16);
            assert!(off > 0.0, "{name}: {weights:?} is not what was asked for");
            assert!(off < bound, "{name}, {weights:?}: {off} of the spread");
        }
    }
}

#[test]
fn ranks_have_the_very_weights_of_one_rank_alone() {
    for name in NAMES {
        for weights in [WeightDtype::Int8, WeightDtype::Int4] {
            let alone = logits(name, weights, 1);
            for ranks in [2, 4] {
                // What is left is the order of sums.
                let off = distance(&logits(name, weights, ranks), &alone);
                assert!(off < 1e-5, "{name}, {weights:?}, {ranks} ranks: {off}");
            }
        }
    }
}

#[test]
fn a_cpu_stays_near_the_very_same_weights() {
    for name in NAMES {
        // What is left is the rounding of activations to 127 steps.
        for weights in [WeightDtype::Int8, WeightDtype::Int4] {
            let off = distance(&on(name, weights, 1, cpu), &logits(name, weights, 1));
            assert!(off < 0.05, "{name}, {weights:?}: {off} of the spread");
        }
    }
}

#[test]
fn the_packed_bytes_are_the_announced_ones() {
    for name in NAMES {
        packed_as_announced(name, || ReferenceBackend);
        packed_as_announced(name, cpu);
    }
}

fn packed_as_announced<B: Backend<Buf: AsRef<[f32]> + AsMut<[f32]>>>(
    name: &str,
    backend: impl Fn() -> B,
) {
    let checkpoint = Checkpoint::open(&models().join(name)).expect("the tiny model");
    let spec = &checkpoint.spec;
    for weights in [WeightDtype::Bf16, WeightDtype::Int8, WeightDtype::Int4] {
        let (mut packed, options) = (0, options(weights));
        let mut progress = |bytes| packed = bytes;
        ModelRunner::load(&checkpoint, &options, backend(), Solo::new(), &mut progress)
            .expect("loads");
        let footprint = Footprint::of::<B>(spec, 0, 1, &options);
        let norms = 4 * (2 * spec.layers + 1) * spec.hidden;
        assert_eq!(footprint.expect("one rank").weights, packed + norms as u64);
    }
}
