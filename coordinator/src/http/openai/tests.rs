use serde_json::json;

use super::*;

fn parse_completion(body: &Value) -> Result<OpenAiRequest, FieldError> {
    completion(body.as_object().unwrap(), &mut || 7)
}

fn parse_chat(body: &Value) -> Result<OpenAiRequest, FieldError> {
    chat(body.as_object().unwrap(), &mut || 7)
}

fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}

fn prompts_of(prompt: Value) -> Vec<Prompt> {
    let request = parse_completion(&json!({"prompt": prompt})).unwrap();
    request
        .prompts
        .into_iter()
        .map(|generate| generate.prompt)
        .collect()
}

#[test]
fn prompts_come_in_four_forms() {
    let text = |text: &str| Prompt::Text(text.into());
    assert_eq!(prompts_of(json!("a")), [text("a")]);
    assert_eq!(prompts_of(json!(["a", "b"])), [text("a"), text("b")]);
    assert_eq!(prompts_of(json!([1, 2])), [Prompt::Tokens(vec![1, 2])]);
    assert_eq!(
        prompts_of(json!([[1], [2, 3]])),
        [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]
    );
}

#[test]
fn every_field_of_a_completion_arrives() {
    let body = json!({
        "model": "e", "prompt": "a", "n": 2, "best_of": 2, "echo": true, "logprobs": 3, "max_tokens": 0,
        "suffix": "!", "stream": true, "stream_options": {"include_usage": true}, "user": "u",
        "use_raw_prompt": true, "error_behavior": "truncate", "unknown": {"x": 1}, "tools": [],
        "response_format": {"type": "text"},
    });
    let request = parse_completion(&body).unwrap();
    let generate = &request.prompts[0];
    assert_eq!((generate.candidates, generate.echo), (2, true));
    assert_eq!(
        (generate.logprobs, generate.prompt_logprobs),
        (Some(3), Some(3))
    );
    assert_eq!(generate.stop.tokens_max, Some(0));
    assert_eq!(generate.sampling.seed, 7);
    assert!(request.stream && request.include_usage && request.partial_on_deadline);
    assert_eq!(request.suffix, "!");
    let plain = parse_completion(&json!({"prompt": "a", "logprobs": 0})).unwrap();
    assert_eq!(
        (plain.prompts[0].logprobs, plain.prompts[0].prompt_logprobs),
        (Some(0), None)
    );
    assert!(!plain.stream && !plain.include_usage && !plain.partial_on_deadline);
    assert!(generate.truncate_prompt && !plain.prompts[0].truncate_prompt);
    assert_eq!((request.n, request.logprobs), (2, true));
}

#[test]
fn the_best_of_several_are_made_with_log_probabilities_that_are_not_shown() {
    let body = json!({"prompt": ["a", "b"], "n": 2, "best_of": 5});
    let request = parse_completion(&body).unwrap();
    assert_eq!((request.n, request.logprobs), (2, false));
    for generate in &request.prompts {
        assert_eq!((generate.candidates, generate.logprobs), (5, Some(0)));
        assert_eq!(generate.prompt_logprobs, None);
    }
    let many = json!({"prompt": vec!["a"; 100], "best_of": 20});
    let error = parse_completion(&many).unwrap_err();
    assert!(
        error.message.contains("asks for 2000 answers"),
        "{}",
        error.message
    );
}

#[test]
fn extra_params_are_strings_and_give_way_to_the_body() {
    let extra =
        json!({"top_k": "1", "temperature": "0.5", "stop": "5", "ignore_eos": "true", "seed": 3});
    let request =
        parse_completion(&json!({"prompt": "a", "temperature": 0.7, "extra_params": extra}))
            .unwrap();
    let generate = &request.prompts[0];
    assert_eq!(
        (generate.sampling.top_k, generate.sampling.temperature),
        (1, 0.7)
    );
    assert_eq!(
        (generate.sampling.seed, generate.stop.ignore_eos),
        (3, true)
    );
    assert_eq!(generate.stop.strings, ["5"]);
    let lists = json!({"stop": "[\"a\", \"b\"]"});
    let request = parse_completion(&json!({"prompt": "a", "extra_params": lists})).unwrap();
    assert_eq!(request.prompts[0].stop.strings, ["a", "b"]);
    let error =
        parse_completion(&json!({"prompt": "a", "extra_params": {"top_k": "many"}})).unwrap_err();
    assert!(
        error
            .message
            .starts_with("extra_params.top_k must be a whole number"),
        "{}",
        error.message
    );
}

#[test]
fn a_chat_keeps_its_turns() {
    let body = json!({"messages": [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "assistant", "content": "c", "tool_calls": []},
        {"role": "user", "content": "d"},
    ]});
    let request = parse_chat(&body).unwrap();
    let turn = |role: &str, content: &str| ChatMessage::said(role, content);
    let turns = vec![
        turn("system", "be brief"),
        turn("user", "a\nb"),
        turn("assistant", "c"),
        turn("user", "d"),
    ];
    assert_eq!(request.prompts[0].prompt, Prompt::Chat(turns.into()));
    assert_eq!(request.prompts[0].logprobs, None);
}

#[test]
fn chat_logprobs_are_a_flag_and_a_count() {
    let base = json!({"messages": [{"role": "user", "content": "a"}]});
    let logprobs = |body: &Value| parse_chat(body).unwrap().prompts[0].logprobs;
    let wanted = with(base.clone(), "logprobs", json!(true));
    assert_eq!(logprobs(&wanted), Some(0));
    assert_eq!(logprobs(&with(wanted, "top_logprobs", json!(20))), Some(20));
    assert_eq!(
        logprobs(&with(base.clone(), "top_logprobs", json!(0))),
        None
    );
    let error = parse_chat(&with(base, "top_logprobs", json!(2))).unwrap_err();
    assert_eq!(error.message, "top_logprobs needs logprobs: true beside it");
}

#[test]
fn every_mistake_of_a_completion_is_told_with_its_field() {
    let at = |key: &str, value: Value| with(json!({"prompt": "a"}), key, value);
    let table = [
        (json!({}), "prompt is missing"),
        (
            at("prompt", json!(5)),
            "prompt must be a string, a list of strings",
        ),
        (at("prompt", json!([])), "prompt has no prompt"),
        (at("prompt", json!([[]])), "prompt[0] is empty"),
        (
            at("prompt", json!(["a", 5])),
            "prompt[1] must be a string or a list of token ids, got 5",
        ),
        (
            at("prompt", json!([5, "a"])),
            "prompt[1] must be a token id, got \"a\"",
        ),
        (
            at("prompt", json!([1, -1])),
            "prompt[1] must be a token id, got -1",
        ),
        (
            at("prompt", json!([1, 4_294_967_296_u64])),
            "prompt[1] must be a token id, got 4294967296",
        ),
        (
            at("prompt", json!([[1], [1.5]])),
            "prompt[1][0] must be a token id, got 1.5",
        ),
        (
            at("prompt", json!(vec!["a"; 257])),
            "prompt has 257 prompts",
        ),
        (
            json!({"prompt": "a", "n": 3, "best_of": 2}),
            "best_of must be at least n, which is 3, got 2",
        ),
        (
            json!({"prompt": "a", "best_of": 2, "stream": true}),
            "best_of must equal n, which is 1, when the answer is a stream",
        ),
        (
            at("best_of", json!(65)),
            "best_of must be a whole number between 1 and 64",
        ),
        (at("echo", json!("x")), "echo must be true or false"),
        (
            at("logprobs", json!(true)),
            "logprobs must be a whole number between 0 and 20, got true",
        ),
        (
            at("logprobs", json!(21)),
            "logprobs must be a whole number between 0 and 20, got 21",
        ),
        (
            at("max_tokens", json!(-1)),
            "max_tokens must be a whole number of at least 0, got -1",
        ),
        (at("suffix", json!(1)), "suffix must be a string"),
        (
            at("stream", json!(1)),
            "stream must be true or false, got 1",
        ),
        (
            at("stream_options", json!(1)),
            "stream_options must be an object, got 1",
        ),
        (
            at("stream_options", json!({"include_usage": 1})),
            "stream_options.include_usage must be",
        ),
        (
            at("error_behavior", json!("x")),
            "error_behavior must be \"error\" or \"truncate\"",
        ),
        (
            at("extra_params", json!("x")),
            "extra_params must be an object",
        ),
        (
            at("use_raw_prompt", json!(1)),
            "use_raw_prompt must be true or false",
        ),
        (
            at("tools", json!([{}])),
            "tools needs messages: a completion calls no tools",
        ),
        (
            at("response_format", json!({"type": "xml"})),
            "response_format.type must be \"text\", \"json_object\" or \"json_schema\"",
        ),
        (
            at("response_format", json!({})),
            "response_format.type is missing",
        ),
    ];
    for (body, expected) in table {
        let error = parse_completion(&body).expect_err(expected);
        assert!(
            error.message.contains(expected),
            "expected {expected:?}, got {:?}",
            error.message
        );
    }
}

#[test]
fn every_mistake_of_a_chat_is_told_with_its_field() {
    let user = json!({"role": "user", "content": "a"});
    let at = |key: &str, value: Value| with(json!({"messages": [user]}), key, value);
    let message = |value: Value| json!({"messages": [user, value]});
    let table = [
        (json!({}), "messages is missing"),
        (
            at("messages", json!("a")),
            "messages must be a list, got \"a\"",
        ),
        (
            at("messages", json!([])),
            "messages must have 1 to 4096 entries, got 0",
        ),
        (
            message(json!("a")),
            "messages[1] must be an object, got \"a\"",
        ),
        (
            message(json!({"content": "a"})),
            "messages[1].role is missing",
        ),
        (
            message(json!({"role": "king", "content": "a"})),
            "messages[1].role must be system, developer, user, assistant or tool",
        ),
        (
            message(json!({"role": "tool", "content": "a"})),
            "messages[1].tool_call_id is missing",
        ),
        (
            message(json!({"role": "function", "name": "f", "content": "a"})),
            "messages[1].role is the old form of \"tool\"",
        ),
        (
            message(json!({"role": "assistant", "content": null, "tool_calls": []})),
            "messages[1].content is missing",
        ),
        (
            message(json!({"role": "user"})),
            "messages[1].content is missing",
        ),
        (
            message(json!({"role": "user", "content": 5})),
            "messages[1].content must be a string or a list",
        ),
        (
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            "messages[1].content[0].type must be \"text\"",
        ),
        (
            message(json!({"role": "assistant", "content": null, "tool_calls": [{}]})),
            "messages[1].tool_calls[0].id is missing",
        ),
        (
            message(json!({"role": "assistant", "function_call": {"name": "f"}})),
            "messages[1].function_call is the old form of tool_calls",
        ),
        (
            at("max_completion_tokens", json!(0)),
            "max_completion_tokens must be a whole number of at least 1",
        ),
        (
            at("logprobs", json!(3)),
            "logprobs must be true or false, got 3",
        ),
        (
            at("tool_choice", json!("required")),
            "tool_choice asks for a call",
        ),
        (at("tools", json!({"a": 1})), "tools must be a list"),
        (
            at("functions", json!([{}])),
            "functions is the old form of tools",
        ),
        (
            with(
                at("regex", json!("a")),
                "tools",
                json!([{"type": "function", "function": {"name": "f"}}]),
            ),
            "tools cannot stand beside a regular expression or a grammar",
        ),
        (
            at("response_format", json!({"type": "json_schema"})),
            "response_format.json_schema is missing",
        ),
    ];
    for (body, expected) in table {
        let error = parse_chat(&body).expect_err(expected);
        assert!(
            error.message.contains(expected),
            "expected {expected:?}, got {:?}",
            error.message
        );
    }
}

#[test]
fn calls_and_their_results_stay_with_their_turns() {
    let call = json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let body = json!({
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": false,
        "response_format": {"type": "json_object"},
    });
    let request = parse_chat(&body).unwrap();
    let generate = &request.prompts[0];
    let Prompt::Chat(chat) = &generate.prompt else {
        panic!("a chat")
    };
    assert_eq!(chat.messages[1].tool_calls, Some(json!([call]).to_string()));
    assert_eq!(chat.messages[1].content, "");
    assert_eq!(chat.messages[2].tool_call_id.as_deref(), Some("c1"));
    assert_eq!(
        chat.tools.as_deref(),
        Some(r#"[{"type":"function","function":{"name":"f"}}]"#)
    );
    assert_eq!(chat.tool_choice, ToolChoice::Function("f".into()));
    assert!(chat.single_call);
    assert_eq!(generate.constraint, Some(Constraint::JsonObject));
    let plain = parse_completion(&json!({"prompt": ["a", "b"], "regex": "x+"})).unwrap();
    let regex = Some(Constraint::Regex("x+".into()));
    assert!(
        plain
            .prompts
            .iter()
            .all(|prompt| prompt.constraint == regex)
    );
}
