//! The coordinator's memory plan against the engine's own account: both from the same `config.json`, for every rank.

use std::path::Path;

use cluster_tests::golden;
use common::model_ref::ModelRef;
use common::wire::message::{DeviceKind, KvDtype, Quantization};
use coordinator::policy::memory_plan::{self, RankNeed};
use coordinator::registry::{Context, ModelFacts, read_config_facts, read_facts};
use engine::backend::cpu::CpuBackend;
use engine::backend::cuda::CudaBackend;
use engine::backend::{self, WeightDtype};
use engine::model_runner::{Footprint, RunnerOptions};
use engine::models::checkpoint::{Checkpoint, LoadError};
use engine::models::spec::ModelSpec;
use gguf::TensorType;
use gguf::write::from_folder;
use serde_json::{Value, json};

/// A kind of device, and how weights, keys and values are kept on it.
#[derive(Debug, Clone, Copy)]
struct Form {
    device: DeviceKind,
    weights: Quantization,
    kv: KvDtype,
}

const CPU: [Form; 5] = [
    cpu(Quantization::None, KvDtype::Bf16),
    cpu(Quantization::None, KvDtype::F32),
    cpu(Quantization::None, KvDtype::Int8),
    cpu(Quantization::Int8, KvDtype::Bf16),
    cpu(Quantization::Int4, KvDtype::Bf16),
];
const CUDA: [Form; 3] = [
    cuda(Quantization::None),
    cuda(Quantization::Int8),
    cuda(Quantization::Int4),
];

const fn cpu(weights: Quantization, kv: KvDtype) -> Form {
    Form {
        device: DeviceKind::Cpu,
        weights,
        kv,
    }
}

const fn cuda(weights: Quantization) -> Form {
    Form {
        device: DeviceKind::Cuda,
        weights,
        kv: KvDtype::Bf16,
    }
}

/// Both accounts of a model cut among `ranks`; the engine's is of the rank that has most of each part.
fn both(config: &Value, ranks: u32, form: Form) -> (RankNeed, Footprint) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let model = ModelRef::new("m", "1").unwrap();
    let facts = ModelFacts {
        quantization: form.weights,
        kv_dtype: form.kv,
        ..read_config_facts(&model, &file).unwrap()
    };
    let need = memory_plan::need(&facts, form.device, ranks, 4).unwrap();
    let spec = ModelSpec::from_config(&config.to_string()).unwrap();
    let footprint = |rank| of_rank(&spec, rank, &need, form);
    let most = (0..ranks).map(footprint).reduce(|a, b| Footprint {
        weights: a.weights.max(b.weights),
        kv_block: a.kv_block.max(b.kv_block),
        workspace: a.workspace.max(b.workspace),
    });
    (need, most.unwrap())
}

fn of_rank(spec: &ModelSpec, rank: u32, need: &RankNeed, form: Form) -> Footprint {
    let options = options(form, need.step_tokens_max, need.sequences_max);
    let (rank, ranks) = (rank as usize, need.ranks as usize);
    match form.device {
        DeviceKind::Cpu => Footprint::of::<CpuBackend>(spec, rank, ranks, &options),
        DeviceKind::Cuda => Footprint::of::<CudaBackend>(spec, rank, ranks, &options),
    }
    .unwrap()
}

fn options(form: Form, step_tokens_max: u32, spans_max: u32) -> RunnerOptions {
    RunnerOptions {
        weight_dtype: match form.weights {
            Quantization::None => WeightDtype::Bf16,
            Quantization::Int8 => WeightDtype::Int8,
            Quantization::Int4 => WeightDtype::Int4,
        },
        kv_dtype: match form.kv {
            KvDtype::Bf16 => backend::KvDtype::Bf16,
            KvDtype::F32 => backend::KvDtype::F32,
            KvDtype::Int8 => backend::KvDtype::Int8,
        },
        blocks: 2,
        step_tokens_max,
        spans_max,
        generation: 1,
    }
}

fn published() -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/configs");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        all.push((path.file_stem().unwrap().to_string_lossy().into(), config));
    }
    all
}

#[test]
fn plan_and_engine_agree_on_published_models_to_the_byte() {
    let models = published();
    assert!(models.len() >= 7, "{models:?}");
    for (name, config) in models {
        for ranks in [1, 2, 4] {
            for form in CPU.into_iter().chain(CUDA) {
                let (plan, taken) = both(&config, ranks, form);
                let workspace = plan.workspace_bytes + plan.scratch_bytes;
                assert_eq!(
                    (plan.weight_bytes, workspace, plan.block_bytes),
                    (taken.weights, taken.workspace, taken.kv_block),
                    "{name} on {ranks} ranks, {form:?}"
                );
            }
        }
    }
}

/// A tiny model as a GGUF file, matrices in these types by their names in the file.
fn file_of(model: &str, types: impl Fn(&str) -> TensorType) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let writer = from_folder(&golden::model_folder(model), types);
    std::fs::write(folder.path().join("m.gguf"), writer.to_bytes()).unwrap();
    folder
}

/// One type for all, and mixtures as quantisers make them.
fn mixture(number: usize, name: &str) -> TensorType {
    use TensorType::{Bf16, Q4_0, Q4_1, Q8_0};
    match (number, name) {
        (0, _) => Bf16,
        (1, _) => Q8_0,
        (2, _) => Q4_0,
        (3, _) => Q4_1,
        // The ends better than the rest; a stack that differs in one part.
        (4, "token_embd.weight" | "output.weight") => Q8_0,
        (4, "blk.1.attn_v.weight") => Q4_1,
        (4, _) => Q4_0,
        // The ends as floats.
        (_, "token_embd.weight" | "output.weight") => Bf16,
        (_, name) if name.contains("ffn_down") => Q8_0,
        _ => Q4_1,
    }
}

#[test]
fn plan_and_engine_agree_on_what_gguf_files_have_and_on_what_is_refused() {
    for model in golden::FAMILIES {
        for number in 0..6 {
            let folder = file_of(model, |name| mixture(number, name));
            let file = folder.path().join("m.gguf");
            let checkpoint = Checkpoint::open(&file).unwrap();
            let name = ModelRef::new("m", "1").unwrap();
            let facts = read_facts(&Context::exact(&name, Default::default()), &file).unwrap();
            for form in CPU.into_iter().chain(CUDA) {
                for ranks in [1, 2] {
                    let what = format!("{model} {number} on {ranks} ranks, {form:?}");
                    let facts = ModelFacts {
                        quantization: form.weights,
                        kv_dtype: form.kv,
                        ..facts.clone()
                    };
                    let planned = memory_plan::need(&facts, form.device, ranks, 4);
                    let taken = |rank| of_file(&checkpoint, rank, ranks, form);
                    match planned {
                        Ok(plan) => {
                            let most = (0..ranks).map(|rank| taken(rank).unwrap().weights).max();
                            // The rank that has most has not the most of every matrix.
                            let most = most.unwrap();
                            assert!(
                                (most..=most + most / 50).contains(&plan.weight_bytes),
                                "{what}: planned {}, taken {most}",
                                plan.weight_bytes
                            );
                        }
                        Err(refused) => {
                            let taken = taken(0).unwrap_err().to_string();
                            let says = |words: &str| words.contains("quantization out");
                            let both = (refused.to_string(), taken);
                            assert!(says(&both.0) && says(&both.1), "{what}: {both:?}");
                        }
                    }
                }
            }
        }
    }
}

fn of_file(
    checkpoint: &Checkpoint,
    rank: u32,
    ranks: u32,
    form: Form,
) -> Result<Footprint, LoadError> {
    let options = options(form, 512, 64);
    let (rank, ranks) = (rank as usize, ranks as usize);
    match form.device {
        DeviceKind::Cpu => {
            Footprint::of_checkpoint::<CpuBackend>(checkpoint, rank, ranks, &options)
        }
        DeviceKind::Cuda => {
            Footprint::of_checkpoint::<CudaBackend>(checkpoint, rank, ranks, &options)
        }
    }
}

/// Models whose parts fill nothing up, with heads of these widths.
fn odd([a, b, c, d, e]: [u64; 5]) -> [Value; 5] {
    let llama = |heads: u64, kv: u64, width: u64, middle: u64, vocab: u64, bias: bool| {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": heads * width, "head_dim": width,
            "num_hidden_layers": 3, "num_attention_heads": heads, "num_key_value_heads": kv,
            "intermediate_size": middle, "vocab_size": vocab, "max_position_embeddings": 777,
            "attention_bias": bias, "mlp_bias": bias, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "tie_word_embeddings": bias})
    };
    let mpt = |heads: u64, width: u64, vocab: u64, qk_ln: bool| {
        json!({"architectures": ["MPTForCausalLM"], "d_model": heads * width, "n_heads": heads, "n_layers": 2,
            "expansion_ratio": 4, "max_seq_len": 300, "vocab_size": vocab, "no_bias": !qk_ln,
            "attn_config": {"alibi": true, "qk_ln": qk_ln}})
    };
    [
        llama(12, 4, a, 1001, 3001, true),
        llama(8, 2, b, 333, 997, false),
        llama(4, 1, c, 100, 101, true),
        mpt(12, d, 1003, true),
        mpt(4, e, 501, false),
    ]
}

#[test]
fn odd_shapes_are_planned_a_little_too_large_and_never_too_small() {
    let on_cpu = odd([24, 40, 16, 36, 16]).map(|config| (config, &CPU[..]));
    // Widths that there are kernels for.
    let on_cuda = odd([32, 80, 16, 112, 16]).map(|config| (config, &CUDA[..]));
    for (config, forms) in on_cpu.into_iter().chain(on_cuda) {
        for ranks in [1, 2, 4] {
            for &form in forms {
                let (plan, taken) = both(&config, ranks, form);
                for (what, planned, taken) in [
                    ("weights", plan.weight_bytes, taken.weights),
                    (
                        "workspace",
                        plan.workspace_bytes + plan.scratch_bytes,
                        taken.workspace,
                    ),
                    ("a KV block", plan.block_bytes, taken.kv_block),
                ] {
                    // Figures are of the rank that has most of each part; on a GPU rows are filled up one by one.
                    assert!(
                        (taken..=taken + taken / 10).contains(&planned),
                        "{what}: planned {planned}, taken {taken}, {ranks} ranks, {form:?}, {config}"
                    );
                }
            }
        }
    }
}
