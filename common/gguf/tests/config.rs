//! A header as a `config.json`, against the folders that it was made of.

use gguf::write::{Writer, from_folder};
use gguf::{Gguf, TensorType};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn folder(model: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/models");
    models.join(model)
}

fn file(model: &str) -> Writer {
    from_folder(&folder(model), |_| TensorType::F16)
}

fn config(writer: &Writer) -> Result<Value, String> {
    let bytes = writer.to_bytes();
    let gguf = Gguf::read(&bytes[..], bytes.len() as u64).map_err(|error| error.to_string())?;
    gguf.config().map_err(|error| error.to_string())
}

#[test]
fn the_config_is_that_of_the_folder_the_file_was_made_of() {
    for model in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        let made = config(&file(model)).unwrap();
        let text = std::fs::read_to_string(folder(model).join("config.json")).unwrap();
        let theirs: Value = serde_json::from_str(&text).unwrap();
        for (key, value) in made.as_object().unwrap() {
            let (value, their) = match key.as_str() {
                // Defaults that the folder leaves out.
                "head_dim" => continue,
                "hidden_act"
                | "rope_theta"
                | "rope_scaling"
                | "mlp_bias"
                | "attention_bias"
                | "tie_word_embeddings"
                | "no_bias"
                | "expansion_ratio"
                | "layer_norm_epsilon"
                    if theirs.get(key).is_none() =>
                {
                    continue;
                }
                "attn_config" => (value["alibi"].clone(), theirs[key]["alibi"].clone()),
                key => (value.clone(), theirs[key].clone()),
            };
            let equal = match (value.as_f64(), their.as_f64()) {
                (Some(a), Some(b)) => a as f32 == b as f32,
                _ => value == their,
            };
            assert!(equal, "{model}, {key}: {value} and {their}");
        }
    }
}

#[test]
fn what_a_config_cannot_say_is_refused_by_key() {
    let whole = file("tiny-llama");
    let with = |key: &str, value: f32| {
        let mut writer = whole.clone();
        writer.set(key, value);
        config(&writer).unwrap_err()
    };
    assert_eq!(
        with("llama.logit_scale", 0.5),
        "its metadata: llama.logit_scale is 0.5; it is not served"
    );
    let count = |key: &str, value: u32| {
        let mut writer = whole.clone();
        writer.set(key, value);
        config(&writer).unwrap_err()
    };
    assert_eq!(
        count("llama.expert_count", 8),
        "its metadata: llama.expert_count is 8; mixtures of experts are not served"
    );
    assert!(count("llama.rope.dimension_count", 8).contains("the width of a head, 16"));
    let mut writer = file("tiny-llama");
    writer.set("llama.rope.scaling.type", "yarn");
    assert!(
        config(&writer)
            .unwrap_err()
            .contains("\"yarn\"; supported are none and linear")
    );
    writer.set("llama.rope.scaling.type", "linear");
    writer.set("llama.rope.scaling.factor", 2.0f32);
    let scaling = config(&writer).unwrap()["rope_scaling"].clone();
    assert_eq!(scaling, json!({"rope_type": "linear", "factor": 2.0}));
    writer.set("general.architecture", "qwen2");
    assert_eq!(
        config(&writer).unwrap_err(),
        "its metadata: general.architecture is \"qwen2\"; supported are llama (Mistral included) and mpt"
    );
}

#[test]
fn a_key_that_is_missing_is_named() {
    let whole = file("tiny-llama");
    for key in [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    ] {
        let mut writer = whole.clone();
        writer.unset(&format!("llama.{key}"));
        let expected = format!("its metadata: llama.{key} is missing; a llama model needs it");
        assert_eq!(config(&writer).unwrap_err(), expected);
    }
}

#[test]
fn numbers_by_layer_count_when_they_are_one() {
    let mut writer = file("tiny-llama");
    writer.set("llama.attention.head_count_kv", &[4, 4, 4, 4][..]);
    assert_eq!(config(&writer).unwrap()["num_key_value_heads"], 4);
    writer.set("llama.attention.head_count_kv", &[4, 4, 2, 4][..]);
    assert!(
        config(&writer)
            .unwrap_err()
            .contains("one number for all layers")
    );
}
