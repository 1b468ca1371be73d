//! A model's text from the metadata of its GGUF file: what a tokenizer's folder says elsewhere.
//!
//! Owns the way from the metadata to a `tokenizer.json`, which is then read like any other. Both kinds of tokenizer that the
//! served families have are known: byte-level BPE with merges, and sentencepiece's BPE with scores.

mod byte_level;
mod facts;
mod pre;
mod sentencepiece;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail};
use gguf::Gguf;
use serde_json::{Value, json};

use super::chat::TemplateSource;
use super::tokenizer::Tokenizer;
use facts::{Facts, Kind};

/// Longest chat template. Real ones have some ten kilobytes.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// Whether a path is a GGUF file's, by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// What a file says of its model's text.
pub struct GgufText {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template.
    pub template: TemplateSource,
    /// Ids that end an answer.
    pub end_ids: Vec<u32>,
}

impl GgufText {
    /// Reads a file's header.
    ///
    /// # Errors
    /// Names the file, and the key that is missing or wrong.
    pub fn open(path: &Path) -> Result<GgufText> {
        let read = || Self::of(&header(path)?);
        read().with_context(|| format!("{}: no tokenizer from it", path.display()))
    }

    /// What a header says.
    ///
    /// # Errors
    /// Names the key that is missing or wrong.
    pub fn of(gguf: &Gguf) -> Result<GgufText> {
        let facts = Facts::of(gguf)?;
        let json = match facts.model {
            "gpt2" => byte_level::tokenizer(&facts)?,
            "llama" => sentencepiece::tokenizer(&facts)?,
            other => bail!(
                "{} is {other:?}; byte-level BPE (gpt2) and sentencepiece (llama) are known",
                facts::MODEL
            ),
        };
        Ok(GgufText {
            tokenizer: Tokenizer::parse(&serde_json::to_vec(&json)?)?,
            template: template(gguf, &facts)?,
            end_ids: facts.end_ids,
        })
    }
}

/// Ids that end an answer, of a file whose tokenizer is not used.
///
/// # Errors
/// Names the file, and the key that is wrong.
pub fn end_ids(path: &Path) -> Result<Vec<u32>> {
    // The tokens are another's, and so is their number.
    let read = || facts::end_ids(&header(path)?, u32::MAX as usize);
    read().with_context(|| format!("{}: no end tokens from it", path.display()))
}

fn header(path: &Path) -> Result<Gguf> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    Ok(Gguf::read(BufReader::new(file), bytes)?)
}

/// The chat template and the names it uses.
fn template(gguf: &Gguf, facts: &Facts) -> Result<TemplateSource> {
    let text = |key: &str| -> Result<Option<String>> {
        let Some(text) = gguf.text(key)? else {
            return Ok(None);
        };
        if text.len() > TEMPLATE_BYTES_MAX {
            bail!(
                "{key} has {} bytes; at most {TEMPLATE_BYTES_MAX} are taken",
                text.len()
            );
        }
        Ok(Some(text.to_owned()))
    };
    let name = |id: Option<u32>| id.map(|id| facts.token(id).to_owned());
    Ok(TemplateSource {
        text: text("tokenizer.chat_template")?,
        tool_use: text("tokenizer.chat_template.tool_use")?,
        bos: name(facts.bos),
        eos: name(facts.eos),
    })
}

/// The tokens that are found in a text before it is cut into words, as `tokenizer.json` has them.
fn added_tokens(facts: &Facts) -> Value {
    let added = facts.tokens().filter_map(|(id, token, kind)| {
        let special = match kind {
            Kind::Special => true,
            Kind::Added => false,
            Kind::Normal | Kind::Byte | Kind::Unused => return None,
        };
        Some(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special}))
    });
    Value::Array(added.collect())
}

/// The vocabulary, as `tokenizer.json` has it.
fn vocabulary(facts: &Facts) -> Value {
    let tokens = facts.tokens();
    Value::Object(
        tokens
            .map(|(id, token, _)| (token.to_owned(), id.into()))
            .collect(),
    )
}

/// What puts a begin token before a text and an end token behind it, as `tokenizer.json` has it.
fn post_processor(facts: &Facts, begins: bool) -> Value {
    let begin = facts.bos.filter(|_| facts.adds_bos.unwrap_or(begins));
    let end = facts.eos.filter(|_| facts.adds_eos);
    let special = |id: Option<u32>| {
        id.map(|id| json!({"SpecialToken": {"id": facts.token(id), "type_id": 0}}))
    };
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single: Vec<Value> = special(begin)
        .into_iter()
        .chain([text])
        .chain(special(end))
        .collect();
    let named = begin.into_iter().chain(end).map(|id| {
        let token = facts.token(id);
        (
            token.to_owned(),
            json!({"id": token, "ids": [id], "tokens": [token]}),
        )
    });
    json!({
        "type": "TemplateProcessing",
        // Nobody tokenizes pairs of texts; the form wants something here.
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "single": single,
        "special_tokens": Value::Object(named.collect()),
    })
}
