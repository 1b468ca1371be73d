//! Mistral: a Llama with a sliding window, and no biases. Its weights have Llama's names.

use super::config::Config;
use super::llama;
use super::spec::{Biases, Family, ModelSpec, SpecError, limits};

/// What transformers takes where the config does not name the number of KV heads.
const KV_HEADS: usize = 8;
/// What transformers takes where the config has no `sliding_window`; null means none.
const WINDOW: usize = 4096;

/// Reads a `MistralForCausalLM`.
///
/// # Errors
/// [`SpecError`].
pub fn spec(config: &Config) -> Result<ModelSpec, SpecError> {
    let llama = llama::spec(config)?;
    let window = match config.has("sliding_window") {
        true if config.get("sliding_window").is_none() => None,
        _ => Some(config.count_or("sliding_window", limits::CONTEXT, WINDOW)?),
    };
    let kv_heads = match config.has("num_key_value_heads") {
        true => llama.kv_heads,
        false => KV_HEADS,
    };
    Ok(ModelSpec {
        family: Family::Mistral,
        kv_heads,
        window,
        bias: Biases::default(),
        ..llama
    })
}
