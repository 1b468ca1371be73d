//! Grammars tried by the real worker's process: what means harm costs little, and the next one is tried all the same.

use std::path::Path;
use std::time::{Duration, Instant};

use common::request::Constraint;
use serde_json::{Map, Value, json};
use worker::text::trial::{Doubt, Trial};

fn trial() -> Trial {
    Trial::new(Path::new(env!("CARGO_BIN_EXE_worker")))
}

fn schema(value: Value) -> Constraint {
    Constraint::JsonSchema(value.to_string())
}

/// Sources that ask for much time, memory or depth.
fn harmful() -> Vec<(&'static str, Constraint)> {
    let mut nested = json!({"type": "string"});
    for _ in 0..40 {
        nested = json!({"type": "object", "properties": {"a": nested}, "required": ["a"]});
    }
    let many: Vec<String> = (0..4000).map(|i| format!("value {i}")).collect();
    let properties: Map<String, Value> = (0..2000)
        .map(|i| (format!("p{i}"), json!({"type": "integer"})))
        .collect();
    let doubling: Map<String, Value> = (0..30)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            let last = json!({"type": "string"});
            let both = json!({"allOf": [next, next]});
            (format!("d{i}"), if i == 29 { last } else { both })
        })
        .collect();
    let chain: String = (1..2500).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let crossed = json!([
        {"type": "string", "pattern": "(a|b)*a(a|b){40}"},
        {"type": "string", "pattern": "(a|b)*b(a|b){41}"},
    ]);
    let grammar = |text: &str| Constraint::Grammar(text.to_owned());
    let regex = |text: &str| Constraint::Regex(text.to_owned());
    vec![
        ("deep objects", schema(nested)),
        ("a huge enum", schema(json!({"enum": many}))),
        (
            "many properties",
            schema(json!({"type": "object", "properties": properties})),
        ),
        ("a reference to itself", schema(json!({"$ref": "#"}))),
        (
            "recursion",
            schema(json!({"type": "array", "items": {"$ref": "#"}})),
        ),
        (
            "doubling",
            schema(json!({"$defs": doubling, "$ref": "#/$defs/d0"})),
        ),
        (
            "a long string",
            schema(json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000})),
        ),
        (
            "a long list",
            schema(json!({"type": "array", "items": {"type": "integer"}, "minItems": 100_000})),
        ),
        (
            "a repeated pattern",
            schema(json!({"type": "string", "pattern": "(a{1000}){1000}"})),
        ),
        ("patterns that cross", schema(json!({"allOf": crossed}))),
        (
            "a huge multiple",
            schema(json!({"type": "integer", "multipleOf": 982_451_653})),
        ),
        ("nested repetition", regex("(((a{100}){100}){100}){100}")),
        ("many states", regex("(a|b)*a(a|b){200}")),
        ("nested stars", regex("((a*)*)*b")),
        ("big classes", regex(r"(\p{L}\p{N}){500}")),
        (
            "left recursion",
            grammar("start: start start | \"a\" | \"\""),
        ),
        (
            "ambiguity",
            grammar("start: a a a a a a a a\na: a a | \"x\" | b\nb: a b | \"x\""),
        ),
        ("an endless rule", grammar("start: a\na: a")),
        (
            "a chain of rules",
            grammar(&format!("start: r1\n{chain}r2500: \"x\"")),
        ),
        (
            "a repeated rule",
            grammar("start: a{100000}\na: b{100000}\nb: \"x\"{100000}"),
        ),
    ]
}

#[test]
fn what_means_harm_is_over_soon_and_the_next_one_is_tried() {
    let trial = trial();
    let good = Constraint::Regex("a+".into());
    assert_eq!(trial.compile(&good), Ok(()));
    for (name, constraint) in harmful() {
        let began = Instant::now();
        let outcome = trial.compile(&constraint);
        let took = began.elapsed();
        println!("{name}: {took:?} {outcome:?}");
        assert!(took < Duration::from_secs(20), "{name} took {took:?}");
        assert!(
            !matches!(outcome, Err(Doubt::Untried(_))),
            "{name}: {outcome:?}"
        );
        assert_eq!(trial.compile(&good), Ok(()), "after {name}");
    }
}

#[test]
fn a_process_that_cannot_be_started_is_no_fault_of_the_source() {
    let nowhere = Trial::new(Path::new("/nowhere/worker"));
    let outcome = nowhere.compile(&Constraint::JsonObject);
    assert!(
        matches!(&outcome, Err(Doubt::Untried(why)) if why.contains("does not start")),
        "{outcome:?}"
    );
}
