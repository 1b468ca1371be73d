//! Everything that is said to a shard's actor.

use std::time::Instant;

use actix::Message;
use common::ids::RequestId;
use common::request::Failure;
use common::wire::message::Start;
use engine::engine::EngineEnd;
use engine::request::RequestKey;

use crate::open::Opened;
use crate::translate::Prepared;

/// From the session: answer a prompt.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Serve {
    /// The prompt.
    pub start: Box<Start>,
    /// When it came: deadlines count from here.
    pub arrival: Instant,
}

/// From the session: an answer is not wanted any more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct CancelRequest(pub RequestId);

/// From the session: the link is gone, and with it everyone who waits for answers.
#[derive(Message)]
#[rtype(result = "()")]
pub struct LinkLost;

/// From the session: let go of the shard.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Unload {
    /// The same shard will be loaded again: its weights may stay.
    pub keep: bool,
}

/// From the opening thread: the shard runs, or why it does not.
#[derive(Message)]
#[rtype(result = "()")]
pub struct OpeningDone(pub Result<Opened, Failure>);

/// From the blocking pool: a prompt is ready, or why it is not.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PromptPrepared {
    /// The key given to the prompt.
    pub key: RequestKey,
    /// The request.
    pub prepared: Result<Prepared, Failure>,
}

/// From the engine's thread: it is over.
#[derive(Message)]
#[rtype(result = "()")]
pub struct EngineEnded(pub EngineEnd);
