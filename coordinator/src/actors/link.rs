//! A worker's link as actors hold it: a bounded queue of commands and the requests in flight.
//!
//! Owns the answer for full: a start waits in its endpoint's queue; a command that must not be lost cuts the link, since
//! a worker that leaves a thousand commands unread is not working.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::ids::{BootId, Generation, ReplicaId, RequestId, Term, WorkerId};
use common::wire::message::{Command, Output, Start};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::flight::{Flight, Flights};

/// Commands that may wait for the socket.
pub const COMMANDS_MAX: usize = 1024;
/// Starts take at most half of the queue: each may be followed by a cancel, which must not be lost.
const STARTS_FREE_MIN: usize = COMMANDS_MAX / 2;

/// A live link to a worker.
#[derive(Debug)]
pub struct Link {
    /// The worker.
    pub worker: WorkerId,
    /// Its life.
    pub boot: BootId,
    /// Requests given to it.
    pub flights: Flights,
    term: Term,
    commands: mpsc::Sender<Command>,
    cut: CancellationToken,
}

impl Link {
    /// A link whose commands come out of the receiver. Cancelling `cut` ends it.
    pub fn new(
        worker: WorkerId,
        boot: BootId,
        term: Term,
        cut: CancellationToken,
    ) -> (Arc<Self>, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(COMMANDS_MAX);
        (
            Arc::new(Link {
                worker,
                boot,
                flights: Flights::open(),
                term,
                commands,
                cut,
            }),
            queue,
        )
    }

    /// The term that this link's commands carry.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Sends a command that must not be lost; a full queue cuts the link.
    pub fn command(&self, command: Command) {
        if let Err(mpsc::error::TrySendError::Full(command)) = self.commands.try_send(command) {
            tracing::warn!(worker = %self.worker, ?command, "the worker reads no commands; its link is cut");
            self.cut.cancel();
        }
    }

    /// Gives a request to the worker.
    ///
    /// # Errors
    /// The flight, when the link is down or busy.
    pub fn start(
        self: &Arc<Self>,
        flight: Flight,
        start: impl FnOnce(&Flight) -> Start,
    ) -> Result<(), Box<Flight>> {
        self.flights.start(flight, self, |flight| {
            let command = || Command::Start {
                term: self.term,
                start: Box::new(start(flight)),
            };
            self.commands.capacity() > STARTS_FREE_MIN && self.commands.try_send(command()).is_ok()
        })
    }

    /// What one step of a generation of a replica gave.
    pub fn step(
        &self,
        replica: ReplicaId,
        generation: Generation,
        outputs: Vec<Output>,
        now: Instant,
    ) {
        self.flights
            .step(replica, generation, outputs, now)
            .follow_up(self);
    }

    /// The caller has left.
    pub fn cancel(&self, request: RequestId) {
        if self.flights.cancel(request) {
            self.command(Command::Cancel { request });
        }
    }

    /// The replica is gone while the link lives: its requests are run elsewhere or end.
    pub fn replica_lost(&self, replica: ReplicaId, reason: &str) {
        self.flights.replica_lost(replica, reason);
    }

    /// Cancels what nobody reads.
    pub fn sweep(&self, now: Instant, idle: Duration) {
        for request in self.flights.sweep(now, idle) {
            self.command(Command::Cancel { request });
        }
    }

    /// Ends the link with a last word; the worker does not dial again.
    pub fn refuse(&self, reason: String) {
        self.command(Command::Refused { reason });
    }

    /// Ends the link.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Resolves when the link is to end.
    pub fn cut_token(&self) -> &CancellationToken {
        &self.cut
    }
}
