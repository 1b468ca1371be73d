//! The OpenAI forms: completions and chat, whole and streamed, on the endpoint's own path and on the client's.

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, FAMILIES, TOKENS_MAX};
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};
use serde_json::{Value, json};

async fn llama() -> Cluster {
    let cluster = Cluster::start(Settings::new()).await;
    cluster.client.deploy("llama", "tiny-llama").await;
    cluster
}

fn text(choice: &Value) -> &str {
    choice["text"].as_str().expect("a choice has text")
}

#[tokio::test]
async fn completions_take_text_lists_and_token_ids() {
    let cluster = llama().await;
    let (spark, sum) = (
        golden::named("tiny-llama", "spark"),
        golden::named("tiny-llama", "sum"),
    );
    let forms = [
        (json!(spark.prompt), vec![&spark]),
        (json!([spark.prompt, sum.prompt]), vec![&spark, &sum]),
        (json!(spark.input_ids), vec![&spark]),
        (json!([sum.input_ids, spark.input_ids]), vec![&sum, &spark]),
    ];
    for (prompt, expected) in forms {
        let body =
            json!({"model": "llama", "prompt": prompt, "max_tokens": TOKENS_MAX, "temperature": 0});
        for path in [
            "/serving-endpoints/llama/invocations",
            "/serving-endpoints/completions",
            "/serving-endpoints/v1/completions",
        ] {
            let answer = cluster.client.post(path, &body).await.ok();
            assert_eq!(answer["object"], "text_completion");
            assert_eq!(answer["model"], "llama");
            let choices = answer["choices"].as_array().unwrap();
            assert_eq!(choices.len(), expected.len(), "{answer}");
            for (index, (choice, golden)) in choices.iter().zip(&expected).enumerate() {
                assert_eq!(
                    (choice["index"].as_u64(), text(choice)),
                    (Some(index as u64), golden.text.as_str())
                );
                assert_eq!(choice["finish_reason"], "stop");
            }
            let prompt_tokens: usize = expected.iter().map(|golden| golden.input_ids.len()).sum();
            assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
        }
    }
}

#[tokio::test]
async fn completions_number_choices_by_prompt_and_sample() {
    let cluster = llama().await;
    let (spark, sum) = (
        golden::named("tiny-llama", "spark"),
        golden::named("tiny-llama", "sum"),
    );
    let body = json!({"prompt": [spark.prompt, sum.prompt], "n": 2, "max_tokens": TOKENS_MAX, "temperature": 0});
    let answer = cluster.client.invoke("llama", &body).await.ok();
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(text)
        .collect();
    assert_eq!(texts, [&spark.text, &spark.text, &sum.text, &sum.text]);
}

#[tokio::test]
async fn completions_default_to_sixteen_tokens_and_echo_and_suffix_frame_the_text() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "count");
    let plain = cluster
        .client
        .invoke("llama", &json!({"prompt": golden.prompt, "temperature": 0}))
        .await
        .ok();
    assert_eq!(plain["usage"]["completion_tokens"], 16);
    assert_eq!(plain["choices"][0]["finish_reason"], "length");
    let body = json!({"prompt": golden.prompt, "temperature": 0, "echo": true, "suffix": " END"});
    let framed = cluster.client.invoke("llama", &body).await.ok();
    let expected = format!("{}{} END", golden.prompt, text(&plain["choices"][0]));
    assert_eq!(text(&framed["choices"][0]), expected);
}

#[tokio::test]
async fn ignore_eos_goes_on_to_max_tokens() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "capital");
    let body =
        json!({"prompt": golden.prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let answer = cluster.client.invoke("llama", &body).await.ok();
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(text(&answer["choices"][0]).starts_with(&golden.text));
}

#[tokio::test]
async fn logprobs_name_the_greedy_token_first_and_join_to_the_text_and_its_end() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "sum");
    let body =
        json!({"prompt": golden.prompt, "max_tokens": TOKENS_MAX, "temperature": 0, "logprobs": 3});
    let answer = cluster.client.invoke("llama", &body).await.ok();
    let (choice, logprobs) = (&answer["choices"][0], &answer["choices"][0]["logprobs"]);
    let tokens: Vec<&str> = logprobs["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    assert_eq!(tokens.concat(), format!("{}</s>", text(choice)));
    let offsets = logprobs["text_offset"].as_array().unwrap();
    assert_eq!(offsets.last(), Some(&json!(text(choice).chars().count())));
    for (i, token) in tokens.iter().enumerate() {
        let chosen = logprobs["token_logprobs"][i].as_f64().unwrap();
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        assert!(chosen <= 0.0 && top.len() == 3, "{logprobs}");
        let best = top
            .values()
            .map(|v| v.as_f64().unwrap())
            .fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(
            best, chosen,
            "greedy takes the best: {token:?} in {logprobs}"
        );
    }
}

#[tokio::test]
async fn chat_renders_the_models_template_for_each_family() {
    let cluster = Cluster::start(Settings::new()).await;
    let messages = json!([
        {"role": "user", "content": "What is the capital of Japan?"},
        {"role": "assistant", "content": "The capital of Japan is Tokyo."},
        {"role": "user", "content": "What is the opposite of day?"},
        {"role": "assistant", "content": "The opposite of day is night."},
        {"role": "user", "content": "What is 2 plus 2?"},
        {"role": "assistant", "content": "2 plus 2 is 4."},
        {"role": "user", "content": [{"type": "text", "text": "Spell the word star."}]},
    ]);
    for model in FAMILIES {
        cluster.client.deploy(model, model).await;
        let golden = golden::named(model, "turns");
        let body = json!({"model": model, "messages": messages, "max_tokens": TOKENS_MAX, "temperature": 0});
        for path in [
            "/serving-endpoints/chat/completions",
            "/serving-endpoints/v1/chat/completions",
        ] {
            let answer = cluster.client.post(path, &body).await.ok();
            assert_eq!(answer["object"], "chat.completion");
            let choice = &answer["choices"][0];
            assert_eq!(
                (&choice["message"]["role"], &choice["message"]["content"]),
                (&json!("assistant"), &json!(golden.text))
            );
            assert_eq!(choice["finish_reason"], "stop");
            assert_eq!(
                answer["usage"]["prompt_tokens"],
                golden.input_ids.len(),
                "{model}"
            );
        }
    }
}

#[tokio::test]
async fn a_stream_is_the_whole_answer_in_pieces() {
    let cluster = llama().await;
    for golden in golden::exact("tiny-llama") {
        let body = json!({"prompt": golden.prompt, "max_tokens": TOKENS_MAX, "temperature": 0, "stream": true});
        let streamed = cluster.client.stream("llama", &body).await.collect().await;
        assert_eq!(
            (streamed.text(), streamed.finish_reason()),
            (golden.text.as_str(), golden.finish_reason.as_str())
        );
        assert!(streamed.done && streamed.usage.is_none(), "{streamed:?}");
        if golden.output_ids.len() > 20 {
            assert!(
                streamed.text_events > 5,
                "the text came in {} pieces",
                streamed.text_events
            );
        }
    }
}

#[tokio::test]
async fn a_chat_stream_begins_with_the_role_and_ends_with_usage_when_asked() {
    let cluster = llama().await;
    let body = json!({"model": "llama", "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": TOKENS_MAX, "temperature": 0, "stream": true, "stream_options": {"include_usage": true}});
    let whole = {
        let mut body = body.clone();
        body.as_object_mut()
            .unwrap()
            .retain(|key, _| !key.starts_with("stream"));
        cluster
            .client
            .post("/serving-endpoints/chat/completions", &body)
            .await
            .ok()
    };
    let stream = cluster
        .client
        .try_stream("/serving-endpoints/chat/completions", &body)
        .await;
    let mut events = stream.unwrap_or_else(|reply| panic!("{reply:?}"));
    let first = events.next().await.unwrap();
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(first["object"], "chat.completion.chunk");
    let id = first["id"].clone();
    let mut streamed = cluster_tests::events::Streamed::default();
    while let Some(event) = events.next().await {
        assert_eq!(event["id"], id, "one id for all chunks");
        if !event["usage"].is_null() {
            assert_eq!(
                event["choices"],
                json!([]),
                "usage comes in a chunk of its own: {event}"
            );
        }
        streamed.take(&event);
    }
    assert!(events.done());
    assert_eq!(streamed.text(), whole["choices"][0]["message"]["content"]);
    assert_eq!(streamed.usage.unwrap(), whole["usage"]);
}

#[tokio::test]
async fn a_stream_of_several_prompts_and_samples_keeps_its_choices_apart() {
    let cluster = llama().await;
    let (spark, sum) = (
        golden::named("tiny-llama", "spark"),
        golden::named("tiny-llama", "sum"),
    );
    let body = json!({"prompt": [spark.prompt, sum.prompt], "n": 2, "max_tokens": TOKENS_MAX, "temperature": 0, "stream": true});
    let streamed = cluster.client.stream("llama", &body).await.collect().await;
    let texts: Vec<&String> = streamed.texts.values().collect();
    assert_eq!(texts, [&spark.text, &spark.text, &sum.text, &sum.text]);
    assert_eq!(streamed.finish_reasons.len(), 4);
}

#[tokio::test]
async fn a_streamed_stop_string_never_shows() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "spark");
    let stop = "source engine";
    let body = json!({"prompt": golden.prompt, "max_tokens": TOKENS_MAX, "temperature": 0, "stop": [stop], "stream": true});
    let streamed = cluster.client.stream("llama", &body).await.collect().await;
    assert_eq!(streamed.text(), golden.text.split(stop).next().unwrap());
    assert_eq!(streamed.finish_reason(), "stop");
}

#[tokio::test]
async fn the_models_list_names_endpoints() {
    let cluster = llama().await;
    let list = cluster.client.get("/serving-endpoints/models").await.ok();
    assert_eq!(list["object"], "list");
    assert_eq!(
        (&list["data"][0]["id"], &list["data"][0]["object"]),
        (&json!("llama"), &json!("model"))
    );
}

#[tokio::test]
async fn a_scored_prompt_has_the_same_log_probabilities_from_a_cold_and_a_warm_cache() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "long_prompt");
    let score = json!({"prompt": golden.input_ids, "max_tokens": 0, "echo": true, "logprobs": 1, "temperature": 0});
    let cold = cluster.client.invoke("llama", &score).await.ok();
    let go_on = json!({"prompt": golden.input_ids, "max_tokens": 2, "temperature": 0});
    for _ in 0..2 {
        cluster.client.invoke("llama", &go_on).await.ok();
    }
    // Workers report their counters once a second.
    until(
        "the prompt to be found in the cache",
        PATIENCE,
        async || {
            let metrics = cluster.client.metrics().await;
            match metrics.sum("tandem_prefix_cache_hits_total", "") {
                Some(hits) if hits > 0.0 => Ok(()),
                hits => Err(format!("{hits:?} hits")),
            }
        },
    )
    .await;
    let warm = cluster.client.invoke("llama", &score).await.ok();
    assert_eq!(cold["choices"], warm["choices"]);
    let logprobs = &warm["choices"][0]["logprobs"];
    let scores = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(
        scores.len(),
        golden.input_ids.len(),
        "one per token of the prompt"
    );
    assert!(scores[0].is_null() && logprobs["top_logprobs"][0].is_null());
    assert!(
        scores[1..]
            .iter()
            .all(|score| score.as_f64().unwrap() <= 0.0)
    );
    assert!(text(&warm["choices"][0]).ends_with("What is the capital of Spain? [/INST]"));
    assert_eq!(warm["usage"]["completion_tokens"], 0);
    assert_eq!(warm["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn the_best_of_several_samples_is_the_most_probable_one_per_token() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "shakespeare");
    let base = json!({"prompt": golden.prompt, "max_tokens": 12, "temperature": 1.5, "seed": 5, "logprobs": 0});
    let with = |more: Value| {
        let mut body = base.clone();
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    };
    let all = cluster
        .client
        .invoke("llama", &with(json!({"n": 6})))
        .await
        .ok();
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs.iter().map(|l| l.as_f64().unwrap()).sum::<f64>() / logprobs.len() as f64
    };
    let mut ranked = all["choices"].as_array().unwrap().clone();
    ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    let best = cluster
        .client
        .invoke("llama", &with(json!({"n": 2, "best_of": 6})))
        .await
        .ok();
    let texts: Vec<&str> = best["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(text)
        .collect();
    assert_eq!(texts, [text(&ranked[0]), text(&ranked[1])]);
    assert_ne!(text(&ranked[0]), text(&ranked[5]), "there was a choice");
    assert_eq!(best["usage"], all["usage"], "all that was made counts");
}

#[tokio::test]
async fn an_overlong_prompt_is_refused_or_keeps_its_end() {
    let cluster = llama().await;
    let golden = golden::named("tiny-llama", "spark");
    let prompt = format!("{}{}", "word ".repeat(3000), golden.prompt);
    let body = json!({"prompt": prompt, "max_tokens": TOKENS_MAX, "temperature": 0});
    let refused = cluster.client.invoke("llama", &body).await;
    refused.refused(400, "BAD_REQUEST", &["tokens", "1024"]);
    let mut cut = body;
    cut["error_behavior"] = json!("truncate");
    cut["echo"] = json!(true);
    let answer = cluster.client.invoke("llama", &cut).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 1024 - TOKENS_MAX);
    let shown = text(&answer["choices"][0]);
    assert!(
        shown.starts_with("word word") && shown.contains(&golden.prompt),
        "{shown}"
    );
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    let ids = json!({"prompt": vec![5; 5000], "max_tokens": 4, "error_behavior": "truncate"});
    let answer = cluster.client.invoke("llama", &ids).await.ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 1020);
}
