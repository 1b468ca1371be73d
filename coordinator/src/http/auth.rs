//! Who calls: bearer tokens, and the paths that need none.
//!
//! Owns the comparison of tokens; where tokens come from is the configuration's matter.

use std::fmt;

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use actix_web::middleware::Next;
use actix_web::web::Data;
use actix_web::{FromRequest, HttpMessage, HttpRequest};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::HttpState;
use super::error::Fault;
use super::openapi;
pub(super) use crate::api::Caller;

/// The callers and the SHA-256 of their tokens; the tokens themselves are not kept.
pub struct TokenTable {
    entries: Vec<(Caller, [u8; 32])>,
}

impl TokenTable {
    /// Takes callers and the digests of their tokens. A user may have several tokens.
    pub fn new(entries: Vec<(Caller, [u8; 32])>) -> Self {
        TokenTable { entries }
    }

    /// The caller a token stands for. Takes the same time whichever entry it is, or none.
    fn caller(&self, token: &str) -> Option<&Caller> {
        let digest = Sha256::digest(token.as_bytes());
        let mut found = None;
        for (caller, known) in &self.entries {
            if bool::from(digest.as_slice().ct_eq(known)) {
                found = Some(caller);
            }
        }
        found
    }
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.entries.iter().map(|(caller, _)| caller))
            .finish()
    }
}

impl FromRequest for Caller {
    type Error = actix_web::Error;
    type Future = std::future::Ready<Result<Self, actix_web::Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let caller = request.extensions().get::<Caller>().cloned();
        std::future::ready(caller.ok_or_else(|| Fault::unauthenticated(NO_TOKEN).into()))
    }
}

const NO_TOKEN: &str = "no token was given: send the header 'Authorization: Bearer <token>'";

/// Lets requests through that carry a known token, or need none. Every new path needs one unless it is named here.
pub(super) async fn require_token(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    if !is_open(request.path()) {
        let tokens = request
            .app_data::<Data<HttpState>>()
            .map(|state| &state.tokens);
        let checked = tokens.map(|tokens| caller(tokens, request.headers()));
        match checked.unwrap_or_else(|| Err(Fault::internal("the server has no token table"))) {
            Ok(caller) => request.extensions_mut().insert(caller),
            Err(fault) => return Ok(request.error_response(fault)),
        };
    }
    Ok(next.call(request).await?.map_into_boxed_body())
}

/// Health and metrics are for the machine's operators; clients ask `/.well-known` before they have a token; people read
/// the API's document before they use it.
fn is_open(path: &str) -> bool {
    matches!(
        path,
        "/health" | "/health/live" | "/health/ready" | "/metrics"
    ) || path.starts_with("/.well-known/")
        || openapi::is_open(path)
}

fn caller(tokens: &TokenTable, headers: &HeaderMap) -> Result<Caller, Fault> {
    let header = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let token = header
        .and_then(|header| header.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim())
        .filter(|token| !token.is_empty())
        .ok_or_else(|| Fault::unauthenticated(NO_TOKEN))?;
    let known = tokens.caller(token).cloned();
    known.ok_or_else(|| Fault::permission_denied("the token is not known to this server"))
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    fn ask(header: Option<&str>) -> Result<Caller, Fault> {
        let digest = |token: &str| Sha256::digest(token.as_bytes()).into();
        let tokens = TokenTable::new(vec![
            (Caller::admin("ann"), digest("one")),
            (Caller::user("bob", &[]), digest("two")),
        ]);
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(AUTHORIZATION, HeaderValue::from_str(header).unwrap());
        }
        caller(&tokens, &headers)
    }

    #[test]
    fn a_known_token_is_its_user_in_any_spelling_of_the_scheme() {
        assert_eq!(ask(Some("Bearer one")).unwrap().user, "ann");
        assert_eq!(ask(Some("bearer  two ")).unwrap().user, "bob");
    }

    #[test]
    fn no_token_is_401_and_an_unknown_one_is_403() {
        for header in [None, Some("Bearer "), Some("one"), Some("Basic b25l")] {
            assert_eq!(
                ask(header).unwrap_err().code,
                "UNAUTHENTICATED",
                "{header:?}"
            );
        }
        for header in ["Bearer three", "Bearer on", "Bearer onee"] {
            assert_eq!(
                ask(Some(header)).unwrap_err().code,
                "PERMISSION_DENIED",
                "{header:?}"
            );
        }
    }

    #[test]
    fn only_the_named_paths_are_open() {
        for path in ["/health", "/metrics", "/.well-known/databricks-config"] {
            assert!(is_open(path), "{path}");
        }
        for path in [
            "/",
            "/healthy",
            "/metrics/x",
            "/.well-known",
            "/api/2.0/serving-endpoints",
        ] {
            assert!(!is_open(path), "{path}");
        }
    }
}
