use common::request::TopToken;
use serde_json::json;

use super::*;

fn meta(style: Style, logprobs: bool) -> Meta {
    Meta {
        style,
        id: "cmpl-1".into(),
        created: 1_710_327_769,
        model: "e".into(),
        logprobs,
    }
}

fn choice(text: &str, tokens: Vec<TokenLogprob>) -> Choice {
    Choice {
        text: text.into(),
        tokens,
        calls: Vec::new(),
        finish: Some(Finish::Length),
        output_tokens: 2,
        ..Choice::default()
    }
}

fn token(id: u32, bytes: &[u8], logprob: f32) -> TokenLogprob {
    let top = vec![TopToken {
        id: 1,
        bytes: b"a".to_vec(),
        logprob: -0.5,
    }];
    TokenLogprob {
        id,
        bytes: bytes.to_vec(),
        logprob: Some(logprob),
        top,
    }
}

#[test]
fn predictions_have_the_recorded_shape() {
    let choices = [
        choice("x", vec![]),
        choice("y", vec![]),
        choice("z", vec![]),
    ];
    let json = serde_json::to_value(Predictions::of(&choices, &[1, 2], &[41, 3])).unwrap();
    let candidate = |text: &str| json!({"text": text, "metadata": {"finish_reason": "length"}});
    let expected = json!({"predictions": [
        {"candidates": [candidate("x")],
         "metadata": {"input_tokens": 41, "output_tokens": 2, "total_tokens": 43}},
        {"candidates": [candidate("y"), candidate("z")],
         "metadata": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}},
    ]});
    assert_eq!(json, expected);
}

#[test]
fn whole_answers_have_openais_shape() {
    let choices = [choice(" w", vec![])];
    let usage = Usage {
        prompt_tokens: 8,
        completion_tokens: 16,
    };
    let text = |style| {
        serde_json::to_string(&OpenAiReply::whole(&meta(style, false), &choices, usage)).unwrap()
    };
    assert_eq!(
        text(Style::Completion),
        r#"{"id":"cmpl-1","object":"text_completion","created":1710327769,"model":"e","choices":[{"index":0,"text":" w","finish_reason":"length","logprobs":null}],"usage":{"prompt_tokens":8,"completion_tokens":16,"total_tokens":24}}"#
    );
    assert_eq!(
        text(Style::Chat),
        r#"{"id":"cmpl-1","object":"chat.completion","created":1710327769,"model":"e","choices":[{"index":0,"message":{"role":"assistant","content":" w"},"finish_reason":"length","logprobs":null}],"usage":{"prompt_tokens":8,"completion_tokens":16,"total_tokens":24}}"#
    );
}

#[test]
fn completion_logprobs_are_four_lists_with_offsets_in_the_choices_text() {
    let first = TokenLogprob {
        logprob: None,
        top: vec![],
        ..token(9, "é".as_bytes(), 0.0)
    };
    let euro = "€".as_bytes();
    let tokens = vec![
        first,
        token(1, b"a", -0.5),
        token(2, &euro[..1], -1.5),
        token(3, &euro[1..], f32::NEG_INFINITY),
    ];
    let choices = [choice("éa€", tokens)];
    let meta = meta(Style::Completion, true);
    let json = serde_json::to_value(OpenAiReply::whole(&meta, &choices, Usage::default())).unwrap();
    let expected = json!({
        "tokens": ["é", "a", "bytes:\\xe2", "bytes:\\x82\\xac"],
        "token_logprobs": [null, -0.5, -1.5, -9999.0],
        "top_logprobs": [null, {"a": -0.5}, {"a": -0.5, "bytes:\\xe2": -1.5},
                         {"a": -0.5, "bytes:\\x82\\xac": -9999.0}],
        "text_offset": [0, 1, 2, 2],
    });
    assert_eq!(json["choices"][0]["logprobs"], expected);
}

#[test]
fn chat_logprobs_are_one_object_per_token() {
    let choices = [choice("a", vec![token(1, b"a", -0.5)])];
    let meta = meta(Style::Chat, true);
    let json = serde_json::to_value(OpenAiReply::whole(&meta, &choices, Usage::default())).unwrap();
    let a = json!({"token": "a", "logprob": -0.5, "bytes": [97]});
    let mut expected = a.clone();
    expected["top_logprobs"] = json!([a]);
    assert_eq!(
        json["choices"][0]["logprobs"],
        json!({"content": [expected]})
    );
}

#[test]
fn calls_stand_beside_the_content_which_is_null_when_there_is_none() {
    let call = |id: &str| ToolCall {
        id: id.into(),
        name: "f".into(),
        arguments: "{\"a\": 1}".into(),
    };
    let called = |text: &str| Choice {
        calls: vec![call("c1"), call("c2")],
        finish: Some(Finish::ToolCalls),
        ..choice(text, vec![])
    };
    let meta = meta(Style::Chat, false);
    let message = |text: &str| {
        let choices = [called(text)];
        let reply = OpenAiReply::whole(&meta, &choices, Usage::default());
        let json = serde_json::to_value(reply).unwrap();
        assert_eq!(json["choices"][0]["finish_reason"], "tool_calls");
        json["choices"][0]["message"].clone()
    };
    let json_call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let expected = json!({"role": "assistant", "content": null, "tool_calls": [json_call("c1"), json_call("c2")]});
    assert_eq!(message(""), expected);
    assert_eq!(message("I look.")["content"], "I look.");
}
