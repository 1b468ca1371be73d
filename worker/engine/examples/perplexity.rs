//! The perplexity of a model on a stored text, for any form of its weights: what a form costs in quality.
//!
//!     cargo run --release -p engine --example perplexity -- MODEL IDS [--weights bf16|int8|int4] [--kv bf16|f32|int8]
//!         [--floats] [--dequantised] [--threads N] [--windows N]
//!
//! MODEL is a folder or a GGUF file. IDS is JSON: `token_ids`, cut into pieces of `window`, each scored alone; with
//! `begin_token` true token 1 goes in front of each. `--floats` takes a checkpoint that is quantised already for one of
//! bf16 with the same numbers, so that it can be quantised anew. `--dequantised` computes with the numbers that the
//! quantised weights stand for, as f32 and without quantised activations: what the products themselves cost.
//! Prints one line: `perplexity X tokens N`.

use std::error::Error;
use std::path::{Path, PathBuf};

use engine::backend::cpu::{CpuBackend, Pool};
use engine::backend::{Backend, KvDtype, QuantBits, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::models::config::Config;
use engine::models::forms::Forms;
use engine::models::quantization;
use engine::models::tensors::{Stacked, TensorNames};
use engine::plan::{BLOCK_TOKENS, Logits, Span, StepPlan};
use engine::weights::{Weights, quant};
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

type Failure = Box<dyn Error>;

/// The stored text.
#[derive(Deserialize)]
struct Text {
    window: usize,
    begin_token: bool,
    token_ids: Vec<u32>,
}

/// What the command line asks for.
struct Options {
    model: PathBuf,
    text: PathBuf,
    weights: WeightDtype,
    kv: KvDtype,
    floats: bool,
    dequantised: bool,
    threads: usize,
    windows: usize,
}

fn main() -> Result<(), Failure> {
    let mut options = Options::read()?;
    let text: Text = serde_json::from_slice(&std::fs::read(&options.text)?)?;
    // Folders of the model's numbers in another form live as long as they are read.
    let mut folders = Vec::new();
    if options.floats {
        folders.push(Source::open(&options.model)?.as_bf16()?);
        options.model = last(&folders);
    }
    if options.dequantised {
        folders.push(Source::open(&options.model)?.dequantised(options.weights)?);
        (options.model, options.weights) = (last(&folders), WeightDtype::F32);
    }
    let (perplexity, tokens) = score(&options, &text)?;
    println!("perplexity {perplexity:.4} tokens {tokens}");
    Ok(())
}

fn last(folders: &[TempDir]) -> PathBuf {
    folders
        .last()
        .map_or_else(PathBuf::new, |dir| dir.path().to_owned())
}

impl Options {
    fn read() -> Result<Options, Failure> {
        let mut arguments = std::env::args().skip(1);
        let mut path = |what: &str| {
            let path = arguments.next().filter(|word| !word.starts_with('-'));
            path.ok_or_else(|| format!("name {what}; see the head of this file"))
        };
        let mut options = Options {
            model: path("the model first")?.into(),
            text: path("the file of token ids second")?.into(),
            weights: WeightDtype::Bf16,
            kv: KvDtype::Bf16,
            floats: false,
            dequantised: false,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            windows: usize::MAX,
        };
        while let Some(key) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .ok_or_else(|| format!("{key} wants a value"))
            };
            match key.as_str() {
                "--floats" => options.floats = true,
                "--dequantised" => options.dequantised = true,
                "--threads" => options.threads = value()?.parse()?,
                "--windows" => options.windows = value()?.parse()?,
                "--weights" => {
                    options.weights = match value()?.as_str() {
                        "bf16" => WeightDtype::Bf16,
                        "int8" => WeightDtype::Int8,
                        "int4" => WeightDtype::Int4,
                        other => {
                            return Err(format!("--weights {other}: bf16, int8 or int4").into());
                        }
                    }
                }
                "--kv" => {
                    options.kv = match value()?.as_str() {
                        "bf16" => KvDtype::Bf16,
                        "f32" => KvDtype::F32,
                        "int8" => KvDtype::Int8,
                        other => return Err(format!("--kv {other}: bf16, f32 or int8").into()),
                    }
                }
                _ => return Err(format!("{key} is no option; see the head of this file").into()),
            }
        }
        Ok(options)
    }
}

/// The perplexity of the text, and how many tokens were scored.
fn score(options: &Options, text: &Text) -> Result<(f64, usize), Failure> {
    let length = text.window + usize::from(text.begin_token);
    let blocks = length.div_ceil(BLOCK_TOKENS) as u32;
    let runner_options = RunnerOptions {
        weight_dtype: options.weights,
        kv_dtype: options.kv,
        blocks: 1 + blocks,
        step_tokens_max: length as u32,
        spans_max: 1,
        generation: 1,
    };
    let checkpoint = Checkpoint::open(&options.model)?;
    let backend = CpuBackend::new(Pool::new(options.threads, &[])?)?;
    let mut runner = ModelRunner::load(
        &checkpoint,
        &runner_options,
        backend,
        Solo::new(),
        &mut |_| {},
    )?;
    let (mut loss, mut scored) = (0.0, 0);
    for (step, window) in text
        .token_ids
        .chunks(text.window)
        .take(options.windows)
        .enumerate()
    {
        let begin = text.begin_token.then_some(1);
        let tokens: Vec<u32> = begin.into_iter().chain(window.iter().copied()).collect();
        let span = Span {
            position: 0,
            len: tokens.len() as u32,
            logits: Logits::All,
            blocks: (1..=blocks)
                .take(tokens.len().div_ceil(BLOCK_TOKENS))
                .collect(),
        };
        let plan = StepPlan {
            step: step as u64 + 1,
            generation: 1,
            tokens: tokens.clone(),
            spans: vec![span],
        };
        let mut targets = tokens[1..].iter();
        runner.run(&plan, |_, logits| {
            if let Some(target) = targets.next() {
                loss += log_sum(logits) - f64::from(logits[*target as usize]);
                scored += 1;
            }
        })?;
    }
    Ok(((loss / scored as f64).exp(), scored))
}

fn log_sum(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from(logit - largest).exp())
        .sum();
    f64::from(largest) + sum.ln()
}

/// A model whose numbers are to be written down in another form.
struct Source {
    config: Value,
    weights: Weights,
    names: TensorNames,
    forms: Forms,
}

impl Source {
    fn open(path: &Path) -> Result<Source, Failure> {
        let checkpoint = Checkpoint::open(path)?;
        let (weights, mut config) = match path.is_file() {
            true => Weights::open_gguf(path)?,
            false => {
                let text = std::fs::read_to_string(path.join("config.json"))?;
                let mut weights = Weights::open(path)?;
                if let Some(format) = quantization::format(&Config::parse(&text)?)? {
                    weights.assemble(format)?;
                }
                (weights, serde_json::from_str(&text)?)
            }
        };
        config["quantization_config"] = Value::Null;
        let spec = &checkpoint.spec;
        let (roots, embedding) = spec.family.roots();
        let has = |root: &&&str| weights.has(&format!("{root}{embedding}.weight"));
        let root = roots.iter().find(has).unwrap_or(&roots[0]);
        Ok(Source {
            config,
            names: spec.family.tensor_names(spec, root),
            weights,
            forms: checkpoint.forms,
        })
    }

    /// The same numbers in bf16.
    fn as_bf16(&self) -> Result<TempDir, Failure> {
        self.write(Dtype::BF16, |_, _| {})
    }

    /// The numbers that this model has in memory when it is loaded as `weights`, in f32.
    fn dequantised(&self, weights: WeightDtype) -> Result<TempDir, Failure> {
        let head = self.names.head.as_ref().unwrap_or(&self.names.embedding);
        let head_dtype = match self.forms.head_quantised {
            true => WeightDtype::Int8.of_head(CpuBackend::QUANTISED_HEAD),
            false => weights.of_head(CpuBackend::QUANTISED_HEAD),
        };
        let mut rounding = vec![
            (&self.names.embedding, None),
            (head, head_dtype.quantised()),
        ];
        for (i, layer) in self.names.layers.iter().enumerate() {
            let forms = self.forms.layer(i);
            let forms = forms.attention().into_iter().chain(forms.mlp());
            let made = layer.matrices().into_iter().zip(forms);
            let made = made.filter(|(_, form)| form.is_none());
            rounding.extend(made.map(|(matrix, _)| (matrix, weights.quantised())));
        }
        let of = |name: &str| {
            let is_of = |matrix: &Stacked| matrix.tensors().any(|tensor| tensor == name);
            // The last one counts: a tied table is the head.
            let found = rounding.iter().rev().find(|(matrix, _)| is_of(matrix));
            found.map(|(_, bits)| *bits)
        };
        self.write(Dtype::F32, |name, row| match of(name) {
            None => {}
            Some(None) => row
                .iter_mut()
                .for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            Some(Some(bits)) => row
                .chunks_mut(quant::GROUP)
                .for_each(|group| round(bits, group)),
        })
    }

    /// A folder of the model, each row of a tensor changed by `change`.
    fn write(&self, dtype: Dtype, change: impl Fn(&str, &mut [f32])) -> Result<TempDir, Failure> {
        let mut tensors = Vec::new();
        for expected in self.names.expected() {
            let mut numbers = self.weights.tensor(&expected.name)?.to_vec();
            let width = expected.shape.last().copied().unwrap_or(1);
            numbers
                .chunks_mut(width)
                .for_each(|row| change(&expected.name, row));
            let bytes: Vec<u8> = match dtype {
                Dtype::BF16 => {
                    let rounded = numbers.iter().map(|x| bf16::from_f32(*x).to_le_bytes());
                    rounded.flatten().collect()
                }
                _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
            tensors.push((expected, bytes));
        }
        let views: Result<Vec<_>, _> = tensors
            .iter()
            .map(|(expected, bytes)| {
                let view = TensorView::new(dtype, expected.shape.clone(), bytes)?;
                Ok::<_, safetensors::SafeTensorError>((expected.name.clone(), view))
            })
            .collect();
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("config.json"), self.config.to_string())?;
        let file = dir.path().join("model.safetensors");
        safetensors::serialize_to_file(views?, None, &file)?;
        Ok(dir)
    }
}

/// A group as it is when it was quantised.
fn round(bits: QuantBits, group: &mut [f32]) {
    let mut q = [0; quant::GROUP];
    let (scale, zero) = quant::quantise(bits, group, &mut q);
    for (x, q) in group.iter_mut().zip(q) {
        *x = scale * f32::from(i16::from(q) - i16::from(zero));
    }
}
