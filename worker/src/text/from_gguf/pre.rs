//! How byte-level tokenizers cut a text into words before they merge, by the names that GGUF files have for it.
//!
//! A GGUF file carries no pre-tokenizer, only the name of one (`tokenizer.ggml.pre`): what the name means is known to
//! whoever reads it. Here are those of the families that are served, as their own `tokenizer.json` files have them.

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// Words of Llama 3.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Qwen 2: those of Llama 3 with each digit alone.
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Mistral's tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The names that are known, for the refusal of all others.
const KNOWN: &str = "gpt-2, mpt, olmo, smollm, starcoder, refact, llama-bpe, dbrx, smaug-bpe, falcon3, pixtral, tekken, \
                     qwen2, deepseek-r1-qwen";

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreTokenizer {
    words: Words,
    /// Text is brought into Unicode's composed form first.
    composes: bool,
    /// A word that is a token is that token, whatever its merges would give.
    pub whole_words: bool,
    /// A text begins with the begin token where the file does not say.
    pub begins: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    /// GPT-2's.
    Gpt2,
    /// GPT-2's, between single digits.
    Gpt2Digits,
    /// What an expression matches.
    Matches(&'static str),
}

impl PreTokenizer {
    /// What a file's name for it stands for.
    ///
    /// # Errors
    /// Names one that is not known, and those that are.
    pub fn of(name: &str) -> Result<PreTokenizer> {
        let plain = PreTokenizer {
            words: Words::Gpt2,
            composes: false,
            whole_words: false,
            begins: false,
        };
        let matches = |expression| PreTokenizer {
            words: Words::Matches(expression),
            ..plain
        };
        Ok(match name {
            "gpt-2" | "gpt2" | "olmo" => plain,
            "mpt" => PreTokenizer {
                composes: true,
                ..plain
            },
            "smollm" | "starcoder" | "refact" => PreTokenizer {
                words: Words::Gpt2Digits,
                ..plain
            },
            "dbrx" | "smaug-bpe" => matches(LLAMA_3),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => PreTokenizer {
                whole_words: true,
                begins: true,
                ..matches(LLAMA_3)
            },
            "tekken" => PreTokenizer {
                whole_words: true,
                begins: true,
                ..matches(TEKKEN)
            },
            "qwen2" | "deepseek-r1-qwen" => PreTokenizer {
                composes: true,
                ..matches(QWEN_2)
            },
            _ => bail!("its pre-tokenizer {name:?} is not known; known are {KNOWN}"),
        })
    }

    /// As `tokenizer.json` has it. With `prefix`, a text begins with a blank.
    pub fn json(&self, prefix: bool) -> Value {
        let bytes = |prefix: bool, words: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": words});
        let sequence =
            |first: Value, then: Value| json!({"type": "Sequence", "pretokenizers": [first, then]});
        match self.words {
            Words::Gpt2 => bytes(prefix, true),
            Words::Gpt2Digits => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                sequence(digits, bytes(prefix, true))
            }
            Words::Matches(expression) => {
                let split = json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated",
                    "invert": false});
                sequence(split, bytes(prefix, false))
            }
        }
    }

    /// The normalizer, as `tokenizer.json` has it.
    pub fn normalizer(&self) -> Value {
        if self.composes {
            json!({"type": "NFC"})
        } else {
            Value::Null
        }
    }
}
