//! A tokenizer's folder in Hugging Face's layout as the keys of a GGUF file, as llama.cpp's converter sets them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;

use super::Writer;
use crate::value::Texts;

/// Types of tokens, as the format counts them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const ADDED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Sets the tokenizer and the chat template of a folder with `tokenizer.json` and `tokenizer_config.json`. `pre` names
/// the pre-tokenizer of a byte-level one.
///
/// # Panics
/// Where the folder's tokenizer is not of the two kinds that the tests have.
pub fn set_tokenizer(writer: &mut Writer, dir: &Path, pre: &str) {
    let read = |name: &str| -> Json {
        let bytes = std::fs::read(dir.join(name)).expect(name);
        serde_json::from_slice(&bytes).expect(name)
    };
    let (json, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let bytes = json["model"]["byte_fallback"] == true;
    let tokens = tokens(&json, bytes);
    let id = |name: &str| tokens.iter().position(|(token, _)| token == name);
    for (key, entry) in [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ] {
        if let Some(id) = name_of(&config[entry]).and_then(id) {
            writer.set(&format!("tokenizer.ggml.{key}_token_id"), id as u32);
        }
    }
    let adds_bos = config["add_bos_token"] == true;
    writer.set("tokenizer.ggml.add_bos_token", adds_bos);
    if let Some(template) = config["chat_template"].as_str() {
        writer.set("tokenizer.chat_template", template);
    }
    if bytes {
        writer.set("tokenizer.ggml.model", "llama");
        writer.set("tokenizer.ggml.pre", "default");
        writer.set("tokenizer.ggml.scores", &scores(&tokens)[..]);
    } else {
        writer.set("tokenizer.ggml.model", "gpt2");
        writer.set("tokenizer.ggml.pre", pre);
        writer.set("tokenizer.ggml.merges", merges(&json));
    }
    let types: Vec<i32> = tokens.iter().map(|(_, kind)| *kind).collect();
    writer.set("tokenizer.ggml.token_type", &types[..]);
    let names: Texts = tokens.iter().map(|(token, _)| token).collect();
    writer.set("tokenizer.ggml.tokens", names);
}

/// Every token and its type, in the order of ids; places without a token are named as llama.cpp's converter does.
fn tokens(json: &Json, bytes: bool) -> Vec<(String, i32)> {
    let unknown = json["model"]["unk_token"].as_str();
    let mut by_id = BTreeMap::new();
    for (token, id) in json["model"]["vocab"].as_object().expect("a vocabulary") {
        let byte = bytes && token.len() == 6 && token.starts_with("<0x");
        by_id.insert(
            id.as_u64(),
            (token.clone(), if byte { BYTE } else { NORMAL }),
        );
    }
    for added in json["added_tokens"].as_array().expect("added tokens") {
        let name = added["content"].as_str().expect("a name");
        let kind = match added["special"] == true {
            true if unknown == Some(name) => UNKNOWN,
            true => CONTROL,
            false => ADDED,
        };
        by_id.insert(added["id"].as_u64(), (name.to_owned(), kind));
    }
    let last = by_id.keys().copied().flatten().max().unwrap_or(0);
    let unused = |id: u64| (format!("[PAD{id}]"), UNUSED);
    (0..=last)
        .map(|id| by_id.remove(&Some(id)).unwrap_or_else(|| unused(id)))
        .collect()
}

/// Sentencepiece's scores: it numbers what it has learnt downwards, in the order of ids.
fn scores(tokens: &[(String, i32)]) -> Vec<f32> {
    let first = tokens
        .iter()
        .position(|(_, kind)| *kind == NORMAL)
        .unwrap_or(0);
    let score = |(id, (_, kind)): (usize, &(String, i32))| match *kind {
        NORMAL => -((id - first) as f32),
        _ => 0.0,
    };
    tokens.iter().enumerate().map(score).collect()
}

fn merges(json: &Json) -> Texts {
    let all = json["model"]["merges"].as_array().expect("merges");
    let merge = |merge: &Json| match merge.as_str() {
        Some(merge) => merge.to_owned(),
        None => {
            let part = |at: usize| merge[at].as_str().expect("a token");
            format!("{} {}", part(0), part(1))
        }
    };
    all.iter().map(merge).collect()
}

/// A special token's name in its two forms.
fn name_of(entry: &Json) -> Option<&str> {
    entry.as_str().or_else(|| entry["content"].as_str())
}
