//! Usage and inference tables: sums, totals and rows, as JSON or as files.

use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::errors;
use super::operation::Operation;
use super::schema::{
    Field, Shape, any_number, any_of, at_least, flag, formed, list, map, may, named, need, object,
    or_null, text, text_of, whole, words,
};
use crate::http::tables::{PARAMETER_BYTES_MAX, ROWS_MAX};

const TAG: &str = "Tables";

/// Puts the paths of tables among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let places = [
        ("/api/2.0/usage", "All", "of all endpoints"),
        (
            "/api/2.0/serving-endpoints/{name}/usage",
            "",
            "of an endpoint",
        ),
    ];
    let paths = places.into_iter().fold(paths, |paths, (path, all, whose)| {
        let ask = |path: &str, what: &str, summary: &str| {
            table(path, &format!("{what}{all}"), &format!("{summary} {whose}"), all == "All")
        };
        let paths = during(ask(path, "getUsage", "Sums up the calls"))
            .takes(
                ParameterIn::Query,
                "group_by",
                formed("^(user|endpoint|entity|day)(,(user|endpoint|entity|day))*$", PARAMETER_BYTES_MAX),
                "By what: some of user, endpoint, entity and day, each once, with commas between them.",
            )
            .gives(named("UsageSums"), "The sums.")
            .put(paths);
        let paths = paged(during(ask(&format!("{path}/rows"), "getUsageRows", "Lists the calls")))
            .gives(page(named("UsageRow")), "The calls, oldest first.")
            .put(paths);
        ask(&format!("{path}/totals"), "getUsageTotals", "Totals of the calls since the first one")
            .gives(named("UsageTotals"), "By user and endpoint.")
            .put(paths)
    });
    let bodies = table(
        "/api/2.0/serving-endpoints/{name}/inference-table",
        "getInferenceTable",
        "Lists the calls of an endpoint with their bodies",
        false,
    );
    paged(during(bodies))
        .about("Needs CAN_MANAGE. Calls are kept while the endpoint's inference table is enabled.")
        .gives(page(named("InferenceRow")), "The calls, oldest first.")
        .put(paths)
}

fn name() -> Shape {
    text_of(0..=PARAMETER_BYTES_MAX)
}

fn table(path: &str, id: &str, summary: &str, all: bool) -> Operation {
    let operation = Operation::new(HttpMethod::Get, path, TAG, id, summary)
        .about("Whoever may manage an endpoint sees all of its calls, anybody else their own.")
        .takes(ParameterIn::Query, "user", name(), "Only this user's calls.")
        .takes(
            ParameterIn::Query,
            "format",
            words(&["json", "csv", "ndjson"]),
            "JSON, or a file with a line for each row. `Accept: text/csv` and `application/x-ndjson` ask for the same.",
        )
        .refuses(&[&errors::BAD_REQUEST])
        .gives_as(200, "text/csv", text(), "A head line, then a line for each row.")
        .gives_as(200, "application/x-ndjson", text(), "An object on each line.");
    if all {
        return operation.takes(
            ParameterIn::Query,
            "endpoint",
            name(),
            "Only this endpoint's calls.",
        );
    }
    operation
}

fn during(operation: Operation) -> Operation {
    let moment = || {
        any_of([
            whole(0..=1 << 52),
            formed("^[0-9]{4}-[0-9]{2}-[0-9]{2}$", 10),
        ])
    };
    operation
        .takes(
            ParameterIn::Query,
            "start",
            moment(),
            "From here on: milliseconds since 1970, a day, or a moment.",
        )
        .takes(
            ParameterIn::Query,
            "end",
            moment(),
            "To here, which is not included.",
        )
}

fn paged(operation: Operation) -> Operation {
    operation
        .takes(
            ParameterIn::Query,
            "limit",
            whole(1..=ROWS_MAX as i128),
            "Most rows of a page; 1000 unless told.",
        )
        .takes(
            ParameterIn::Query,
            "page_token",
            name(),
            "The `next_page_token` of the page before.",
        )
}

fn page(row: Shape) -> Shape {
    object([
        need("rows", list(row), "The rows."),
        may(
            "next_page_token",
            text(),
            "There may be more rows: ask again with this as `page_token`.",
        ),
    ])
}

/// Puts the schemas of tables among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    components
        .schema("UsageSums", usage_sums())
        .schema("UsageTotals", usage_totals())
        .schema("Sums", object(sums()))
        .schema("UsageRow", usage_row())
        .schema("KeptBody", kept_body())
        .schema("InferenceRow", inference_row())
}

fn sums() -> Vec<Field> {
    vec![
        need("calls", at_least(0), "Calls."),
        need("complete", at_least(0), "Answered to their end."),
        need("cancelled", at_least(0), "Left by their client."),
        need("failed", at_least(0), "Refused, or failed on the way."),
        need("prompt_tokens", at_least(0), "Tokens of prompts."),
        need("output_tokens", at_least(0), "Tokens made, read or not."),
        need("total_tokens", at_least(0), "Both."),
        need(
            "cached_tokens",
            at_least(0),
            "Prompt tokens that came from the prefix cache.",
        ),
        need(
            "latency_ms_mean",
            or_null(any_number()),
            "Mean milliseconds to the end.",
        ),
        need(
            "ttft_ms_mean",
            or_null(any_number()),
            "Mean milliseconds to the first output.",
        ),
    ]
}

/// Sums, with the keys by which they are.
fn group() -> Shape {
    let keys = [
        may("user", text(), "Who called."),
        may("endpoint", text(), "What was called."),
        may(
            "endpoint_id",
            text(),
            "Its id, of which one made anew has another.",
        ),
        may("entity", text(), "Which served entity answered."),
        may("day", text(), "When."),
    ];
    object(keys.into_iter().chain(sums()))
}

fn usage_sums() -> Shape {
    object([
        need("start_ms", at_least(0), "From when."),
        need("end_ms", or_null(at_least(0)), "Until when."),
        need("group_by", list(text()), "By what."),
        need("groups", list(group()), "The sums of each group."),
        need("total", named("Sums"), "The sums of all."),
    ])
}

fn usage_totals() -> Shape {
    object([
        need("totals", list(group()), "By user and endpoint."),
        need("total", named("Sums"), "Of all."),
    ])
}

/// What rows of both tables have in common.
fn call() -> Vec<Field> {
    vec![
        need(
            "time_ms",
            at_least(0),
            "When it ended, in milliseconds since 1970.",
        ),
        need("started_ms", at_least(0), "When it came."),
        need(
            "request_id",
            text(),
            "Its id, as in the header `x-request-id`.",
        ),
        need(
            "client_request_id",
            or_null(text()),
            "The client's own id of it.",
        ),
        need("user", text(), "Who called."),
        need("endpoint", text(), "The endpoint's name."),
        need("endpoint_id", text(), "The endpoint's id."),
        need(
            "served_entity",
            or_null(text()),
            "Which served entity took it.",
        ),
        need(
            "format",
            text(),
            "`predictions`, `completions`, `chat` or `embeddings`.",
        ),
        need("stream", flag(), "Whether a stream was asked for."),
        need(
            "status",
            whole(100..=599),
            "The HTTP status; 499 when the client left before the end.",
        ),
        need(
            "outcome",
            text(),
            "`complete`, `cancelled`, or the error code.",
        ),
        need("latency_ms", at_least(0), "Milliseconds to its end."),
    ]
}

fn usage_row() -> Shape {
    let mut fields = call();
    fields.extend([
        need("entity_name", or_null(text()), "The entity's model."),
        need("entity_version", or_null(text()), "The model's version."),
        need("prompt_tokens", at_least(0), "Tokens of its prompts."),
        need("output_tokens", at_least(0), "Tokens made for it."),
        need(
            "cached_tokens",
            at_least(0),
            "Prompt tokens that came from the prefix cache.",
        ),
        need(
            "ttft_ms",
            or_null(at_least(0)),
            "Milliseconds to the first output.",
        ),
        need("usage_context", map(text(), None), "The client's labels."),
    ]);
    object(fields)
}

fn inference_row() -> Shape {
    let mut fields = call();
    fields.extend([
        need("request", named("KeptBody"), "What was sent."),
        need("response", or_null(named("KeptBody")), "What was answered."),
    ]);
    object(fields)
}

fn kept_body() -> Shape {
    object([
        need("bytes", at_least(0), "How long it was."),
        need("sha256", text(), "Its SHA-256."),
        need(
            "text",
            or_null(text()),
            "The body, unless texts are not to be kept.",
        ),
        need("truncated", flag(), "Whether its end was cut off."),
    ])
}
