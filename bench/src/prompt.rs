//! Prompts of given lengths: random ones, of which a share may begin alike.
//!
//! A prompt is a list of token ids where the API takes one, so that its length is exact whatever the tokenizer; else a
//! text of short common words, most of them one token each. What a server counted is in the report.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

/// Ids that are ordinary tokens of every model, tiny ones included: special ones lie below.
const IDS: std::ops::Range<u32> = 300..2000;

/// Words that are a token each, with the blank before them, in the vocabularies of Llama, Mistral and their like.
const WORDS: [&str; 32] = [
    "time", "year", "people", "way", "day", "man", "thing", "world", "life", "hand", "part",
    "place", "work", "week", "case", "point", "number", "group", "water", "room", "money", "story",
    "fact", "month", "right", "study", "book", "eye", "job", "word", "business", "side",
];

/// How prompts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PromptForm {
    /// Lists of token ids.
    Ids,
    /// Texts.
    Text,
}

/// Makes prompts; equal ones for equal seeds, numbers and lengths.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// How they are written.
    pub form: PromptForm,
    /// The share of each prompt, from its beginning, that all have in common.
    pub shared: f64,
    /// What they are drawn from.
    pub seed: u64,
}

impl Prompts {
    /// The prompt of a request by its number, of so many tokens.
    #[must_use]
    pub fn make(&self, number: u64, tokens: u32) -> Value {
        let shared = (self.shared * f64::from(tokens)).round() as usize;
        let mut common = StdRng::seed_from_u64(self.seed);
        let mut own =
            StdRng::seed_from_u64(self.seed ^ (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut draw = |index: usize| {
            let source = if index < shared {
                &mut common
            } else {
                &mut own
            };
            source.random_range(IDS)
        };
        let ids = (0..tokens as usize).map(&mut draw);
        match self.form {
            PromptForm::Ids => ids.collect(),
            PromptForm::Text => {
                let words: Vec<&str> = ids.map(|id| WORDS[id as usize % WORDS.len()]).collect();
                Value::String(words.join(" "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(shared: f64, number: u64, tokens: u32) -> Vec<u64> {
        let prompts = Prompts {
            form: PromptForm::Ids,
            shared,
            seed: 3,
        };
        let prompt = prompts.make(number, tokens);
        let ids = prompt.as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap()).collect()
    }

    #[test]
    fn a_prompt_has_the_length_that_was_asked_for_and_is_the_same_again() {
        assert_eq!(ids(0.0, 5, 77).len(), 77);
        assert_eq!(ids(0.0, 5, 77), ids(0.0, 5, 77));
    }

    #[test]
    fn prompts_begin_alike_for_their_shared_part_and_differ_behind_it() {
        let (a, b) = (ids(0.5, 1, 40), ids(0.5, 2, 40));
        assert_eq!(a[..20], b[..20]);
        let same = a[20..].iter().zip(&b[20..]).filter(|(a, b)| a == b).count();
        assert!(same < 5, "{same} of 20 are equal");
        // What is shared does not depend on the length.
        assert_eq!(ids(0.5, 3, 20)[..10], a[..10]);
        assert_ne!(ids(0.0, 1, 40)[..20], ids(0.0, 2, 40)[..20]);
    }

    #[test]
    fn a_text_has_a_word_for_each_token() {
        let prompts = Prompts {
            form: PromptForm::Text,
            shared: 0.0,
            seed: 3,
        };
        let text = prompts.make(1, 12);
        assert_eq!(text.as_str().unwrap().split(' ').count(), 12);
    }
}
