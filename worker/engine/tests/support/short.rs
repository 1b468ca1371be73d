//! Two short sequences through a model, and how far two models' logits lie apart.

use super::{AllLogits, Sequence, Setup, run};
use engine::backend::{Backend, KvDtype, WeightDtype};
use engine::model_runner::RunnerOptions;
use std::path::Path;

/// The options of a runner with room for little.
pub fn options(weight_dtype: WeightDtype) -> RunnerOptions {
    RunnerOptions {
        weight_dtype,
        kv_dtype: KvDtype::Bf16,
        blocks: 9,
        step_tokens_max: 40,
        spans_max: 3,
        generation: 1,
    }
}

/// The logits of two short sequences on `ranks` ranks, with keys and values in f32.
pub fn logits<B: Backend<Buf: AsRef<[f32]> + AsMut<[f32]>>>(
    path: &Path,
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
    run(path, setup, backend, &sequences)
}

/// Root of the mean square of the differences, as a share of the spread of the second ones.
pub fn distance(a: &AllLogits, b: &AllLogits) -> f64 {
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
