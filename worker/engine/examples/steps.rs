//! How fast whole steps of a model are on this CPU, beside what the machine could do: a prompt, and decodes of some
//! batch sizes.
//!
//!     cargo run --release -p engine --example steps -- FOLDER [--weights bf16|int8|int4] [--kv bf16|f32|int8]
//!         [--prompt 512] [--batch 1,32] [--context 512] [--threads N] [--seconds 3]
//!
//! Steps go through the runner and the sampler as a served model's do, without text and HTTP. The roof of a step is the
//! time to read its weights, and the keys and values it looks at, at the measured bandwidth, or the time of its
//! multiplications at the measured peak of the type, whichever is longer: see docs/performance.md. Each step is timed
//! alone, in some rounds with the limits measured before each: what else the machine's memory does changes both. The median
//! round counts, and of it the median step. Lines have the form `prefill|decode KEY=VALUE ...`.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::cpu::limits::Limits;
use engine::backend::cpu::{CpuBackend, Isa, Pool, allowed_cores};
use engine::backend::{KvDtype, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{Footprint, ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::models::spec::{MlpKind, ModelSpec};
use engine::plan::{BLOCK_TOKENS, Logits, Span, StepPlan};
use engine::request::Sampling;
use engine::runner::{Runner, SampleRow};

type Failure = Box<dyn std::error::Error>;
type CpuRunner = ModelRunner<CpuBackend, Solo>;

const GENERATION: u64 = 1;
/// Steps before the first that counts.
const WARM_UP: usize = 2;
const ROUNDS: usize = 5;

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let checkpoint = Checkpoint::open(&options.folder)?;
    let pool = Pool::new(options.threads, &allowed_cores())?;
    pool.pin_caller();
    let limits = Limits::measure(Isa::detect(), &pool)?;
    println!(
        "limits path={} threads={} read_gb_per_s={:.1} f32_gflops={:.0} bf16_gflops={:.0} \
         int8_gops={:.0}",
        Isa::detect().path().name(),
        options.threads,
        limits.read_gb_per_s,
        limits.arithmetic.f32,
        limits.arithmetic.bf16,
        limits.arithmetic.int8
    );
    let runner_options = options.runner();
    let footprint = Footprint::of_checkpoint::<CpuBackend>(&checkpoint, 0, 1, &runner_options)?;
    let begun = Instant::now();
    let backend = CpuBackend::new(Arc::clone(&pool))?;
    let runner = ModelRunner::load(
        &checkpoint,
        &runner_options,
        backend,
        Solo::new(),
        &mut |_| {},
    )?;
    println!(
        "loaded weights={} seconds={:.2} weight_bytes={} kv_block_bytes={}",
        options.weights_name,
        begun.elapsed().as_secs_f64(),
        footprint.weights,
        footprint.kv_block
    );
    let mut bench = Bench {
        costs: Costs::of(&checkpoint.spec, &footprint),
        runner,
        pool,
        step: 0,
        options,
    };
    if bench.options.prompt > 0 {
        bench.prefill()?;
    }
    for batch in bench.options.batches.clone() {
        bench.decode(batch)?;
    }
    Ok(())
}

/// What the command line asks for.
struct Options {
    folder: PathBuf,
    weights: WeightDtype,
    weights_name: String,
    kv: KvDtype,
    prompt: usize,
    batches: Vec<usize>,
    context: usize,
    threads: usize,
    time: Duration,
}

impl Options {
    fn read() -> Result<Options, Failure> {
        let mut arguments = std::env::args().skip(1);
        let folder = arguments.next().filter(|word| !word.starts_with('-'));
        let mut options = Options {
            folder: folder.ok_or("name the model's folder first")?.into(),
            weights: WeightDtype::Bf16,
            weights_name: "bf16".into(),
            kv: KvDtype::Bf16,
            prompt: 512,
            batches: vec![1, 32],
            context: 512,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            time: Duration::from_secs(3),
        };
        while let Some(key) = arguments.next() {
            let value = arguments
                .next()
                .ok_or_else(|| format!("{key} wants a value"))?;
            match key.as_str() {
                "--weights" => {
                    options.weights = match value.as_str() {
                        "bf16" => WeightDtype::Bf16,
                        "int8" => WeightDtype::Int8,
                        "int4" => WeightDtype::Int4,
                        _ => return Err(format!("--weights {value}: bf16, int8 or int4").into()),
                    };
                    options.weights_name = value;
                }
                "--kv" => {
                    options.kv = match value.as_str() {
                        "bf16" => KvDtype::Bf16,
                        "f32" => KvDtype::F32,
                        "int8" => KvDtype::Int8,
                        _ => return Err(format!("--kv {value}: bf16, f32 or int8").into()),
                    }
                }
                "--prompt" => options.prompt = number(&key, &value)?,
                "--batch" => {
                    let counts = value.split(',').map(|word| number(&key, word));
                    options.batches = counts.collect::<Result<_, _>>()?;
                }
                "--context" => options.context = number(&key, &value)?,
                "--threads" => options.threads = number(&key, &value)?,
                "--seconds" => options.time = Duration::from_secs(number(&key, &value)?),
                _ => return Err(format!("{key} is no option; see the head of this file").into()),
            }
        }
        Ok(options)
    }

    /// Blocks of a sequence that is as long as any here.
    fn blocks(&self) -> usize {
        self.prompt.max(self.context + 1).div_ceil(BLOCK_TOKENS)
    }

    fn runner(&self) -> RunnerOptions {
        let batch = self.batches.iter().copied().max().unwrap_or(1);
        RunnerOptions {
            weight_dtype: self.weights,
            kv_dtype: self.kv,
            blocks: (1 + batch * self.blocks()) as u32,
            step_tokens_max: self.prompt.max(batch).max(1) as u32,
            spans_max: batch.max(1) as u32,
            generation: GENERATION,
        }
    }
}

fn number<T: FromStr>(key: &str, word: &str) -> Result<T, Failure> {
    word.parse()
        .map_err(|_| format!("{key} {word}: no number").into())
}

/// What a step must read and compute, whoever computes it.
struct Costs {
    /// Weights that a step reads: all but the rows of an embedding that is not the head.
    weight_bytes: f64,
    /// Keys and values of a token.
    kv_bytes: f64,
    /// Multiplications and additions of a token, in the layers and in the head.
    layer_flops: f64,
    head_flops: f64,
    /// Those of a token for each token that it looks at.
    attention_flops: f64,
}

impl Costs {
    fn of(spec: &ModelSpec, footprint: &Footprint) -> Costs {
        let (q, kv) = (
            spec.heads * spec.head_width,
            spec.kv_heads * spec.head_width,
        );
        let mlp = match spec.mlp {
            MlpKind::GatedSilu => 3,
            MlpKind::Gelu => 2,
        };
        let layer = spec.hidden * (2 * q + 2 * kv) + mlp * spec.hidden * spec.intermediate;
        let table = if spec.tied {
            0
        } else {
            2 * spec.vocab * spec.hidden
        };
        Costs {
            weight_bytes: footprint.weights as f64 - table as f64,
            kv_bytes: footprint.kv_block as f64 / BLOCK_TOKENS as f64,
            layer_flops: (2 * spec.layers * layer) as f64,
            head_flops: (2 * spec.vocab * spec.hidden) as f64,
            attention_flops: (4 * spec.layers * q) as f64,
        }
    }

    /// Whether products are int8's: weights are of 8 bits or fewer, with their scales.
    fn in_int8(&self) -> bool {
        self.weight_bytes * 8.0 < 12.0 * (self.layer_flops + self.head_flops) / 2.0
    }
}

struct Bench {
    options: Options,
    runner: CpuRunner,
    costs: Costs,
    pool: Arc<Pool>,
    step: u64,
}

impl Bench {
    /// A whole prompt in one step.
    fn prefill(&mut self) -> Result<(), Failure> {
        let tokens = self.options.prompt;
        let plan = self.plan(1, 0, tokens);
        let looked_at = (tokens * tokens) as f64 / 2.0;
        let flops = tokens as f64 * self.costs.layer_flops
            + self.costs.head_flops
            + looked_at * self.costs.attention_flops;
        let bytes = self.costs.weight_bytes + tokens as f64 * self.costs.kv_bytes;
        self.rounds(&format!("prefill tokens={tokens}"), &plan, bytes, flops)
    }

    /// A token of each of `batch` sequences.
    fn decode(&mut self, batch: usize) -> Result<(), Failure> {
        let context = self.options.context;
        let plan = self.plan(batch, context, 1);
        let looked_at = (batch * (context + 1)) as f64;
        let bytes = self.costs.weight_bytes + looked_at * self.costs.kv_bytes;
        let flops = batch as f64 * (self.costs.layer_flops + self.costs.head_flops);
        let name = format!("decode batch={batch} context={context}");
        self.rounds(&name, &plan, bytes, flops)
    }

    /// A plan of `tokens` tokens of each of `sequences` sequences, from `position` on. What lies in the cache before is
    /// zeros, which take no less time than other numbers.
    fn plan(&self, sequences: usize, position: usize, tokens: usize) -> StepPlan {
        let blocks = self.options.blocks();
        let span = |sequence: usize| Span {
            position: position as u32,
            len: tokens as u32,
            logits: Logits::Last,
            blocks: (0..blocks)
                .map(|block| (1 + sequence * blocks + block) as u32)
                .collect(),
        };
        StepPlan {
            step: 0,
            generation: GENERATION,
            tokens: (0..sequences * tokens)
                .map(|i| (300 + i * 7 % 1500) as u32)
                .collect(),
            spans: (0..sequences).map(span).collect(),
        }
    }

    /// Times the plan, round by round, and shows the median one.
    fn rounds(
        &mut self,
        what: &str,
        plan: &StepPlan,
        bytes: f64,
        flops: f64,
    ) -> Result<(), Failure> {
        let mut plan = plan.clone();
        self.time(&mut plan, |steps, _| steps == WARM_UP)?;
        let time = self.options.time / ROUNDS as u32;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let limits = Limits::measure(Isa::detect(), &self.pool)?;
            let peak = if self.costs.in_int8() {
                limits.arithmetic.int8
            } else {
                limits.arithmetic.bf16
            };
            let roof = (bytes / limits.read_gb_per_s).max(flops / peak) / 1e9;
            let seconds = self.time(&mut plan, |_, spent| spent > time)?;
            rounds.push((roof / seconds[seconds.len() / 2], roof, seconds));
        }
        rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (fraction, roof, seconds) = &rounds[ROUNDS / 2];
        let (tokens, median) = (plan.tokens.len() as f64, seconds[seconds.len() / 2]);
        println!(
            "{what} weights={} ms={:.2} tokens_per_s={:.1} best={:.1} bytes={bytes:.0} flops={flops:.0} \
             roof_tokens_per_s={:.1} fraction={fraction:.3}",
            self.options.weights_name,
            median * 1e3,
            tokens / median,
            tokens / seconds[0],
            tokens / roof,
        );
        Ok(())
    }

    /// Runs the plan until `enough` of the steps and the time so far; the times of single steps in seconds, the shortest
    /// first.
    fn time(
        &mut self,
        plan: &mut StepPlan,
        enough: impl Fn(usize, Duration) -> bool,
    ) -> Result<Vec<f64>, Failure> {
        let sampling = Sampling::default();
        let samples: Vec<SampleRow<'_>> = (0..plan.spans.len())
            .map(|span| SampleRow {
                span,
                sampling: &sampling,
                candidate: 0,
                output_index: 0,
                prompt: &[],
                outputs: &[],
                mask: None,
            })
            .collect();
        let (mut seconds, begun) = (Vec::new(), Instant::now());
        while seconds.is_empty() || !enough(seconds.len(), begun.elapsed()) {
            self.step += 1;
            plan.step = self.step;
            let start = Instant::now();
            let ticket = self.runner.submit(plan, &samples, &[], &[])?;
            let output = self.runner.collect(ticket)?;
            seconds.push(start.elapsed().as_secs_f64());
            for (span, sampled) in output.samples.drain(..).enumerate() {
                let id = sampled
                    .map_err(|error| format!("a step failed: {error:?}"))?
                    .id;
                if plan.tokens.len() == plan.spans.len() {
                    plan.tokens[span] = id;
                }
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds)
    }
}
