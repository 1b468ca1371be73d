//! One shard: its life from Load to Unload, and the prompts on their way into its engine.
//!
//! Owns the shard's phase and reports each change of it. The work itself is done elsewhere: opening on a thread of its
//! own, tokenizing on the blocking pool, answers on the answering thread, steps on the engine's.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, Handler, WrapFuture,
};
use common::ids::RequestId;
use common::request::{Failure, FailureKind, Prompt};
use common::wire::message::{HeldShard, Report, ShardSpec, ShardState};
use engine::engine::EngineEnd;
use engine::request::RequestKey;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::messages::{
    CancelRequest, EngineEnded, LinkLost, OpeningDone, PromptPrepared, Serve, Unload,
};
use crate::answering::Work;
use crate::artifacts::library::Library;
use crate::device::Device;
use crate::health::HealthReporter;
use crate::logs::{LoadLog, RunLog, ShardLog};
use crate::memory::Lease;
use crate::open::{Leader, Opening, Running, open};
use crate::outbox::Outbox;
use crate::translate::{Prepared, prepare};

/// Messages that may wait for the actor; the session waits beyond.
const MAILBOX: usize = 256;
/// Prompts that may be on their way into the engine; more are told to come again.
const PREPARING_MAX: usize = 1024;
/// Prompts tokenized at a time; the compute threads keep their cores.
const TOKENIZING_MAX: usize = 2;
/// Long prompts take turns of their own, so that short ones do not wait for them.
const TOKENIZING_LONG_MAX: usize = 1;
/// Bytes of a prompt that is long: it takes some tens of milliseconds.
const LONG_BYTES: usize = 64 << 10;
/// How often counters are reported.
const HEALTH_EVERY: Duration = Duration::from_secs(1);
/// A shard that is let go finishes its step within this time, or its group is ended inside the step.
const STOP_MAX: Duration = Duration::from_secs(5);

/// A shard's actor.
pub struct ShardActor {
    shard: Shard,
}

impl ShardActor {
    /// Begins to load a shard.
    pub fn load(
        spec: ShardSpec,
        device: Arc<Device>,
        library: Arc<Library>,
        outbox: Arc<Outbox>,
    ) -> Addr<ShardActor> {
        let lease = Arc::new(device.memory.lease(&spec));
        let shard = Shard {
            log: ShardLog::new(&spec, outbox.clone()),
            run_log: RunLog::new(Instant::now()),
            spec,
            device,
            library,
            outbox,
            lease,
            phase: Phase::Opening,
            preparing: HashMap::new(),
            next_key: 0,
            turns: Turns::default(),
        };
        ShardActor { shard }.start()
    }
}

impl Actor for ShardActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(MAILBOX);
        self.shard.begin_opening(ctx.address());
        ctx.run_interval(HEALTH_EVERY, |actor, _| actor.shard.report_health());
    }
}

impl Handler<Serve> for ShardActor {
    type Result = ();

    fn handle(&mut self, serve: Serve, ctx: &mut Context<Self>) {
        let Some(job) = self.shard.begin_prompt(serve) else {
            return;
        };
        ctx.spawn(job.run().into_actor(self).map(|done, actor, ctx| {
            if let Some(work) = actor.shard.end_prompt(done) {
                actor.give(work, ctx);
            }
        }));
    }
}

impl Handler<CancelRequest> for ShardActor {
    type Result = ();

    fn handle(&mut self, CancelRequest(request): CancelRequest, ctx: &mut Context<Self>) {
        self.shard
            .drop_prompts(|preparing| preparing.request == request, Wanted::Cancelled);
        self.give(Work::Cancel(request), ctx);
    }
}

impl Handler<LinkLost> for ShardActor {
    type Result = ();

    fn handle(&mut self, _: LinkLost, ctx: &mut Context<Self>) {
        self.shard.drop_prompts(|_| true, Wanted::ByNobody);
        self.give(Work::Forget, ctx);
    }
}

impl Handler<OpeningDone> for ShardActor {
    type Result = ();

    fn handle(&mut self, OpeningDone(opened): OpeningDone, ctx: &mut Context<Self>) {
        if self.shard.end_opening(opened).is_err() {
            ctx.stop();
        }
    }
}

impl Handler<Unload> for ShardActor {
    type Result = ();

    fn handle(&mut self, Unload { keep }: Unload, ctx: &mut Context<Self>) {
        if self.shard.begin_leaving(keep) {
            ctx.run_later(STOP_MAX, |actor, _| actor.shard.abort());
        } else {
            ctx.stop();
        }
    }
}

impl Handler<EngineEnded> for ShardActor {
    type Result = ();

    fn handle(&mut self, EngineEnded(end): EngineEnded, ctx: &mut Context<Self>) {
        self.shard.end(end);
        ctx.stop();
    }
}

impl ShardActor {
    /// Hands work to the answering thread; while its queue is full, the actor takes no further messages.
    fn give(&mut self, work: Work, ctx: &mut Context<Self>) {
        let Some(queue) = self.shard.work() else {
            return;
        };
        if let Err(mpsc::error::TrySendError::Full(work)) = queue.try_send(work) {
            let queue = queue.clone();
            // A closed queue means a dead engine, whose end is on its way.
            ctx.wait(async move { drop(queue.send(work).await) }.into_actor(self));
        }
    }
}

struct Shard {
    spec: ShardSpec,
    log: ShardLog,
    run_log: RunLog,
    device: Arc<Device>,
    library: Arc<Library>,
    outbox: Arc<Outbox>,
    lease: Arc<Lease>,
    phase: Phase,
    preparing: HashMap<RequestKey, Preparing>,
    next_key: RequestKey,
    turns: Turns,
}

enum Phase {
    Opening,
    Running(Running, HealthReporter),
    Leaving(Running),
    /// Its end is told.
    Over,
}

struct Preparing {
    request: RequestId,
    attempt: u32,
    wanted: Wanted,
    /// Cancelled when nobody wants it any more.
    dropped: CancellationToken,
}

/// Who still wants a prompt that is being prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Yes,
    /// Not the coordinator: it is told so.
    Cancelled,
    /// The link it came by is gone.
    ByNobody,
}

impl Shard {
    /// Starts the opening thread.
    fn begin_opening(&self, actor: Addr<ShardActor>) {
        self.log.build(format!(
            "load begins: rank {} of {} on {}",
            self.spec.rank,
            self.spec.members.len(),
            self.device.facts.name
        ));
        let progress = {
            let (outbox, held) = (self.outbox.clone(), self.held(ShardState::Unloaded));
            let (log, lines) = (self.log.clone(), RefCell::new(LoadLog::default()));
            move |stage: &str, done_bytes: u64, total_bytes: u64| {
                let line = lines
                    .borrow_mut()
                    .line(stage, done_bytes, total_bytes, Instant::now());
                if let Some(line) = line {
                    log.build(line);
                }
                let state = ShardState::Loading {
                    stage: stage.to_owned(),
                    done_bytes,
                    total_bytes,
                };
                outbox.send_shard(HeldShard {
                    state,
                    ..held.clone()
                });
            }
        };
        let ended = actor.clone();
        let opening = Opening {
            spec: self.spec.clone(),
            device: self.device.clone(),
            library: self.library.clone(),
            lease: self.lease.clone(),
            outbox: self.outbox.clone(),
            log: self.log.clone(),
            progress: Box::new(progress),
            // The two ends of a shard's life are single messages: they may pass a full mailbox, and must not be lost.
            on_end: Box::new(move |end| ended.do_send(EngineEnded(end))),
        };
        let thread = std::thread::Builder::new().name(format!("open-{}", self.spec.replica));
        let done = actor.clone();
        let spawned = thread.spawn(move || {
            let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| open(opening)));
            let opened = opened
                .unwrap_or_else(|_| Err(internal("a defect in the worker ended the loading")));
            done.do_send(OpeningDone(opened));
        });
        if let Err(e) = spawned {
            actor.do_send(OpeningDone(Err(internal(&format!(
                "cannot start a thread: {e}"
            )))));
        }
    }

    /// The shard runs, or has failed.
    fn end_opening(&mut self, opened: Result<crate::open::Opened, Failure>) -> Result<(), ()> {
        match opened {
            Ok(opened) => {
                tracing::info!(replica = %self.spec.replica, generation = %self.spec.generation, rank = self.spec.rank,
                    load_ms = opened.ready.load_ms, weight_bytes = opened.ready.weight_bytes, "shard ready");
                self.log.run("ready to serve");
                self.run_log = RunLog::new(Instant::now());
                let health = HealthReporter::new(&opened.running);
                self.phase = Phase::Running(opened.running, health);
                self.tell(ShardState::Ready(Box::new(opened.ready)));
                self.report_health();
                Ok(())
            }
            Err(failure) => {
                self.fail(failure);
                Err(())
            }
        }
    }

    /// Takes a prompt in, or refuses it.
    fn begin_prompt(&mut self, Serve { start, arrival }: Serve) -> Option<PromptJob> {
        let (request, attempt) = (start.request, start.attempt);
        let refuse = |kind, message: &str| {
            self.outbox.send(Report::Rejected {
                request,
                attempt,
                failure: Failure::new(kind, message),
            });
        };
        let Phase::Running(Running::Leader(Leader { text, limits, .. }), _) = &self.phase else {
            refuse(
                FailureKind::Unavailable,
                "the replica is not ready on this worker",
            );
            return None;
        };
        if start.generation != self.spec.generation {
            refuse(
                FailureKind::Unavailable,
                "the replica has another generation on this worker",
            );
            return None;
        }
        if self.preparing.len() >= PREPARING_MAX {
            self.run_log.refused();
            refuse(
                FailureKind::Overloaded,
                "too many prompts wait to be tokenized; try again later",
            );
            return None;
        }
        let key = self.next_key;
        self.next_key += 1;
        let dropped = CancellationToken::new();
        self.preparing.insert(
            key,
            Preparing {
                request,
                attempt,
                wanted: Wanted::Yes,
                dropped: dropped.clone(),
            },
        );
        let (text, limits) = (text.clone(), *limits);
        Some(PromptJob {
            key,
            turns: self.turns.of(&start.generate.prompt).clone(),
            dropped,
            work: Box::new(move || prepare(*start, &text, limits, key, arrival)),
        })
    }

    /// A prompt is prepared: gives what is to be done with it.
    fn end_prompt(&mut self, PromptPrepared { key, prepared }: PromptPrepared) -> Option<Work> {
        let Preparing {
            request,
            attempt,
            wanted,
            ..
        } = self.preparing.remove(&key)?;
        let failure = match (wanted, prepared) {
            (Wanted::ByNobody, _) => return None,
            (Wanted::Yes, Ok(prepared)) if self.work().is_some() => {
                self.run_log.accepted();
                let prepared = Box::new(prepared);
                return Some(Work::Begin { prepared, attempt });
            }
            (Wanted::Yes, Ok(_)) => {
                Failure::new(FailureKind::Unavailable, "the replica is being stopped")
            }
            (Wanted::Yes, Err(failure)) => failure,
            (Wanted::Cancelled, _) => cancelled(),
        };
        self.run_log.refused();
        self.outbox.send(Report::Rejected {
            request,
            attempt,
            failure,
        });
        None
    }

    fn drop_prompts(&mut self, which: impl Fn(&Preparing) -> bool, wanted: Wanted) {
        self.preparing
            .values_mut()
            .filter(|preparing| which(preparing))
            .for_each(|preparing| {
                preparing.wanted = wanted;
                preparing.dropped.cancel();
            });
    }

    /// The answering thread's queue, while requests may run.
    fn work(&self) -> Option<mpsc::Sender<Work>> {
        match &self.phase {
            Phase::Running(Running::Leader(leader), _) => Some(leader.work.clone()),
            _ => None,
        }
    }

    /// Lets go of the shard. True when its engine's end is still to come.
    fn begin_leaving(&mut self, keep: bool) -> bool {
        self.lease.leave(keep);
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Running(running, _) | Phase::Leaving(running) => {
                running.stop();
                self.phase = Phase::Leaving(running);
                true
            }
            before @ (Phase::Opening | Phase::Over) => {
                if matches!(before, Phase::Opening) {
                    self.log.build("let go of before it was ready");
                }
                self.outbox.send_last(self.held(ShardState::Unloaded));
                false
            }
        }
    }

    fn abort(&self) {
        if let Phase::Leaving(running) = &self.phase {
            running.abort();
        }
    }

    /// The engine is over: as it was told, or not.
    fn end(&mut self, end: EngineEnd) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Leaving(_) => {
                self.log.run("let go of as told");
                self.outbox.send_last(self.held(ShardState::Unloaded));
            }
            Phase::Over => {}
            Phase::Opening | Phase::Running(..) => {
                let reason = match end {
                    EngineEnd::Stopped if self.spec.rank > 0 => {
                        "rank 0 has ended the shard group".to_owned()
                    }
                    end => end.to_string(),
                };
                self.fail(Failure::new(FailureKind::Unavailable, reason));
            }
        }
    }

    fn fail(&mut self, failure: Failure) {
        tracing::error!(replica = %self.spec.replica, generation = %self.spec.generation, rank = self.spec.rank,
            kind = ?failure.kind, reason = failure.message, "shard failed");
        let text = format!("failed: {}", failure.message);
        match self.phase {
            Phase::Opening => self.log.build(text),
            _ => self.log.run(text),
        }
        self.lease.leave(true);
        self.phase = Phase::Over;
        self.tell(ShardState::Failed(failure));
    }

    fn report_health(&mut self) {
        let Phase::Running(_, health) = &mut self.phase else {
            return;
        };
        if let Some(health) = health.take() {
            for line in self.run_log.lines(&health, Instant::now()) {
                self.log.run(line);
            }
            let ShardSpec {
                replica,
                generation,
                ..
            } = self.spec;
            self.outbox.send(Report::Health {
                replica,
                generation,
                health,
            });
        }
    }

    fn tell(&self, state: ShardState) {
        self.outbox.send_shard(self.held(state));
    }

    fn held(&self, state: ShardState) -> HeldShard {
        let ShardSpec {
            replica,
            generation,
            rank,
            ..
        } = self.spec;
        HeldShard {
            replica,
            generation,
            rank,
            state,
        }
    }
}

/// A panic in a handler ends the actor without a word: this is the word.
impl Drop for Shard {
    fn drop(&mut self) {
        if std::thread::panicking() && !matches!(self.phase, Phase::Over) {
            self.fail(Failure::new(
                FailureKind::Unavailable,
                "a defect in the worker ended this shard",
            ));
        }
    }
}

/// Who may be tokenized now.
struct Turns {
    short: Arc<Semaphore>,
    long: Arc<Semaphore>,
}

impl Default for Turns {
    fn default() -> Turns {
        Turns {
            short: Arc::new(Semaphore::new(TOKENIZING_MAX)),
            long: Arc::new(Semaphore::new(TOKENIZING_LONG_MAX)),
        }
    }
}

impl Turns {
    fn of(&self, prompt: &Prompt) -> &Arc<Semaphore> {
        let bytes = match prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Tokens(_) => 0,
            Prompt::Chat(chat) => chat.bytes(),
        };
        if bytes > LONG_BYTES {
            &self.long
        } else {
            &self.short
        }
    }
}

/// A prompt for the blocking pool.
struct PromptJob {
    key: RequestKey,
    turns: Arc<Semaphore>,
    dropped: CancellationToken,
    work: Box<dyn FnOnce() -> Result<Prepared, Failure> + Send>,
}

impl PromptJob {
    async fn run(self) -> PromptPrepared {
        let PromptJob {
            key,
            turns,
            dropped,
            work,
        } = self;
        let prepared = tokio::select! {
            biased;
            () = dropped.cancelled() => Err(cancelled()),
            // The semaphore is never closed; without a turn the prompt runs all the same.
            _turn = turns.acquire() => tokio::task::spawn_blocking(work)
                .await
                .unwrap_or_else(|_| Err(internal("a defect in the worker ended this request"))),
        };
        PromptPrepared { key, prepared }
    }
}

fn cancelled() -> Failure {
    Failure::new(FailureKind::Unavailable, "cancelled before it began")
}

fn internal(message: &str) -> Failure {
    Failure::new(FailureKind::Internal, message)
}

#[cfg(test)]
mod tests;
