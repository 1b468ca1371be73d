//! Checkpoints that are quantised already: a model computes with the very numbers that its file stands for, on any number of
//! ranks, and takes as much memory as is announced.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{Backend, WeightDtype};
use engine::collective::Collective;
use engine::collective::solo::Solo;
use engine::model_runner::{Footprint, ModelRunner};
use engine::models::checkpoint::Checkpoint;
use engine::models::config::Config;
use engine::models::quantization;
use engine::weights::Weights;
use gguf::TensorType;
use std::path::Path;
use support::quantiser::Quantiser;
use support::ready;
use support::short::{distance, logits, options};
use support::{AllLogits, cpu, models};
use tempfile::TempDir;

const NAMES: [&str; 3] = ["tiny-llama", "tiny-mistral", "tiny-mpt"];
const KEPT: [TensorType; 3] = [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1];

fn reference(path: &Path, weights: WeightDtype) -> AllLogits {
    logits(path, weights, 1, || ReferenceBackend)
}

/// Embedding and head, which are kept in bf16.
fn is_end(name: &str) -> bool {
    ["embed_tokens", "wte", "lm_head"]
        .iter()
        .any(|end| name.contains(end))
}

/// The packed bytes are the announced ones.
fn check_bytes<B: Backend>(path: &Path, weights: WeightDtype, backend: B)
where
    Solo: Collective<B::Buf>,
{
    let checkpoint = Checkpoint::open(path).expect("a good checkpoint");
    let (mut packed, options) = (0, options(weights));
    let mut progress = |bytes| packed = bytes;
    ModelRunner::load(&checkpoint, &options, backend, Solo::new(), &mut progress).expect("loads");
    let footprint = Footprint::of_checkpoint::<B>(&checkpoint, 0, 1, &options).expect("one rank");
    let spec = &checkpoint.spec;
    let norms = 4 * (2 * spec.layers + 1) * spec.hidden;
    assert_eq!(footprint.weights, packed + norms as u64);
}

/// The checkpoint computes with the numbers of its twin: exactly where its numbers are taken as they are, and near them where
/// activations are quantised or sums are in another order.
fn check_twin(path: &Path, twin: &Path) {
    let expected = reference(twin, WeightDtype::F32);
    assert_eq!(reference(path, WeightDtype::Bf16), expected);
    for ranks in [2, 4] {
        let off = distance(
            &logits(path, WeightDtype::Bf16, ranks, || ReferenceBackend),
            &expected,
        );
        assert!(off < 1e-5, "{ranks} ranks: {off}");
        let off = distance(&logits(path, WeightDtype::Bf16, ranks, cpu), &expected);
        assert!(off < 0.03, "{ranks} ranks on a CPU: {off}");
    }
    // f32 asks for floats, whatever the checkpoint has.
    let floats = logits(path, WeightDtype::F32, 1, || ReferenceBackend);
    let off = distance(&floats, &expected);
    assert!(off < 0.02, "as floats: {off}");
    check_bytes(path, WeightDtype::Bf16, ReferenceBackend);
    check_bytes(path, WeightDtype::Bf16, cpu());
}

fn open_gguf(dir: &TempDir) -> Weights {
    let (weights, _) = Weights::open_gguf(&ready::file_in(dir)).expect("a good file");
    weights
}

fn refused(path: &Path) -> String {
    let dir = path.display().to_string();
    let error = Checkpoint::open(path).expect_err("refused").to_string();
    error.replace(&dir, "PATH")
}

fn notes(path: &Path, weights: WeightDtype) -> Vec<String> {
    let checkpoint = Checkpoint::open(path).expect("a good checkpoint");
    let notes = checkpoint.notes::<ReferenceBackend>(0, 1, weights);
    notes.expect("one rank")
}

#[test]
fn a_file_of_floats_is_the_folder_it_was_made_of() {
    for name in NAMES {
        let folder = reference(&models().join(name), WeightDtype::Bf16);
        for tensor_type in [TensorType::F32, TensorType::Bf16] {
            let dir = ready::gguf(name, |_| tensor_type);
            assert_eq!(
                reference(&ready::file_in(&dir), WeightDtype::Bf16),
                folder,
                "{name}, {tensor_type}"
            );
            assert_eq!(
                reference(dir.path(), WeightDtype::Int4),
                reference(&models().join(name), WeightDtype::Int4),
                "{name}, {tensor_type}, quantised while it is loaded"
            );
        }
        // f16 has not the exponents of bf16.
        let dir = ready::gguf(name, |_| TensorType::F16);
        let off = distance(&reference(dir.path(), WeightDtype::Bf16), &folder);
        assert!(off < 1e-3, "{name}, F16: {off}");
    }
}

#[test]
fn blocks_of_32_are_kept_as_they_are() {
    for name in NAMES {
        for tensor_type in KEPT {
            let dir = ready::gguf(name, |_| tensor_type);
            let twin = ready::twin(name, &open_gguf(&dir), is_end);
            check_twin(dir.path(), twin.path());
            let notes = notes(dir.path(), WeightDtype::Bf16);
            assert_eq!(
                notes,
                [
                    format!("16 matrices of the layers are {tensor_type}"),
                    "16 of 16 are kept as they are, the others packed as bf16".to_owned()
                ]
            );
        }
    }
}

#[test]
fn blocks_of_256_become_floats() {
    for tensor_type in [TensorType::Q4_K, TensorType::Q6_K] {
        // The one matrix of the tiny models whose rows are whole blocks.
        let large = |name: &str| name.contains("ffn_down");
        let dir = ready::gguf("tiny-mpt", |name| match large(name) {
            true => tensor_type,
            false => TensorType::Q8_0,
        });
        let rounded = |name: &str| is_end(name) || name.contains("down_proj");
        let twin = ready::twin("tiny-mpt", &open_gguf(&dir), rounded);
        check_twin(dir.path(), twin.path());
        let notes = notes(dir.path(), WeightDtype::Bf16);
        assert!(notes[2].starts_with("12 of 16 are kept"), "{notes:?}");
        check_bytes(dir.path(), WeightDtype::Int8, ReferenceBackend);
    }
}

#[test]
fn stacked_matrices_of_several_forms_become_floats() {
    let dir = ready::gguf("tiny-llama", |name| match name {
        name if name.contains("attn_k") => TensorType::Q8_0,
        name if name.contains("ffn_up") => TensorType::F16,
        _ => TensorType::Q4_1,
    });
    let apart = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"];
    let rounded = |name: &str| is_end(name) || apart.iter().any(|part| name.contains(part));
    let twin = ready::twin("tiny-llama", &open_gguf(&dir), rounded);
    check_twin(dir.path(), twin.path());
    let notes = notes(dir.path(), WeightDtype::Bf16);
    assert_eq!(notes[1], "4 matrices of the layers are Q4_1 and F16");
    assert_eq!(
        notes[2],
        "4 matrices of the layers are Q4_1 and Q8_0 and Q4_1"
    );
    assert_eq!(
        notes[3],
        "8 of 16 are kept as they are, the others packed as bf16"
    );
}

#[test]
fn what_gptq_and_awq_have_made_is_kept_as_it_is() {
    let (gptq, awq) = (Quantiser::GPTQ, Quantiser::AWQ);
    for (quantiser, kept) in [
        (gptq, true),
        (
            Quantiser {
                group: 64,
                second: true,
                ..gptq
            },
            true,
        ),
        (Quantiser { bits: 8, ..gptq }, true),
        (
            Quantiser {
                by_index: true,
                ..gptq
            },
            false,
        ),
        (awq, true),
        (Quantiser { group: 128, ..awq }, true),
    ] {
        let dir = ready::quantised("tiny-llama", quantiser);
        let mut weights = Weights::open(dir.path()).expect("safetensors");
        let config = std::fs::read_to_string(dir.path().join("config.json")).expect("a config");
        let config = Config::parse(&config).expect("an object");
        let format = quantization::format(&config).expect("a known form");
        weights.assemble(format.expect("quantised")).expect("whole");
        let rounded = |name: &str| is_end(name) || (!kept && name.contains("_proj"));
        let twin = ready::twin("tiny-llama", &weights, rounded);
        check_twin(dir.path(), twin.path());
        // The numbers are near those they were made of, or words and zero points would be mixed up.
        let off = distance(
            &reference(dir.path(), WeightDtype::Bf16),
            &reference(&models().join("tiny-llama"), WeightDtype::Bf16),
        );
        assert!(off < 0.4, "{quantiser:?}: {off}");
    }
}

#[test]
fn an_option_that_would_change_kept_numbers_is_refused() {
    let load = |path: &Path, weights| {
        let checkpoint = Checkpoint::open(path).expect("a good checkpoint");
        let options = options(weights);
        ModelRunner::load(
            &checkpoint,
            &options,
            ReferenceBackend,
            Solo::new(),
            &mut |_| {},
        )
        .map(|_| ())
        .map_err(|error| error.to_string())
    };
    let dir = ready::gguf("tiny-llama", |_| TensorType::Q4_0);
    assert_eq!(load(dir.path(), WeightDtype::Int4), Ok(()));
    assert_eq!(
        load(dir.path(), WeightDtype::Int8),
        Err(
            "model.layers.0.self_attn.q_proj is int4 in the checkpoint and cannot be made int8; leave the quantization out"
                .to_owned()
        )
    );
    // Floats beside them follow the option.
    let dir = ready::gguf("tiny-llama", |name| match name.contains("ffn_") {
        true => TensorType::F16,
        false => TensorType::Q8_0,
    });
    assert_eq!(load(dir.path(), WeightDtype::Int8), Ok(()));
    check_bytes(dir.path(), WeightDtype::Int8, ReferenceBackend);
    assert!(load(dir.path(), WeightDtype::Int4).is_err());
}

#[test]
fn files_that_cannot_be_served_are_refused_in_words() {
    let dir = ready::gguf("tiny-llama", |_| TensorType::F16);
    let file = ready::file_in(&dir);
    let bytes = std::fs::read(&file).expect("written");
    for end in [0, 3, 4, 100, 2000, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..end]).expect("written");
        assert!(refused(&file).starts_with("PATH: "), "cut at {end}");
    }
    std::fs::write(dir.path().join("other.gguf"), &bytes).expect("written");
    assert_eq!(
        refused(dir.path()),
        "PATH has 2 .gguf files; name the one to be served as the model's path"
    );

    let mut writer = gguf::write::from_folder(&models().join("tiny-llama"), |_| TensorType::F16);
    let with = |writer: &gguf::write::Writer| {
        std::fs::write(&file, writer.to_bytes()).expect("written");
        refused(&file)
    };
    writer.set("llama.embedding_length", 256u32);
    assert!(
        with(&writer).starts_with("tensor model.embed_tokens.weight has the shape [2048, 128]")
    );
    writer.set("llama.embedding_length", 128u32);
    writer.tensor(
        "blk.0.attn_sinks.weight",
        &[8],
        TensorType::F32,
        vec![0; 32],
    );
    assert_eq!(
        with(&writer),
        "the checkpoint has a tensor blk.0.attn_sinks.weight that config.json does not account for"
    );
    writer.tensor(
        "blk.0.odd.weight",
        &[256],
        TensorType::Other(13),
        vec![0; 176],
    );
    assert_eq!(
        with(&writer),
        "PATH: tensor blk.0.odd.weight is Q5_K; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K"
    );
    writer.set("general.architecture", "qwen2");
    assert!(with(&writer).contains("general.architecture is \"qwen2\"; supported are llama"));
}
