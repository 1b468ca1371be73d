//! Parsers against arbitrary JSON: an answer or a refusal, never a panic, and nothing unchecked inside.

use common::request::{Generate, Prompt, Stop};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::super::json::Object;
use super::super::sampling::{CHOICES_MAX, NAMES, PROMPTS_MAX};
use super::super::{embeddings, inputs, openai, spec};

/// Keys that parsers know, beside those of the parameters.
const KEYS: [&str; 37] = [
    "input",
    "encoding_format",
    "dimensions",
    "best_of",
    "error_behavior",
    "prompt",
    "messages",
    "inputs",
    "instances",
    "dataframe_split",
    "dataframe_records",
    "columns",
    "data",
    "params",
    "role",
    "content",
    "type",
    "text",
    "stream",
    "stream_options",
    "include_usage",
    "logprobs",
    "top_logprobs",
    "extra_params",
    "name",
    "config",
    "served_models",
    "model_name",
    "model_version",
    "scale_to_zero_enabled",
    "traffic_config",
    "routes",
    "served_model_name",
    "traffic_percentage",
    "tags",
    "environment_vars",
    "echo",
];

fn key() -> impl Strategy<Value = String> {
    let known: Vec<&str> = KEYS.into_iter().chain(NAMES).collect();
    prop_oneof![9 => proptest::sample::select(known).prop_map(str::to_owned), 1 => "[a-z0-9]{0,3}"]
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-2i64..70).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(|n| json!(n)),
        (0.0..1.0).prop_map(|n: f64| json!(n)),
        proptest::sample::select(vec![
            "", "user", "text", "prompt", "true", "Small", "CPU", "1", "é", "\u{0}"
        ])
        .prop_map(Value::from),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(4, 48, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
            object_of(inner).prop_map(Value::Object),
        ]
    })
}

fn object_of(values: impl Strategy<Value = Value>) -> impl Strategy<Value = Object> {
    proptest::collection::vec((key(), values), 0..8)
        .prop_map(|entries| entries.into_iter().collect::<Map<_, _>>())
}

/// A valid body of one of the formats with some fields replaced by anything.
fn damaged() -> impl Strategy<Value = Object> {
    let good = proptest::sample::select(vec![
        json!({"prompt": ["a", "b"], "n": 2}),
        json!({"prompt": [[1, 2], [3]]}),
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        json!({"inputs": {"prompt": ["a", "b"], "stop": ["x"], "temperature": [0.5, 1]}}),
        json!({"instances": [{"prompt": "a"}, "b"]}),
        json!({"dataframe_records": [{"prompt": "a", "top_k": 3}]}),
        json!({"dataframe_split": {"columns": ["prompt", "seed"], "data": [["a", 1], ["b", 2]]}}),
        json!({"name": "e", "config": {"served_models": [
            {"model_name": "m", "model_version": 1, "scale_to_zero_enabled": true}]}}),
    ]);
    (good, object_of(value())).prop_map(|(mut good, damage)| {
        let object = good.as_object_mut().expect("a body is an object");
        object.extend(damage);
        object.clone()
    })
}

fn is_checked(prompts: &[Generate]) {
    assert!((1..=PROMPTS_MAX).contains(&prompts.len()));
    assert!(
        prompts
            .iter()
            .map(|prompt| prompt.candidates as usize)
            .sum::<usize>()
            <= CHOICES_MAX
    );
    for prompt in prompts {
        prompt.sampling.check().unwrap();
        assert!((1..=Generate::CANDIDATES_MAX).contains(&prompt.candidates));
        assert!(prompt.stop.strings.len() <= Stop::STRINGS_MAX);
        assert!(
            prompt
                .stop
                .strings
                .iter()
                .all(|s| (1..=Stop::STRING_BYTES_MAX).contains(&s.len()))
        );
        assert!(prompt.logprobs.is_none_or(|n| n <= Generate::LOGPROBS_MAX));
        assert!(!matches!(&prompt.prompt, Prompt::Tokens(ids) if ids.is_empty()));
    }
}

fn parse_everything(body: &Object) {
    let mut seed = || 1;
    for key in [
        "dataframe_split",
        "dataframe_records",
        "instances",
        "inputs",
    ] {
        if let Ok(prompts) = inputs::predictions(body, key, &mut seed) {
            is_checked(&prompts);
        }
    }
    for request in [
        openai::completion(body, &mut seed),
        openai::chat(body, &mut seed),
    ]
    .into_iter()
    .flatten()
    {
        is_checked(&request.prompts);
    }
    if let Ok(request) = embeddings::request(body) {
        is_checked(&request.prompts);
    }
    let types = ["CPU".to_owned()];
    if let Ok(endpoint) = spec::create(body, &types) {
        assert_eq!(
            endpoint
                .config
                .routes
                .iter()
                .map(|route| route.percentage)
                .sum::<u32>(),
            100
        );
    }
    let _ = spec::update(body, &types);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_json_is_taken_or_refused(body in object_of(value())) {
        parse_everything(&body);
    }

    #[test]
    fn damaged_bodies_are_taken_or_refused(body in damaged()) {
        parse_everything(&body);
    }
}
