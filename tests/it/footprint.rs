//! The coordinator's memory plan against the engine's own account: both from the same `config.json`, for every rank.

use std::path::Path;

use common::model_ref::ModelRef;
use common::wire::message::{DeviceKind, KvDtype, Quantization};
use coordinator::policy::memory_plan::{self, RankNeed};
use coordinator::registry::{ModelFacts, read_config_facts};
use engine::backend::cpu::CpuBackend;
use engine::backend::cuda::CudaBackend;
use engine::backend::{self, WeightDtype};
use engine::model_runner::{Footprint, RunnerOptions};
use engine::models::spec::ModelSpec;
use serde_json::{Value, json};

/// A kind of device, and how weights, keys and values are kept on it.
#[derive(Debug, Clone, Copy)]
struct Form {
    device: DeviceKind,
    weights: Quantization,
    kv: KvDtype,
}

const CPU: [Form; 3] = [cpu(KvDtype::Bf16), cpu(KvDtype::F32), cpu(KvDtype::Int8)];
const CUDA: [Form; 3] = [
    cuda(Quantization::None),
    cuda(Quantization::Int8),
    cuda(Quantization::Int4),
];

const fn cpu(kv: KvDtype) -> Form {
    Form {
        device: DeviceKind::Cpu,
        weights: Quantization::None,
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
    let options = RunnerOptions {
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
        step_tokens_max: need.step_tokens_max,
        spans_max: need.sequences_max,
        generation: 1,
    };
    let (rank, ranks) = (rank as usize, need.ranks as usize);
    match form.device {
        DeviceKind::Cpu => Footprint::of::<CpuBackend>(spec, rank, ranks, &options),
        DeviceKind::Cuda => Footprint::of::<CudaBackend>(spec, rank, ranks, &options),
    }
    .unwrap()
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
                    // Matrices that the engine stacks are filled up to whole panels one by one here: much of a tiny model.
                    assert!(
                        (taken..=taken + taken / 10).contains(&planned),
                        "{what}: planned {planned}, taken {taken}, {ranks} ranks, {form:?}, {config}"
                    );
                }
            }
        }
    }
}
