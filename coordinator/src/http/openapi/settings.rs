//! What stands beside an endpoint's configuration: tags, limits, the gateway's switches, notifications.

use serde_json::json;
use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::errors;
use super::operation::Operation;
use super::parameters::endpoint_name;
use super::schema::{
    Field, Shape, anything, flag, list, list_of, may, named, need, object, text, text_of, whole,
    words,
};
use crate::http::settings::{ADDRESSES_MAX, LIMIT_MAX, LIMITS_MAX, TEXT_BYTES_MAX};
use crate::policy::settings::TAGS_MAX;

const TAG: &str = "Endpoints";

/// Puts the paths of settings among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let operation = |method, last: &str, id, summary| {
        let path = format!("/api/2.0/serving-endpoints/{{name}}/{last}");
        Operation::new(method, &path, TAG, id, summary)
    };
    let paths = operation(
        HttpMethod::Patch,
        "tags",
        "patchTags",
        "Adds and deletes tags",
    )
    .body(
        named("TagChanges"),
        [(
            "change",
            "One tag is set, another goes",
            json!({"add_tags": [{"key": "team", "value": "search"}], "delete_tags": ["old"]}),
        )],
    )
    .gives(
        object([need(
            "tags",
            list(named("Tag")),
            "All tags, after the change.",
        )]),
        "The tags.",
    )
    .put(paths);
    let paths = operation(
        HttpMethod::Patch,
        "notifications",
        "patchNotifications",
        "Says who is to be told of updates",
    )
    .about("Kept and shown back. This server sends no mail.")
    .body(
        object([may(
            "email_notifications",
            named("EmailNotifications"),
            "Who is to be told.",
        )]),
        [(
            "failure",
            "Somebody is told when an update fails",
            json!({"email_notifications": {"on_update_failure": ["ann@example.com"]}}),
        )],
    )
    .gives(
        object([
            need("name", endpoint_name(), "The endpoint."),
            need("email_notifications", named("Emails"), "Who is to be told."),
        ]),
        "The notifications.",
    )
    .put(paths);
    let limits = || list_of(named("CallLimit"), 0..=LIMITS_MAX);
    let paths = operation(
        HttpMethod::Put,
        "rate-limits",
        "putRateLimits",
        "Limits calls, in the older form",
    )
    .body(
        object([may(
            "rate_limits",
            limits(),
            "All limits; none when it is empty or missing.",
        )]),
        [(
            "user",
            "Each user may call so often in a minute",
            json!({"rate_limits": [{"calls": 100000, "key": "user", "renewal_period": "minute"}]}),
        )],
    )
    .gives(
        object([need("rate_limits", list(named("RateLimit")), "The limits.")]),
        "The limits.",
    )
    .put(paths);
    let paths = operation(HttpMethod::Put, "ai-gateway", "putAiGateway", "Sets limits, accounts and fallback")
        .about("Everything is replaced: what the body does not name is off.")
        .body(
            named("AiGatewayRequest"),
            [
                (
                    "limits",
                    "Limits of calls and tokens",
                    json!({
                        "rate_limits": [
                            {"tokens": 10000000, "key": "user_group", "principal": "team", "renewal_period": "minute"},
                            {"calls": 100000, "key": "endpoint", "renewal_period": "minute"},
                        ],
                        "usage_tracking_config": {"enabled": true},
                    }),
                ),
                (
                    "tables",
                    "Requests and answers are kept, and another served entity stands in for one that cannot answer",
                    json!({
                        "rate_limits": [{"calls": 100000, "key": "user", "renewal_period": "minute"}],
                        "inference_table_config": {"enabled": true, "table_name_prefix": "hello"},
                        "fallback_config": {"enabled": true},
                    }),
                ),
            ],
        )
        .gives(named("AiGateway"), "The gateway.")
        .put(paths);
    let paths = operation(
        HttpMethod::Patch,
        "telemetry-config",
        "patchTelemetry",
        "Not built: no telemetry is exported",
    )
    .refuses(&[&errors::NOT_IMPLEMENTED])
    .put(paths);
    operation(
        HttpMethod::Get,
        "system-metrics-export-state",
        "getSystemMetricsExportState",
        "Not built: metrics are fetched, not exported",
    )
    .about("All other methods are answered in the same way.")
    .refuses(&[&errors::NOT_IMPLEMENTED])
    .put(paths)
}

/// Puts the schemas of settings among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    let address = || text_of(0..=TEXT_BYTES_MAX);
    components
        .schema("Tag", tag())
        .schema(
            "TagChanges",
            object([
                may(
                    "add_tags",
                    list_of(named("Tag"), 0..=TAGS_MAX),
                    "Set, whether they are there or not.",
                ),
                may(
                    "delete_tags",
                    list_of(text_of(0..=TEXT_BYTES_MAX), 0..=TAGS_MAX),
                    "Keys of those that go.",
                ),
            ]),
        )
        .schema(
            "EmailNotifications",
            object([
                may(
                    "on_update_success",
                    list_of(address(), 0..=ADDRESSES_MAX),
                    "When an update is done.",
                ),
                may(
                    "on_update_failure",
                    list_of(address(), 0..=ADDRESSES_MAX),
                    "When one fails.",
                ),
            ]),
        )
        .schema(
            "Emails",
            object([
                need("on_update_success", list(text()), "When an update is done."),
                need("on_update_failure", list(text()), "When one fails."),
            ]),
        )
        .schema("CallLimit", call_limit())
        .schema("RateLimit", object(limit()))
        .schema("TableRequest", table(false))
        .schema("Table", table(true))
        .schema("AiGatewayRequest", gateway(false))
        .schema("AiGateway", gateway(true))
}

/// What may be said of settings when an endpoint is created.
pub(super) fn at_creation() -> Vec<Field> {
    vec![
        may("tags", list_of(named("Tag"), 0..=TAGS_MAX), "Free labels."),
        may("description", text_of(0..=TEXT_BYTES_MAX), "For people."),
        may(
            "rate_limits",
            list_of(named("CallLimit"), 0..=LIMITS_MAX),
            "Limits of calls.",
        ),
        may(
            "ai_gateway",
            named("AiGatewayRequest"),
            "Limits, accounts and fallback.",
        ),
        may(
            "email_notifications",
            named("EmailNotifications"),
            "Who is to be told of updates; no mail is sent.",
        ),
        may(
            "budget_policy_id",
            text_of(0..=TEXT_BYTES_MAX),
            "Shown back.",
        ),
        may("route_optimized", flag(), "Shown back."),
    ]
}

fn tag() -> Shape {
    object([
        need("key", text_of(1..=TEXT_BYTES_MAX), "The label; not blank."),
        may(
            "value",
            text_of(0..=TEXT_BYTES_MAX),
            "Its value; empty unless given.",
        ),
    ])
}

fn number() -> Shape {
    whole(0..=LIMIT_MAX)
}

fn period() -> Field {
    need(
        "renewal_period",
        words(&["minute"]),
        "How soon what was used may be used again.",
    )
}

fn call_limit() -> Shape {
    object([
        need("calls", number(), "Most calls in the period."),
        may(
            "key",
            words(&["user", "endpoint"]),
            "Whether for each user or for all together; all unless told.",
        ),
        period(),
    ])
}

fn limit() -> Vec<Field> {
    vec![
        may("calls", number(), "Most calls in the period."),
        may(
            "tokens",
            number(),
            "Most tokens in the period, of prompts and answers. Calls or tokens are needed.",
        ),
        may(
            "key",
            words(&["user", "endpoint", "user_group", "service_principal"]),
            "Whom it limits; all callers together unless told.",
        ),
        may(
            "principal",
            text_of(1..=TEXT_BYTES_MAX),
            "Which user, group or service principal; without it each of them. A group must be named.",
        ),
        period(),
    ]
}

/// The table of requests and answers; shown, it always says whether it is on.
fn table(shown: bool) -> Shape {
    let enabled = if shown { need } else { may };
    let name = || text_of(0..=TEXT_BYTES_MAX);
    object([
        enabled("enabled", flag(), "Whether requests and answers are kept."),
        may("catalog_name", name(), "Shown back."),
        may("schema_name", name(), "Shown back."),
        may("table_name_prefix", name(), "Shown back."),
        may(
            "redact",
            flag(),
            "Whether only lengths and digests of texts are kept.",
        ),
    ])
}

fn gateway(shown: bool) -> Shape {
    let switch = || {
        let enabled = if shown { need } else { may };
        object([enabled("enabled", flag(), "Whether it is on.")])
    };
    let table = if shown { "Table" } else { "TableRequest" };
    let mut fields = vec![
        may(
            "rate_limits",
            list_of(named("RateLimit"), 0..=LIMITS_MAX),
            "Limits.",
        ),
        may(
            "usage_tracking_config",
            switch(),
            "Whether calls are written into the usage table.",
        ),
        may(
            "inference_table_config",
            named(table),
            "Whether requests and answers are kept.",
        ),
        may(
            "fallback_config",
            switch(),
            "Whether another served entity answers when the chosen one cannot.",
        ),
    ];
    if !shown {
        fields.push(may(
            "guardrails",
            anything(),
            "Refused unless all that stands in it is off: nothing here checks texts.",
        ));
    }
    object(fields)
}
