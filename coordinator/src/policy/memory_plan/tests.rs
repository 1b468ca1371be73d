//! The plan against models whose numbers are known.

use common::model_ref::ModelRef;
use common::wire::message::{KvDtype, ModelSource, Quantization};
use proptest::prelude::*;

use super::*;
use crate::registry::form::{Form, Grouped, Offset};
use crate::registry::shape::Family;
use crate::registry::tensors::{Slice, WeightTensor};
use crate::registry::{Context, Shape};

/// A bf16 Llama of this shape, with the tensors its checkpoint would have.
fn llama(
    hidden: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    intermediate: u64,
    vocab: u64,
    context: u32,
) -> ModelFacts {
    let head_width = hidden / heads;
    let shape = Shape {
        architecture: "LlamaForCausalLM".into(),
        family: Family::Llama,
        hidden,
        layers,
        heads,
        kv_heads,
        head_width,
        intermediate,
        vocab,
        context_max: context,
        tied: false,
        attention_bias: false,
        mlp_bias: false,
        norm_bias: false,
        qk_norm: false,
    };
    let mut tensors = Vec::new();
    let mut add = |name: &str, dims: &[u64], slice| {
        let by_columns = matches!(name, "o" | "down");
        tensors.push(WeightTensor {
            name: name.into(),
            dims: dims.to_vec(),
            slice,
            by_columns,
            form: Form::Float,
        });
    };
    add("embed", &[vocab, hidden], Slice::Vocabulary);
    add("lm_head", &[vocab, hidden], Slice::Vocabulary);
    for _ in 0..layers {
        add("q", &[hidden, hidden], Slice::Heads);
        add("k", &[kv_heads * head_width, hidden], Slice::KvHeads);
        add("v", &[kv_heads * head_width, hidden], Slice::KvHeads);
        add("o", &[hidden, hidden], Slice::Heads);
        add("gate", &[intermediate, hidden], Slice::Middle);
        add("up", &[intermediate, hidden], Slice::Middle);
        add("down", &[hidden, intermediate], Slice::Middle);
        add("norm", &[hidden], Slice::Whole);
        add("norm", &[hidden], Slice::Whole);
    }
    add("norm", &[hidden], Slice::Whole);
    let model = ModelRef::new("m", "1").unwrap();
    ModelFacts {
        model,
        source: ModelSource::Folder("/m".into()),
        task: None,
        shape,
        tensors,
        kv_dtype: KvDtype::Bf16,
        quantization: Quantization::None,
        context_max: context,
    }
}

fn llama_70b() -> ModelFacts {
    llama(8192, 80, 64, 8, 28672, 32000, 4096)
}

const A100: u64 = 80 << 30;

/// Bytes of weights that the engine says it took, for 1 and 2 ranks.
#[test]
fn the_plan_agrees_with_what_the_engine_takes() {
    let measured = [
        ("tiny-llama", 1, 2_527_744),
        ("tiny-llama", 2, 1_266_176),
        ("tiny-mistral", 1, 2_560_512),
        ("tiny-mpt", 2, 1_053_184),
    ];
    for (name, ranks, taken) in measured {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/models")
            .join(name);
        let model = ModelRef::new("m", "1").unwrap();
        let facts =
            crate::registry::read_facts(&Context::exact(&model, Default::default()), &folder)
                .unwrap();
        let planned = need(&facts, DeviceKind::Cpu, ranks, 4)
            .unwrap()
            .weight_bytes;
        assert!(
            (taken..=taken + taken / 50).contains(&planned),
            "{name} on {ranks}: planned {planned}, taken {taken}"
        );
    }
}

#[test]
fn a_70b_model_needs_two_a100_and_a_34b_one() {
    let one = need(&llama_70b(), DeviceKind::Cuda, 1, 4).unwrap();
    assert!(one.fit(A100, 4).is_none(), "{}", one.text());
    let two = need(&llama_70b(), DeviceKind::Cuda, 2, 4).unwrap();
    let plan = two.fit(A100, 64).unwrap();
    // 69e9 parameters of two bytes, half on each, and padding.
    assert!(
        (64..70).contains(&(plan.need.weight_bytes >> 30)),
        "{}",
        plan.need.text()
    );
    // 2 (K, V) x 80 layers x 4 heads x 128 x 2 bytes x 16 tokens.
    assert_eq!(plan.need.block_bytes, 2 * 80 * 4 * 128 * 2 * 16);
    assert!(plan.concurrency() >= 4 && plan.bytes() <= A100);
    let code_llama_34b = llama(8192, 48, 64, 8, 22016, 32000, 16384);
    assert!(
        need(&code_llama_34b, DeviceKind::Cuda, 1, 4)
            .unwrap()
            .fit(A100, 4)
            .is_some()
    );
}

fn llama_7b(quantization: Quantization) -> ModelFacts {
    ModelFacts {
        quantization,
        ..llama(4096, 32, 32, 32, 11008, 32000, 4096)
    }
}

#[test]
fn quantised_weights_on_a_gpu_are_numbers_and_scales_and_their_ends_stay_bf16() {
    let bytes = |quantization, ranks| {
        let facts = llama_7b(quantization);
        need(&facts, DeviceKind::Cuda, ranks, 4).unwrap()
    };
    // Two ends of 32,000 rows; 65 norms in f32.
    let (ends, norms) = (2 * 32_000 * 4096 * 2, 65 * 4096 * 4);
    // A row of 4096 has 32 groups, one of 11,008 has 86. Four scales' bytes each, with a zero point in int4.
    let int8 = 4 * 4096 * (4096 + 32 * 4) + 2 * 11_008 * (4096 + 32 * 4) + 4096 * (11_008 + 86 * 4);
    let int4 = 4 * 4096 * (2048 + 32 * 5) + 2 * 11_008 * (2048 + 32 * 5) + 4096 * (5504 + 86 * 5);
    let bf16 = 2 * (4 * 4096 * 4096 + 3 * 11_008 * 4096);
    for (quantization, layer) in [
        (Quantization::None, bf16),
        (Quantization::Int8, int8),
        (Quantization::Int4, int4),
    ] {
        let need = bytes(quantization, 1);
        assert_eq!(need.weight_bytes, ends + norms + 32 * layer);
        assert_eq!(
            need.parameters,
            6_738_415_616 - 65 * 4096,
            "{quantization:?}"
        );
    }
    // Of four ranks each has 2752 columns of the MLP's middle: 21.5 groups, which touch 22.
    let middle = 4096 * (2752 + 22 * 4);
    let rows = (3 * 1024 + 2 * 2752) * (4096 + 32 * 4);
    let out = 4096 * (1024 + 8 * 4);
    assert_eq!(
        bytes(Quantization::Int8, 4).weight_bytes,
        ends / 4 + norms + 32 * (rows + out + middle)
    );
}

/// A model whose layers' matrices lie so in their files.
fn llama_7b_in(form: Grouped) -> ModelFacts {
    let mut facts = llama_7b(Quantization::None);
    let matrices = facts
        .tensors
        .iter_mut()
        .filter(|tensor| tensor.dims.len() == 2);
    for tensor in matrices.filter(|tensor| tensor.slice != Slice::Vocabulary) {
        tensor.form = Form::Grouped(form);
    }
    facts
}

fn weight_bytes(facts: &ModelFacts, kind: DeviceKind, ranks: u32) -> u64 {
    need(facts, kind, ranks, 4).unwrap().weight_bytes
}

#[test]
fn quantised_weights_on_a_cpu_have_scales_of_two_bytes_and_an_int8_head() {
    let (table, head, norms) = (32_000 * 4096 * 2, 32_000 * (4096 + 32 * 2), 65 * 4096 * 4);
    // A row of 4096 has 32 groups, one of 11,008 has 86.
    let int8 = (4 * 4096 + 2 * 11_008) * (4096 + 32 * 2) + 4096 * (11_008 + 86 * 2);
    let int4 = (4 * 4096 + 2 * 11_008) * (2048 + 32 * 2) + 4096 * (5504 + 86 * 2);
    for (quantization, layer) in [(Quantization::Int8, int8), (Quantization::Int4, int4)] {
        let facts = llama_7b(quantization);
        assert_eq!(
            weight_bytes(&facts, DeviceKind::Cpu, 1),
            table + head + norms + 32 * layer
        );
    }
    // Of four ranks each has 2752 columns of the MLP's middle: 21.5 groups.
    let middle = 4096 * (2752 + 22 * 2);
    let rows = (3 * 1024 + 2 * 2752) * (4096 + 32 * 2);
    let out = 4096 * (1024 + 8 * 2);
    assert_eq!(
        weight_bytes(&llama_7b(Quantization::Int8), DeviceKind::Cpu, 4),
        (table + head) / 4 + norms + 32 * (rows + out + middle)
    );
}

#[test]
fn ready_made_forms_are_planned_as_they_are_where_the_device_has_products_for_them() {
    let form = |bits, group, offset| Grouped {
        bits,
        group,
        offset,
    };
    let (ends, norms) = (2 * 32_000 * 4096 * 2, 65 * 4096 * 4);
    let numbers = 4 * 4096 * 4096 + 3 * 11_008 * 4096;
    let q4_1 = llama_7b_in(form(4, 32, Offset::Mins));
    // 20 bytes for 32 numbers, as in the file.
    assert_eq!(
        weight_bytes(&q4_1, DeviceKind::Cpu, 1),
        ends + norms + 32 * numbers / 32 * 20
    );
    // On a GPU it is bf16 again.
    let bf16 = weight_bytes(&llama_7b(Quantization::None), DeviceKind::Cuda, 1);
    assert_eq!(weight_bytes(&q4_1, DeviceKind::Cuda, 1), bf16);
    let awq = llama_7b_in(form(4, 128, Offset::Zeros));
    assert_eq!(
        weight_bytes(&awq, DeviceKind::Cpu, 1),
        ends + norms + 32 * numbers / 128 * (64 + 2 + 2)
    );
    assert_eq!(
        weight_bytes(&awq, DeviceKind::Cuda, 1),
        ends + norms + 32 * numbers / 128 * (64 + 4 + 1)
    );
}

#[test]
fn ready_made_weights_are_not_quantised_again() {
    let mut facts = llama_7b_in(Grouped {
        bits: 4,
        group: 32,
        offset: Offset::Middle,
    });
    facts.quantization = Quantization::Int8;
    let message = need(&facts, DeviceKind::Cpu, 1, 4).unwrap_err().to_string();
    assert!(
        message.starts_with(
            "the weights of m version 1 are in int4 already (q) and are not changed to int8"
        ),
        "{message}"
    );
    // Floats beside them, the head for one, become int4 too.
    facts.quantization = Quantization::Int4;
    assert!(need(&facts, DeviceKind::Cpu, 1, 4).is_ok());
}

#[test]
fn a_gpu_counts_its_own_memory_alone() {
    let facts = llama_7b(Quantization::None);
    let need = need(&facts, DeviceKind::Cuda, 1, 64).unwrap();
    // x, y, qkv, attention's output, gate, up and middle, angles: of 2048 tokens; the logits of 128 rows.
    let per_token = 2 * 4096 + 3 * 4096 + 4096 + 3 * 11_008 + 128;
    assert_eq!(
        need.workspace_bytes,
        4 * (2048 * per_token + 128 * (4096 + 32_000))
    );
    // cuBLAS, rounding and draws; the cast of the widest row; 64 parts of 32 heads; tables.
    let fixed = (32 << 20) + (1 << 20) + (64 << 10);
    let split = 4 * 32 * 130 * 64;
    let tables = 4 * (2 * 2048 + 2 * 32 + 9 * 64 + 64 * 256);
    assert_eq!(
        need.scratch_bytes,
        fixed + 2 * 2048 * 11_008 + split + tables
    );
    // 32 layers of 16 kernels and 8 more, recorded for 1, 2, 4, 8, 16, 24, 32, 48 and 64 sequences.
    assert_eq!(need.overhead_bytes, (32 * 16 + 8) * 9 * (64 << 10));
    assert_eq!(need.block_bytes, 2 * 16 * 32 * 32 * 128 * 2);
}

#[test]
fn what_a_kind_of_device_has_no_kernels_for_is_refused_before_a_worker_is_asked() {
    let refused = |facts: &ModelFacts, kind| need(facts, kind, 1, 4).unwrap_err().to_string();
    let mut facts = llama_7b(Quantization::None);
    facts.kv_dtype = KvDtype::F32;
    assert!(refused(&facts, DeviceKind::Cuda).contains("f32 are served on CPUs alone"));
    assert!(need(&facts, DeviceKind::Cpu, 1, 4).is_ok());
    let odd = llama(96, 2, 2, 2, 96, 100, 128);
    assert_eq!(
        refused(&odd, DeviceKind::Cuda),
        "heads of 48 numbers are not served on GPUs, which have kernels for 16, 32, 64, 80, 96, 112, 128, 256"
    );
    assert!(need(&odd, DeviceKind::Cpu, 1, 4).is_ok());
}

#[test]
fn kv_heads_are_repeated_when_there_are_fewer_than_ranks() {
    let facts = llama(64, 2, 8, 2, 96, 100, 128);
    let block = |ranks| need(&facts, DeviceKind::Cpu, ranks, 4).unwrap().block_bytes;
    assert_eq!(block(2), block(1) / 2);
    assert_eq!(block(4), block(2), "one head each, whatever the ranks");
    assert_eq!(block(8), block(2));
}

#[test]
fn ranks_that_do_not_divide_the_heads_are_refused_with_what_would_do() {
    let facts = llama(96, 2, 12, 3, 96, 100, 128);
    let message = |ranks| {
        need(&facts, DeviceKind::Cpu, ranks, 4)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message(5),
        "12 attention heads cannot be divided among 5 shards; choose a workload type with a divisor of 12 shards"
    );
    assert!(message(2).contains("3 KV heads cannot be divided among 2 shards"));
}

#[test]
fn a_pool_shrinks_to_the_memory_and_holds_one_sequence_at_least() {
    let facts = llama(64, 2, 8, 4, 96, 100, 128);
    let need = need(&facts, DeviceKind::Cpu, 1, 64).unwrap();
    assert_eq!(need.fit(u64::MAX / 2, 64).unwrap().concurrency(), 64);
    let least = need.fit(need.least_bytes(), 64).unwrap();
    assert_eq!(
        (least.concurrency(), least.bytes()),
        (1, need.least_bytes())
    );
    assert_eq!(need.fit(need.least_bytes() - 1, 64), None);
    assert_eq!(need.context_within(need.least_bytes()), 128);
    assert_eq!(
        need.context_within(need.least_bytes() - need.block_bytes),
        112
    );
    assert_eq!(need.context_within(0), 0);
}

proptest! {
    #[test]
    fn ranks_together_hold_the_whole_model_and_each_less_than_it(
        kv_heads in 1u64..5, per_kv in 1u64..4, ranks in 1u32..9, layers in 1u64..4,
    ) {
        let heads = kv_heads * per_kv;
        let facts = llama(heads * 8, layers, heads, kv_heads, 96, 100, 64);
        let whole: u64 = facts.tensors.iter().map(|t| t.dims.iter().product::<u64>() * 2).sum();
        if let Ok(rank) = need(&facts, DeviceKind::Cpu, ranks, 4) {
            prop_assert!(rank.weight_bytes * u64::from(ranks) >= whole);
            let alone = need(&facts, DeviceKind::Cpu, 1, 4).unwrap();
            prop_assert!(rank.weight_bytes <= alone.weight_bytes && rank.block_bytes <= alone.block_bytes);
            let plan = rank.fit(rank.bytes_for(3), 3).unwrap();
            prop_assert_eq!(plan.concurrency(), 3);
            prop_assert!(plan.bytes() <= rank.bytes_for(3));
        }
    }
}
