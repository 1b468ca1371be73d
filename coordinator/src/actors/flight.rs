//! Requests that run: a [`Flight`] each, and a link's table of them.
//!
//! Owns each request's one end: a flight is removed from the table exactly once, and whoever removes it ends it. Tokens
//! go from the link's reader into the request's own channel here; the channel is sized so that it cannot fill.
//!
//! A request keeps its id over its attempts. What is said of an older attempt is dropped: words about a prompt carry
//! the attempt, output carries replica and generation, and no output counts before the attempt was accepted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::ids::{Generation, ReplicaId, RequestId};
use common::request::{End, Failure, FailureKind};
use common::wire::message::{Command, Output, Start};

use super::link::Link;
use super::meters::outcome;
use super::permit::Permit;
use super::ticket::{Place, Ticket, end_event, send};
use crate::api::{ApiError, ErrorKind, GenerationEvent};

/// Most replicas that a request is given to before its caller is told.
const ATTEMPTS_MAX: u32 = 3;
/// A worker ends requests at their deadline; one that is this late is ended here.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);
/// A replica that refused is left alone for so long.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// A request that runs on a replica.
#[derive(Debug)]
pub struct Flight {
    ticket: Ticket,
    replica: ReplicaId,
    generation: Generation,
    permit: Permit,
    candidates: Vec<Candidate>,
    open: usize,
    /// The worker has taken this attempt: output before that is an older attempt's.
    taken: bool,
    /// Nothing was shown yet.
    first: bool,
    last_output: Instant,
    sent: usize,
    read: usize,
}

#[derive(Debug, Clone, Default)]
struct Candidate {
    tokens: u32,
    ended: bool,
}

impl Flight {
    /// A request about to be given to this generation of `replica`.
    pub fn new(ticket: Ticket, replica: ReplicaId, generation: Generation, permit: Permit) -> Self {
        let candidates = vec![Candidate::default(); ticket.generate.candidates as usize];
        let (open, last_output) = (candidates.len(), ticket.arrived);
        Flight {
            ticket,
            replica,
            generation,
            permit,
            candidates,
            open,
            taken: false,
            first: true,
            last_output,
            sent: 0,
            read: 0,
        }
    }

    /// The request as its worker is told.
    pub(super) fn start(&self) -> Start {
        let Ticket {
            request,
            attempt,
            ref generate,
            deadline,
            ..
        } = self.ticket;
        let left = deadline.saturating_duration_since(Instant::now());
        Start {
            request,
            replica: self.replica,
            generation: self.generation,
            attempt,
            generate: generate.clone(),
            resume: Vec::new(),
            deadline_ms: Some(left.as_millis() as u64),
        }
    }

    /// It was not given to the replica after all: back to the queue, and the replica is left alone for a moment.
    pub fn put_back(self, pause: Duration) {
        let Flight { ticket, permit, .. } = self;
        permit.suspend(pause);
        back_to_queue(ticket, permit);
    }

    /// Its replica is gone. Before the first output it is run again elsewhere; afterwards each open candidate ends
    /// with an error that says so.
    fn lost(mut self, reason: &str) {
        if self.first
            && self.ticket.attempt + 1 < ATTEMPTS_MAX
            && self.ticket.deadline > Instant::now()
        {
            self.ticket.attempt += 1;
            tracing::info!(request = %self.ticket.request, replica = %self.replica, reason, "request is run again elsewhere");
            let Flight { ticket, permit, .. } = self;
            return back_to_queue(ticket, permit);
        }
        if self.first {
            let error = ApiError::new(
                ErrorKind::Unavailable,
                format!("the replica was lost: {reason}; send the request again"),
            );
            let Flight { ticket, .. } = self;
            return ticket.refuse(error.retry_after(1));
        }
        self.end_all(&End::Error(broken_off(FailureKind::Unavailable, reason)));
    }

    /// Its endpoint is deleted: it ends here, and the same request will fail again.
    fn deleted(self, endpoint: &str) {
        if self.first {
            let message = format!("Endpoint with name '{endpoint}' does not exist.");
            let Flight { ticket, .. } = self;
            return ticket.refuse(ApiError::new(ErrorKind::NotFound, message));
        }
        let message = format!("endpoint '{endpoint}' was deleted while it answered");
        self.end_all(&End::Error(Failure::new(FailureKind::NotFound, message)));
    }

    /// Its worker would not go on with it: as if its replica were gone, which is left alone for a moment, because the
    /// news of its own end may still be on the way.
    fn turned_away(self, reason: &str) {
        self.permit.suspend(REFUSED_PAUSE);
        self.lost(reason);
    }

    /// Ends every candidate that is open.
    fn end_all(mut self, end: &End) {
        self.ticket.meters.ended(outcome(end));
        for (index, candidate) in self
            .candidates
            .iter_mut()
            .enumerate()
            .filter(|(_, candidate)| !candidate.ended)
        {
            candidate.ended = true;
            send(
                &self.ticket.events,
                self.ticket.request,
                end_event(index as u32, candidate.tokens, end.clone()),
            );
        }
    }

    /// Takes one output in.
    fn output(&mut self, output: Output, now: Instant) -> Went {
        let event = match output {
            Output::Prompt { text, tokens, .. } => {
                if std::mem::replace(&mut self.ticket.prompt_delivered, true) {
                    return Went::On;
                }
                GenerationEvent::Prompt { text, tokens }
            }
            Output::Embedding { values, .. } => GenerationEvent::Embedding(values),
            Output::Delta { delta, .. } => {
                let candidate = self
                    .candidates
                    .get_mut(delta.candidate as usize)
                    .filter(|candidate| !candidate.ended);
                let Some(candidate) = candidate else {
                    return Went::On;
                };
                candidate.tokens += delta.ids.len() as u32;
                let waited = now.saturating_duration_since(self.last_output);
                let first = std::mem::replace(&mut self.first, false);
                if first {
                    self.ticket.booking.settle(0);
                }
                self.ticket.meters.output(delta.ids.len(), waited, first);
                self.ticket.used(delta.ids.len() as u64, now);
                self.permit.entity().spend(delta.ids.len() as u64);
                self.last_output = now;
                GenerationEvent::Delta(delta)
            }
            Output::End {
                candidate,
                output_tokens,
                cached_tokens,
                end,
                ..
            } => {
                let known = self
                    .candidates
                    .get_mut(candidate as usize)
                    .filter(|candidate| !candidate.ended);
                let Some(known) = known else {
                    return Went::On;
                };
                let end = match end {
                    End::Error(failure) if failure.kind.retryable() => {
                        if self.first {
                            return Went::Lost(failure.message);
                        }
                        End::Error(broken_off(failure.kind, &failure.message))
                    }
                    end => end,
                };
                known.ended = true;
                self.open -= 1;
                // The client cannot be handed to another replica any more.
                self.first = false;
                if self.open == 0 {
                    let took = now.saturating_duration_since(self.ticket.arrived);
                    self.ticket.meters.answered(outcome(&end), took);
                }
                GenerationEvent::End {
                    candidate,
                    output_tokens,
                    cached_tokens,
                    end,
                }
            }
        };
        self.sent += 1;
        if !send(&self.ticket.events, self.ticket.request, event) {
            Went::TooFar
        } else if self.open == 0 {
            Went::Over
        } else {
            Went::On
        }
    }

    /// Whether nobody reads what waits.
    fn is_idle(&mut self, now: Instant, idle: Duration) -> bool {
        let waiting = self.ticket.events.max_capacity() - self.ticket.events.capacity();
        let read = self.sent.saturating_sub(waiting);
        if waiting == 0 || read > self.read {
            self.read = read;
            self.ticket.reading.went_on(now);
            return false;
        }
        self.ticket.reading.idle(now) >= idle
    }
}

/// How a flight stands after an output.
enum Went {
    On,
    /// Its last candidate has ended.
    Over,
    /// More came than was asked for: it is given up.
    TooFar,
    /// Its replica cannot go on with it, and nothing was shown yet.
    Lost(String),
}

/// An answer that breaks off after its first output. (It could be resumed elsewhere: the wire carries what that needs.)
fn broken_off(kind: FailureKind, reason: &str) -> Failure {
    let message =
        format!("the replica was lost while it answered: {reason}; send the request again");
    Failure::new(kind, message)
}

fn back_to_queue(ticket: Ticket, permit: Permit) {
    let entity = permit.entity().clone();
    drop(permit);
    if !ticket.whereabouts.wait_again(entity.waker()) {
        return ticket.meters.ended("cancelled");
    }
    if let Err(ticket) = entity.give_back(ticket) {
        let error = ApiError::new(
            ErrorKind::Unavailable,
            "the endpoint was changed or deleted while the request waited",
        );
        ticket.refuse(error.retry_after(1));
    }
}

/// What a step left to do, once the table is not locked any more: a flight's end wakes others.
#[derive(Debug, Default)]
pub struct Stepped {
    /// Requests that are over here and not at the worker.
    pub(super) cancel: Vec<RequestId>,
    over: Vec<Flight>,
    lost: Vec<(Flight, String)>,
}

impl Stepped {
    /// Does it. Cancels go first: another attempt keeps the request's id.
    pub(super) fn follow_up(self, link: &Link) {
        for request in self.cancel {
            link.command(Command::Cancel { request });
        }
        drop(self.over);
        for (flight, reason) in self.lost {
            flight.turned_away(&reason);
        }
    }
}

/// The flights of one link.
#[derive(Debug, Default)]
pub struct Flights {
    /// `None` once the link is down.
    table: Mutex<Option<HashMap<RequestId, Flight>>>,
}

impl Flights {
    /// An empty table of a link that is up.
    pub fn open() -> Self {
        Flights {
            table: Mutex::new(Some(HashMap::new())),
        }
    }

    fn table(&self) -> MutexGuard<'_, Option<HashMap<RequestId, Flight>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a flight in, then says so to the worker by `tell`; both or neither.
    ///
    /// # Errors
    /// The flight, when the link is down or `tell` fails. A flight whose caller has left just ends.
    pub(super) fn start(
        &self,
        flight: Flight,
        link: &Arc<Link>,
        tell: impl FnOnce(&Flight) -> bool,
    ) -> Result<(), Box<Flight>> {
        let whereabouts = flight.ticket.whereabouts.clone();
        // Held until the flight is in the table: a cancel comes before (and is seen here) or finds the link.
        let mut place = whereabouts.place();
        if matches!(*place, Place::Cancelled) {
            flight.ticket.meters.ended("cancelled");
            return Ok(());
        }
        let mut table = self.table();
        let Some(flights) = table.as_mut() else {
            return Err(Box::new(flight));
        };
        if !tell(&flight) {
            return Err(Box::new(flight));
        }
        flights.insert(flight.ticket.request, flight);
        *place = Place::OnLink(link.clone());
        Ok(())
    }

    /// Removes a flight whose caller has left.
    pub(super) fn cancel(&self, request: RequestId) -> bool {
        let removed = self
            .table()
            .as_mut()
            .and_then(|flights| flights.remove(&request));
        if let Some(flight) = &removed {
            flight.ticket.meters.ended("cancelled");
        }
        removed.is_some()
    }

    /// What one step of a generation of a replica gave.
    pub fn step(
        &self,
        replica: ReplicaId,
        generation: Generation,
        outputs: Vec<Output>,
        now: Instant,
    ) -> Stepped {
        let mut stepped = Stepped::default();
        let mut table = self.table();
        let Some(flights) = table.as_mut() else {
            return stepped;
        };
        for output in outputs {
            let request = output.request();
            let Some(flight) = flights.get_mut(&request).filter(|flight| {
                flight.taken && (flight.replica, flight.generation) == (replica, generation)
            }) else {
                continue;
            };
            let went = flight.output(output, now);
            let still_open = flight.open;
            if matches!(went, Went::On) {
                continue;
            }
            let Some(flight) = flights.remove(&request) else {
                continue;
            };
            match went {
                Went::Lost(reason) => {
                    if still_open > 1 {
                        stepped.cancel.push(request);
                    }
                    stepped.lost.push((flight, reason));
                }
                Went::TooFar if still_open > 0 => {
                    stepped.cancel.push(request);
                    stepped.over.push(flight);
                }
                _ => stepped.over.push(flight),
            }
        }
        stepped
    }

    /// A worker has understood a prompt.
    pub fn accepted(&self, request: RequestId, attempt: u32, prompt_tokens: u32) {
        let mut table = self.table();
        let Some(flight) = table
            .as_mut()
            .and_then(|flights| flights.get_mut(&request))
            .filter(|flight| flight.ticket.attempt == attempt)
        else {
            return;
        };
        flight.taken = true;
        flight.ticket.booking.settle(u64::from(prompt_tokens));
        if let Some(accepted) = flight.ticket.accepted.take() {
            flight.ticket.meters.accepted(prompt_tokens);
            flight.ticket.used(u64::from(prompt_tokens), Instant::now());
            flight.permit.entity().spend(u64::from(prompt_tokens));
            // A caller that has left cancels by its guard.
            let _ = accepted.send(Ok(prompt_tokens));
        }
    }

    /// A worker will not run a prompt.
    pub fn rejected(&self, request: RequestId, attempt: u32, failure: Failure) {
        let removed = self.table().as_mut().and_then(|flights| {
            let known = flights.get(&request)?.ticket.attempt == attempt;
            known.then(|| flights.remove(&request))?
        });
        let Some(flight) = removed else { return };
        let refuse = |flight: Flight, error| {
            let Flight { ticket, .. } = flight;
            ticket.refuse(error);
        };
        match failure.kind {
            // A worker that has sent output has accepted; whatever it says now ends the answer.
            kind if !flight.first && kind.retryable() => {
                flight.end_all(&End::Error(broken_off(kind, &failure.message)));
            }
            _ if !flight.first => flight.end_all(&End::Error(failure)),
            FailureKind::Unavailable => flight.turned_away(&failure.message),
            FailureKind::BadRequest | FailureKind::TooLarge | FailureKind::NotFound => {
                refuse(
                    flight,
                    ApiError::new(ErrorKind::BadRequest, failure.message),
                );
            }
            FailureKind::Overloaded => refuse(
                flight,
                ApiError::new(ErrorKind::Overloaded, failure.message).retry_after(1),
            ),
            FailureKind::Internal => {
                refuse(flight, ApiError::new(ErrorKind::Internal, failure.message))
            }
        }
    }

    /// The replica is gone: its flights are run elsewhere or end.
    pub fn replica_lost(&self, replica: ReplicaId, reason: &str) {
        let lost = self.take_all(replica);
        lost.into_iter().for_each(|flight| flight.lost(reason));
    }

    /// The replica's endpoint is deleted: its flights end.
    pub fn endpoint_deleted(&self, replica: ReplicaId, endpoint: &str) {
        let over = self.take_all(replica);
        over.into_iter().for_each(|flight| flight.deleted(endpoint));
    }

    fn take_all(&self, replica: ReplicaId) -> Vec<Flight> {
        let mut table = self.table();
        let Some(flights) = table.as_mut() else {
            return Vec::new();
        };
        let taken = flights.extract_if(|_, flight| flight.replica == replica);
        taken.map(|(_, flight)| flight).collect()
    }

    /// The link is gone, and with it all its flights; none is taken from here on.
    pub fn close(&self, reason: &str) {
        let flights = self.table().take().unwrap_or_default();
        flights.into_values().for_each(|flight| flight.lost(reason));
    }

    /// Ends what nobody reads and what is beyond its deadline. Returns the requests to cancel at the worker.
    pub fn sweep(&self, now: Instant, idle: Duration) -> Vec<RequestId> {
        let mut ended = Vec::new();
        if let Some(flights) = self.table().as_mut() {
            // All of a call are looked at before any is judged: one that is read keeps its siblings.
            let unread: Vec<RequestId> = flights
                .iter_mut()
                .filter_map(|(request, flight)| flight.is_idle(now, idle).then_some(*request))
                .collect();
            for request in unread {
                if flights
                    .get(&request)
                    .is_some_and(|flight| flight.ticket.reading.idle(now) >= idle)
                {
                    ended.extend(
                        flights
                            .remove(&request)
                            .map(|flight| (flight, End::Cancelled)),
                    );
                }
            }
            let late =
                flights.extract_if(|_, flight| now > flight.ticket.deadline + DEADLINE_GRACE);
            ended.extend(late.map(|(_, flight)| (flight, End::Deadline)));
        }
        let mut requests = Vec::new();
        for (flight, end) in ended {
            requests.push(flight.ticket.request);
            tracing::info!(request = %flight.ticket.request, ?end, "request is ended: nobody reads it, or its worker is late");
            if flight.ticket.accepted.is_some() {
                let Flight { ticket, .. } = flight;
                ticket.refuse(ApiError::new(
                    ErrorKind::Deadline,
                    "the request's time is up",
                ));
            } else {
                flight.end_all(&end);
            }
        }
        requests
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table().as_ref().map_or(0, HashMap::len)
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests;
