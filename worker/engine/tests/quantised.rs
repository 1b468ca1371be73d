//! Models whose weights are quantised while they are loaded: near the model they were made of, the same on any number of
//! ranks, and on a CPU near what the reference makes of the same weights.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{Backend, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{Footprint, ModelRunner};
use engine::models::checkpoint::Checkpoint;
use support::short::{self, distance, options};
use support::{AllLogits, cpu, models};

const NAMES: [&str; 3] = ["tiny-llama", "tiny-mistral", "tiny-mpt"];

fn logits(name: &str, weights: WeightDtype, ranks: u32) -> AllLogits {
    short::logits(&models().join(name), weights, ranks, || ReferenceBackend)
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
            let off = distance(
                &short::logits(&models().join(name), weights, 1, cpu),
                &logits(name, weights, 1),
            );
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
