//! The tiny models as GGUF files tell the same facts as their folders, and broken files are named.

use std::fs;
use std::path::{Path, PathBuf};

use ::gguf::write::{Writer, from_folder};
use common::model_ref::ModelRef;

use super::*;
use crate::registry::{Context, ModelFacts, read_facts};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/models")
        .join(name)
}

fn facts(path: &Path) -> Result<ModelFacts, String> {
    let model = ModelRef::new("m", "1").unwrap();
    let context = Context::exact(&model, Default::default());
    read_facts(&context, path).map_err(|e| e.to_string())
}

/// The facts of a file alone in its folder; the folder and the file are the same model.
fn facts_of(writer: &Writer) -> Result<ModelFacts, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    fs::write(&file, writer.to_bytes()).unwrap();
    let (of_folder, of_file) = (facts(folder.path()), facts(&file));
    assert_eq!(
        of_folder.as_ref().map(|facts| &facts.tensors),
        of_file.as_ref().map(|facts| &facts.tensors)
    );
    of_file
}

fn tiny_llama(tensor_type: TensorType) -> Writer {
    from_folder(&tiny("tiny-llama"), |_| tensor_type)
}

#[test]
fn a_file_tells_what_its_models_folder_tells() {
    for name in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        let folder = facts(&tiny(name)).unwrap();
        let file = facts_of(&from_folder(&tiny(name), |_| TensorType::Bf16)).unwrap();
        assert_eq!(file.shape, folder.shape);
        let sorted = |facts: &ModelFacts| {
            let mut tensors = facts.tensors.clone();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            tensors
        };
        assert_eq!(sorted(&file), sorted(&folder));
    }
}

#[test]
fn matrices_have_the_forms_of_their_types() {
    let kept = |tensor_type: TensorType| {
        let facts = facts_of(&tiny_llama(tensor_type)).unwrap();
        let down = facts
            .tensors
            .iter()
            .find(|tensor| tensor.name.contains("down_proj"));
        down.unwrap().form
    };
    let grouped = |bits, offset| {
        Form::Grouped(Grouped {
            bits,
            group: 32,
            offset,
        })
    };
    assert_eq!(kept(TensorType::F16), Form::Float);
    assert_eq!(kept(TensorType::Q8_0), grouped(8, Offset::Middle));
    assert_eq!(kept(TensorType::Q4_0), grouped(4, Offset::Middle));
    assert_eq!(kept(TensorType::Q4_1), grouped(4, Offset::Mins));
}

#[test]
fn a_stack_of_different_types_becomes_floats() {
    let writer = from_folder(&tiny("tiny-llama"), |name| match name {
        "blk.1.attn_v.weight" => TensorType::Q8_0,
        _ => TensorType::Q4_0,
    });
    let facts = facts_of(&writer).unwrap();
    let form = |name: &str| {
        facts
            .tensors
            .iter()
            .find(|t| t.name.contains(name))
            .unwrap()
            .form
    };
    assert_eq!(form("layers.1.self_attn.q_proj"), Form::Unpacked);
    assert!(matches!(
        form("layers.0.self_attn.q_proj"),
        Form::Grouped(_)
    ));
}

#[test]
fn broken_files_are_named_with_what_is_wrong() {
    let refused = |change: &dyn Fn(&mut Writer)| {
        let mut writer = tiny_llama(TensorType::Q8_0);
        change(&mut writer);
        facts_of(&writer).unwrap_err()
    };
    let says = |message: String, part: &str| {
        assert!(
            message.contains("m.gguf: ") && message.contains(part),
            "{message}"
        );
    };
    says(
        refused(&|writer| writer.set("general.architecture", "gpt2")),
        "supported are llama",
    );
    says(
        refused(&|writer| writer.unset("llama.block_count")),
        "llama.block_count is missing",
    );
    says(
        refused(&|writer| writer.set("llama.block_count", 9u32)),
        "has no tensor blk.4.",
    );
    says(
        refused(&|writer| writer.set("llama.feed_forward_length", 64u32)),
        "its metadata ask for",
    );
    says(
        refused(&|writer| writer.set("llama.context_length", 0u32)),
        "max_position_embeddings must be a whole number",
    );
}

#[test]
fn a_file_that_is_cut_short_or_of_another_kind_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    let whole = tiny_llama(TensorType::Q4_0).to_bytes();
    for (bytes, part) in [
        (&whole[..whole.len() - 100], "past the end of the file"),
        (&whole[..100], "ends inside its header"),
        (&b"PK\x03\x04 and so on"[..], "not a GGUF file"),
        (&b""[..], "ends inside its header"),
    ] {
        fs::write(&file, bytes).unwrap();
        let message = facts(&file).unwrap_err();
        assert!(
            message.contains("m.gguf: ") && message.contains(part),
            "{message}"
        );
    }
}
