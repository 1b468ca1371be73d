//! The door between the HTTP layer and the actors: what may be asked of the cluster, and what it answers.
//!
//! Owns types only. HTTP parses bodies into these and turns them into JSON; actors never see JSON, handlers never see
//! actors. Tests put a fake [`Gateway`] behind the HTTP layer.

mod settings;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::model_ref::ModelRef;
use common::request::{Delta, End, Generate, TokenLogprob};
use common::wire::message::Quantization;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

pub use settings::{
    Access, AiGateway, Amendment, Caller, EmailNotifications, Grant, Grantee, InferenceTable,
    Level, Limited, RateLimit, Settings,
};

/// Why something asked for cannot be done. The status codes are in `http::error`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What kind, by what the caller can do.
    pub kind: ErrorKind,
    /// What was asked and what would help.
    pub message: String,
    /// When to come again, for `Overloaded` and `Unavailable`.
    pub retry_after_s: Option<u64>,
}

/// Kinds of [`ApiError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A control-plane field is wrong.
    InvalidParameter,
    /// An invocation's body or parameters are wrong, or the prompt does not fit.
    BadRequest,
    /// The body is not JSON.
    Malformed,
    /// The caller may not do this.
    PermissionDenied,
    /// No such endpoint, model or version.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Not now, because of what else is going on (update during update).
    Conflict,
    /// The queue is full.
    Overloaded,
    /// Not ready, or no replica: try again.
    Unavailable,
    /// The request's time is up.
    Deadline,
    /// A fault of ours.
    Internal,
    /// The API has this, and this server does not.
    NotImplemented,
}

impl ApiError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        ApiError {
            kind,
            message: message.into(),
            retry_after_s: None,
        }
    }

    /// The same, with a time to come again.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }
}

/// How many requests a served entity admits at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkloadSize {
    /// 4.
    Small,
    /// 16.
    Medium,
    /// 64.
    Large,
}

/// A served entity as asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntitySpec {
    /// Unique in the endpoint; the model's last name and version unless given.
    pub name: String,
    /// The model.
    pub model: ModelRef,
    /// Its workload type's name; empty until the cluster has chosen, where throughput sizes it.
    pub workload_type: String,
    /// Its size; the cluster's choice where throughput sizes it.
    pub workload_size: WorkloadSize,
    /// Only CPU types may.
    pub scale_to_zero: bool,
    /// Echoed to clients.
    pub environment_vars: Vec<(String, String)>,
    /// Sized by tokens per second instead of by workload type and size.
    #[serde(default)]
    pub provisioned: Option<Provisioned>,
    /// Requests at a time, instead of what the size stands for.
    #[serde(default)]
    pub concurrency: Option<ConcurrencyRange>,
    /// Echoed to clients.
    #[serde(default)]
    pub instance_profile_arn: Option<String>,
    /// How weights are kept; `None` is as cluster.toml says of the model.
    #[serde(default)]
    pub quantization: Option<Quantization>,
}

/// Requests at a time that an entity is provisioned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConcurrencyRange {
    /// Echoed to clients; 0 only with scaling to zero.
    pub min: u32,
    /// Admitted at a time.
    pub max: u32,
}

/// Provisioned throughput of a served entity: prompt and output tokens per second, together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provisioned {
    /// What the chosen hardware must give.
    pub min_tokens_per_s: u64,
    /// What is taken in at most, over time.
    pub max_tokens_per_s: u64,
    /// The same in chunks, when it was asked for so; both rates follow from it.
    pub model_units: Option<u64>,
}

/// What throughput a model gives on this cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptimizationInfo {
    /// None: its files are of a kind that is not served, or it fits no workload type.
    NotServable,
    /// It can be served.
    Servable {
        /// Its family: `llama`, `mistral` or `mpt`.
        model_type: String,
        /// Tokens per second of one chunk.
        chunk_tokens_per_s: u64,
    },
}

/// A share of the traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The served entity's name.
    pub entity: String,
    /// 0 to 100; all routes sum to 100.
    pub percentage: u32,
}

/// What an endpoint shall serve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfigSpec {
    /// At least one, at most ten.
    pub entities: Vec<EntitySpec>,
    /// One per entity that gets traffic.
    pub routes: Vec<Route>,
    /// The older switch of the table of requests and answers.
    pub auto_capture: Option<InferenceTable>,
}

/// An endpoint to create.
#[derive(Debug, Clone, PartialEq)]
pub struct CreateEndpoint {
    /// Its name.
    pub name: String,
    /// What it shall serve.
    pub config: ConfigSpec,
    /// Everything else.
    pub settings: Settings,
}

/// An endpoint as clients see it.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointView {
    /// Its name.
    pub name: String,
    /// 32 hexadecimal digits.
    pub id: String,
    /// Who made it.
    pub creator: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
    /// When its configuration last changed.
    pub updated_ms: u64,
    /// All served entities of the active configuration are up.
    pub ready: bool,
    /// How the last change stands.
    pub update: UpdateState,
    /// What serves.
    pub active: Option<ConfigView>,
    /// What is being deployed, or failed to be.
    pub pending: Option<ConfigView>,
    /// The models' task, when known.
    pub task: Option<String>,
    /// Everything beside its configurations.
    pub settings: Settings,
}

/// How the last change of a configuration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UpdateState {
    /// Nothing is going on.
    NotUpdating,
    /// A configuration is being deployed.
    InProgress,
    /// The last one could not be deployed.
    Failed,
    /// The last one was given up.
    Cancelled,
}

/// A configuration and how its entities stand.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigView {
    /// Counts from 1.
    pub version: u64,
    /// When its deployment began, in milliseconds since 1970.
    pub started_ms: u64,
    /// The served entities.
    pub entities: Vec<EntityView>,
    /// The traffic.
    pub routes: Vec<Route>,
    /// The older switch of the table of requests and answers.
    pub auto_capture: Option<InferenceTable>,
}

/// A served entity and how it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct EntityView {
    /// As asked for.
    pub spec: EntitySpec,
    /// Who asked.
    pub creator: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
    /// How it stands.
    pub state: DeploymentState,
    /// The same in words: progress, what stands in, why it failed.
    pub message: String,
}

/// Life of a served entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeploymentState {
    /// Being brought up for the first time.
    Creating,
    /// Serving.
    Ready,
    /// Was ready, is being brought back.
    Recovering,
    /// Could not be brought up.
    Failed,
    /// Given up for a newer configuration.
    Aborted,
}

/// What HTTP may ask of the cluster.
pub trait Gateway: Send + Sync + 'static {
    /// Creates an endpoint; answers as soon as the wish is stored.
    fn create(
        &self,
        user: String,
        endpoint: CreateEndpoint,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>>;

    /// One endpoint.
    fn get(&self, name: String) -> BoxFuture<'_, Result<EndpointView, ApiError>>;

    /// All endpoints, by name.
    fn list(&self) -> BoxFuture<'_, Result<Vec<EndpointView>, ApiError>>;

    /// Deploys another configuration; the active one serves until it is ready.
    fn update(
        &self,
        user: String,
        name: String,
        config: ConfigSpec,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>>;

    /// What must be known of an endpoint before anything is done with it. Asks no actor.
    ///
    /// # Errors
    /// When there is none of this name.
    fn access(&self, name: &str) -> Result<Arc<Access>, ApiError>;

    /// The name of the endpoint with this id.
    fn name_of(&self, id: &str) -> Option<String>;

    /// Changes an endpoint's settings.
    fn amend(
        &self,
        name: String,
        amendment: Amendment,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>>;

    /// Deletes an endpoint; requests in flight end as unavailable.
    fn delete(&self, name: String) -> BoxFuture<'_, Result<(), ApiError>>;

    /// Gives prompts to one served entity of the endpoint. Answers when a worker has accepted all of them.
    fn generate(&self, call: Call) -> BoxFuture<'_, Result<Answer, ApiError>>;

    /// What throughput a model gives here.
    fn optimization_info(
        &self,
        model: ModelRef,
    ) -> BoxFuture<'_, Result<OptimizationInfo, ApiError>>;

    /// The workload types that are mapped, for messages.
    fn workload_types(&self) -> Vec<String>;

    /// What the process can do now, for `/health`.
    fn health(&self) -> BoxFuture<'_, ClusterHealth>;
}

/// Prompts for an endpoint.
#[derive(Debug, Clone)]
pub struct Call {
    /// The endpoint's name.
    pub endpoint: String,
    /// Who calls.
    pub caller: Caller,
    /// The client's id of the call, for logs.
    pub request_id: String,
    /// The prompts; one generation each.
    pub prompts: Vec<Generate>,
    /// When the call's time is up.
    pub deadline: Instant,
}

/// The accepted call.
#[derive(Debug)]
pub struct Answer {
    /// Which served entity answers.
    pub served_entity: String,
    /// One per prompt, in order.
    pub generations: Vec<Generation>,
}

/// One prompt's answer, arriving. Dropping it cancels the generation and frees its blocks.
#[derive(Debug)]
pub struct Generation {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// The events; bounded by the most tokens the request may give, so that a slow reader never stalls a link.
    pub events: tokio::sync::mpsc::Receiver<GenerationEvent>,
    /// Cancels on drop.
    pub guard: CancelGuard,
}

/// Calls its function when dropped: a caller that leaves frees what it took.
pub struct CancelGuard(Option<Box<dyn FnOnce() + Send>>);

impl CancelGuard {
    /// Calls `cancel` on drop. Cancelling what is over must do nothing.
    pub fn new(cancel: impl FnOnce() + Send + 'static) -> Self {
        CancelGuard(Some(Box::new(cancel)))
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if let Some(cancel) = self.0.take() {
            cancel();
        }
    }
}

impl std::fmt::Debug for CancelGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CancelGuard")
    }
}

/// A part of a prompt's answer. After the last candidate's end the channel closes; a channel that closes before is a
/// fault.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationEvent {
    /// The prompt's text and log-probabilities, when asked for; first.
    Prompt {
        /// The prompt as the tokenizer gives it back.
        text: String,
        /// One per token.
        tokens: Vec<TokenLogprob>,
    },
    /// The prompt's embedding, when that was asked for.
    Embedding(Vec<f32>),
    /// New output.
    Delta(Delta),
    /// A candidate is over.
    End {
        /// Which.
        candidate: u32,
        /// Its output tokens in all.
        output_tokens: u32,
        /// Prompt tokens that came from the prefix cache.
        cached_tokens: u32,
        /// Why.
        end: End,
    },
}

/// Is told of every call once, when it is over: answered, refused, failed, or left by its client.
///
/// A call is an invocation whose body is a JSON object and names an endpoint, be there one or not.
pub trait CallObserver: Send + Sync + 'static {
    /// Whether records of this endpoint's calls shall carry their bodies.
    fn wants_payload(&self, endpoint: &str) -> bool;

    /// Takes the record. Called on HTTP's threads, also while a client's connection is being dropped: it must not wait.
    fn record(&self, record: CallRecord);
}

/// Nobody is interested.
impl CallObserver for () {
    fn wants_payload(&self, _: &str) -> bool {
        false
    }

    fn record(&self, _: CallRecord) {}
}

/// What a call came to.
#[derive(Debug, Clone, PartialEq)]
pub struct CallRecord {
    /// The endpoint's name.
    pub endpoint: String,
    /// Which served entity took it; `None` when none did.
    pub served_entity: Option<String>,
    /// Who called.
    pub user: String,
    /// The call's id, as in the header `x-request-id`.
    pub request_id: String,
    /// The client's own id of it, from its body.
    pub client_request_id: Option<String>,
    /// The client's labels for its accounts, from the body.
    pub usage_context: Vec<(String, String)>,
    /// The body's format.
    pub format: CallFormat,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// When it came, in milliseconds since 1970.
    pub started_ms: u64,
    /// From its coming to the first output.
    pub first_output: Option<Duration>,
    /// From its coming to its end.
    pub latency: Duration,
    /// Tokens of its prompts, each counted once; 0 when no replica took them.
    pub prompt_tokens: u64,
    /// Tokens made for it, over all candidates, also those that the client did not stay to read.
    pub output_tokens: u64,
    /// Prompt tokens that came from the prefix cache.
    pub cached_tokens: u64,
    /// The HTTP status; of a stream that failed the one it would have had, and 499 when the client left.
    pub status: u16,
    /// How it ended.
    pub outcome: Outcome,
    /// Its bodies, when they were wanted.
    pub payload: Option<Payload>,
}

/// The formats of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CallFormat {
    /// Databricks' predictions.
    Predictions,
    /// OpenAI's completions.
    Completions,
    /// OpenAI's chat.
    Chat,
    /// OpenAI's embeddings.
    Embeddings,
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Answered to its end.
    Complete,
    /// Its client left before.
    Cancelled,
    /// Refused, or failed on the way.
    Failed {
        /// The error code as the client was told.
        code: String,
        /// The message.
        message: String,
    },
}

/// A call's bodies as JSON text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// The request's.
    pub request: String,
    /// The answer's; a stream's as if it had been asked for whole, as far as it came. `None` where there was none.
    pub response: Option<String>,
}

/// What `/health` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClusterHealth {
    /// The process answers.
    pub live: bool,
    /// The store answers a read, and the coordinator is up: workers can join.
    pub ready: bool,
    /// Workers with a link.
    pub workers: u32,
    /// Workers that cluster.toml names.
    pub workers_expected: u32,
    /// Endpoints that are ready.
    pub endpoints_ready: u32,
    /// Endpoints in all.
    pub endpoints: u32,
    /// Replicas whose engine has work but makes no progress.
    pub stalled: u32,
}
