use serde_json::json;

use super::*;

const KEYS: [&str; 4] = [
    "dataframe_split",
    "dataframe_records",
    "instances",
    "inputs",
];

fn parse(body: Value) -> Result<Vec<Generate>, FieldError> {
    let body = body.as_object().unwrap();
    let key = only_key(body, &KEYS)?;
    let mut seed = 0;
    predictions(body, key, &mut || {
        seed += 1;
        seed
    })
}

fn texts(body: Value) -> Vec<String> {
    let text = |generate: Generate| match generate.prompt {
        Prompt::Text(text) => text,
        other => panic!("not a text: {other:?}"),
    };
    parse(body).unwrap().into_iter().map(text).collect()
}

#[test]
fn all_four_formats_of_the_seed_are_the_same_request() {
    let params = json!({"temperature": 0.5, "max_tokens": 100, "stop": ["word1", "word2"], "candidate_count": 1});
    let bodies = [
        json!({"dataframe_split": {"columns": ["prompt"], "index": [0], "data": [["p"]]}, "params": params}),
        json!({"dataframe_records": [{"prompt": "p"}], "params": params}),
        json!({"instances": [{"prompt": "p"}], "params": params}),
        json!({"inputs": {"prompt": "p"}, "params": params}),
        json!({"inputs": {"prompt": ["p"]}, "params": params}),
    ];
    for body in bodies {
        let parsed = parse(body).unwrap();
        assert_eq!(parsed.len(), 1);
        assert_eq!(parsed[0].prompt, Prompt::Text("p".into()));
        assert_eq!(parsed[0].sampling.temperature, 0.5);
        assert_eq!(parsed[0].stop.strings, ["word1", "word2"]);
        assert_eq!(
            (parsed[0].stop.tokens_max, parsed[0].candidates),
            (Some(100), 1)
        );
    }
}

#[test]
fn prompts_keep_their_order_in_every_format() {
    for body in [
        json!({"dataframe_split": {"columns": ["x", "prompt"], "data": [[1, "a"], [2, "b"]]}}),
        json!({"dataframe_records": [{"prompt": "a"}, {"prompt": "b"}]}),
        json!({"instances": [{"prompt": "a"}, "b"], "params": null}),
        json!({"instances": ["a", "b"]}),
        json!({"inputs": ["a", {"prompt": "b"}]}),
        json!({"inputs": {"prompt": ["a", "b"]}, "prompt": null}),
    ] {
        assert_eq!(texts(body), ["a", "b"]);
    }
    assert_eq!(texts(json!({"inputs": "a"})), ["a"]);
    assert_eq!(texts(json!({"instances": "a"})), ["a"]);
}

#[test]
fn columns_beside_the_prompt_are_parameters_and_params_win() {
    let expected = |parsed: Vec<Generate>| {
        let of = |g: &Generate| {
            (
                g.sampling.temperature,
                g.stop.tokens_max,
                g.stop.strings.clone(),
            )
        };
        assert_eq!(of(&parsed[0]), (0.1, Some(9), vec!["x".to_owned()]));
        assert_eq!(of(&parsed[1]), (0.0, Some(9), vec!["x".to_owned()]));
    };
    let params = json!({"max_tokens": 9});
    expected(
        parse(json!({"params": params, "dataframe_split": {
        "columns": ["prompt", "temperature", "max_tokens", "stop", 0],
        "data": [["a", 0.1, 5, "x", 1], ["b", null, 6, ["x"], 2]]}}))
        .unwrap(),
    );
    expected(parse(json!({"params": params, "dataframe_records": [
        {"prompt": "a", "temperature": 0.1, "stop": "x"}, {"prompt": "b", "max_tokens": 1, "stop": ["x"]}]}))
    .unwrap());
    expected(
        parse(json!({"params": params, "inputs": {
        "prompt": ["a", "b"], "temperature": [0.1, null], "stop": ["x"], "max_tokens": [1, 2]}}))
        .unwrap(),
    );
    let per_prompt =
        parse(json!({"inputs": {"prompt": ["a", "b"], "stop": [["x"], null], "top_k": 5}}))
            .unwrap();
    assert_eq!(
        (
            per_prompt[0].stop.strings.len(),
            per_prompt[1].stop.strings.len()
        ),
        (1, 0)
    );
    assert_eq!(
        (per_prompt[0].sampling.top_k, per_prompt[1].sampling.top_k),
        (5, 5)
    );
    let single =
        parse(json!({"inputs": {"prompt": "a", "stop": ["x", "y"], "temperature": 0.3}})).unwrap();
    assert_eq!(
        (single[0].stop.strings.len(), single[0].sampling.temperature),
        (2, 0.3)
    );
}

#[test]
fn prompts_without_a_seed_draw_their_own_and_a_given_seed_holds_for_all() {
    let seeds = |body| {
        parse(body)
            .unwrap()
            .iter()
            .map(|g| g.sampling.seed)
            .collect::<Vec<_>>()
    };
    assert_eq!(seeds(json!({"inputs": ["a", "a"]})), [1, 2]);
    assert_eq!(
        seeds(json!({"inputs": ["a", "a"], "params": {"seed": 9}})),
        [9, 9]
    );
}

#[test]
fn every_mistake_is_told_with_its_place() {
    let table = [
        (
            json!({}),
            "exactly one of dataframe_split, dataframe_records, instances, inputs; got an empty object",
        ),
        (json!({"text": "a"}), "got [\"text\"]"),
        (
            json!({"inputs": null, "text": "a"}),
            "inputs is null, which is the same as missing",
        ),
        (
            json!({"dataframe_split": {"columns": ["prompt", "x", "prompt"], "data": [["a", 1, "b"]]}}),
            "dataframe_split.columns has more than one column named \"prompt\"",
        ),
        (
            json!({"dataframe_split": {"columns": ["prompt", "top_k", "top_k"], "data": [["a", 1, 2]]}}),
            "dataframe_split.columns has more than one column named \"top_k\"",
        ),
        (
            json!({"inputs": "a", "instances": ["a"]}),
            "the body has instances, inputs, give one",
        ),
        (
            json!({"inputs": 5}),
            "inputs must be a prompt, a list of prompts, or an object with a prompt, got 5",
        ),
        (json!({"inputs": {"text": "a"}}), "inputs.prompt is missing"),
        (
            json!({"inputs": {"prompt": 5}}),
            "inputs.prompt must be a string, got 5",
        ),
        (
            json!({"inputs": {"prompt": ["a", 5]}}),
            "inputs.prompt[1] must be a string, got 5",
        ),
        (
            json!({"inputs": {"prompt": []}}),
            "inputs.prompt has no prompt",
        ),
        (
            json!({"dataframe_split": {"columns": ["prompt"], "data": []}}),
            "dataframe_split.data has no prompt",
        ),
        (json!({"inputs": []}), "inputs has no prompt"),
        (
            json!({"inputs": [["a"]]}),
            "inputs[0] must be a string, got a list",
        ),
        (
            json!({"inputs": {"prompt": ["a"], "top_k": [1, 2]}}),
            "inputs.top_k has 2 values for 1 prompts",
        ),
        (
            json!({"inputs": {"prompt": ["a"], "top_k": ["x"]}}),
            "inputs[0].top_k must be a whole number",
        ),
        (
            json!({"instances": [{"text": "a"}]}),
            "instances[0].prompt is missing",
        ),
        (
            json!({"dataframe_records": {"prompt": "a"}}),
            "dataframe_records must be a list, got an object",
        ),
        (
            json!({"dataframe_records": ["a"]}),
            "dataframe_records[0] must be an object, got \"a\"",
        ),
        (
            json!({"dataframe_split": []}),
            "dataframe_split must be an object, got a list",
        ),
        (
            json!({"dataframe_split": {"data": []}}),
            "dataframe_split.columns is missing",
        ),
        (
            json!({"dataframe_split": {"columns": ["prompt"]}}),
            "dataframe_split.data is missing",
        ),
        (
            json!({"dataframe_split": {"columns": ["text", 0], "data": [["a", 1]]}}),
            "dataframe_split.columns must have a column named \"prompt\", got [\"text\", \"0\"]",
        ),
        (
            json!({"dataframe_split": {"columns": ["prompt"], "data": [["a"], []]}}),
            "dataframe_split.data[1] must have 1 values, one per column, got 0",
        ),
        (
            json!({"dataframe_split": {"columns": ["prompt"], "data": [[5]]}}),
            "dataframe_split.data[0][0] must be a string, got 5",
        ),
        (
            json!({"inputs": "a", "params": [1]}),
            "params must be an object, got a list",
        ),
        (
            json!({"inputs": "a", "params": {"max_tokens": -5}}),
            "params.max_tokens must be a whole number of at least 1, got -5",
        ),
        (
            json!({"inputs": "a", "params": {"max_tokens": "many"}}),
            "params.max_tokens must be a whole number",
        ),
        (
            json!({"inputs": "a", "params": {"candidate_count": 0}}),
            "params.candidate_count must be",
        ),
        (
            json!({"inputs": "a", "stream": true}),
            "stream needs 'messages' or 'prompt'",
        ),
        (
            json!({"inputs": vec!["a"; 257]}),
            "inputs has 257 prompts; one call takes at most 256",
        ),
        (
            json!({"inputs": vec!["a"; 200], "params": {"candidate_count": 64}}),
            "inputs asks for 12800 answers; one call gives at most 1024",
        ),
    ];
    for (body, expected) in table {
        let error = parse(body).expect_err(expected);
        assert!(
            error.message.contains(expected),
            "expected {expected:?}, got {:?}",
            error.message
        );
    }
}
