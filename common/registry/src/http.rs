//! HTTP with a registry: signed, bounded, with time-outs, tried again where that may help.

use std::sync::Once;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, RANGE, RETRY_AFTER};
use reqwest::{Certificate, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use url::Url;

use crate::auth::Auth;
use crate::{Body, Error};

/// Connecting takes no longer.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A connection that is silent for so long is broken.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// A small answer takes no longer in all.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Tries of a request in all.
const TRIES_MAX: u32 = 4;
/// Pause before the second try; it doubles.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
/// Longest pause, also when the registry asks for a longer one.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Largest small answer: a listing of the greatest model has some hundred kilobytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Most of an answer that a message repeats.
const SHOWN_CHARS_MAX: usize = 300;

/// One registry's HTTP.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    client: reqwest::Client,
    /// Where its API begins.
    pub base: Url,
    auth: Auth,
}

/// What an answer with an error status was.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// 404.
    NotFound(String),
    /// 416: the file ends before the place asked for.
    NoSuchRange(String),
    /// Anything else.
    Other(Error),
}

impl Refusal {
    /// An error of it, where "not there" is nothing special.
    pub(crate) fn error(self) -> Error {
        match self {
            Refusal::NotFound(message) | Refusal::NoSuchRange(message) => Error::Unusable(message),
            Refusal::Other(error) => error,
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::Other(error)
    }
}

/// Makes ring the process's cryptography, if nobody has chosen another.
pub(crate) fn install_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Fails when one is there, which will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

impl Http {
    pub(crate) fn new(
        name: &str,
        url: &str,
        auth: Auth,
        ca_file: Option<std::path::PathBuf>,
        insecure_tls: bool,
    ) -> Result<Http, Error> {
        let wrong = |reason: String| Error::Unusable(format!("registry {name}: {reason}"));
        let base = Url::parse(url.trim_end_matches('/'))
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| {
                wrong(format!(
                    "{url} is not an address that begins with https:// or http://"
                ))
            })?;
        install_provider();
        let mut authorities = Vec::new();
        if let Some(file) = ca_file {
            let pem = std::fs::read(&file)
                .map_err(|e| wrong(format!("cannot read {}: {e}", file.display())))?;
            authorities = Certificate::from_pem_bundle(&pem)
                .ok()
                .filter(|found| !found.is_empty())
                .ok_or_else(|| wrong(format!("{}: holds no PEM certificate", file.display())))?;
        }
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_MAX)
                .read_timeout(SILENCE_MAX)
                .user_agent(concat!("tandem/", env!("CARGO_PKG_VERSION")))
                .tls_danger_accept_invalid_certs(insecure_tls)
        };
        let merged = builder().tls_certs_merge(authorities.clone()).build();
        let client = match merged {
            // A machine without certificates of its own: plain HTTP works, and so does a given authority.
            Err(_) if base.scheme() == "http" || !authorities.is_empty() => {
                builder().tls_certs_only(authorities).build()
            }
            built => built,
        };
        let client = client.map_err(|e| wrong(format!("TLS cannot be set up: {}", causes(&e))))?;
        Ok(Http { client, base, auth })
    }

    /// The address of a path of the API.
    pub(crate) fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty();
            path.extend(segments.iter().flat_map(|part| part.split('/')));
        }
        url
    }

    /// The same with one more segment, in which a slash is no separator.
    pub(crate) fn url_with(&self, segments: &[&str], last: &str) -> Url {
        let mut url = self.url(segments);
        if let Ok(mut path) = url.path_segments_mut() {
            path.push(last);
        }
        url
    }

    /// The same API on another host, which gets no secrets unless it is the same machine.
    pub(crate) fn at_host(&self, host: &str) -> Result<Http, Error> {
        let mut base = self.base.clone();
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) => (name, port.parse().ok()),
            None => (host, None),
        };
        let wrong = || {
            Error::Unusable(format!(
                "the registry names the host '{host}', which is none"
            ))
        };
        base.set_host(Some(name)).map_err(|_| wrong())?;
        base.set_port(port).map_err(|()| wrong())?;
        let auth = match base.host() == self.base.host() {
            true => self.auth.clone(),
            false => Auth::None,
        };
        Ok(Http {
            client: self.client.clone(),
            base,
            auth,
        })
    }

    /// GET with a JSON answer.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        query: &[(&str, &str)],
    ) -> Result<T, Refusal> {
        self.get_url(self.url(segments), query).await
    }

    /// GET of an address with a JSON answer.
    pub(crate) async fn get_url<T: DeserializeOwned>(
        &self,
        mut url: Url,
        query: &[(&str, &str)],
    ) -> Result<T, Refusal> {
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let response = self
            .send(&url, |client| client.get(url.clone()).timeout(ANSWER_MAX))
            .await?;
        Ok(json(&url, response).await?)
    }

    /// POST of JSON with a JSON answer.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        body: &Value,
    ) -> Result<T, Refusal> {
        let url = self.url(segments);
        let response = self
            .send(&url, |client| {
                client.post(url.clone()).timeout(ANSWER_MAX).json(body)
            })
            .await?;
        Ok(json(&url, response).await?)
    }

    /// A file's bytes, from `from` on if the server can, else from the start.
    pub(crate) async fn open(&self, url: Url, from: u64) -> Result<Body, Error> {
        let opened = match self.open_at(&url, from).await {
            Err(Refusal::NoSuchRange(_)) if from > 0 => self.open_at(&url, 0).await,
            opened => opened,
        };
        opened.map_err(Refusal::error)
    }

    async fn open_at(&self, url: &Url, from: u64) -> Result<Body, Refusal> {
        let response = self
            .send(url, |client| {
                // Lengths count stored bytes.
                let request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
                match from {
                    0 => request,
                    from => request.header(RANGE, format!("bytes={from}-")),
                }
            })
            .await?;
        let (from, bytes) = match response.status() {
            StatusCode::PARTIAL_CONTENT => range(&response).ok_or_else(|| {
                Error::Unusable(format!("{url} answered a part of the file and not which"))
            })?,
            _ => (0, response.content_length()),
        };
        let url = shown(url);
        let chunks = response.bytes_stream().map(move |chunk| {
            chunk.map_err(|e| Error::Unavailable(format!("{url} broke off: {}", causes(&e))))
        });
        Ok(Body::new(from, bytes, chunks.boxed()))
    }

    /// Sends a request, again where that may help; gives answers of success.
    async fn send(
        &self,
        url: &Url,
        request: impl Fn(&reqwest::Client) -> reqwest::RequestBuilder,
    ) -> Result<Response, Refusal> {
        let (mut pause, mut attempt) = (PAUSE_FIRST, 0);
        loop {
            attempt += 1;
            let mut request = request(&self.client);
            if self.is_ours(url) {
                request = self.auth.sign(request)?;
            }
            let (error, wait) = match request.send().await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let (status, wait) = (response.status(), retry_after(&response));
                    let passing = status.is_server_error()
                        || matches!(status.as_u16(), 408 | 429) && status.as_u16() != 501;
                    let refusal = self.refusal(url, response).await;
                    if !passing {
                        return Err(refusal);
                    }
                    (refusal.error(), wait)
                }
                Err(e) => (
                    Error::Unavailable(format!("{} does not answer: {}", shown(url), causes(&e))),
                    None,
                ),
            };
            if attempt >= TRIES_MAX {
                return Err(error.into());
            }
            tracing::debug!(%error, attempt, "a registry is asked again");
            let jitter = rand::random_range(0.75..1.25);
            let wait = wait.unwrap_or(pause.mul_f64(jitter)).min(PAUSE_MAX);
            tokio::time::sleep(wait).await;
            pause *= 2;
        }
    }

    /// The address is the registry's own host, which the secrets are for.
    fn is_ours(&self, url: &Url) -> bool {
        url.host() == self.base.host() && (url.scheme() == "https" || self.base.scheme() == "http")
    }

    async fn refusal(&self, url: &Url, response: Response) -> Refusal {
        let status = response.status();
        let text = match bounded(response).await {
            Ok(bytes) => words(&bytes),
            Err(e) => e.to_string(),
        };
        let url = shown(url);
        match status.as_u16() {
            404 => Refusal::NotFound(format!("{url} answered 404: {text}")),
            416 => Refusal::NoSuchRange(format!("{url} answered 416: {text}")),
            401 | 403 => Refusal::Other(Error::Unusable(format!(
                "{url} answered {}: {text} ({}; see the registry's token_file, username and password_file in \
                 cluster.toml)",
                status.as_u16(),
                self.auth.words()
            ))),
            code if status.is_server_error() || matches!(code, 408 | 429) => {
                Refusal::Other(Error::Unavailable(format!("{url} answered {code}: {text}")))
            }
            code => Refusal::Other(Error::Unusable(format!("{url} answered {code}: {text}"))),
        }
    }
}

/// An address for people: without what may be secret in its query.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    if url
        .query()
        .is_some_and(|query| query.contains("sig=") || query.contains("ignature="))
    {
        url.set_query(None);
    }
    url.to_string()
}

async fn json<T: DeserializeOwned>(url: &Url, response: Response) -> Result<T, Error> {
    let bytes = bounded(response)
        .await
        .map_err(|e| Error::Unavailable(format!("{url} broke off: {e}")))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::Unusable(format!(
            "{url} answered something else than expected ({e}): {}; is it the registry's address?",
            words(&bytes)
        ))
    })
}

/// An answer's bytes, up to a limit.
async fn bounded(response: Response) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut chunks = response.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        bytes.extend_from_slice(&chunk.map_err(|e| causes(&e))?);
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(format!(
                "the answer is longer than {ANSWER_BYTES_MAX} bytes"
            ));
        }
    }
    Ok(bytes)
}

/// The message in an error's body, or its first words.
fn words(bytes: &[u8]) -> String {
    let parsed: Option<Value> = serde_json::from_slice(bytes).ok();
    let said = parsed.as_ref().and_then(|body| {
        let message = body.get("message").or_else(|| body.get("error"));
        message.and_then(Value::as_str)
    });
    let text = said.map_or_else(|| String::from_utf8_lossy(bytes), Into::into);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None if text.is_empty() => "(nothing)".to_owned(),
        None => text,
    }
}

/// An error with its causes, without the address, which may be signed.
fn causes(error: &reqwest::Error) -> String {
    let mut text = Vec::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push(error.to_string());
        cause = error.source();
    }
    if text.is_empty() {
        text.push(
            if error.is_timeout() {
                "it took too long"
            } else {
                "the request failed"
            }
            .into(),
        );
    }
    text.dedup();
    text.join(": ")
}

/// Where a part begins and how long the whole is: `bytes 5-9/10`.
fn range(response: &Response) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (part, whole) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((
        part.split_once('-')?.0.trim().parse().ok()?,
        whole.parse().ok(),
    ))
}

fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}
