//! What invocations answer: predictions, completions, chats, and their chunks.

use utoipa::openapi::ComponentsBuilder;

use super::parameters::endpoint_name;
use super::schema::{
    Field, Shape, any_number, any_of, at_least, list, map, may, named, need, object, or_null, text,
    whole, words,
};

/// Why an answer ended.
fn finish_reason() -> Shape {
    words(&["stop", "length", "tool_calls"])
}

/// Puts the schemas of answers among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    components
        .schema("Predictions", predictions())
        .schema("Usage", usage())
        .schema("CompletionLogprobs", completion_logprobs())
        .schema(
            "CompletionReply",
            whole_reply("text_completion", completion_choice(finish_reason())),
        )
        .schema(
            "CompletionChunk",
            chunk(
                "text_completion",
                completion_choice(or_null(finish_reason())),
            ),
        )
        .schema("TokenLogprob", object(token_logprob()))
        .schema("ChatLogprobs", chat_logprobs())
        .schema("ChatReply", whole_reply("chat.completion", chat_choice()))
        .schema("ChatChunk", chunk("chat.completion.chunk", chat_delta()))
        .schema("EmbeddingReply", embeddings())
        .schema("Model", model())
        .schema("ModelList", models())
}

fn predictions() -> Shape {
    let candidate = object([
        need(
            "text",
            text(),
            "The continuation alone, without the prompt and without a stop text.",
        ),
        need(
            "metadata",
            object([need("finish_reason", finish_reason(), "Why it ended.")]),
            "How it ended.",
        ),
    ]);
    let tokens = object([
        need("input_tokens", at_least(0), "Tokens of the prompt."),
        need("output_tokens", at_least(0), "Tokens of all its answers."),
        need("total_tokens", at_least(0), "Both."),
    ]);
    let prediction = object([
        need("candidates", list(candidate), "As many as were asked for."),
        need("metadata", tokens, "What was used."),
    ]);
    object([need(
        "predictions",
        list(prediction),
        "One for each prompt, in their order.",
    )])
}

fn usage() -> Shape {
    object([
        need(
            "prompt_tokens",
            at_least(0),
            "Tokens of all prompts, each counted once.",
        ),
        need("completion_tokens", at_least(0), "Tokens made."),
        need("total_tokens", at_least(0), "Both."),
    ])
}

/// The fields of every answer in OpenAI's form.
fn head(kind: &str, choice: Shape) -> Vec<Field> {
    vec![
        need(
            "id",
            text(),
            "The answer's id; all chunks of a stream have the same.",
        ),
        need("object", words(&[kind]), "What this is."),
        need("created", at_least(0), "When, in seconds since 1970."),
        need("model", endpoint_name(), "The endpoint."),
        need(
            "choices",
            list(choice),
            "Answers: those to the first prompt first.",
        ),
    ]
}

fn whole_reply(kind: &str, choice: Shape) -> Shape {
    let mut fields = head(kind, choice);
    fields.push(need("usage", named("Usage"), "What was used."));
    object(fields)
}

fn chunk(kind: &str, choice: Shape) -> Shape {
    let mut fields = head(kind, choice);
    fields.push(may(
        "usage",
        named("Usage"),
        "In the last chunk, when it was asked for.",
    ));
    object(fields)
}

fn index() -> Field {
    need(
        "index",
        at_least(0),
        "Which answer: prompt by prompt, and in each by sample.",
    )
}

fn completion_choice(finish_reason: Shape) -> Shape {
    object([
        index(),
        need("text", text(), "The completion."),
        need("finish_reason", finish_reason, "Why it ended."),
        need(
            "logprobs",
            or_null(named("CompletionLogprobs")),
            "When they were asked for.",
        ),
    ])
}

fn completion_logprobs() -> Shape {
    object([
        need("tokens", list(text()), "The tokens."),
        need(
            "token_logprobs",
            list(or_null(any_number())),
            "How probable each was; null for the first token of a prompt.",
        ),
        need(
            "top_logprobs",
            list(or_null(map(any_number(), None))),
            "For each the most probable ones.",
        ),
        need(
            "text_offset",
            list(at_least(0)),
            "Where each begins in the text, in characters.",
        ),
    ])
}

fn token_logprob() -> Vec<Field> {
    vec![
        need("token", text(), "The token."),
        need("logprob", any_number(), "How probable it was."),
        need(
            "bytes",
            list(whole(0..=255)),
            "The token's bytes, which need not be text by themselves.",
        ),
    ]
}

fn chat_logprobs() -> Shape {
    let mut fields = token_logprob();
    fields.push(need(
        "top_logprobs",
        list(named("TokenLogprob")),
        "The most probable ones.",
    ));
    object([need("content", list(object(fields)), "One for each token.")])
}

fn chat_choice() -> Shape {
    let call = object([
        need("id", text(), "The call's id, which its answer names."),
        need("type", words(&["function"]), "What is called."),
        need(
            "function",
            object([
                need("name", text(), "Which function."),
                need(
                    "arguments",
                    text(),
                    "Its arguments: the text of a JSON object.",
                ),
            ]),
            "The function.",
        ),
    ]);
    let message = object([
        need("role", words(&["assistant"]), "Who speaks."),
        need(
            "content",
            or_null(text()),
            "What is said; null when the turn only calls tools.",
        ),
        may("tool_calls", list(call), "Calls of tools."),
    ]);
    object([
        index(),
        need("message", message, "The next turn."),
        need("finish_reason", finish_reason(), "Why it ended."),
        need(
            "logprobs",
            or_null(named("ChatLogprobs")),
            "When they were asked for.",
        ),
    ])
}

fn chat_delta() -> Shape {
    let call = object([
        need("index", at_least(0), "Which call of the turn."),
        may("id", text(), "The call's id, in its first part."),
        may(
            "type",
            words(&["function"]),
            "What is called, in its first part.",
        ),
        need(
            "function",
            object([
                may("name", text(), "Which function, in the call's first part."),
                need("arguments", text(), "More of its arguments."),
            ]),
            "The function.",
        ),
    ]);
    let delta = object([
        may(
            "role",
            words(&["assistant"]),
            "Who speaks: in the first chunk of each answer.",
        ),
        may("content", text(), "New text."),
        may("tool_calls", list(call), "Parts of calls of tools."),
    ]);
    object([
        index(),
        need("delta", delta, "What is new."),
        need(
            "finish_reason",
            or_null(finish_reason()),
            "Why it ended, in its last chunk.",
        ),
        need(
            "logprobs",
            or_null(named("ChatLogprobs")),
            "When they were asked for.",
        ),
    ])
}

fn embeddings() -> Shape {
    let embedding = object([
        need("object", words(&["embedding"]), "What this is."),
        need("index", at_least(0), "Which input it belongs to."),
        need(
            "embedding",
            any_of([list(any_number()), text()]),
            "The numbers, or base64 of their bytes.",
        ),
    ]);
    let usage = object([
        need("prompt_tokens", at_least(0), "Tokens of all inputs."),
        need("total_tokens", at_least(0), "The same."),
    ]);
    object([
        need("object", words(&["list"]), "What this is."),
        need("model", endpoint_name(), "The endpoint."),
        need("data", list(embedding), "One for each input."),
        need("usage", usage, "What was used."),
    ])
}

fn model() -> Shape {
    object([
        need("id", endpoint_name(), "The endpoint's name."),
        need("object", words(&["model"]), "What this is."),
        need("created", at_least(0), "When, in seconds since 1970."),
        need("owned_by", text(), "Who made it."),
    ])
}

fn models() -> Shape {
    object([
        need("object", words(&["list"]), "What this is."),
        need(
            "data",
            list(named("Model")),
            "The endpoints that the caller may see.",
        ),
    ])
}
