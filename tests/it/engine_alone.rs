//! The engine by itself, in the test's own process: what it makes of a checkpoint without workers, wire or API.

use std::path::Path;

use engine::backend::cpu::{CpuBackend, Pool};
use engine::backend::{KvDtype, WeightDtype};
use engine::collective::solo::Solo;
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{BLOCK_TOKENS, Logits, Span, StepPlan};
use engine::request::Sampling;
use engine::runner::{Runner, SampleRow};
use serde_json::Value;
use tokenizers::Tokenizer;

/// Longest sequence of the tiny models.
const CONTEXT: u32 = 1024;
const GENERATION: u64 = 1;

/// A checkpoint on one thread, one sequence at a time.
pub struct EngineAlone {
    runner: ModelRunner<CpuBackend, Solo>,
    tokenizer: Tokenizer,
    end_token: u32,
    steps: u64,
}

impl EngineAlone {
    /// Loads the checkpoint in a folder, with its tokenizer.
    pub fn load(folder: &Path) -> EngineAlone {
        let options = RunnerOptions {
            weight_dtype: WeightDtype::Bf16,
            kv_dtype: KvDtype::Bf16,
            blocks: 1 + CONTEXT / BLOCK_TOKENS as u32,
            step_tokens_max: CONTEXT,
            spans_max: 1,
            generation: GENERATION,
        };
        let checkpoint = Checkpoint::open(folder).unwrap();
        let backend = CpuBackend::new(Pool::new(1, &[]).unwrap()).unwrap();
        let generation = std::fs::read(folder.join("generation_config.json")).unwrap();
        let generation: Value = serde_json::from_slice(&generation).unwrap();
        EngineAlone {
            runner: ModelRunner::load(&checkpoint, &options, backend, Solo::new(), &mut |_| {})
                .unwrap(),
            tokenizer: Tokenizer::from_file(folder.join("tokenizer.json")).unwrap(),
            end_token: generation["eos_token_id"].as_u64().unwrap() as u32,
            steps: 0,
        }
    }

    /// The greedy continuation of a prompt of ids.
    pub fn continue_ids(&mut self, prompt: &[u32], tokens_max: u32) -> String {
        let mut all = prompt.to_vec();
        let mut computed = 0;
        while all.len() < prompt.len() + tokens_max as usize {
            let id = self.step(&all, computed);
            if id == self.end_token {
                break;
            }
            computed = all.len();
            all.push(id);
        }
        let text = |ids: &[u32]| self.tokenizer.decode(ids, true).unwrap();
        text(&all)[text(prompt).len()..].to_owned()
    }

    /// The most probable token after `tokens`, of which all from `computed` on are run.
    fn step(&mut self, tokens: &[u32], computed: usize) -> u32 {
        self.steps += 1;
        let plan = StepPlan {
            step: self.steps,
            generation: GENERATION,
            tokens: tokens[computed..].to_vec(),
            spans: vec![Span {
                position: computed as u32,
                len: (tokens.len() - computed) as u32,
                logits: Logits::Last,
                blocks: (1..=tokens.len().div_ceil(BLOCK_TOKENS) as u32).collect(),
            }],
        };
        let sample = SampleRow {
            span: 0,
            sampling: &Sampling::default(),
            candidate: 0,
            output_index: 0,
            prompt: &[],
            outputs: &[],
            mask: None,
        };
        let ticket = self.runner.submit(&plan, &[sample], &[], &[]).unwrap();
        let output = self.runner.collect(ticket).unwrap();
        output.samples.remove(0).unwrap().id
    }
}
