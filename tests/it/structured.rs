//! Answers that must have a form: JSON by a schema, expressions, grammars, choices, and calls of tools.

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, FAMILIES, TOKENS_MAX};
use cluster_tests::settings::Settings;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

const CHAT: &str = "/serving-endpoints/chat/completions";

async fn with(model: &str) -> Cluster {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("e", model).await;
    cluster
}

/// A random schema whose values have an end, and are told right from wrong by [`fits`].
fn schema(rng: &mut StdRng, depth: u32) -> Value {
    match rng.random_range(0..if depth == 0 { 5 } else { 7 }) {
        0 => json!({"type": "string", "maxLength": rng.random_range(1..8)}),
        1 => {
            let least = rng.random_range(-50..50);
            json!({"type": "integer", "minimum": least, "maximum": least + rng.random_range(0..200)})
        }
        2 => json!({"type": "boolean"}),
        3 => json!({"enum": ["red", "green \"blue\"", 7, null]}),
        4 => json!({"type": "number", "minimum": 0, "maximum": 1}),
        5 => {
            let least = rng.random_range(0..2);
            json!({"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + 2})
        }
        _ => {
            let count = rng.random_range(1..4);
            let names: Vec<String> = (0..count).map(|i| format!("p{i}")).collect();
            let properties: serde_json::Map<String, Value> = names
                .iter()
                .map(|name| (name.clone(), schema(rng, depth - 1)))
                .collect();
            json!({"type": "object", "properties": properties, "required": names, "additionalProperties": false})
        }
    }
}

/// Whether a value is what a schema of [`schema`] describes.
fn fits(schema: &Value, value: &Value) -> bool {
    let bound = |key: &str| schema[key].as_f64().unwrap();
    match schema["type"].as_str() {
        None => schema["enum"].as_array().unwrap().contains(value),
        Some("string") => value
            .as_str()
            .is_some_and(|text| text.chars().count() as f64 <= bound("maxLength")),
        Some("boolean") => value.is_boolean(),
        Some(kind @ ("integer" | "number")) => {
            let whole = kind == "number" || value.is_i64() || value.is_u64();
            whole
                && value
                    .as_f64()
                    .is_some_and(|x| (bound("minimum")..=bound("maximum")).contains(&x))
        }
        Some("array") => value.as_array().is_some_and(|items| {
            (bound("minItems")..=bound("maxItems")).contains(&(items.len() as f64))
                && items.iter().all(|item| fits(&schema["items"], item))
        }),
        Some(_) => value.as_object().is_some_and(|object| {
            let properties = schema["properties"].as_object().unwrap();
            object.len() == properties.len()
                && properties
                    .iter()
                    .all(|(name, of)| object.get(name).is_some_and(|value| fits(of, value)))
        }),
    }
}

fn format_of(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "s", "strict": true, "schema": schema}})
}

#[tokio::test]
async fn whatever_the_schema_the_seed_and_the_temperature_answers_fit() {
    let cluster = Cluster::start(Settings::new()).await;
    let mut rng = StdRng::seed_from_u64(7);
    let (mut samples, mut complete) = (0, 0);
    for model in FAMILIES {
        cluster.client.deploy(model, model).await;
        for (i, temperature) in (0..12).zip([0.0, 0.7, 1.0, 2.0].into_iter().cycle()) {
            let schema = json!({"type": "object", "properties": {"value": schema(&mut rng, 2)},
                "required": ["value"], "additionalProperties": false});
            let body = json!({"model": model, "messages": [{"role": "user", "content": "Tell me something."}],
                "response_format": format_of(&schema), "n": 6, "seed": i, "temperature": temperature, "max_tokens": 200});
            let answer = cluster.client.post(CHAT, &body).await.ok();
            for choice in answer["choices"].as_array().unwrap() {
                samples += 1;
                let text = choice["message"]["content"].as_str().unwrap();
                if choice["finish_reason"] == "stop" {
                    complete += 1;
                    let value: Value =
                        serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
                    assert!(
                        fits(&schema, &value),
                        "{model}: {text} does not fit {schema}"
                    );
                } else {
                    assert!(text.starts_with('{'), "{text}");
                }
            }
        }
    }
    println!("{complete} of {samples} answers were complete");
    assert!(
        samples >= 200 && complete * 10 >= samples * 9,
        "{complete} of {samples} complete"
    );
}

/// Whether a text is what was asked for.
type Fits = fn(&str) -> bool;

#[tokio::test]
async fn expressions_choices_and_grammars_are_kept_to_by_chats_and_completions() {
    let cluster = with("tiny-mpt").await;
    let number =
        |text: &str| text.len() == 5 && text.bytes().filter(u8::is_ascii_digit).count() == 4;
    let table: [(Value, Fits); 6] = [
        (json!({"regex": r"[0-9]{3}-[0-9]"}), number),
        (
            json!({"structured_outputs": {"regex": r"[0-9]{3}-[0-9]"}}),
            number,
        ),
        (json!({"guided_choice": ["yes", "no", "perhaps so"]}), |t| {
            ["yes", "no", "perhaps so"].contains(&t)
        }),
        (
            json!({"grammar": "start: \"<\" INNER \">\"\nINNER: /[a-c]{1,4}/"}),
            |t| t.starts_with('<') && t.ends_with('>'),
        ),
        (json!({"guided_json": {"enum": ["a", 5]}}), |t| {
            t == "\"a\"" || t == "5"
        }),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}}}),
            |t| t == "true" || t == "false",
        ),
    ];
    for (form, fits) in table {
        for seed in 0..6 {
            let mut body = form.clone();
            for (key, value) in [
                ("prompt", json!("Well,")),
                ("seed", json!(seed)),
                ("max_tokens", json!(40)),
            ] {
                body[key] = value;
            }
            let answer = cluster.client.invoke("e", &body).await.ok();
            let choice = &answer["choices"][0];
            assert!(fits(choice["text"].as_str().unwrap()), "{form}: {choice}");
            assert_eq!(choice["finish_reason"], "stop");
            body.as_object_mut().unwrap().remove("prompt");
            body["messages"] = json!([{"role": "user", "content": "Well?"}]);
            body["stream"] = json!(true);
            let streamed = cluster.client.stream("e", &body).await.collect().await;
            assert!(fits(streamed.text()), "{form}: {streamed:?}");
        }
    }
}

fn tools() -> Value {
    let tool = |name: &str, properties: Value| {
        let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
        json!({"type": "function", "function": {"name": name, "description": "Tells something.", "parameters":
            {"type": "object", "properties": properties, "required": required, "additionalProperties": false}}})
    };
    json!([
        tool(
            "get_weather",
            json!({"city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}})
        ),
        tool(
            "add",
            json!({"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "integer", "minimum": 0, "maximum": 99}})
        ),
    ])
}

fn asked(seed: u64, choice: Value) -> Value {
    json!({"model": "e", "messages": [{"role": "user", "content": "What is 2 plus 2?"}], "tools": tools(),
        "tool_choice": choice, "parallel_tool_calls": false, "seed": seed, "max_tokens": 400, "temperature": 0.7})
}

/// The only call's name and arguments.
fn call_of(choice: &Value) -> (String, Value) {
    let calls = choice["message"]["tool_calls"]
        .as_array()
        .unwrap_or_else(|| panic!("no call in {choice}"));
    assert_eq!(calls.len(), 1, "{choice}");
    assert_eq!(calls[0]["type"], "function");
    assert!(calls[0]["id"].as_str().is_some_and(|id| id.len() > 8));
    let function = &calls[0]["function"];
    let arguments = serde_json::from_str(function["arguments"].as_str().unwrap());
    (
        function["name"].as_str().unwrap().to_owned(),
        arguments.unwrap_or_else(|e| panic!("{e}: {function}")),
    )
}

#[tokio::test]
async fn required_calls_are_made_whole_and_streamed_by_every_family() {
    for model in FAMILIES {
        let cluster = with(model).await;
        for seed in 0..6 {
            let function = json!({"type": "function", "function": {"name": "add"}});
            let choice = if seed % 2 == 0 {
                json!("required")
            } else {
                function
            };
            let mut body = asked(seed, choice);
            let answer = cluster.client.post(CHAT, &body).await.ok();
            let choice = &answer["choices"][0];
            assert_eq!(
                (&choice["finish_reason"], &choice["message"]["content"]),
                (&json!("tool_calls"), &Value::Null)
            );
            let (name, arguments) = call_of(choice);
            assert!(seed % 2 == 0 || name == "add");
            let known = tools();
            let tool = known
                .as_array()
                .unwrap()
                .iter()
                .find(|tool| tool["function"]["name"] == name)
                .unwrap();
            let parameters = &tool["function"]["parameters"];
            assert!(fits(parameters, &arguments), "{model}: {arguments}");

            body["stream"] = json!(true);
            let mut events = cluster.client.try_stream(CHAT, &body).await.unwrap();
            let (mut parts, mut text, mut finish) = (Vec::new(), String::new(), Value::Null);
            while let Some(event) = events.next().await {
                let choice = &event["choices"][0];
                text += choice["delta"]["content"].as_str().unwrap_or_default();
                parts.extend(
                    choice["delta"]["tool_calls"]
                        .as_array()
                        .cloned()
                        .unwrap_or_default(),
                );
                finish = choice["finish_reason"].clone();
            }
            assert_eq!((text.as_str(), finish), ("", json!("tool_calls")));
            let first = &parts[0];
            assert_eq!(
                (
                    &first["index"],
                    &first["type"],
                    &first["function"]["arguments"]
                ),
                (&json!(0), &json!("function"), &json!(""))
            );
            assert_eq!(first["function"]["name"], name);
            let rest = &parts[1..];
            assert!(
                rest.len() > 1
                    && rest
                        .iter()
                        .all(|part| part["id"].is_null() && part["function"]["name"].is_null()),
                "{rest:?}"
            );
            let streamed: String = rest
                .iter()
                .map(|part| part["function"]["arguments"].as_str().unwrap())
                .collect();
            assert_eq!(
                streamed, choice["message"]["tool_calls"][0]["function"]["arguments"],
                "one seed, one call"
            );
        }
    }
}

#[tokio::test]
async fn a_conversation_with_calls_and_results_goes_on() {
    let cluster = with("tiny-llama").await;
    let mut body = asked(1, json!("required"));
    body["n"] = json!(3);
    let answer = cluster.client.post(CHAT, &body).await.ok();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 3);
    let message = answer["choices"][2]["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    let mut body = asked(2, json!("auto"));
    let turns = body["messages"].as_array_mut().unwrap();
    turns.push(message);
    turns.push(json!({"role": "tool", "tool_call_id": id, "content": "4"}));
    let answer = cluster.client.post(CHAT, &body).await.ok();
    assert!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );
}

#[tokio::test]
async fn tools_that_need_not_be_called_leave_text_as_it_is() {
    let cluster = with("tiny-llama").await;
    let plain = json!({"model": "e", "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0, "max_tokens": TOKENS_MAX});
    let mut none = plain.clone();
    none["tools"] = tools();
    none["tool_choice"] = json!("none");
    let expected = cluster.client.post(CHAT, &plain).await.ok();
    let answer = cluster.client.post(CHAT, &none).await.ok();
    assert_eq!(answer["choices"], expected["choices"]);
    none["tool_choice"] = json!("auto");
    none["response_format"] = format_of(
        &json!({"type": "object", "properties": {"x": {"type": "boolean"}},
        "required": ["x"], "additionalProperties": false}),
    );
    none["n"] = json!(8);
    none["temperature"] = json!(1.5);
    let answer = cluster.client.post(CHAT, &none).await.ok();
    for choice in answer["choices"].as_array().unwrap() {
        let message = &choice["message"];
        match message["content"].as_str() {
            Some(text) => assert!(
                serde_json::from_str::<Value>(text).is_ok_and(|value| value["x"].is_boolean()),
                "{choice}"
            ),
            None => assert!(
                !message["tool_calls"].as_array().unwrap().is_empty(),
                "{choice}"
            ),
        }
    }
}

#[tokio::test]
async fn one_seed_gives_one_answer_beside_any_load_and_bad_forms_hurt_nobody() {
    let cluster = with("tiny-llama").await;
    let mut rng = StdRng::seed_from_u64(3);
    let forms: Vec<Value> = (0..8).map(|_| format_of(&schema(&mut rng, 2))).collect();
    let body = |i: usize| {
        json!({"model": "e", "messages": [{"role": "user", "content": "Tell me."}], "response_format": forms[i],
            "seed": i, "temperature": 1.2, "max_tokens": 80, "logprobs": true, "top_logprobs": 2})
    };
    let mut alone = Vec::new();
    for i in 0..forms.len() {
        alone.push(cluster.client.post(CHAT, &body(i)).await.ok()["choices"].clone());
    }
    let golden = golden::named("tiny-llama", "spark");
    let free = json!({"prompt": golden.prompt, "max_tokens": TOKENS_MAX, "temperature": 0, "stream": true});
    let bad = [
        (json!({"regex": "("}), "regular expression"),
        (json!({"grammar": "start: nothing"}), "nothing"),
        (json!({"guided_json": {"type": "strin"}}), "strin"),
        (json!({"guided_json": {"$ref": "#"}}), "JSON schema"),
        (
            json!({"grammar": format!("start: {}", "(".repeat(20_000))}),
            "nested",
        ),
    ];
    let together =
        async |i: usize| cluster.client.post(CHAT, &body(i)).await.ok()["choices"].clone();
    let streams = async || cluster.client.stream("e", &free).await.collect().await;
    let refused = async |(form, says): &(Value, &str)| {
        let mut body = form.clone();
        body["prompt"] = json!("x");
        cluster
            .client
            .invoke("e", &body)
            .await
            .refused(400, "BAD_REQUEST", &[says]);
    };
    let (answers, streamed, _) = tokio::join!(
        futures::future::join_all((0..forms.len()).map(together)),
        futures::future::join_all((0..6).map(|_| streams())),
        futures::future::join_all(bad.iter().map(refused)),
    );
    assert_eq!(answers, alone);
    for streamed in streamed {
        assert_eq!(
            (streamed.text(), streamed.done),
            (golden.text.as_str(), true)
        );
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_grammar_frees_everything() {
    let cluster = with("tiny-llama").await;
    let body = json!({"model": "e", "messages": [{"role": "user", "content": "Count."}],
        "regex": "(a|b|c)+", "ignore_eos": true, "stream": true, "max_tokens": 800, "temperature": 1});
    for _ in 0..4 {
        let mut events = cluster.client.try_stream(CHAT, &body).await.unwrap();
        // One: a busy machine may bring many tokens at once.
        assert!(events.next().await.is_some());
    }
    cluster.wait_idle().await;
    let answer = cluster
        .client
        .invoke("e", &json!({"prompt": "a", "regex": "x{3}"}))
        .await
        .ok();
    assert_eq!(answer["choices"][0]["text"], "xxx");
}
