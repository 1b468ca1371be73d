//! What masks cost with a tokenizer: `cargo run -p worker --example mask_cost -- FOLDER`, of `tokenizer.json`.
//!
//! Walks forms at random, as an answer would, and prints the time of the first use, of compiling, and of a token's set.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::request::Constraint;
use serde_json::json;
use worker::text::constraint::Grammars;
use worker::text::tokenizer::Tokenizer;

/// Tokens that are walked per form.
const TOKENS: usize = 2000;

fn main() -> anyhow::Result<()> {
    let folder: PathBuf = std::env::args_os()
        .nth(1)
        .unwrap_or_else(|| "tests/models/tiny-llama".into())
        .into();
    let tokenizer = Tokenizer::open(&folder)?;
    let vocabulary = tokenizer.vocabulary();
    println!("{}: {} tokens", folder.display(), vocabulary.len());
    let person = json!({"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {"type": "object", "properties": {"street": {"type": "string", "maxLength": 80}, "zip": {"type": "string",
        "pattern": "^[0-9]{5}$"}}, "required": ["street", "zip"], "additionalProperties": false}},
        "required": ["name", "age", "tags", "address"], "additionalProperties": false});
    let forms = [
        ("a schema", Constraint::JsonSchema(person.to_string())),
        ("any object", Constraint::JsonObject),
        (
            "an expression",
            Constraint::Regex("([A-Z][a-z]+ ){3,20}[0-9]{4}".into()),
        ),
        (
            "a grammar",
            Constraint::Grammar(
                "start: sum\nsum: NUMBER | sum \"+\" sum | \"(\" sum \")\"\nNUMBER: /[0-9]{1,6}/"
                    .into(),
            ),
        ),
    ];
    let grammars = Grammars::default();
    let began = Instant::now();
    grammars.of_request(&Constraint::Regex("a".into()), vocabulary, &[2])?;
    println!("first use: {:.1} ms", ms(began.elapsed()));
    for (name, form) in forms {
        let began = Instant::now();
        let start = grammars.of_request(&form, vocabulary, &[2])?;
        let compiling = began.elapsed();
        let (mut times, mut seed) = (Vec::with_capacity(TOKENS), 1u64);
        let mut grammar = start.clone();
        while times.len() < TOKENS {
            let mut ids: Vec<u32> = Vec::new();
            let began = Instant::now();
            let told = grammar.allowed(|words| {
                let ones = |(at, word): (usize, &u32)| {
                    let bits = (0..32).filter(|bit| word >> bit & 1 == 1);
                    bits.map(|bit| at as u32 * 32 + bit).collect::<Vec<u32>>()
                };
                times.push(began.elapsed());
                ids = words.iter().enumerate().flat_map(ones).collect();
            });
            told.map_err(anyhow::Error::msg)?;
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let id = ids[(seed >> 33) as usize % ids.len()];
            if id == 2 || grammar.accept(id).map_err(anyhow::Error::msg)? {
                grammar = start.clone();
            }
        }
        times.sort_unstable();
        let at = |share: usize| ms(times[(times.len() - 1) * share / 100]);
        println!(
            "{name}: compiled in {:.1} ms; a token's set p50 {:.3} ms, p99 {:.3} ms, most {:.3} ms",
            ms(compiling),
            at(50),
            at(99),
            at(100)
        );
    }
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
