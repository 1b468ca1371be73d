//! Sentencepiece's BPE (`llama`): tokens with scores, blanks as "▁", and single bytes for what has no token.
//!
//! Sentencepiece joins the two neighbours whose whole has the best score. That is BPE whose merges are all ways to cut a
//! token into two tokens, ordered by the score of the whole: as transformers converts such models.

use std::cmp::Reverse;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::facts::{Facts, Kind};
use super::{added_tokens, post_processor, vocabulary};

/// How sentencepiece writes a blank.
const BLANK: &str = "\u{2581}";

/// Its `tokenizer.json`.
///
/// # Errors
/// No scores.
pub fn tokenizer(facts: &Facts) -> Result<Value> {
    let prefix = facts.adds_blank.unwrap_or(true);
    let blanks = json!({"type": "Replace", "pattern": {"String": " "}, "content": BLANK});
    let mut normalizers = vec![blanks];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": BLANK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": BLANK}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "added_tokens": added_tokens(facts),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": post_processor(facts, true),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": facts.unk.map(|id| facts.token(id)),
            "fuse_unk": true,
            "byte_fallback": facts.tokens().any(|(.., kind)| kind == Kind::Byte),
            "ignore_merges": false,
            "vocab": vocabulary(facts),
            "merges": merges(facts)?,
        },
    }))
}

/// A way to cut a token into two.
struct Cut<'a> {
    score: f64,
    left: &'a str,
    right: &'a str,
}

/// Most merges, and most bytes of their texts. Vocabularies of a quarter of a million tokens have some hundred thousand;
/// one that was made to have more would fill memory.
const MERGES_MAX: usize = 1 << 22;
const MERGES_BYTES_MAX: usize = 128 << 20;

fn merges<'a>(facts: &Facts<'a>) -> Result<Vec<[&'a str; 2]>> {
    let scores = facts.scores.as_ref();
    let scores =
        scores.context("it has no tokenizer.ggml.scores, which say what is merged first")?;
    let (mut cuts, mut bytes) = (Vec::new(), 0);
    for (id, token, kind) in facts.tokens() {
        if kind != Kind::Normal {
            continue;
        }
        let score = scores[id as usize];
        let mut own: Vec<(u32, u32, Cut)> = Vec::new();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (facts.id(left), facts.id(right)) {
                bytes += token.len();
                ensure!(
                    bytes <= MERGES_BYTES_MAX && cuts.len() + own.len() < MERGES_MAX,
                    "tokenizer.ggml.tokens: there are more than {MERGES_MAX} ways to cut its tokens in two, or they have \
                     more than {MERGES_BYTES_MAX} bytes"
                );
                own.push((left_id, right_id, Cut { score, left, right }));
            }
        }
        own.sort_by_key(|(left, right, _)| (*left, *right));
        cuts.extend(own.into_iter().map(|(.., cut)| cut));
    }
    // The best score first, then the longest parts; what is equal stays in the order of the tokens.
    let chars = |text: &str| Reverse(text.chars().count());
    cuts.sort_by(|a, b| {
        let lengths = |cut: &Cut| (chars(cut.left), chars(cut.right));
        b.score
            .total_cmp(&a.score)
            .then_with(|| lengths(a).cmp(&lengths(b)))
    });
    Ok(cuts.into_iter().map(|cut| [cut.left, cut.right]).collect())
}
