//! What invocations take: the four input formats, completions and chats.
//!
//! Bounds come from the constants by which requests are checked.

use common::request::{Generate, Sampling, Stop};
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::errors;
use super::examples::{
    EMBEDDING_ENDPOINT, chat_examples, completion_examples, embedding_examples, input_examples,
    with_model,
};
use super::operation::Operation;
use super::parameters::endpoint_name;
use super::schema::{
    Field, Shape, any_number, any_of, anything, at_least, filled_list, flag, formed, list, list_of,
    map, may, named, need, number, number_above, object, one_of, text, text_of, whole, words,
};
use crate::http::openai::{MESSAGES_MAX, SUFFIX_BYTES_MAX};
use crate::http::sampling::{PROMPTS_MAX, STOP_TOKEN_IDS_MAX};

const TAG: &str = "Invocations";

/// The formats of invocations: the name of each schema, and the key by which a body says that it is in this format.
pub(super) const FORMATS: [(&str, &str); 7] = [
    ("SplitRequest", "dataframe_split"),
    ("RecordsRequest", "dataframe_records"),
    ("InstancesRequest", "instances"),
    ("InputsRequest", "inputs"),
    ("Completion", "prompt"),
    ("Chat", "messages"),
    ("Embedding", "input"),
];

/// Puts the paths of generation among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let paths = invocations("/serving-endpoints/{name}/invocations", &FORMATS).put(paths);
    let paths = generates(
        "/serving-endpoints/completions",
        "completions",
        "Completes texts, as OpenAI's clients ask it",
    )
    .about(ALIASED)
    .body(
        named("CompletionRequest"),
        with_model(completion_examples()),
    )
    .gives(named("CompletionReply"), "The completions.")
    .streams()
    .with_header(ENTITY_HEADER, ENTITY_SAYS)
    .put(paths);
    let paths = generates(
        "/serving-endpoints/chat/completions",
        "chat",
        "Continues a conversation, as OpenAI's clients ask it",
    )
    .about(ALIASED)
    .body(named("ChatRequest"), with_model(chat_examples()))
    .gives(named("ChatReply"), "The next turn.")
    .streams()
    .with_header(ENTITY_HEADER, ENTITY_SAYS)
    .put(paths);
    let paths = generates(
        "/serving-endpoints/embeddings",
        "embeddings",
        "Embeds texts, as OpenAI's clients ask it",
    )
    .about(ALIASED)
    .body(
        named("EmbeddingRequest"),
        embedding_examples()
            .into_iter()
            .map(|(name, says, mut body)| {
                body["model"] = EMBEDDING_ENDPOINT.into();
                (name, says, body)
            }),
    )
    .gives(
        named("EmbeddingReply"),
        "The embeddings, in the inputs' order.",
    )
    .with_header(ENTITY_HEADER, ENTITY_SAYS)
    .put(paths);
    let paths = Operation::new(
        HttpMethod::Get,
        "/serving-endpoints/models",
        TAG,
        "models",
        "Lists endpoints as OpenAI's clients list models",
    )
    .about("Those that the caller may ask. Also at the other places where OpenAI's paths are.")
    .gives(named("ModelList"), "The endpoints.")
    .put(paths);
    Operation::new(
        HttpMethod::Get,
        "/serving-endpoints/models/{name}",
        TAG,
        "model",
        "Shows an endpoint as OpenAI's clients see a model",
    )
    .gives(named("Model"), "The endpoint.")
    .put(paths)
}

const ALIASED: &str = "The endpoint is the one that `model` names. Also under `/serving-endpoints/v1`, `/ai-gateway/mlflow/v1` \
                       and `/ai-gateway/openai/v1`. With `stream: true` the answer is a stream of events: each a line \
                       `data: {...}` with a CompletionChunk or ChatChunk and an empty line, and after the last one \
                       `data: [DONE]`. What goes wrong after the first byte is an event with an `error`, and there is no \
                       `[DONE]`.";
const ENTITY_HEADER: &str = "served-model-name";
const ENTITY_SAYS: &str = "The served entity that answered.";

/// The invocation of an endpoint that takes these formats.
pub(super) fn invocations(path: &str, formats: &[(&str, &str)]) -> Operation {
    let takes = |key: &str| formats.iter().any(|(_, known)| *known == key);
    let examples = [
        (&["prompt"][..], completion_examples()),
        (&["messages"][..], chat_examples()),
        (&["input"][..], embedding_examples()),
        (
            &[
                "dataframe_split",
                "dataframe_records",
                "instances",
                "inputs",
            ][..],
            input_examples(),
        ),
    ];
    let examples = examples
        .into_iter()
        .filter(|(keys, _)| keys.iter().all(|key| takes(key)))
        .flat_map(|(_, examples)| examples);
    let mut replies = vec![named("Predictions")];
    replies.extend(takes("prompt").then(|| named("CompletionReply")));
    replies.extend(takes("messages").then(|| named("ChatReply")));
    replies.extend(takes("input").then(|| named("EmbeddingReply")));
    replies.retain(|reply| takes("inputs") || *reply != named("Predictions"));
    generates(path, "invoke", "Asks an endpoint")
        .about(
            "The body's keys say in which format it is: exactly one of `dataframe_split`, `dataframe_records`, `instances`, \
             `inputs`, `prompt`, `messages` and `input`. Unknown fields are ignored, and null is the same as absent. With `stream: true` completions and chats \
             are answered by events.",
        )
        .body(one_of(formats.iter().map(|(name, _)| named(name))), examples)
        .gives(any_of(replies), "The answer, in the form that belongs to the request's format.")
        .streams()
        .with_header(ENTITY_HEADER, ENTITY_SAYS)
}

/// What all generation has in common.
fn generates(path: &str, id: &str, summary: &str) -> Operation {
    Operation::new(HttpMethod::Post, path, TAG, id, summary)
        .takes(
            ParameterIn::Header,
            "x-request-timeout-ms",
            at_least(1),
            "Wait no longer than so many milliseconds; the server's own limit is the most.",
        )
        .refuses(&[&errors::NOT_FOUND, &errors::OVERLOADED, &errors::DEADLINE])
}

/// Puts the schemas of requests among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    let model = || need("model", endpoint_name(), "The endpoint's name.");
    components
        .schema("Params", object(parameters(Format::Predictions)))
        .schema("PromptRecord", prompt_record())
        .schema("SplitRequest", predictions("dataframe_split", split()))
        .schema(
            "RecordsRequest",
            predictions(
                "dataframe_records",
                list_of(named("PromptRecord"), 1..=PROMPTS_MAX),
            ),
        )
        .schema("InstancesRequest", predictions("instances", free()))
        .schema("InputsRequest", predictions("inputs", free()))
        .schema("Completion", object(completion()))
        .schema(
            "CompletionRequest",
            object([model()].into_iter().chain(completion())),
        )
        .schema("Embedding", object(embedding()))
        .schema(
            "EmbeddingRequest",
            object([model()].into_iter().chain(embedding())),
        )
        .schema("ChatMessage", message())
        .schema("Chat", object(chat()))
        .schema("ChatRequest", object([model()].into_iter().chain(chat())))
}

#[derive(Clone, Copy, PartialEq)]
enum Format {
    Predictions,
    Completion,
    Chat,
}

/// The parameters that all formats share.
fn parameters(format: Format) -> Vec<Field> {
    let (temperature, tokens_least) = match format {
        Format::Predictions => ("0 is greedy and the default.", 1),
        Format::Completion => ("0 is greedy; 1 unless told.", 0),
        Format::Chat => ("0 is greedy; 1 unless told.", 1),
    };
    let tokens = match format {
        Format::Predictions => "Most tokens of each answer; what fits unless told.",
        Format::Completion => {
            "Most tokens of each completion; 16 unless told. 0 scores the prompt: with `echo` and `logprobs`."
        }
        Format::Chat => {
            "Most tokens of the turn; what fits unless told. The older name of `max_completion_tokens`."
        }
    };
    let mut fields = vec![
        may("temperature", number(0.0..=100.0), temperature),
        may("max_tokens", at_least(tokens_least), tokens),
        may(
            "stop",
            any_of([
                text_of(1..=Stop::STRING_BYTES_MAX),
                list_of(text_of(1..=Stop::STRING_BYTES_MAX), 0..=Stop::STRINGS_MAX),
            ]),
            "Texts that end the answer; they are not part of it.",
        ),
        may(
            "top_p",
            number_above(0.0, 1.0),
            "Keep the most probable tokens up to this sum.",
        ),
        may(
            "top_k",
            whole(-1..=i128::from(u32::MAX)),
            "Keep so many of the most probable tokens; 0 and -1 keep all.",
        ),
        may(
            "min_p",
            number(0.0..=1.0),
            "Keep tokens at least so probable, compared with the most probable one.",
        ),
        may(
            "repetition_penalty",
            number(0.001..=100.0),
            "Above 1, tokens that stood in the text before become less probable.",
        ),
        may(
            "presence_penalty",
            number(-2.0..=2.0),
            "Taken from the logits of tokens that were given before.",
        ),
        may(
            "frequency_penalty",
            number(-2.0..=2.0),
            "The same, for each time that they were given.",
        ),
        may(
            "logit_bias",
            map(
                number(
                    f64::from(*Sampling::LOGIT_BIAS.start())
                        ..=f64::from(*Sampling::LOGIT_BIAS.end()),
                ),
                Some(Sampling::LOGIT_BIAS_MAX),
            ),
            "Added to the logits of these token ids.",
        ),
        may(
            "seed",
            whole(i128::from(i64::MIN)..=i128::from(u64::MAX)),
            "The same seed gives the same text, whatever else the server does meanwhile.",
        ),
        may(
            "stop_token_ids",
            list_of(token_id(), 0..=STOP_TOKEN_IDS_MAX),
            "Token ids that end the answer, beside the model's own.",
        ),
        may("ignore_eos", flag(), "Go on past the model's end of text."),
    ];
    let candidates = whole(1..=i128::from(Generate::CANDIDATES_MAX));
    fields.push(match format {
        Format::Predictions => may(
            "candidate_count",
            candidates,
            "How many answers to each prompt.",
        ),
        _ => may("n", candidates, "How many answers to each prompt."),
    });
    if format == Format::Chat {
        fields.push(may(
            "max_completion_tokens",
            at_least(1),
            "Most tokens of the turn; what fits unless told.",
        ));
    }
    fields
}

fn token_id() -> Shape {
    whole(0..=i128::from(u32::MAX))
}

/// A body of the four input formats.
fn predictions(key: &'static str, input: Shape) -> Shape {
    object([
        need(key, input, "The prompts, and parameters beside them."),
        may(
            "params",
            named("Params"),
            "Parameters of all prompts; they win over those beside a prompt.",
        ),
        may(
            "client_request_id",
            text(),
            "The client's own id of the call, for its accounts.",
        ),
    ])
}

fn prompt_record() -> Shape {
    object(
        [need("prompt", text(), "The text to continue.")]
            .into_iter()
            .chain(parameters(Format::Predictions)),
    )
}

fn split() -> Shape {
    object([
        need(
            "columns",
            list(text()),
            "Names of the columns: one is `prompt`, others may be parameters.",
        ),
        need(
            "data",
            list_of(list(anything()), 1..=PROMPTS_MAX),
            "Rows with one value per column.",
        ),
        may(
            "index",
            list(anything()),
            "Pandas writes it; it says nothing here.",
        ),
    ])
}

fn free() -> Shape {
    any_of([
        text(),
        list_of(any_of([text(), named("PromptRecord")]), 1..=PROMPTS_MAX),
        object([need(
            "prompt",
            any_of([text(), list_of(text(), 1..=PROMPTS_MAX)]),
            "One text to continue, or several.",
        )]),
    ])
}

/// What a completion continues and an embedding stands for.
fn texts_or_ids(name: &'static str) -> Field {
    let ids = || filled_list(token_id());
    need(
        name,
        any_of([
            text(),
            list_of(text(), 1..=PROMPTS_MAX),
            ids(),
            list_of(ids(), 1..=PROMPTS_MAX),
        ]),
        "A text, texts, token ids, or lists of them.",
    )
}

fn completion() -> Vec<Field> {
    let mut fields = vec![texts_or_ids("prompt")];
    fields.extend(parameters(Format::Completion));
    fields.extend([
        may(
            "echo",
            flag(),
            "Put the prompt in front of each completion.",
        ),
        may(
            "suffix",
            text_of(0..=SUFFIX_BYTES_MAX),
            "Stands behind each completion.",
        ),
        may(
            "logprobs",
            whole(0..=i128::from(Generate::LOGPROBS_MAX)),
            "Give log-probabilities, with so many of the most probable tokens.",
        ),
        may(
            "best_of",
            whole(1..=i128::from(Generate::CANDIDATES_MAX)),
            "So many completions are made and the `n` best are given; at least `n`, and no more than that in a stream.",
        ),
        may(
            "use_raw_prompt",
            flag(),
            "No template stands around a completion's prompt in any case.",
        ),
    ]);
    fields.extend(openai());
    fields
}

fn embedding() -> Vec<Field> {
    vec![
        texts_or_ids("input"),
        may(
            "encoding_format",
            words(&["float", "base64"]),
            "Numbers, or base64 of their bytes as little-endian f32.",
        ),
        may(
            "dimensions",
            whole(1..=i128::from(u32::MAX)),
            "Must be the model's own number of dimensions.",
        ),
        error_behavior(),
        may("user", text(), "Taken and not used."),
    ]
}

fn chat() -> Vec<Field> {
    let mut fields = vec![need(
        "messages",
        list_of(named("ChatMessage"), 1..=MESSAGES_MAX),
        "The conversation so far.",
    )];
    fields.extend(parameters(Format::Chat));
    fields.extend([
        may("logprobs", flag(), "Give log-probabilities."),
        may(
            "top_logprobs",
            whole(0..=i128::from(Generate::LOGPROBS_MAX)),
            "With so many of the most probable tokens; needs `logprobs`.",
        ),
    ]);
    fields.extend(tools());
    fields.extend(openai());
    fields
}

fn error_behavior() -> Field {
    may(
        "error_behavior",
        words(&["error", "truncate"]),
        "What becomes of a prompt that does not fit, and of an answer whose time is up: an error, or what fits or is there.",
    )
}

/// What completions and chats have in common beside the parameters.
fn openai() -> Vec<Field> {
    vec![
        may(
            "response_format",
            any_of([
                object([need(
                    "type",
                    words(&["text", "json_object"]),
                    "Any text, or a JSON object.",
                )]),
                object([
                    need("type", words(&["json_schema"]), "JSON of a schema."),
                    need(
                        "json_schema",
                        object([
                            need("name", formed("^[A-Za-z0-9_-]+$", 64), "What it is called."),
                            need("schema", map(anything(), None), "The JSON schema."),
                            may("strict", flag(), "Enforced in any case."),
                        ]),
                        "The schema.",
                    ),
                ]),
            ]),
            "What form the answer must have: tokens that would break it are never chosen.",
        ),
        may(
            "regex",
            text(),
            "A regular expression that the whole answer must match.",
        ),
        may(
            "grammar",
            text(),
            "A grammar in Lark's notation of which the answer must be.",
        ),
        may("stream", flag(), "Answer as a stream of events."),
        may(
            "stream_options",
            object([may(
                "include_usage",
                flag(),
                "Say the usage at the stream's end.",
            )]),
            "How to stream.",
        ),
        error_behavior(),
        may("user", text(), "Taken and not used."),
        may(
            "extra_params",
            map(any_of([text(), any_number(), flag()]), None),
            "Other fields, their values written as strings, as Databricks' SDK sends them.",
        ),
        may(
            "client_request_id",
            text(),
            "The client's own id of the call, for its accounts.",
        ),
    ]
}

fn message() -> Shape {
    object([
        need(
            "role",
            words(&["system", "developer", "user", "assistant", "tool"]),
            "Who speaks.",
        ),
        may(
            "content",
            any_of([
                text(),
                list(object([
                    need("type", words(&["text"]), "The kind of the part."),
                    need("text", text(), "The part's text."),
                ])),
            ]),
            "What is said; may be missing where an assistant only called tools.",
        ),
        may(
            "tool_calls",
            list(map(anything(), None)),
            "An assistant's calls of tools, as they were answered.",
        ),
        may(
            "tool_call_id",
            text(),
            "Which call a tool's turn answers; needed there.",
        ),
    ])
}

/// What a chat's next turn may call.
fn tools() -> [Field; 3] {
    let function = object([
        need("name", formed("^[A-Za-z0-9_-]+$", 64), "Its name."),
        may("description", text(), "What it does."),
        may(
            "parameters",
            map(anything(), None),
            "A JSON schema of its arguments.",
        ),
    ]);
    let tool = object([
        need("type", words(&["function"]), "What it is."),
        need("function", function, "The function."),
    ]);
    [
        may("tools", list(tool), "What may be called."),
        may(
            "tool_choice",
            any_of([text(), map(anything(), None)]),
            "`none`, `auto`, `required`, or the function that must be called.",
        ),
        may(
            "parallel_tool_calls",
            flag(),
            "Whether one turn may call several tools.",
        ),
    ]
}
