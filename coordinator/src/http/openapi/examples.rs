//! Examples of invocations. A test sends each to a real cluster.

use serde_json::json;

use super::operation::Example;
use super::parameters::ENDPOINT;

const PROMPT: &str = "Hello, I'm a language model,";

pub(super) fn input_examples() -> Vec<Example> {
    vec![
        (
            "inputs",
            "One prompt",
            json!({"inputs": {"prompt": PROMPT}, "params": {"max_tokens": 16}}),
        ),
        (
            "instances",
            "Several prompts",
            json!({"instances": [{"prompt": PROMPT}, {"prompt": "Two plus two is"}], "params": {"max_tokens": 8}}),
        ),
        (
            "dataframe_records",
            "A data frame by rows, with two sampled answers",
            json!({
                "dataframe_records": [{"prompt": PROMPT}],
                "params": {"temperature": 0.8, "seed": 7, "candidate_count": 2, "max_tokens": 8},
            }),
        ),
        (
            "dataframe_split",
            "A data frame as pandas splits it, with a parameter as a column",
            json!({
                "dataframe_split": {"columns": ["prompt", "max_tokens"], "index": [0], "data": [[PROMPT, 8]]},
                "params": {"stop": ["."]},
            }),
        ),
    ]
}

pub(super) fn completion_examples() -> Vec<Example> {
    vec![
        (
            "completion",
            "A completion",
            json!({"prompt": PROMPT, "max_tokens": 16, "temperature": 0}),
        ),
        (
            "scores",
            "Log-probabilities of the prompt's own tokens",
            json!({"prompt": PROMPT, "max_tokens": 0, "echo": true, "logprobs": 1}),
        ),
        (
            "completion_stream",
            "A completion as a stream",
            json!({"prompt": PROMPT, "max_tokens": 8, "stream": true, "stream_options": {"include_usage": true}}),
        ),
    ]
}

pub(super) fn chat_examples() -> Vec<Example> {
    let messages = || json!([{"role": "user", "content": "What is the capital of France?"}]);
    vec![
        (
            "chat",
            "A conversation",
            json!({"messages": messages(), "max_tokens": 16, "temperature": 0}),
        ),
        (
            "chat_stream",
            "A conversation as a stream",
            json!({"messages": messages(), "max_tokens": 8, "stream": true}),
        ),
        (
            "chat_regex",
            "An answer that a regular expression bounds",
            json!({"messages": messages(), "regex": "[a-z]{1,8}", "max_tokens": 16, "temperature": 0}),
        ),
        (
            "chat_logprobs",
            "Two answers with log-probabilities",
            json!({"messages": messages(), "max_tokens": 4, "n": 2, "logprobs": true, "top_logprobs": 2}),
        ),
    ]
}

/// An endpoint whose model's task is embeddings.
pub(super) const EMBEDDING_ENDPOINT: &str = "hello-embeddings";

pub(super) fn embedding_examples() -> Vec<Example> {
    vec![
        (
            "embedding",
            "One text; the endpoint's model must be logged with the task llm/v1/embeddings",
            json!({"input": PROMPT}),
        ),
        (
            "embedding_base64",
            "Several texts, as OpenAI's Python client asks for them",
            json!({"input": [PROMPT, "Two plus two is"], "encoding_format": "base64"}),
        ),
    ]
}

/// The same for a path on which the body names the endpoint.
pub(super) fn with_model(examples: Vec<Example>) -> impl Iterator<Item = Example> {
    examples.into_iter().map(|(name, says, mut body)| {
        body["model"] = ENDPOINT.into();
        (name, says, body)
    })
}
