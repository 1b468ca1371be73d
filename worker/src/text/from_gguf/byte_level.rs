//! Byte-level BPE (`gpt2`): tokens spelled in GPT-2's alphabet of bytes, and a list of merges.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::facts::Facts;
use super::pre::PreTokenizer;
use super::{added_tokens, post_processor, vocabulary};

/// Its `tokenizer.json`.
///
/// # Errors
/// No merges, a merge of what is no token, an unknown pre-tokenizer.
pub fn tokenizer(facts: &Facts) -> Result<Value> {
    let pre = facts.pre.context(
        "it does not name its pre-tokenizer (tokenizer.ggml.pre is missing): convert it again with a newer converter",
    )?;
    let pre = PreTokenizer::of(pre)?;
    Ok(json!({
        "version": "1.0",
        "added_tokens": added_tokens(facts),
        "normalizer": pre.normalizer(),
        "pre_tokenizer": pre.json(facts.adds_blank.unwrap_or(false)),
        "post_processor": post_processor(facts, pre.begins),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "unk_token": facts.unk.map(|id| facts.token(id)),
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre.whole_words,
            "vocab": vocabulary(facts),
            "merges": merges(facts)?,
        },
    }))
}

fn merges(facts: &Facts) -> Result<Vec<Value>> {
    const KEY: &str = "tokenizer.ggml.merges";
    let merges = facts.merges.with_context(|| format!("it has no {KEY}"))?;
    let pair = |(index, merge): (usize, &str)| {
        let (left, right) = merge
            .split_once(' ')
            .with_context(|| format!("{KEY}: entry {index} is {merge:?} and not two tokens"))?;
        for token in [left, right, &format!("{left}{right}")] {
            ensure!(
                facts.id(token).is_some(),
                "{KEY}: entry {index} is {merge:?}, and there is no token {token:?}"
            );
        }
        Ok(json!([left, right]))
    };
    merges.iter().enumerate().map(pair).collect()
}
