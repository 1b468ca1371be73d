//! The HTTP API: JSON in, JSON or events out, and nothing else.
//!
//! Knows the cluster through [`Gateway`] alone. Bodies are parsed at the door into checked types (`spec`, `inputs`,
//! `openai`); handlers are shims (`endpoints`, `invocations`, `ops`); status codes are in `error`.

mod account;
mod amendments;
mod auth;
mod embeddings;
mod endpoints;
mod error;
mod format;
mod inputs;
mod invocations;
mod json;
mod logs;
mod metrics;
mod offsets;
mod openai;
mod openapi;
mod ops;
mod parts;
mod permissions;
mod provisioned;
mod replies;
mod sampling;
mod settings;
mod spec;
mod sse;
mod tables;
#[cfg(test)]
mod tests;
mod throughput;
mod tools;
mod view;
mod whoami;

pub use auth::TokenTable;
pub use ops::build_recorder;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{Server, ServiceFactory, ServiceRequest, ServiceResponse};
use actix_web::http::header::{ALLOW, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::{Next, NormalizePath, from_fn};
use actix_web::web::{Data, PayloadConfig};
use actix_web::{App, HttpMessage, HttpResponse, HttpServer};
use common::config::Limits;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::api::{CallObserver, Gateway};
use crate::logs::Logs;
use crate::tables::Tables;

/// Threads that parse and write; they leave the machine to the engines.
const THREADS: usize = 2;
/// Connections per thread; more wait in the listener's backlog. Bounds memory against idle or deaf clients.
const CONNECTIONS_MAX: usize = 4096;
/// Idle connections are kept a little longer than proxies and client pools keep theirs.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// A request's head must be here by then.
const HEAD_READ_MAX: Duration = Duration::from_secs(10);
/// Requests in flight may finish for this long after the signal to stop.
const DRAIN_S: u64 = 10;
/// The request's id, echoed or given.
const ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id: some clients cut longer ones.
const ID_CHARS_MAX: usize = 64;

/// What handlers work with.
pub struct HttpState {
    /// The cluster.
    pub gateway: Arc<dyn Gateway>,
    /// Who may call.
    pub tokens: TokenTable,
    /// Sizes and times.
    pub limits: Limits,
    /// What `/metrics` shows.
    pub metrics: PrometheusHandle,
    /// Who hears what each call came to.
    pub observer: Arc<dyn CallObserver>,
    /// The served entities' logs.
    pub logs: Arc<Logs>,
    /// What calls came to.
    pub tables: Arc<Tables>,
}

/// Serves the API on a listener until `shutdown`, then lets requests in flight finish for a short time. The returned
/// server is a future to await inside an actix system.
///
/// # Errors
/// When the listener cannot be used.
pub fn serve(
    listener: TcpListener,
    state: HttpState,
    shutdown: CancellationToken,
) -> std::io::Result<Server> {
    tokio::spawn(ops::upkeep(state.metrics.clone(), shutdown.clone()));
    let state = Data::new(state);
    let server = HttpServer::new(move || app(state.clone()))
        .workers(THREADS)
        .max_connections(CONNECTIONS_MAX)
        .keep_alive(KEEP_ALIVE)
        .client_request_timeout(HEAD_READ_MAX)
        .tcp_nodelay(true)
        // A client that left is noticed while its handler runs, and the handler is dropped: that is what cancels.
        .h1_allow_half_closed(false)
        .shutdown_timeout(DRAIN_S)
        .shutdown_signal(shutdown.cancelled_owned())
        .listen(listener)?
        .run();
    Ok(server)
}

/// All routes and what stands around them, outermost last.
fn app(
    state: Data<HttpState>,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<BoxBody>,
        Error = actix_web::Error,
        InitError = (),
    >,
> {
    let bytes_max = usize::try_from(state.limits.body_bytes_max).unwrap_or(usize::MAX);
    App::new()
        .app_data(state)
        .app_data(PayloadConfig::new(bytes_max))
        .configure(ops::routes)
        .configure(openapi::routes)
        .configure(provisioned::routes)
        .configure(endpoints::routes)
        .configure(logs::routes)
        .configure(tables::routes)
        .configure(amendments::routes)
        .configure(metrics::routes)
        .configure(permissions::routes)
        .configure(whoami::routes)
        .configure(invocations::routes)
        .wrap(from_fn(auth::require_token))
        // Clients write paths with and without a slash at the end, and follow no redirect of a POST.
        .wrap(NormalizePath::trim())
        .wrap(from_fn(observe))
}

/// The id under which a request is in logs.
#[derive(Debug, Clone)]
struct RequestId(String);

impl RequestId {
    /// The client's own, when it is one that can be written anywhere; else a new one.
    fn of(headers: &HeaderMap) -> Self {
        let plain = |id: &&str| {
            (1..=ID_CHARS_MAX).contains(&id.len())
                && id
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let given = headers
            .get(ID_HEADER)
            .and_then(|value| value.to_str().ok())
            .filter(plain);
        RequestId(given.map_or_else(|| Uuid::new_v4().simple().to_string(), str::to_owned))
    }
}

/// Gives each request its id, each error its body, and counts.
async fn observe(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let started = Instant::now();
    let method = request.method().clone();
    // What can be read can be asked about: the body is left out where the answer is written.
    if method == Method::HEAD {
        request.head_mut().method = Method::GET;
    }
    let id = RequestId::of(request.headers());
    request.extensions_mut().insert(id.clone());
    let mut response = error::render(next.call(request).await?.map_into_boxed_body());
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(ID_HEADER, value);
    }
    if method == Method::OPTIONS && response.status() == StatusCode::METHOD_NOT_ALLOWED {
        response = options(response);
    }
    ops::count(&method, started, &response);
    Ok(response)
}

/// What a path answers to, for whoever asks before it calls.
fn options(refused: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let allow = refused.headers().get(ALLOW);
    let mut allowed = allow
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    if allowed.split(", ").any(|method| method == "GET") {
        allowed.push_str(", HEAD");
    }
    allowed.push_str(", OPTIONS");
    let mut answer = HttpResponse::NoContent();
    answer.insert_header((ALLOW, allowed));
    for id in refused.headers().get_all(ID_HEADER) {
        answer.insert_header((ID_HEADER, id.clone()));
    }
    refused.into_response(answer.finish())
}
