//! The engine's forward pass against the recorded outputs of transformers: logits, greedy ids, log-probabilities and
//! perplexity, for every family, one and more ranks, both cache formats.
//!
//! Prompts and perplexity windows run together: the prompts in chunks, their outputs token by token as recorded, so that
//! one near tie does not spoil what comes after.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{Backend, KvDtype, WeightDtype};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use support::{Sequence, Setup, cpu, cpu_as_served, models, run};

#[derive(Deserialize)]
struct Golden {
    eos_token_id: u32,
    float32: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    input_ids: Vec<u32>,
    output_ids: Vec<u32>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    id: u32,
    margin: f32,
    top5: Vec<(u32, f32)>,
}

#[derive(Deserialize)]
struct Perplexity {
    window: usize,
    begin_token: bool,
    token_ids: Vec<u32>,
    float32: Score,
}

impl Perplexity {
    fn windows(&self) -> Vec<Vec<u32>> {
        let begin: &[u32] = if self.begin_token { &[1] } else { &[] };
        let windows = self.token_ids.chunks(self.window);
        windows.map(|window| [begin, window].concat()).collect()
    }
}

#[derive(Deserialize)]
struct Score {
    tokens: usize,
    perplexity: f64,
}

/// How near the outputs must be.
struct Tolerance {
    /// Of logits kept as f32.
    logit: f32,
    /// Of logits kept as f16.
    logit_f16: f32,
    /// Of the log-probabilities of the five best.
    logprob: f32,
    /// Steps whose best token leads by more must choose it.
    margin: f32,
    /// Relative, of the perplexity.
    perplexity: f64,
}

const KV_F32: Tolerance = Tolerance {
    logit: 2e-3,
    logit_f16: 1e-2,
    logprob: 2e-3,
    margin: 0.01,
    perplexity: 1e-3,
};
const KV_BF16: Tolerance = Tolerance {
    logit: 0.15,
    logit_f16: 0.15,
    logprob: 0.15,
    margin: 0.2,
    perplexity: 5e-3,
};

/// As bf16, but for the perplexity, which is the promise.
const KV_INT8: Tolerance = Tolerance {
    logit: 0.4,
    logit_f16: 0.4,
    logprob: 0.4,
    margin: 0.5,
    perplexity: 1e-2,
};

/// Runs one model and compares everything that is recorded of it.
fn compare<B: Backend>(model: &str, setup: Setup, backend: impl Fn() -> B + Sync)
where
    B::Buf: AsRef<[f32]> + AsMut<[f32]>,
{
    let golden: Golden = read(model, "golden.json");
    let text: Perplexity = read(model, "perplexity.json");
    let windows = text.windows();
    let prompts = golden.float32.iter().map(|prompt| Sequence {
        tokens: [&prompt.input_ids[..], &prompt.output_ids[..]].concat(),
        prefill: prompt.input_ids.len(),
    });
    let texts = windows.iter().map(|window| Sequence {
        tokens: window.clone(),
        prefill: window.len(),
    });
    let logits = run(
        &models().join(model),
        setup,
        backend,
        &prompts.chain(texts).collect::<Vec<_>>(),
    );
    let (prompts, texts) = logits.split_at(golden.float32.len());

    let tolerance = match setup.kv {
        KvDtype::F32 => KV_F32,
        KvDtype::Bf16 => KV_BF16,
        KvDtype::Int8 => KV_INT8,
    };
    let what = format!("{model}, {} ranks, kv {:?}", setup.ranks, setup.kv);
    compare_logits(&what, model, &golden, prompts, &tolerance);
    for (prompt, logits) in golden.float32.iter().zip(prompts) {
        compare_steps(&what, prompt, golden.eos_token_id, logits, &tolerance);
    }
    compare_perplexity(&what, &text, &windows, texts, &tolerance);
}

fn compare_logits(
    what: &str,
    model: &str,
    golden: &Golden,
    prompts: &[Vec<Vec<f32>>],
    tolerance: &Tolerance,
) {
    let bytes = std::fs::read(
        models()
            .join("golden")
            .join(model)
            .join("logits.safetensors"),
    )
    .expect("recorded logits");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    for name in ["spark", "turns"] {
        let (prompt, logits) = golden
            .float32
            .iter()
            .zip(prompts)
            .find(|(prompt, _)| prompt.name == name)
            .expect("recorded");
        let numbers = |kind: &str| {
            file.tensor(&format!("{name}.float32.{kind}"))
                .expect("recorded")
                .data()
                .to_vec()
        };
        let last: Vec<f32> = numbers("last_logits")
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect();
        let all = numbers("logits_all_positions_f16");
        let all: Vec<f32> = all
            .as_chunks()
            .0
            .iter()
            .map(|bytes| half::f16::from_le_bytes(*bytes).to_f32())
            .collect();
        let off = distance(&logits[prompt.input_ids.len() - 1], &last);
        assert!(
            off <= tolerance.logit,
            "{what}, {name}: the last logits are off by {off}"
        );
        let off = distance(&logits[..prompt.input_ids.len()].concat(), &all);
        assert!(
            off <= tolerance.logit_f16,
            "{what}, {name}: logits are off by {off}"
        );
    }
}

fn compare_steps(
    what: &str,
    prompt: &Prompt,
    eos: u32,
    logits: &[Vec<f32>],
    tolerance: &Tolerance,
) {
    for (i, (step, logits)) in prompt
        .steps
        .iter()
        .zip(&logits[prompt.input_ids.len() - 1..])
        .enumerate()
    {
        let place = format!("{what}, {}, output {i}", prompt.name);
        assert_eq!(
            step.id,
            prompt.output_ids.get(i).copied().unwrap_or(eos),
            "{place}: the recording agrees with itself"
        );
        let normal = log_sum(logits);
        for (id, expected) in &step.top5 {
            let logprob = (f64::from(logits[*id as usize]) - normal) as f32;
            assert!(
                (logprob - expected).abs() <= tolerance.logprob,
                "{place}: token {id} has {logprob}, expected {expected}"
            );
        }
        let best = (0..logits.len())
            .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
            .expect("a vocabulary");
        assert!(
            step.margin <= tolerance.margin || best as u32 == step.id,
            "{place}: chose {best}, expected {}",
            step.id
        );
    }
}

/// The perplexity of the windows, and how many tokens were scored.
fn perplexity(windows: &[Vec<u32>], logits: &[Vec<Vec<f32>>]) -> (f64, usize) {
    let (mut loss, mut tokens) = (0.0, 0);
    for (window, logits) in windows.iter().zip(logits) {
        for (target, logits) in window[1..].iter().zip(logits) {
            loss += log_sum(logits) - f64::from(logits[*target as usize]);
            tokens += 1;
        }
    }
    ((loss / tokens as f64).exp(), tokens)
}

fn compare_perplexity(
    what: &str,
    text: &Perplexity,
    windows: &[Vec<u32>],
    logits: &[Vec<Vec<f32>>],
    tolerance: &Tolerance,
) {
    let (perplexity, tokens) = perplexity(windows, logits);
    assert_eq!(tokens, text.float32.tokens, "{what}: tokens scored");
    let off = (perplexity / text.float32.perplexity - 1.0).abs();
    assert!(
        off <= tolerance.perplexity,
        "{what}: perplexity {perplexity}, expected {}",
        text.float32.perplexity
    );
}

fn read<T: DeserializeOwned>(model: &str, file: &str) -> T {
    let path = models().join("golden").join(model).join(file);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Largest difference; endless where one side is not a number.
fn distance(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter()
        .zip(y)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |most, off| {
            if most.is_nan() || off <= most {
                most
            } else {
                off
            }
        })
}

fn log_sum(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    largest
        + logits
            .iter()
            .map(|logit| (f64::from(*logit) - largest).exp())
            .sum::<f64>()
            .ln()
}

macro_rules! goldens {
    ($($name:ident: $model:literal, $ranks:literal, $kv:ident, $backend:expr;)*) => {
        $(#[test]
        fn $name() {
            compare($model, Setup::new($ranks, KvDtype::$kv), $backend);
        })*
    };
}

goldens! {
    llama_equals_transformers: "tiny-llama", 1, F32, cpu;
    llama_on_2_ranks_equals_transformers: "tiny-llama", 2, F32, cpu;
    llama_on_4_ranks_equals_transformers: "tiny-llama", 4, F32, cpu;
    llama_with_bf16_cache_is_near_transformers: "tiny-llama", 1, Bf16, cpu;
    llama_with_bf16_cache_on_2_ranks_is_near_transformers: "tiny-llama", 2, Bf16, cpu;
    llama_with_bf16_cache_on_4_ranks_is_near_transformers: "tiny-llama", 4, Bf16, cpu;
    llama_with_int8_cache_is_near_transformers: "tiny-llama", 1, Int8, cpu;
    llama_with_int8_cache_on_4_ranks_is_near_transformers: "tiny-llama", 4, Int8, cpu;
    mistral_with_int8_cache_is_near_transformers: "tiny-mistral", 1, Int8, cpu;
    mpt_with_int8_cache_is_near_transformers: "tiny-mpt", 1, Int8, cpu;
    mistral_equals_transformers: "tiny-mistral", 1, F32, cpu;
    mistral_on_2_ranks_equals_transformers: "tiny-mistral", 2, F32, cpu;
    mistral_on_4_ranks_equals_transformers: "tiny-mistral", 4, F32, cpu;
    mistral_with_bf16_cache_is_near_transformers: "tiny-mistral", 1, Bf16, cpu;
    mistral_with_bf16_cache_on_2_ranks_is_near_transformers: "tiny-mistral", 2, Bf16, cpu;
    mistral_with_bf16_cache_on_4_ranks_is_near_transformers: "tiny-mistral", 4, Bf16, cpu;
    mpt_equals_transformers: "tiny-mpt", 1, F32, cpu;
    mpt_on_2_ranks_equals_transformers: "tiny-mpt", 2, F32, cpu;
    mpt_on_4_ranks_equals_transformers: "tiny-mpt", 4, F32, cpu;
    mpt_with_bf16_cache_is_near_transformers: "tiny-mpt", 1, Bf16, cpu;
    mpt_with_bf16_cache_on_2_ranks_is_near_transformers: "tiny-mpt", 2, Bf16, cpu;
    mpt_with_bf16_cache_on_4_ranks_is_near_transformers: "tiny-mpt", 4, Bf16, cpu;
    llama_as_served_is_near_transformers: "tiny-llama", 1, Bf16, cpu_as_served;
    mistral_as_served_on_2_ranks_is_near_transformers: "tiny-mistral", 2, Bf16, cpu_as_served;
    mpt_as_served_is_near_transformers: "tiny-mpt", 1, Bf16, cpu_as_served;
    the_reference_runs_llama_as_transformers: "tiny-llama", 1, F32, || ReferenceBackend;
    the_reference_runs_llama_on_4_ranks_as_transformers: "tiny-llama", 4, Bf16, || ReferenceBackend;
    the_reference_runs_mistral_as_transformers: "tiny-mistral", 1, F32, || ReferenceBackend;
    the_reference_runs_mistral_on_2_ranks_as_transformers: "tiny-mistral", 2, Bf16, || ReferenceBackend;
    the_reference_runs_mpt_as_transformers: "tiny-mpt", 1, F32, || ReferenceBackend;
    the_reference_runs_mpt_on_2_ranks_as_transformers: "tiny-mpt", 2, Bf16, || ReferenceBackend;
}

#[test]
fn int8_weights_cost_less_than_a_hundredth_of_the_perplexity() {
    for model in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        let windows = read::<Perplexity>(model, "perplexity.json").windows();
        let texts = windows.iter().map(|window| Sequence {
            tokens: window.clone(),
            prefill: window.len(),
        });
        let texts: Vec<Sequence> = texts.collect();
        let of = |weights| {
            let setup = Setup {
                weights,
                ..Setup::new(1, KvDtype::Bf16)
            };
            perplexity(&windows, &run(&models().join(model), setup, cpu, &texts)).0
        };
        let (bf16, int8) = (of(WeightDtype::Bf16), of(WeightDtype::Int8));
        assert!(int8 < 1.01 * bf16, "{model}: {int8}, and {bf16} in bf16");
    }
}
