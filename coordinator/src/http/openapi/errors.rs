//! How requests are refused: by status, with the codes that may stand in the body.

use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::{ComponentsBuilder, Content};

use super::operation::{header, retry_after};
use super::schema::{Shape, described, may, need, object, or_null, text, words};

/// A status with which requests are refused.
#[derive(Debug, PartialEq)]
pub(in crate::http) struct Refusal {
    pub status: u16,
    /// Its name among the document's responses.
    pub name: &'static str,
    pub says: &'static str,
    pub codes: &'static [&'static str],
}

pub(super) const BAD_REQUEST: Refusal = Refusal {
    status: 400,
    name: "BadRequest",
    says: "The body or a parameter is wrong: the message names the field, what is allowed and what was given.",
    codes: &[
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "RESOURCE_ALREADY_EXISTS",
    ],
};
pub(super) const UNAUTHENTICATED: Refusal = Refusal {
    status: 401,
    name: "Unauthenticated",
    says: "No token was given.",
    codes: &["UNAUTHENTICATED"],
};
pub(super) const PERMISSION_DENIED: Refusal = Refusal {
    status: 403,
    name: "PermissionDenied",
    says: "The token is not known, or its user may not do this.",
    codes: &["PERMISSION_DENIED"],
};
pub(super) const NOT_FOUND: Refusal = Refusal {
    status: 404,
    name: "NotFound",
    says: "There is no such endpoint, served entity, model or version.",
    codes: &["RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND"],
};
pub(super) const METHOD_NOT_ALLOWED: Refusal = Refusal {
    status: 405,
    name: "MethodNotAllowed",
    says: "The path does not answer to this method; the header `allow` names those that it answers to.",
    codes: &["METHOD_NOT_ALLOWED"],
};
pub(super) const BODY_TIMEOUT: Refusal = Refusal {
    status: 408,
    name: "BodyTimeout",
    says: "The body did not arrive in time.",
    codes: &["REQUEST_TIMEOUT"],
};
pub(super) const CONFLICT: Refusal = Refusal {
    status: 409,
    name: "Conflict",
    says: "Not now, because of what else is going on: another update, for example.",
    codes: &["RESOURCE_CONFLICT"],
};
pub(super) const TOO_LARGE: Refusal = Refusal {
    status: 413,
    name: "TooLarge",
    says: "The body is larger than this server takes (`limits.body_bytes_max` in cluster.toml).",
    codes: &["REQUEST_TOO_LARGE"],
};
pub(super) const OVERLOADED: Refusal = Refusal {
    status: 429,
    name: "Overloaded",
    says: "A rate limit is reached or the queue is full: come again after `Retry-After` seconds.",
    codes: &["REQUEST_LIMIT_EXCEEDED"],
};
pub(super) const INTERNAL_ERROR: Refusal = Refusal {
    status: 500,
    name: "InternalError",
    says: "A fault of the server.",
    codes: &["INTERNAL_ERROR"],
};
pub(super) const NOT_IMPLEMENTED: Refusal = Refusal {
    status: 501,
    name: "NotImplemented",
    says: "A call of the cloud's API that this server does not have.",
    codes: &["NOT_IMPLEMENTED"],
};
pub(super) const UNAVAILABLE: Refusal = Refusal {
    status: 503,
    name: "Unavailable",
    says: "Not ready yet, or a worker is being waited for: come again after `Retry-After` seconds.",
    codes: &["TEMPORARILY_UNAVAILABLE"],
};
pub(super) const DEADLINE: Refusal = Refusal {
    status: 504,
    name: "Deadline",
    says: "The time that the request had was over before its answer was complete.",
    codes: &["DEADLINE_EXCEEDED"],
};

/// All of them.
pub(in crate::http) const ALL: [&Refusal; 13] = [
    &BAD_REQUEST,
    &UNAUTHENTICATED,
    &PERMISSION_DENIED,
    &NOT_FOUND,
    &METHOD_NOT_ALLOWED,
    &BODY_TIMEOUT,
    &CONFLICT,
    &TOO_LARGE,
    &OVERLOADED,
    &INTERNAL_ERROR,
    &NOT_IMPLEMENTED,
    &UNAVAILABLE,
    &DEADLINE,
];

/// Puts all refusals among the components.
pub(super) fn add(components: ComponentsBuilder) -> ComponentsBuilder {
    ALL.iter().fold(components, |components, refusal| {
        let mut response = ResponseBuilder::new()
            .description(refusal.says)
            .content("application/json", Content::new(Some(body(refusal.codes))));
        response = match refusal.status {
            401 => response.header(
                "www-authenticate",
                header(words(&["Bearer"]), "How to say who you are."),
            ),
            429 | 503 => response.header("retry-after", retry_after()),
            _ => response,
        };
        components.response(refusal.name, response)
    })
}

fn body(codes: &[&str]) -> Shape {
    object([
        need("error_code", words(codes), "What kind of error it is."),
        need(
            "message",
            text(),
            "What was asked, why it cannot be done, and what would help.",
        ),
        may(
            "code",
            words(codes),
            "The same as `error_code`, for OpenAI's clients; on paths that begin with `/serving-endpoints`.",
        ),
        may(
            "type",
            words(&[
                "authentication_error",
                "permission_error",
                "rate_limit_error",
                "server_error",
                "invalid_request_error",
            ]),
            "OpenAI's word for it; on the same paths.",
        ),
        may(
            "param",
            or_null(described(text(), "The field's path in the body.")),
            "The field that is wrong, if it is about one; on the same paths.",
        ),
    ])
}
