use serde_json::json;

use super::super::json::Object;
use super::*;

fn read(body: &Value, format: &Format) -> Result<Generate, FieldError> {
    let object: &Object = body.as_object().unwrap();
    let options = Options::read(&Fields::of("", object), format)?;
    Ok(options.generate(Prompt::Text("p".into()), &mut || 77))
}

#[test]
fn each_format_has_its_defaults() {
    for (format, temperature, tokens_max) in [
        (PREDICTIONS, 0.0, None),
        (COMPLETIONS, 1.0, Some(16)),
        (CHAT, 1.0, None),
    ] {
        let generate = read(&json!({}), &format).unwrap();
        let sampling = Sampling {
            temperature,
            seed: 77,
            ..Sampling::default()
        };
        let stop = Stop {
            tokens_max,
            ..Stop::default()
        };
        assert_eq!(
            generate,
            Generate {
                sampling,
                stop,
                ..Generate::new(Prompt::Text("p".into()))
            }
        );
    }
}

#[test]
fn every_parameter_arrives() {
    let body = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": -1, "frequency_penalty": 2.0, "logit_bias": {"5": -100, "6": null}, "seed": -1,
        "stop": ["a", "\n"], "stop_token_ids": [7, 8], "ignore_eos": true, "max_tokens": 0, "n": 3,
    });
    let expected = Generate {
        sampling: Sampling {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.1,
            presence_penalty: -1.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(5, -100.0)],
            seed: u64::MAX,
        },
        stop: Stop {
            strings: vec!["a".into(), "\n".into()],
            token_ids: vec![7, 8],
            ignore_eos: true,
            tokens_max: Some(0),
        },
        candidates: 3,
        ..Generate::new(Prompt::Text("p".into()))
    };
    assert_eq!(read(&body, &COMPLETIONS).unwrap(), expected);
}

#[test]
fn names_and_spellings_of_the_formats_hold() {
    let tokens_max = |body: Value, format| read(&body, &format).unwrap().stop.tokens_max;
    assert_eq!(
        tokens_max(json!({"max_completion_tokens": 5, "max_tokens": 9}), CHAT),
        Some(5)
    );
    assert_eq!(tokens_max(json!({"max_tokens": 9.0}), CHAT), Some(9));
    assert_eq!(
        tokens_max(json!({"max_tokens": 1e18}), PREDICTIONS),
        Some(u32::MAX)
    );
    assert_eq!(
        read(&json!({"candidate_count": 2, "n": 3}), &PREDICTIONS)
            .unwrap()
            .candidates,
        2
    );
    assert_eq!(
        read(&json!({"stop": "x"}), &CHAT).unwrap().stop.strings,
        ["x"]
    );
    assert_eq!(
        read(&json!({"top_k": -1}), &CHAT).unwrap().sampling.top_k,
        0
    );
    assert_eq!(
        read(&json!({"seed": u64::MAX}), &CHAT)
            .unwrap()
            .sampling
            .seed,
        u64::MAX
    );
}

#[test]
fn every_value_out_of_range_is_told_with_its_field() {
    let table = [
        (
            json!({"temperature": -0.1}),
            "temperature must be between 0 and 100, got -0.1",
        ),
        (
            json!({"temperature": 1e300}),
            "temperature must be between 0 and 100, got 1e",
        ),
        (
            json!({"temperature": "hot"}),
            "temperature must be a number, got \"hot\"",
        ),
        (
            json!({"top_p": 0}),
            "top_p must be above 0 and at most 1, got 0",
        ),
        (
            json!({"top_k": -2}),
            "top_k must be a whole number between -1 and",
        ),
        (json!({"min_p": 2}), "min_p must be between 0 and 1, got 2"),
        (
            json!({"repetition_penalty": 0}),
            "repetition_penalty must be between 0.001 and 100, got 0",
        ),
        (
            json!({"repetition_penalty": 1e-30}),
            "repetition_penalty must be between 0.001 and 100, got 1e-30",
        ),
        (
            json!({"presence_penalty": 3}),
            "presence_penalty must be between -2 and 2, got 3",
        ),
        (
            json!({"frequency_penalty": [1]}),
            "frequency_penalty must be a number, got a list",
        ),
        (
            json!({"logit_bias": {"x": 1}}),
            "logit_bias must have token ids for keys, got \"x\"",
        ),
        (
            json!({"logit_bias": {"-1": 1}}),
            "logit_bias must have token ids for keys, got \"-1\"",
        ),
        (
            json!({"logit_bias": {"5": 101, "6": 1}}),
            "logit_bias.5 must be between -100 and 100, got 101",
        ),
        (
            json!({"logit_bias": {"1": "a"}}),
            "logit_bias.1 must be a number, got \"a\"",
        ),
        (json!({"seed": 1.5}), "seed must be a whole number"),
        (json!({"seed": 1e30}), "seed must be a whole number"),
        (
            json!({"stop": 5}),
            "stop must be a string or a list of strings, got 5",
        ),
        (json!({"stop": ["a", 5]}), "stop[1] must be a string, got 5"),
        (
            json!({"stop": ""}),
            "stop must be 1 to 1024 bytes long, got 0",
        ),
        (
            json!({"stop": ["x".repeat(1025)]}),
            "stop[0] must be 1 to 1024 bytes long, got 1025",
        ),
        (
            json!({"stop": vec!["x"; 65]}),
            "stop must have at most 64 strings, got 65",
        ),
        (
            json!({"stop_token_ids": [1, -1]}),
            "stop_token_ids[1] must be a token id, got -1",
        ),
        (
            json!({"stop_token_ids": vec![1; 257]}),
            "stop_token_ids must have at most 256 token ids, got 257",
        ),
        (
            json!({"ignore_eos": 1}),
            "ignore_eos must be true or false, got 1",
        ),
        (
            json!({"max_tokens": -1}),
            "max_tokens must be a whole number of at least 0, got -1",
        ),
        (
            json!({"max_tokens": 1.5}),
            "max_tokens must be a whole number of at least 0, got 1.5",
        ),
        (
            json!({"max_tokens": "9"}),
            "max_tokens must be a whole number of at least 0, got \"9\"",
        ),
        (
            json!({"n": 0}),
            "n must be a whole number between 1 and 64, got 0",
        ),
        (
            json!({"n": 65}),
            "n must be a whole number between 1 and 64, got 65",
        ),
        (json!({"min_tokens": 2}), "min_tokens is not supported"),
    ];
    for (body, expected) in table {
        let error = read(&body, &COMPLETIONS).expect_err(expected);
        assert!(
            error.message.contains(expected),
            "expected {expected:?}, got {:?}",
            error.message
        );
    }
    let zero = read(&json!({"max_tokens": 0}), &CHAT).unwrap_err().message;
    assert_eq!(
        zero,
        "max_tokens must be a whole number of at least 1, got 0"
    );
    let biases: Object = (0..1025).map(|id| (id.to_string(), json!(1))).collect();
    let many = read(&json!({"logit_bias": biases}), &CHAT)
        .unwrap_err()
        .message;
    assert!(many.contains("at most 1024 entries"), "{many}");
}

#[test]
fn the_sizes_of_a_call_are_bounded() {
    assert!(check_size(PROMPTS_MAX, CHOICES_MAX, "prompt").is_ok());
    assert!(
        check_size(0, 0, "prompt")
            .unwrap_err()
            .message
            .contains("has no prompt")
    );
    assert!(
        check_size(PROMPTS_MAX + 1, 1, "prompt")
            .unwrap_err()
            .message
            .contains("at most 256")
    );
    assert!(
        check_size(2, CHOICES_MAX + 1, "prompt")
            .unwrap_err()
            .message
            .contains("at most 1024")
    );
}
