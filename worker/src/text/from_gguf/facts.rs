//! What the metadata say of a tokenizer, checked: every id is a token's, every list has an entry per token.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use gguf::{Gguf, Texts, Value};

/// The key that says what kind of tokenizer it is.
pub const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
/// Longest token: the longest real ones are runs of some hundred blanks. Work grows with the square of it.
const TOKEN_BYTES_MAX: usize = 1 << 10;
/// Bytes of all tokens: a quarter of a million have some three megabytes.
const VOCABULARY_BYTES_MAX: usize = 16 << 20;

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text that merging gives.
    Normal,
    /// Has a name and no text: control tokens, and the one for what is unknown.
    Special,
    /// Text that is found before merging.
    Added,
    /// A place without a token.
    Unused,
    /// A single byte.
    Byte,
}

/// A tokenizer's facts.
pub struct Facts<'a> {
    /// Its kind.
    pub model: &'a str,
    /// The name of its pre-tokenizer.
    pub pre: Option<&'a str>,
    tokens: &'a Texts,
    kinds: Vec<Kind>,
    ids: HashMap<&'a str, u32>,
    /// Which tokens are better, if it says so.
    pub scores: Option<Vec<f64>>,
    /// Pairs of tokens that become one, first ones first.
    pub merges: Option<&'a Texts>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The token that ends a text.
    pub eos: Option<u32>,
    /// The token for what is unknown.
    pub unk: Option<u32>,
    /// Ids that end an answer.
    pub end_ids: Vec<u32>,
    /// Whether texts are given the begin token, if it says so.
    pub adds_bos: Option<bool>,
    /// Whether texts are given the end token.
    pub adds_eos: bool,
    /// Whether texts are given a blank in front, if it says so.
    pub adds_blank: Option<bool>,
}

impl<'a> Facts<'a> {
    /// Reads and checks them.
    ///
    /// # Errors
    /// Names the key that is missing or wrong.
    pub fn of(gguf: &'a Gguf) -> Result<Facts<'a>> {
        let model = gguf.text(MODEL)?;
        let model = model.with_context(|| format!("it has no tokenizer ({MODEL} is missing)"))?;
        let tokens = texts(gguf, TOKENS)?.with_context(|| format!("it has no {TOKENS}"))?;
        let kinds = kinds(gguf, tokens.len())?;
        let id = |name: &str| id(gguf, name, tokens.len());
        Ok(Facts {
            model,
            pre: gguf.text("tokenizer.ggml.pre")?,
            ids: ids(tokens, &kinds)?,
            scores: scores(gguf, tokens.len())?,
            merges: texts(gguf, MERGES)?,
            bos: id("bos")?,
            eos: id("eos")?,
            unk: id("unknown")?,
            end_ids: end_ids(gguf, tokens.len())?,
            adds_bos: gguf.flag("tokenizer.ggml.add_bos_token")?,
            adds_eos: gguf.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            adds_blank: gguf.flag("tokenizer.ggml.add_space_prefix")?,
            tokens,
            kinds,
        })
    }

    /// All tokens in the order of their ids.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        let all = self.tokens.iter().zip(&self.kinds).enumerate();
        all.map(|(id, (token, kind))| (id as u32, token, *kind))
            .filter(|(.., kind)| *kind != Kind::Unused)
    }

    /// A token's name. Its id was checked.
    pub fn token(&self, id: u32) -> &'a str {
        self.tokens.get(id as usize).unwrap_or_default()
    }

    /// A token's id.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }
}

fn texts<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<&'a Texts>> {
    let texts = |value: &'a Value| {
        let texts = value.as_texts();
        texts.with_context(|| format!("{key} is {}; it should be a list of texts", value.shown()))
    };
    gguf.get(key).map(texts).transpose()
}

/// Ids that end an answer: a text, a turn or a message.
pub fn end_ids(gguf: &Gguf, tokens: usize) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for name in ["eos", "eot", "eom"] {
        all.extend(id(gguf, name, tokens)?);
    }
    all.dedup();
    Ok(all)
}

/// The id under a name: one of a token, or none.
fn id(gguf: &Gguf, name: &str, tokens: usize) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(id) = gguf.count(&key)? else {
        return Ok(None);
    };
    ensure!(
        id < tokens as u64,
        "{key} is {id}, and there are {tokens} tokens"
    );
    Ok(u32::try_from(id).ok())
}

/// A list of numbers with one for each token.
fn numbers<'a>(gguf: &'a Gguf, key: &str, tokens: usize) -> Result<Option<&'a gguf::Numbers>> {
    let Some(value) = gguf.get(key) else {
        return Ok(None);
    };
    match value.as_numbers() {
        Some(numbers) if numbers.len() == tokens => Ok(Some(numbers)),
        _ => bail!(
            "{key} is {}; it should be a list of one number for each of {tokens} tokens",
            value.shown()
        ),
    }
}

fn kinds(gguf: &Gguf, tokens: usize) -> Result<Vec<Kind>> {
    let numbers = numbers(gguf, KINDS, tokens)?;
    let numbers = numbers.with_context(|| {
        format!("it has no {KINDS}, so special tokens cannot be told from text")
    })?;
    let kind = |value: Value| {
        Ok(match value.as_u64() {
            Some(1) => Kind::Normal,
            Some(2 | 3) => Kind::Special,
            Some(4) => Kind::Added,
            Some(5) => Kind::Unused,
            Some(6) => Kind::Byte,
            _ => bail!("{KINDS} has {}, which is no type of a token", value.shown()),
        })
    };
    numbers.iter().map(kind).collect()
}

fn scores(gguf: &Gguf, tokens: usize) -> Result<Option<Vec<f64>>> {
    let Some(numbers) = numbers(gguf, SCORES, tokens)? else {
        return Ok(None);
    };
    let score = |(id, value): (usize, Value)| {
        let score = value.as_f64().filter(|score| score.is_finite());
        score.with_context(|| format!("{SCORES}: that of token {id} is {}", value.shown()))
    };
    let scores: Result<Vec<f64>> = numbers.iter().enumerate().map(score).collect();
    scores.map(Some)
}

/// Every token's id, by its name.
fn ids<'a>(tokens: &'a Texts, kinds: &[Kind]) -> Result<HashMap<&'a str, u32>> {
    let mut ids = HashMap::new();
    let mut bytes = 0;
    for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
        bytes += token.len();
        ensure!(
            token.len() <= TOKEN_BYTES_MAX,
            "{TOKENS}: token {id} has {} bytes; at most {TOKEN_BYTES_MAX} are taken",
            token.len()
        );
        ensure!(
            bytes <= VOCABULARY_BYTES_MAX,
            "{TOKENS}: they have more than {VOCABULARY_BYTES_MAX} bytes"
        );
        if *kind == Kind::Unused {
            continue;
        }
        ensure!(!token.is_empty(), "{TOKENS}: token {id} is empty");
        if let Some(first) = ids.insert(token, id as u32) {
            bail!("{TOKENS}: tokens {first} and {id} are both {token:?}");
        }
    }
    Ok(ids)
}
