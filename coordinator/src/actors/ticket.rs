//! A request on its way: what it needs ([`Ticket`]), where it is ([`Whereabouts`]), how its answer is read ([`Reading`]).
//!
//! Cancelling works wherever a request is: in a queue, given to a worker, over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::ids::RequestId;
use common::request::{End, Failure, FailureKind, Generate};
use tokio::sync::{Notify, mpsc, oneshot};

use super::allowance::Charge;
use super::link::Link;
use super::meters::Meters;
use super::permit::Booking;
use crate::api::{ApiError, ErrorKind, GenerationEvent};

/// A prompt with everything that answering it needs; waits in a queue or flies.
#[derive(Debug)]
pub struct Ticket {
    /// Its id; another attempt keeps it.
    pub request: RequestId,
    /// What to do.
    pub generate: Generate,
    /// When its time is up.
    pub deadline: Instant,
    /// When it arrived.
    pub arrived: Instant,
    /// Replicas it was given to before.
    pub attempt: u32,
    /// Told once: tokens of the prompt, or why it is refused.
    pub accepted: Option<oneshot::Sender<Result<u32, ApiError>>>,
    /// The answer.
    pub events: mpsc::Sender<GenerationEvent>,
    /// Where it is, for whoever cancels it.
    pub whereabouts: Arc<Whereabouts>,
    /// Its share of the backlog.
    pub booking: Booking,
    /// How the call it belongs to is read.
    pub reading: Arc<Reading>,
    /// Its endpoint's meters.
    pub meters: Arc<Meters>,
    /// Counts its tokens where they are limited.
    pub charge: Option<Charge>,
    /// The prompt's own event was delivered by an earlier attempt.
    pub prompt_delivered: bool,
}

impl Ticket {
    /// Events that a request of `candidates` answers of at most `tokens_max` tokens can give: a delta per token, one
    /// for text that was held back and the end, per candidate; the prompt's own.
    pub fn events_max(candidates: u32, tokens_max: u32) -> usize {
        candidates as usize * (tokens_max as usize + 2) + 1
    }

    /// Ends the request before any output.
    pub fn refuse(mut self, error: ApiError) {
        self.meters.ended(match error.kind {
            ErrorKind::Deadline => "deadline",
            ErrorKind::Overloaded => "overloaded",
            _ => "error",
        });
        match self.accepted.take() {
            // A caller that has left is not told.
            Some(accepted) => drop(accepted.send(Err(error))),
            None => {
                let kind = match error.kind {
                    ErrorKind::Internal => FailureKind::Internal,
                    ErrorKind::BadRequest => FailureKind::BadRequest,
                    ErrorKind::Overloaded => FailureKind::Overloaded,
                    _ => FailureKind::Unavailable,
                };
                let end = match error.kind {
                    ErrorKind::Deadline => End::Deadline,
                    _ => End::Error(Failure::new(kind, error.message)),
                };
                for candidate in 0..self.generate.candidates {
                    send(
                        &self.events,
                        self.request,
                        end_event(candidate, 0, end.clone()),
                    );
                }
            }
        }
    }

    /// So many tokens were read or given.
    pub(super) fn used(&self, tokens: u64, now: Instant) {
        if let Some(charge) = &self.charge {
            charge.tokens(tokens, now);
        }
    }

    /// The caller has left.
    pub fn is_cancelled(&self) -> bool {
        matches!(*self.whereabouts.place(), Place::Cancelled)
    }
}

/// Where a request is. Cancelling it works in any place, and more than once.
#[derive(Debug)]
pub struct Whereabouts {
    request: RequestId,
    place: Mutex<Place>,
}

#[derive(Debug)]
pub(super) enum Place {
    /// In an endpoint's queue, whose door is to be woken.
    Waiting(Arc<Notify>),
    /// Given to a worker.
    OnLink(Arc<Link>),
    /// Not wanted any more.
    Cancelled,
}

impl Whereabouts {
    /// In a queue; `wake` is notified when it is cancelled there.
    pub fn waiting(request: RequestId, wake: Arc<Notify>) -> Arc<Self> {
        Arc::new(Whereabouts {
            request,
            place: Mutex::new(Place::Waiting(wake)),
        })
    }

    /// The caller has left: out of the queue, or a word to the worker. What is over stays over.
    pub fn cancel(&self) {
        let before = std::mem::replace(&mut *self.place(), Place::Cancelled);
        match before {
            Place::Waiting(wake) => wake.notify_one(),
            Place::OnLink(link) => link.cancel(self.request),
            Place::Cancelled => {}
        }
    }

    /// In a queue again. `false` when the caller has left meanwhile.
    pub(super) fn wait_again(&self, wake: Arc<Notify>) -> bool {
        let mut place = self.place();
        let wanted = !matches!(*place, Place::Cancelled);
        if wanted {
            *place = Place::Waiting(wake);
        }
        wanted
    }

    pub(super) fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a call's answers are read: all of its requests together, since a reader may take them in turn.
#[derive(Debug)]
pub struct Reading {
    handed_out: AtomicBool,
    last: Mutex<Instant>,
}

impl Reading {
    /// Nobody reads yet.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Reading {
            handed_out: AtomicBool::new(false),
            last: Mutex::new(now),
        })
    }

    /// The caller has the answers from here on.
    pub fn hand_out(&self, now: Instant) {
        self.went_on(now);
        self.handed_out.store(true, Ordering::Release);
    }

    pub(super) fn went_on(&self, now: Instant) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    pub(super) fn idle(&self, now: Instant) -> Duration {
        if !self.handed_out.load(Ordering::Acquire) {
            return Duration::ZERO;
        }
        now.saturating_duration_since(*self.last.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// An end as its reader gets it.
pub(super) fn end_event(candidate: u32, output_tokens: u32, end: End) -> GenerationEvent {
    GenerationEvent::End {
        candidate,
        output_tokens,
        cached_tokens: 0,
        end,
    }
}

/// Puts an event into a request's channel. It is full only when a worker sends more than it was asked for: the request
/// is then given up, and its channel closes without an end, which readers take as a fault.
pub(super) fn send(
    events: &mpsc::Sender<GenerationEvent>,
    request: RequestId,
    event: GenerationEvent,
) -> bool {
    match events.try_send(event) {
        Ok(()) => true,
        // The reader has left; its guard cancels.
        Err(mpsc::error::TrySendError::Closed(_)) => true,
        Err(mpsc::error::TrySendError::Full(_)) => {
            tracing::error!(%request, "a worker sends more than was asked for; the request is given up");
            false
        }
    }
}
