//! What a client is told when something cannot be done: the one place that knows status codes and error bodies.
//!
//! Handlers return a [`Fault`]; actix's own refusals (no such path, wrong method, body too large) become one here as
//! well, so that every error of the API is the same flat JSON. Error bodies never have a key `error`: Databricks' SDK
//! would take its value for the message.

use actix_web::body::BoxBody;
use actix_web::dev::ServiceResponse;
use actix_web::http::StatusCode;
use actix_web::http::header::{
    CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
};
use actix_web::{HttpResponse, ResponseError};
use common::request::{Failure, FailureKind};
use serde::Serialize;

use super::json::FieldError;
use crate::api::{ApiError, ErrorKind};

/// When to come again unless the cluster knows better.
const RETRY_AFTER_DEFAULT_S: u64 = 1;

/// A refusal or failure as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Fault {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    pub retry_after_s: Option<u64>,
}

impl Fault {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Fault {
            status,
            code,
            message: message.into(),
            param: None,
            retry_after_s: None,
        }
    }

    /// A control-plane field is wrong.
    pub fn invalid_parameter(error: FieldError) -> Self {
        Fault {
            param: error.field,
            ..ApiError::new(ErrorKind::InvalidParameter, error.message).into()
        }
    }

    /// A field of an invocation is wrong.
    pub fn bad_request(error: FieldError) -> Self {
        Fault {
            param: error.field,
            ..ApiError::new(ErrorKind::BadRequest, error.message).into()
        }
    }

    pub fn malformed(message: impl Into<String>) -> Self {
        ApiError::new(ErrorKind::Malformed, message).into()
    }

    pub fn internal(message: impl Into<String>) -> Self {
        ApiError::new(ErrorKind::Internal, message).into()
    }

    pub fn deadline(allowed_ms: u64) -> Self {
        let message = format!(
            "the request's {allowed_ms} ms were over before its answer was complete: ask for fewer tokens, or allow more time"
        );
        ApiError::new(ErrorKind::Deadline, message).into()
    }

    pub fn cancelled() -> Self {
        let message = "the request was cancelled before its end: the answer was not read, or the server stops";
        ApiError::new(ErrorKind::Unavailable, message).into()
    }

    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Fault::new(StatusCode::UNAUTHORIZED, "UNAUTHENTICATED", message)
    }

    pub fn permission_denied(message: impl Into<String>) -> Self {
        ApiError::new(ErrorKind::PermissionDenied, message).into()
    }

    pub fn too_large(bytes_max: u64) -> Self {
        let message =
            format!("the body is larger than {bytes_max} bytes, the most this server takes");
        Fault::new(StatusCode::PAYLOAD_TOO_LARGE, "REQUEST_TOO_LARGE", message)
    }

    pub fn body_timeout(seconds: u64) -> Self {
        let message = format!("the body did not arrive within {seconds} s");
        Fault::new(StatusCode::REQUEST_TIMEOUT, "REQUEST_TIMEOUT", message)
    }

    /// A refusal by actix itself, of which only the status is known.
    fn of_status(status: StatusCode, method: &str, path: &str) -> Self {
        match status {
            StatusCode::NOT_FOUND => {
                let message = format!("no API is found for '{method} {path}'");
                Fault::new(status, "ENDPOINT_NOT_FOUND", message)
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                let message = format!("'{path}' does not answer to {method}");
                Fault::new(status, "METHOD_NOT_ALLOWED", message)
            }
            StatusCode::PAYLOAD_TOO_LARGE => Fault::new(
                status,
                "REQUEST_TOO_LARGE",
                "the body is larger than this server takes",
            ),
            _ if status.is_client_error() => {
                let reason = status.canonical_reason().unwrap_or("bad request");
                Fault::new(status, "BAD_REQUEST", reason.to_lowercase())
            }
            _ => Fault::new(
                status,
                "INTERNAL_ERROR",
                "the server could not answer this request",
            ),
        }
    }

    /// OpenAI's word for this kind of error.
    fn openai_type(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The same as an event of a stream that has begun.
    pub fn event(&self) -> impl Serialize + '_ {
        StreamFault {
            error: StreamFaultBody {
                message: &self.message,
                r#type: self.openai_type(),
                code: self.code,
                param: self.param.as_deref(),
                retryable: self.retry_after_s.is_some(),
            },
        }
    }

    fn response(&self, openai_fields: bool) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        if let Some(seconds) = self.retry_after_s {
            response.insert_header((RETRY_AFTER, seconds.to_string()));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.insert_header((WWW_AUTHENTICATE, "Bearer"));
        }
        response.json(FaultBody {
            error_code: self.code,
            message: &self.message,
            openai: openai_fields.then(|| OpenAiFields {
                code: self.code,
                r#type: self.openai_type(),
                param: self.param.as_deref(),
            }),
        })
    }
}

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        let (status, code) = match error.kind {
            ErrorKind::InvalidParameter => (StatusCode::BAD_REQUEST, "INVALID_PARAMETER_VALUE"),
            ErrorKind::BadRequest => (StatusCode::BAD_REQUEST, "BAD_REQUEST"),
            ErrorKind::Malformed => (StatusCode::BAD_REQUEST, "MALFORMED_REQUEST"),
            ErrorKind::PermissionDenied => (StatusCode::FORBIDDEN, "PERMISSION_DENIED"),
            ErrorKind::NotFound => (StatusCode::NOT_FOUND, "RESOURCE_DOES_NOT_EXIST"),
            ErrorKind::AlreadyExists => (StatusCode::BAD_REQUEST, "RESOURCE_ALREADY_EXISTS"),
            ErrorKind::Conflict => (StatusCode::CONFLICT, "RESOURCE_CONFLICT"),
            ErrorKind::Overloaded => (StatusCode::TOO_MANY_REQUESTS, "REQUEST_LIMIT_EXCEEDED"),
            ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "TEMPORARILY_UNAVAILABLE"),
            ErrorKind::Deadline => (StatusCode::GATEWAY_TIMEOUT, "DEADLINE_EXCEEDED"),
            ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL_ERROR"),
            ErrorKind::NotImplemented => (StatusCode::NOT_IMPLEMENTED, "NOT_IMPLEMENTED"),
        };
        let retryable = matches!(error.kind, ErrorKind::Overloaded | ErrorKind::Unavailable);
        let retry_after_s =
            retryable.then(|| error.retry_after_s.unwrap_or(RETRY_AFTER_DEFAULT_S).max(1));
        Fault {
            retry_after_s,
            ..Fault::new(status, code, error.message)
        }
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        let kind = match failure.kind {
            FailureKind::BadRequest | FailureKind::TooLarge => ErrorKind::BadRequest,
            FailureKind::Overloaded => ErrorKind::Overloaded,
            FailureKind::Unavailable => ErrorKind::Unavailable,
            FailureKind::Internal => ErrorKind::Internal,
            FailureKind::NotFound => ErrorKind::NotFound,
        };
        ApiError::new(kind, failure.message).into()
    }
}

impl ResponseError for Fault {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    /// [`render`] writes the body again where the path asks for more fields.
    fn error_response(&self) -> HttpResponse {
        self.response(false)
    }
}

/// Gives every error response its body; other responses pass.
pub(super) fn render(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let told = response
        .response()
        .error()
        .and_then(|e| e.as_error::<Fault>())
        .cloned();
    let is_json =
        response.headers().get(CONTENT_TYPE) == Some(&HeaderValue::from_static("application/json"));
    let request = response.request();
    let fault = match told {
        Some(fault) => fault,
        None if is_json => return response,
        None => Fault::of_status(status, request.method().as_str(), request.path()),
    };
    if status.is_server_error() {
        tracing::warn!(path = request.path(), code = fault.code, message = %fault.message, "request failed");
    }
    let openai_fields = ["/serving-endpoints", "/ai-gateway"]
        .iter()
        .any(|prefix| request.path().starts_with(prefix));
    let mut rendered = fault.response(openai_fields);
    for (name, value) in response.headers() {
        if name == HeaderName::from_static("allow") {
            rendered.headers_mut().insert(name.clone(), value.clone());
        }
    }
    response.into_response(rendered)
}

#[derive(Serialize)]
struct FaultBody<'a> {
    error_code: &'a str,
    message: &'a str,
    #[serde(flatten)]
    openai: Option<OpenAiFields<'a>>,
}

#[derive(Serialize)]
struct OpenAiFields<'a> {
    code: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
}

#[derive(Serialize)]
struct StreamFault<'a> {
    error: StreamFaultBody<'a>,
}

#[derive(Serialize)]
struct StreamFaultBody<'a> {
    message: &'a str,
    r#type: &'a str,
    code: &'a str,
    param: Option<&'a str>,
    /// Whether the same request may succeed when it is sent again.
    retryable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_status_and_code() {
        let table = [
            (ErrorKind::InvalidParameter, 400, "INVALID_PARAMETER_VALUE"),
            (ErrorKind::BadRequest, 400, "BAD_REQUEST"),
            (ErrorKind::Malformed, 400, "MALFORMED_REQUEST"),
            (ErrorKind::PermissionDenied, 403, "PERMISSION_DENIED"),
            (ErrorKind::NotFound, 404, "RESOURCE_DOES_NOT_EXIST"),
            (ErrorKind::AlreadyExists, 400, "RESOURCE_ALREADY_EXISTS"),
            (ErrorKind::Conflict, 409, "RESOURCE_CONFLICT"),
            (ErrorKind::Overloaded, 429, "REQUEST_LIMIT_EXCEEDED"),
            (ErrorKind::Unavailable, 503, "TEMPORARILY_UNAVAILABLE"),
            (ErrorKind::Deadline, 504, "DEADLINE_EXCEEDED"),
            (ErrorKind::Internal, 500, "INTERNAL_ERROR"),
            (ErrorKind::NotImplemented, 501, "NOT_IMPLEMENTED"),
        ];
        for (kind, status, code) in table {
            let fault = Fault::from(ApiError::new(kind, "why"));
            assert_eq!((fault.status.as_u16(), fault.code), (status, code));
        }
    }

    #[test]
    fn only_what_may_succeed_later_says_when_to_come_again() {
        let full = Fault::from(ApiError::new(ErrorKind::Overloaded, "full").retry_after(7));
        assert_eq!(full.retry_after_s, Some(7));
        let soon = Fault::from(ApiError::new(ErrorKind::Unavailable, "soon").retry_after(0));
        assert_eq!(soon.retry_after_s, Some(1));
        assert_eq!(Fault::internal("broken").retry_after_s, None);
        assert_eq!(Fault::deadline(1).retry_after_s, None);
    }

    #[test]
    fn no_message_makes_the_databricks_sdk_retry_for_minutes() {
        let retried = [
            "Unexpected error",
            "Please try again later",
            "RPC token bucket",
            "ClusterNotReady",
        ];
        for fault in [
            Fault::deadline(1),
            Fault::cancelled(),
            Fault::too_large(1),
            Fault::body_timeout(1),
        ] {
            assert!(
                retried.iter().all(|text| !fault.message.contains(text)),
                "{}",
                fault.message
            );
        }
    }
}
