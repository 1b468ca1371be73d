//! All messages between actors, and from outside to them.
//!
//! Load flows through two of them, both sent with `try_send`: [`Invoke`] (one per call) and [`Dispatch`] (one per
//! prompt). The rest is control: a few per second whatever the load.

use std::sync::Arc;
use std::time::Duration;

use actix::{Addr, Message};
use common::ids::{Generation, ReplicaId, WorkerId};
use common::wire::message::{Health, HeldShard, Hello, ShardState};
use tokio::sync::{mpsc, oneshot};

use super::allowance::Charge;
use super::link::Link;
use super::permit::{Credits, Permit};
use super::replica::ReplicaActor;
use super::ticket::Ticket;
use crate::api::{
    ApiError, Call, CancelGuard, ClusterHealth, ConfigSpec, EndpointView, GenerationEvent,
};
use crate::policy::throughput::Forecast;
use crate::registry::{ModelFacts, RegistryError};
use crate::store::{Change, Entry, StoreError};

// To the coordinator, from workers' links.

/// A worker has joined.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Joined {
    /// What it said of itself.
    pub hello: Box<Hello>,
    /// Its link.
    pub link: Arc<Link>,
}

/// A link has ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Left {
    /// The link.
    pub link: Arc<Link>,
    /// Why.
    pub reason: String,
}

/// A worker tells of one of its shards. The coordinator passes it on to the replica.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ShardReport {
    /// Whose.
    pub link: Arc<Link>,
    /// Of which replica.
    pub replica: ReplicaId,
    /// Of which generation.
    pub generation: Generation,
    /// What.
    pub news: ShardNews,
}

/// What a worker tells of a shard.
#[derive(Debug)]
pub enum ShardNews {
    /// How it stands.
    State(ShardState),
    /// Its counters.
    Health(Box<Health>),
}

// To the coordinator, from the store's watch and from its own work on other threads.

/// The store has changed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Changed(pub Vec<Change>);

/// The watch lost its place: all endpoints, at this revision.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Relisted(pub Vec<Entry>, pub u64);

/// A model's headers were read for a replica to be placed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct FactsRead {
    /// For which replica.
    pub replica: ReplicaId,
    /// What was found.
    pub facts: Result<Arc<ModelFacts>, RegistryError>,
}

/// Where a replica goes was stored.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Assigned {
    /// Which replica.
    pub replica: ReplicaId,
    /// Of which generation.
    pub generation: Generation,
    /// Whether it was.
    pub stored: Result<(), StoreError>,
}

// To the coordinator, from its children.

/// How a replica stands.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct ReplicaStatus {
    /// Which.
    pub replica: ReplicaId,
    /// Of which generation.
    pub generation: Generation,
    /// How.
    pub status: Status,
}

/// How a replica stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// On its way; what is being done.
    Starting(String),
    /// Takes requests.
    Ready {
        /// The model's task, as its files say.
        task: Option<String>,
        /// Replicas of one id give the same text.
        numerics_id: u64,
    },
    /// A member is gone and may come back.
    Waiting(String),
    /// It is over: shards were told to go.
    Over {
        /// Trying again will fail again.
        fatal: bool,
        /// The worker that it is over because of, where that is known.
        cause: Option<WorkerId>,
        /// Why.
        message: String,
    },
    /// Its engine has work and makes no progress.
    Stalled,
}

/// An actor is gone.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Died {
    /// Which.
    pub who: Who,
    /// It meant to end; otherwise it panicked.
    pub orderly: bool,
}

/// An actor that a parent watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// The coordinator itself.
    Coordinator,
    /// An endpoint's door.
    Endpoint(String),
    /// A replica of a generation.
    Replica(ReplicaId, Generation),
}

// To the coordinator, from the gateway.

/// One endpoint as clients see it.
#[derive(Debug, Message)]
#[rtype(result = "Option<EndpointView>")]
pub struct GetView(pub String);

/// All endpoints, by name.
#[derive(Debug, Message)]
#[rtype(result = "Vec<EndpointView>")]
pub struct ListViews;

/// Whether a configuration can be placed, with all workers there.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct CheckFit {
    /// What shall be served.
    pub config: ConfigSpec,
    /// The facts of its entities' models, in order.
    pub facts: Vec<Arc<ModelFacts>>,
    /// The endpoint whose own replicas make room.
    pub instead_of: Option<String>,
}

/// What throughput a model gets here, with all workers there and nothing else deployed; `None` when it does not fit.
#[derive(Debug, Message)]
#[rtype(result = "Result<Option<Offer>, ApiError>")]
pub struct GetOffer(pub Arc<ModelFacts>);

/// A workload type and what it gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// The smallest type that the model fits.
    pub workload_type: String,
    /// What a replica on it gives.
    pub forecast: Forecast,
}

/// What `/health` shows.
#[derive(Debug, Message)]
#[rtype(result = "ClusterHealth")]
pub struct GetHealth;

// To an endpoint.

/// What an endpoint serves from here on.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Configure {
    /// Whether and why not.
    pub gate: Gate,
    /// The active configuration's entities.
    pub entities: Vec<Serving>,
    /// What one of them cannot take is given to another: nothing waits for one that is down.
    pub falls_back: bool,
}

/// Whether an endpoint takes calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// It does.
    Open,
    /// Not yet; what is being waited for.
    NotReady(String),
    /// Its first deployment failed; why.
    Failed(String),
}

/// A served entity of the active configuration.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Its name.
    pub name: String,
    /// Its share of the traffic.
    pub percentage: u32,
    /// Requests admitted at a time.
    pub concurrency: u32,
    /// Tokens per second that it keeps to, where throughput sizes it.
    pub tokens_per_s_max: Option<u64>,
    /// Longest sequence served.
    pub context_max: u32,
    /// Its copies.
    pub replicas: Vec<Target>,
    /// What the first copy that is not ready waits for.
    pub waits: Option<String>,
}

/// A replica as its endpoint sees it.
#[derive(Debug, Clone)]
pub struct Target {
    /// Which.
    pub replica: ReplicaId,
    /// Its actor.
    pub addr: Addr<ReplicaActor>,
    /// Its credits.
    pub credits: Arc<Credits>,
}

/// Prompts for an endpoint.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Invoke {
    /// What is asked.
    pub call: Call,
    /// Counts its tokens.
    pub charge: Option<Charge>,
    /// Served entities that could not take it; empty the first time.
    pub tried: Vec<String>,
    /// Told at once: admitted or not.
    pub reply: oneshot::Sender<Result<Admitted, Refusal>>,
}

/// A call that is not taken.
#[derive(Debug)]
pub struct Refusal {
    /// The served entity that could not; `None` when it is about none of them.
    pub entity: Option<String>,
    /// Why.
    pub error: ApiError,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Refusal {
            entity: None,
            error,
        }
    }
}

/// Prompts in an endpoint's queue. Dropping them cancels.
#[derive(Debug)]
pub struct Admitted {
    /// Which served entity answers.
    pub served_entity: String,
    /// One per prompt, in order.
    pub pending: Vec<Pending>,
    /// To be told when the caller has the answers.
    pub reading: Arc<super::ticket::Reading>,
}

/// A prompt that no worker has accepted yet.
#[derive(Debug)]
pub struct Pending {
    /// Tokens of the prompt, or why it is refused.
    pub accepted: oneshot::Receiver<Result<u32, ApiError>>,
    /// The answer.
    pub events: mpsc::Receiver<GenerationEvent>,
    /// Cancels on drop.
    pub guard: CancelGuard,
}

// To a replica.

/// Answer a prompt.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Dispatch {
    /// The prompt.
    pub ticket: Ticket,
    /// The right to run it.
    pub permit: Permit,
}

/// A member's worker has a link again.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct MemberJoined {
    /// The link.
    pub link: Arc<Link>,
    /// The shard it still holds.
    pub held: Option<HeldShard>,
}

/// A member's link has ended.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct MemberLeft {
    /// The link.
    pub link: Arc<Link>,
    /// Why.
    pub reason: String,
}

/// News of a shard of this replica and generation.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct MemberNews {
    /// Whose.
    pub link: Arc<Link>,
    /// What.
    pub news: ShardNews,
}

/// Let the shards go.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub enum Retire {
    /// Once what runs is finished, or after so long.
    After(Duration),
    /// Now: this endpoint is deleted, and what runs ends with it.
    Deleted(String),
}
