//! Grammars over the tiny vocabularies: against a naive twin, and with sources that mean harm.

use std::time::{Duration, Instant};

use super::super::tests::{MODELS, tokenizer};
use super::*;

const END: u32 = 2;

fn end_of(model: &str) -> u32 {
    if model == "tiny-mpt" { 0 } else { END }
}

fn compiled(model: &str, constraint: &Constraint) -> Result<Grammar, ConstraintError> {
    let grammars = Grammars::default();
    grammars.of_request(constraint, tokenizer(model).vocabulary(), &[end_of(model)])
}

fn schema(value: Value) -> Constraint {
    Constraint::JsonSchema(value.to_string())
}

fn allowed(grammar: &mut Grammar) -> Vec<u32> {
    let mut ids = Vec::new();
    let take = |words: &[u32]| {
        ids.extend(
            (0..words.len() as u32 * 32)
                .filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1),
        );
    };
    grammar.allowed(take).unwrap();
    ids
}

/// A cheap generator, so that walks are the same each time.
fn pick(seed: &mut u64, ids: &[u32]) -> u32 {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    ids[(*seed >> 33) as usize % ids.len()]
}

/// Walks a grammar at random; gives the bytes when it ends within `most` tokens.
fn walk(model: &str, grammar: &Grammar, seed: u64, most: usize) -> Option<Vec<u8>> {
    let vocabulary = tokenizer(model).vocabulary();
    let (mut grammar, mut seed, mut text) = (grammar.clone(), seed, Vec::new());
    for _ in 0..most {
        let id = pick(&mut seed, &allowed(&mut grammar));
        if id == end_of(model) {
            return Some(text);
        }
        text.extend_from_slice(vocabulary.text(id));
        if grammar.accept(id).unwrap() {
            return Some(text);
        }
    }
    None
}

fn walks(model: &str, constraint: &Constraint, count: u64) -> Vec<String> {
    let grammar = compiled(model, constraint).unwrap();
    let texts = (0..count).filter_map(|seed| walk(model, &grammar, seed, 400));
    texts.map(|text| String::from_utf8(text).unwrap()).collect()
}

#[test]
fn the_allowed_tokens_are_those_that_a_naive_twin_allows() {
    // Whether some text of the language begins with these bytes, and whether they are such a text.
    let language = ["yes", "no", "noon", "\u{e9}t\u{e9}", "a b  c"];
    let begins = |bytes: &[u8]| {
        language
            .iter()
            .any(|text| text.as_bytes().starts_with(bytes))
    };
    let is = |bytes: &[u8]| language.iter().any(|text| text.as_bytes() == bytes);
    let expression = Constraint::Regex(language.join("|"));
    let list = language
        .map(|text| serde_json::to_string(text).unwrap())
        .join(" | ");
    let grammar = Constraint::Grammar(format!("start: {list}"));
    for model in MODELS {
        let vocabulary = tokenizer(model).vocabulary();
        for constraint in [&expression, &grammar] {
            let start = compiled(model, constraint).unwrap();
            for seed in 0..40 {
                let (mut grammar, mut seed, mut text) = (start.clone(), seed, Vec::new());
                loop {
                    let naive = |id: &u32| {
                        if *id == end_of(model) {
                            return is(&text);
                        }
                        let token = vocabulary.text(*id);
                        !token.is_empty() && begins(&[&text[..], token].concat())
                    };
                    let expected: Vec<u32> = (0..vocabulary.len() as u32).filter(naive).collect();
                    let got = allowed(&mut grammar);
                    assert_eq!(
                        got,
                        expected,
                        "{model} after {:?}",
                        String::from_utf8_lossy(&text)
                    );
                    let id = pick(&mut seed, &got);
                    if id == end_of(model) {
                        break;
                    }
                    text.extend_from_slice(vocabulary.text(id));
                    if grammar.accept(id).unwrap() {
                        assert!(is(&text));
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn walks_give_what_was_asked_for_on_every_tokenizer() {
    let person = schema(json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", null]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    }));
    for model in MODELS {
        let texts = walks(model, &person, 30);
        assert!(
            texts.len() >= 20,
            "{model}: only {} of 30 ended",
            texts.len()
        );
        for text in texts {
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            let age = value["age"].as_u64().unwrap();
            assert!(
                age <= 150 && value["name"].as_str().unwrap().chars().count() <= 12,
                "{text}"
            );
            assert!(value["kind"].is_null() || value["kind"] == "cat" || value["kind"] == "dog");
            assert_eq!(value.as_object().unwrap().len(), 3);
        }
        for text in walks(
            model,
            &Constraint::Regex(r"^[a-f]{2}[0-9]-[0-9]$".into()),
            20,
        ) {
            let bytes = text.as_bytes();
            assert!(
                bytes.len() == 5 && bytes[3] == b'-' && bytes[4].is_ascii_digit(),
                "{text}"
            );
        }
        let sum =
            Constraint::Grammar("start: NUMBER (\"+\" NUMBER){1,3}\nNUMBER: /[0-9]{1,3}/".into());
        for text in walks(model, &sum, 20) {
            let terms: Vec<&str> = text.split('+').collect();
            assert!(
                (2..=4).contains(&terms.len())
                    && terms.iter().all(|term| term.parse::<u32>().is_ok()),
                "{text}"
            );
        }
    }
}

#[test]
fn an_object_is_all_that_json_object_allows() {
    let grammar = compiled("tiny-llama", &Constraint::JsonObject).unwrap();
    let vocabulary = tokenizer("tiny-llama").vocabulary();
    let first = allowed(&mut grammar.clone());
    assert!(
        !first.is_empty()
            && first
                .iter()
                .all(|&id| vocabulary.text(id).starts_with(b"{"))
    );
}

#[test]
fn anchors_around_an_expression_say_nothing_new() {
    for (expression, expected) in [
        ("^a$", "a"),
        ("a\\$", "a\\$"),
        ("a\\\\$", "a\\\\"),
        ("", ""),
        ("^", ""),
    ] {
        assert_eq!(whole(expression), expected);
    }
}

#[test]
fn a_grammar_is_compiled_once_and_old_ones_are_forgotten() {
    let grammars = Grammars::default();
    let of = |i: usize| Constraint::Regex(format!("a{{{i}}}"));
    let vocabulary = tokenizer("tiny-llama").vocabulary();
    for i in (1..=COMPILED_MAX + 5).chain([COMPILED_MAX + 5, 6]) {
        grammars.of_request(&of(i), vocabulary, &[END]).unwrap();
    }
    let compiled = grammars.compiled.lock().unwrap();
    let kept: Vec<&Constraint> = compiled.iter().map(|(known, _)| known).collect();
    assert_eq!(kept.len(), COMPILED_MAX);
    assert_eq!([kept[0], kept[1]], [&of(6), &of(COMPILED_MAX + 5)]);
    assert!(!kept.contains(&&of(5)));
}

/// Sources that are wrong, each with a word of the reason.
#[test]
fn what_cannot_be_enforced_is_refused_with_the_reason() {
    let table = [
        (schema(json!({"type": "strin"})), "strin"),
        (schema(json!({"not": {"type": "string"}})), "not"),
        (
            schema(json!({"type": "object", "properties": 5})),
            "properties",
        ),
        (schema(json!({"$ref": "#/$defs/none"})), "none"),
        (
            schema(json!({"oneOf": [{"type": "object"}, {"type": "object"}]})),
            "oneOf",
        ),
        (Constraint::JsonSchema("{".into()), "EOF"),
        (Constraint::Regex("(".into()), "regular expression"),
        (Constraint::Regex("(?=a)b".into()), "regular expression"),
        (Constraint::Grammar("".into()), "grammar"),
        (Constraint::Grammar("start: nothing".into()), "nothing"),
        (Constraint::Grammar("%%%".into()), "grammar"),
        (
            Constraint::Regex("a".repeat(SOURCE_BYTES_MAX + 1)),
            "65537 bytes",
        ),
        (
            Constraint::Grammar(format!("start: {}", "(".repeat(30_000))),
            "nested",
        ),
    ];
    for (constraint, word) in table {
        let refused = compiled("tiny-llama", &constraint).err();
        let refused = refused
            .unwrap_or_else(|| panic!("{constraint:?} was taken"))
            .to_string();
        assert!(refused.contains(word), "{word}: {refused}");
        assert!(refused.len() < 600 && !refused.contains('\n'), "{refused}");
    }
}

#[test]
fn what_costs_too_much_in_the_middle_is_an_error_of_its_answer() {
    // Its automaton has 2^200 states, of which each token shows new ones.
    let many = Constraint::Regex("(a|b)*a(a|b){200}".into());
    let mut grammar = compiled("tiny-llama", &many).unwrap();
    let began = Instant::now();
    let mut seed = 7;
    for step in 0..2000 {
        let mut ids = Vec::new();
        let take = |words: &[u32]| {
            ids.extend((0..2048).filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1));
        };
        if let Err(why) = grammar.allowed(take) {
            println!("after {step} tokens: {why}");
            break;
        }
        ids.retain(|id| *id != END);
        let id = pick(&mut seed, &ids);
        if grammar.accept(id).is_err() {
            break;
        }
    }
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
}
