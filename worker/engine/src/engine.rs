//! The engine's thread: takes requests in, runs steps, hands events out.
//!
//! Owns the inbox (bounded by the backlog's limits), the table of candidates that still owe an end, and the loop. What
//! runs in a step is the scheduler's decision, how it runs the runner's. Each candidate ends exactly once, also when
//! the engine is stopped, a step fails or a defect panics.

pub use crate::end::{EngineEnd, OnEnd};

use crate::end::{EndCell, guarded};
use crate::mask::MaskAhead;
use crate::request::{EndReason, Event, Request, RequestKey, SequenceError};
use crate::runner::{Runner, StepError};
use crate::scheduler::{Backlog, Full, Scheduler, SchedulerConfig, check_backlog, check_request};
use crate::stats::Stats;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What an engine is started with, beside its runner.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Name of the thread.
    pub name: String,
    /// Generation of the shard group, put on every plan: the runner's.
    pub generation: u64,
    /// Key of the prefix cache: whatever makes K and V differ or must not be shared (cluster secret, model, version).
    pub prefix_salt: Vec<u8>,
    /// Most tokens of one sequence in one step; at most the runner's step anyway.
    pub chunk_tokens_max: u32,
    /// Most work that may wait for its first admission.
    pub backlog: Backlog,
}

/// Why a request was not taken. No event follows.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// Too much work waits already.
    #[error(transparent)]
    Full(#[from] Full),
    /// The engine is over or about to be.
    #[error("the engine is stopped")]
    Stopped,
    /// The request is malformed or can never fit this engine.
    #[error(transparent)]
    Refused(#[from] SequenceError),
}

/// Where events go, in order, all of a step together. Called on the engine's thread: it must not wait.
pub type Sink = Box<dyn FnMut(Vec<Event>) + Send>;

/// An engine's thread seen from outside. When the last clone is dropped, the engine stops.
#[derive(Clone)]
pub struct EngineHandle {
    door: Arc<Door>,
}

/// Stops the engine when the last handle goes.
struct Door {
    shared: Arc<Shared>,
    scheduler_config: SchedulerConfig,
    backlog: Backlog,
}

/// Between handles and thread.
#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    filled: Condvar,
    stats: Arc<Stats>,
    end: EndCell,
}

#[derive(Default)]
struct Inbox {
    requests: Vec<Request>,
    /// Requests, or single candidates of them, that are not wanted any more.
    cancels: Vec<(RequestKey, Option<u32>)>,
    /// What waits in `requests` and in the scheduler.
    waiting: Backlog,
    /// Candidates that have not ended, by request. The one authority on who owes an end.
    live: HashMap<RequestKey, Vec<u32>>,
    stopping: bool,
}

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Starts the thread. `sink` gets the events, `on_end` the reason why the thread ended.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn(
        runner: Box<dyn Runner>,
        config: EngineConfig,
        sink: Sink,
        on_end: OnEnd,
    ) -> std::io::Result<EngineHandle> {
        let EngineConfig {
            name,
            generation,
            prefix_salt,
            chunk_tokens_max,
            backlog,
        } = config;
        let scheduler_config =
            SchedulerConfig::new(runner.geometry(), generation, prefix_salt, chunk_tokens_max);
        let scheduler = Scheduler::new(scheduler_config.clone());
        let shared = Arc::new(Shared::default());
        shared.stats.publish(&scheduler);
        let door = Arc::new(Door {
            shared: shared.clone(),
            scheduler_config,
            backlog,
        });
        let thread = Thread {
            runner,
            scheduler,
            masks: MaskAhead::new(&name),
            sink,
            events: Vec::new(),
            shared,
        };
        std::thread::Builder::new()
            .name(name)
            .spawn(move || thread.run(on_end))?;
        Ok(EngineHandle { door })
    }
}

impl EngineHandle {
    /// Hands a request to the engine. Its events come through the sink; its key may be used again after its last end.
    ///
    /// # Errors
    /// [`SubmitError`]: the request was not taken and will have no events.
    pub fn submit(&self, request: Request) -> Result<(), SubmitError> {
        let Door {
            shared,
            scheduler_config,
            backlog,
        } = &*self.door;
        check_request(scheduler_config, &request)?;
        let incoming = Backlog::of(&request);
        let mut inbox = shared.lock();
        if inbox.stopping {
            return Err(SubmitError::Stopped);
        }
        if inbox.live.contains_key(&request.key) {
            return Err(SequenceError::Invalid(format!(
                "a request with key {} is in flight",
                request.key
            ))
            .into());
        }
        check_backlog(*backlog, inbox.waiting, incoming)?;
        inbox.waiting = inbox.waiting + incoming;
        inbox.live.insert(
            request.key,
            request
                .candidates
                .iter()
                .map(|candidate| candidate.index)
                .collect(),
        );
        inbox.requests.push(request);
        shared.filled.notify_one();
        Ok(())
    }

    /// Ends a request's candidates before the next step. Nothing happens when they have ended already.
    pub fn cancel(&self, key: RequestKey) {
        self.end(key, None);
    }

    /// Ends one candidate of a request before the next step; the others go on.
    pub fn cancel_candidate(&self, key: RequestKey, candidate: u32) {
        self.end(key, Some(candidate));
    }

    fn end(&self, key: RequestKey, candidate: Option<u32>) {
        let mut inbox = self.door.shared.lock();
        let lives = inbox
            .live
            .get(&key)
            .is_some_and(|live| candidate.is_none_or(|index| live.contains(&index)));
        if lives && !inbox.cancels.contains(&(key, candidate)) {
            inbox.cancels.push((key, candidate));
            self.door.shared.filled.notify_one();
        }
    }

    /// The engine's numbers.
    pub fn stats(&self) -> Arc<Stats> {
        self.door.shared.stats.clone()
    }

    /// Ends everything after the current step; does not wait. Candidates in flight end with an error.
    pub fn stop(&self) {
        self.door.shared.stop();
    }

    /// Why the engine is over, if it is.
    pub fn ended(&self) -> Option<EngineEnd> {
        self.door.shared.end.get()
    }

    /// Waits until the engine is over.
    pub fn wait(&self) -> EngineEnd {
        self.door.shared.end.wait()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stopping = true;
        self.filled.notify_one();
    }
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.cancels.is_empty() && !self.stopping
    }

    /// Strikes the ended candidates off the list of those that owe an end.
    fn settle(&mut self, events: &[Event]) {
        for event in events {
            let Event::Ended { key, candidate, .. } = event else {
                continue;
            };
            let Some(candidates) = self.live.get_mut(key) else {
                continue;
            };
            candidates.retain(|index| index != candidate);
            if candidates.is_empty() {
                self.live.remove(key);
            }
        }
    }
}

/// What the thread owns.
struct Thread {
    runner: Box<dyn Runner>,
    scheduler: Scheduler,
    masks: MaskAhead,
    sink: Sink,
    /// Not yet delivered.
    events: Vec<Event>,
    shared: Arc<Shared>,
}

impl Thread {
    fn run(mut self, on_end: OnEnd) {
        let reason = guarded(|| {
            self.serve()
                .err()
                .map_or(EngineEnd::Stopped, EngineEnd::from)
        });
        let shared = self.shared.clone();
        // The sink itself may have panicked, and the runner may panic when dropped.
        let reason = match guarded(|| self.end_all(reason.clone())) {
            late @ EngineEnd::Panicked(_) if matches!(reason, EngineEnd::Stopped) => late,
            _ => reason,
        };
        shared.stats.idle();
        shared.end.set(reason.clone());
        on_end(reason);
    }

    /// The loop.
    fn serve(&mut self) -> Result<(), StepError> {
        while self.receive() {
            let runs = self.scheduler.schedule(Instant::now(), &mut self.events);
            self.open_door();
            if runs {
                self.step()?;
            }
            self.deliver();
        }
        Ok(())
    }

    /// Moves what arrived to the scheduler; waits while there is nothing to do. False when the engine shall stop.
    fn receive(&mut self) -> bool {
        let mut inbox = self.shared.lock();
        while inbox.is_empty() && self.scheduler.is_idle() {
            self.shared.stats.idle();
            inbox.waiting = Backlog::default();
            inbox = self
                .shared
                .filled
                .wait(inbox)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.shared.stats.begin_step();
        for request in inbox.requests.drain(..) {
            self.scheduler.submit(request, &mut self.events);
        }
        for (key, candidate) in inbox.cancels.drain(..) {
            self.scheduler.cancel(key, candidate, &mut self.events);
        }
        !inbox.stopping
    }

    /// Counts what still waits, so that requests are let in while the step runs.
    fn open_door(&self) {
        let mut inbox = self.shared.lock();
        inbox.waiting = inbox
            .requests
            .iter()
            .map(Backlog::of)
            .fold(self.scheduler.backlog(), std::ops::Add::add);
    }

    fn step(&mut self) -> Result<(), StepError> {
        self.masks.compute(self.scheduler.masks());
        let (samples, scores, pools) = self.scheduler.rows();
        let ticket = self
            .runner
            .submit(self.scheduler.plan(), &samples, &scores, &pools)?;
        let output = self.runner.collect(ticket)?;
        self.scheduler.complete(output, &mut self.events)?;
        self.shared.stats.end_step();
        Ok(())
    }

    fn deliver(&mut self) {
        self.shared.stats.publish(&self.scheduler);
        if !self.events.is_empty() {
            let events = std::mem::take(&mut self.events);
            self.shared.lock().settle(&events);
            (self.sink)(events);
        }
    }

    /// Closes the door and ends every candidate that has not ended.
    fn end_all(mut self, reason: EngineEnd) -> EngineEnd {
        let mut events = std::mem::take(&mut self.events);
        let mut inbox = self.shared.lock();
        inbox.stopping = true;
        inbox.settle(&events);
        for (key, candidates) in inbox.live.drain() {
            events.extend(candidates.into_iter().map(|candidate| Event::Ended {
                key,
                candidate,
                reason: EndReason::Error(SequenceError::Engine(reason.to_string())),
                cached_tokens: 0,
            }));
        }
        drop(inbox);
        if !events.is_empty() {
            (self.sink)(events);
        }
        self.runner.end(&reason);
        reason
    }
}

#[cfg(test)]
mod tests;
