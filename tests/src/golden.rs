//! The tiny models and what transformers makes of them: `tests/models`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// One tiny model per family.
pub const FAMILIES: [&str; 3] = ["tiny-llama", "tiny-mistral", "tiny-mpt"];

/// Below this gap between the two best tokens a bf16 KV cache may choose the other one.
pub const MARGIN_BF16_KV: f64 = 0.2;

/// Most output tokens of a golden.
pub const TOKENS_MAX: u32 = 64;

/// A prompt and its greedy continuation by transformers in float32.
#[derive(Debug, Clone, Deserialize)]
pub struct Golden {
    /// A short name of the prompt.
    pub name: String,
    /// The prompt.
    pub prompt: String,
    /// The prompt's ids, with those that the tokenizer adds.
    pub input_ids: Vec<u32>,
    /// The continuation's ids; a final end token is not among them.
    pub output_ids: Vec<u32>,
    /// The continuation.
    pub text: String,
    /// `stop` or `length`.
    pub finish_reason: String,
    /// The smallest gap in log-probability between the best and the second token.
    pub min_margin: f64,
}

/// A tiny model's folder.
pub fn model_folder(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("models")
        .join(model)
}

/// All goldens of a model.
pub fn all(model: &str) -> Vec<Golden> {
    #[derive(Deserialize)]
    struct File {
        float32: Vec<Golden>,
    }
    let path = model_folder("golden").join(model).join("golden.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file: File =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.float32
}

/// The goldens of a model that a bf16 KV cache must reproduce exactly.
pub fn exact(model: &str) -> Vec<Golden> {
    let mut goldens = all(model);
    goldens.retain(|golden| golden.min_margin > MARGIN_BF16_KV);
    assert!(
        goldens.len() >= 10,
        "{model} has only {} goldens with a clear margin",
        goldens.len()
    );
    goldens
}

/// One golden by name.
pub fn named(model: &str, name: &str) -> Golden {
    let found = all(model).into_iter().find(|golden| golden.name == name);
    found.unwrap_or_else(|| panic!("{model} has no golden {name}"))
}
