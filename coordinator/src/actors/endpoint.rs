//! One endpoint's door: takes a call in or refuses it, splits the traffic, keeps the queue, gives prompts to replicas.
//!
//! Owns the queues; the counters beside them give themselves back ([`super::permit`]). Which replicas there are is the
//! coordinator's word ([`Configure`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::fut::ActorFutureExt;
use actix::{Actor, ActorContext, AsyncContext, Context, Handler, Recipient, WrapFuture};
use common::config::Limits;
use common::ids::RequestId;
use common::request::{Generate, Prompt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::allowance::Charge;
use super::death::DeathNotice;
use super::messages::{
    Admitted, Configure, Died, Dispatch, Gate, Invoke, Pending, Refusal, Serving, Target, Who,
};
use super::meters::Meters;
use super::permit::{Booking, EntityShared, Permit};
use super::ticket::{Reading, Ticket, Whereabouts};
use crate::api::{ApiError, Call, CancelGuard, ErrorKind};
use crate::policy::admission::{self, Ask, Bounds, DrainRate, Load, Verdict};
use crate::policy::fallback;
use crate::policy::routing::{self, Split};
use crate::policy::throughput::Bucket;

/// Calls on their way to the door; beyond, callers are sent away.
const MAILBOX: usize = 1024;
/// How often queues are looked at without a reason: suspended replicas, deadlines.
const TICK: Duration = Duration::from_millis(100);
/// How long a queue waits for a replica to come back.
const RECOVERY_WAIT: Duration = Duration::from_secs(30);

/// An endpoint's door.
pub struct Door {
    name: String,
    limits: Limits,
    gate: Gate,
    split: Split,
    entities: Vec<Entity>,
    falls_back: bool,
    meters: Arc<Meters>,
    wake: Arc<Notify>,
}

struct Entity {
    serving: Serving,
    shared: Arc<EntityShared>,
    queue: VecDeque<Ticket>,
    drain: DrainRate,
    /// Keeps to the rate that was asked for, where throughput sizes the entity.
    bucket: Option<Bucket>,
    /// Since when no replica is up.
    down_since: Option<Instant>,
}

impl Door {
    /// A door that is closed until it is configured.
    pub fn new(name: &str, limits: Limits, meters: Arc<Meters>) -> Self {
        let gate = Gate::NotReady("Creating resources for served entity.".into());
        let wake = Arc::new(Notify::new());
        Door {
            name: name.to_owned(),
            limits,
            gate,
            split: Split::default(),
            entities: Vec::new(),
            falls_back: false,
            meters,
            wake,
        }
    }

    fn configure(&mut self, configure: Configure, now: Instant) {
        self.gate = configure.gate;
        self.falls_back = configure.falls_back;
        let mut before = std::mem::take(&mut self.entities);
        for serving in configure.entities {
            let kept = before
                .iter()
                .position(|entity| entity.serving.name == serving.name);
            self.entities.push(match kept {
                Some(at) => Entity {
                    serving,
                    ..before.swap_remove(at)
                },
                None => Entity {
                    serving,
                    shared: EntityShared::new(self.wake.clone()),
                    queue: VecDeque::new(),
                    drain: DrainRate::default(),
                    bucket: None,
                    down_since: None,
                },
            });
        }
        for entity in &mut self.entities {
            entity.keep_rate(now);
        }
        let weights: Vec<u32> = self
            .entities
            .iter()
            .map(|entity| entity.serving.percentage)
            .collect();
        if weights != self.split.weights() {
            self.split = Split::new(weights);
        }
        let concurrency = self.entities.iter().map(Entity::concurrency).sum();
        self.meters.concurrency(concurrency);
        // What waited for an entity that is gone goes where new calls go.
        for mut gone in before {
            gone.queue.extend(gone.shared.close());
            for ticket in gone.queue {
                match self.split.take() {
                    Some(at) => self.entities[at].queue.push_back(ticket),
                    None => ticket.refuse(self.changed()),
                }
            }
        }
    }

    fn changed(&self) -> ApiError {
        ApiError::new(
            ErrorKind::Unavailable,
            format!(
                "Endpoint '{}' was changed while the request waited.",
                self.name
            ),
        )
        .retry_after(1)
    }

    fn invoke(&mut self, invoke: Invoke, now: Instant) {
        let Invoke {
            call,
            charge,
            tried,
            reply,
        } = invoke;
        let admitted = self.choose(&tried).map_err(Refusal::from).and_then(|at| {
            let entity = self.entities[at].serving.name.clone();
            self.admit(at, call, charge, now).map_err(|error| Refusal {
                entity: Some(entity),
                error,
            })
        });
        // A caller that has left drops what it is given, which cancels it.
        let _ = reply.send(admitted);
    }

    /// The served entity that takes the next call; another than those that were tried.
    fn choose(&mut self, tried: &[String]) -> Result<usize, ApiError> {
        match &self.gate {
            Gate::Open => {}
            Gate::NotReady(why) => {
                let message = format!("Endpoint '{}' is not ready: {why}", self.name);
                return Err(ApiError::new(ErrorKind::Unavailable, message).retry_after(2));
            }
            Gate::Failed(why) => {
                let message = format!(
                    "Endpoint '{}' could not be deployed: {why}. Update its configuration, or delete it and create it again.",
                    self.name
                );
                return Err(ApiError::new(ErrorKind::BadRequest, message));
            }
        }
        let names = self.entities.iter().map(|e| e.serving.name.as_str());
        let chosen = if tried.is_empty() {
            self.split.take()
        } else {
            fallback::next(names, tried)
        };
        chosen.ok_or_else(|| {
            let message = format!(
                "Endpoint '{}' routes no traffic to any served entity.",
                self.name
            );
            ApiError::new(ErrorKind::BadRequest, message)
        })
    }

    fn admit(
        &mut self,
        at: usize,
        call: Call,
        charge: Option<Charge>,
        now: Instant,
    ) -> Result<Admitted, ApiError> {
        let entity = &mut self.entities[at];
        if !entity
            .serving
            .replicas
            .iter()
            .any(|replica| replica.credits.is_up())
        {
            return Err(entity.down(&self.name));
        }
        let context = entity.serving.context_max;
        for generate in &call.prompts {
            check(generate, context)?;
        }
        let tokens =
            |generate: &Generate| generate.prompt.tokens_upper_bound().min(u64::from(context));
        let ask = Ask {
            requests: call.prompts.len() as u64,
            tokens: call.prompts.iter().map(tokens).sum(),
        };
        let load = entity.load();
        let ended = entity.shared.take_ended();
        entity.drain.note(ended, load.waiting > 0, now);
        match admission::decide(
            load,
            entity.bounds(&self.limits),
            ask,
            entity.drain.per_second(),
        ) {
            Verdict::Take => {}
            Verdict::Never(message) => return Err(ApiError::new(ErrorKind::BadRequest, message)),
            Verdict::Later(seconds) => {
                self.meters.ended("overloaded");
                let message = format!(
                    "Endpoint '{}' is busy: {} requests run and {} wait; try again in {seconds} s.",
                    self.name, load.running, load.waiting
                );
                return Err(ApiError::new(ErrorKind::Overloaded, message).retry_after(seconds));
            }
        }
        let reading = Reading::new(now);
        let mut pending = Vec::with_capacity(call.prompts.len());
        for generate in call.prompts {
            let request = RequestId::random();
            let tokens_max = generate.stop.tokens_max.unwrap_or(context).min(context);
            let (events, receiver) =
                mpsc::channel(Ticket::events_max(generate.candidates, tokens_max));
            let (accepted, told) = oneshot::channel();
            let whereabouts = Whereabouts::waiting(request, self.wake.clone());
            let guard = CancelGuard::new({
                let whereabouts = whereabouts.clone();
                move || whereabouts.cancel()
            });
            tracing::debug!(%request, call = call.request_id, endpoint = self.name, "request queued");
            entity.queue.push_back(Ticket {
                request,
                booking: Booking::new(entity.shared.clone(), tokens(&generate)),
                generate,
                deadline: call.deadline,
                arrived: now,
                attempt: 0,
                accepted: Some(accepted),
                events,
                whereabouts,
                reading: reading.clone(),
                meters: self.meters.clone(),
                charge: charge.clone(),
                prompt_delivered: false,
            });
            pending.push(Pending {
                accepted: told,
                events: receiver,
                guard,
            });
        }
        let served_entity = entity.serving.name.clone();
        self.dispatch(now);
        Ok(Admitted {
            served_entity,
            pending,
            reading,
        })
    }

    /// Drops what is not wanted any more and gives what can run to replicas.
    fn dispatch(&mut self, now: Instant) {
        for entity in &mut self.entities {
            for ticket in entity.shared.take_returned().into_iter().rev() {
                entity.queue.push_front(ticket);
            }
            entity.clean(&self.name, self.falls_back, now);
            while entity.shared.running() < entity.concurrency()
                && entity.is_within_rate(now)
                && entity.dispatch_one(now)
            {}
        }
        let (waiting, running) = self
            .entities
            .iter()
            .fold((0, 0), |(waiting, running), entity| {
                let load = entity.load();
                (waiting + load.waiting, running + load.running)
            });
        self.meters.load(waiting, running);
    }

    /// The endpoint is gone: nothing waits any more.
    fn close(&mut self) {
        for entity in &mut self.entities {
            entity.queue.extend(entity.shared.close());
            for ticket in entity.queue.drain(..) {
                let message = format!("Endpoint '{}' was deleted or restarted.", self.name);
                ticket.refuse(ApiError::new(ErrorKind::Unavailable, message).retry_after(1));
            }
        }
        self.meters.load(0, 0);
    }
}

/// What can be seen to be wrong without a tokenizer.
fn check(generate: &Generate, context: u32) -> Result<(), ApiError> {
    if generate.candidates == 0 {
        return Err(ApiError::new(
            ErrorKind::BadRequest,
            "at least one candidate must be asked for",
        ));
    }
    let Prompt::Tokens(ids) = &generate.prompt else {
        return Ok(());
    };
    if generate.truncate_prompt {
        return Ok(());
    }
    // One place is for the first output token, unless the prompt is only scored or embedded.
    let answers = generate.stop.tokens_max != Some(0) && !generate.embedding;
    let room = u64::from(context) - u64::from(answers);
    if ids.len() as u64 > room {
        let message = format!(
            "the prompt has {} tokens; the model's context is {context} tokens, prompt and output",
            ids.len()
        );
        return Err(ApiError::new(ErrorKind::BadRequest, message));
    }
    Ok(())
}

impl Entity {
    fn load(&self) -> Load {
        Load {
            waiting: self.queue.len() as u64,
            running: self.shared.running(),
            tokens: self.shared.tokens(),
        }
    }

    /// Requests that run at a time: what is admitted, or what the replicas have room for.
    fn concurrency(&self) -> u64 {
        let admitted = u64::from(self.serving.concurrency);
        let replicas = &self.serving.replicas;
        if replicas.is_empty() {
            return admitted;
        }
        let credits = |target: &Target| u64::from(target.credits.total());
        admitted.min(replicas.iter().map(credits).sum())
    }

    /// Takes over the rate that it is told to keep to.
    fn keep_rate(&mut self, now: Instant) {
        match (self.serving.tokens_per_s_max, &mut self.bucket) {
            (Some(rate), Some(bucket)) => bucket.set_rate(rate, now),
            (Some(rate), None) => {
                self.shared.take_spent();
                self.bucket = Some(Bucket::new(rate, now));
            }
            (None, _) => self.bucket = None,
        }
    }

    /// Another request may begin: what earlier ones took has been waited for.
    fn is_within_rate(&mut self, now: Instant) -> bool {
        let Some(bucket) = &mut self.bucket else {
            return true;
        };
        bucket.spend(self.shared.take_spent(), now);
        bucket.is_open(now)
    }

    fn bounds(&self, limits: &Limits) -> Bounds {
        Bounds {
            concurrency: self.concurrency(),
            waiting_max: limits.queue_requests_max,
            tokens_max: limits
                .queue_tokens_max
                .saturating_mul(self.serving.replicas.len().max(1) as u64),
        }
    }

    /// No copy takes requests: come again, and why.
    fn down(&self, endpoint: &str) -> ApiError {
        let name = &self.serving.name;
        let mut message =
            format!("Served entity '{name}' of endpoint '{endpoint}' is being brought back");
        if let Some(waits) = &self.serving.waits {
            message.push_str(": ");
            message.push_str(waits);
        }
        ApiError::new(ErrorKind::Unavailable, message).retry_after(2)
    }

    fn clean(&mut self, endpoint: &str, falls_back: bool, now: Instant) {
        let up = self
            .serving
            .replicas
            .iter()
            .any(|replica| replica.credits.is_up());
        let down_since = if up {
            None
        } else {
            Some(*self.down_since.get_or_insert(now))
        };
        self.down_since = down_since;
        let gone =
            down_since.is_some_and(|since| now.saturating_duration_since(since) > RECOVERY_WAIT);
        // What a worker has accepted has its served entity's name on it, and waits for that one.
        let elsewhere = |ticket: &Ticket| falls_back && !up && ticket.accepted.is_some();
        for ticket in std::mem::take(&mut self.queue) {
            if ticket.is_cancelled() {
                ticket.meters.ended("cancelled");
            } else if ticket.deadline <= now {
                ticket.refuse(ApiError::new(
                    ErrorKind::Deadline,
                    "the request's time was up before it could run",
                ));
            } else if gone || elsewhere(&ticket) {
                ticket.refuse(self.down(endpoint));
            } else {
                self.queue.push_back(ticket);
            }
        }
    }

    /// Gives the oldest waiting request to a replica. Says whether it could.
    fn dispatch_one(&mut self, now: Instant) -> bool {
        let loads: Vec<_> = self
            .serving
            .replicas
            .iter()
            .map(|replica| replica.credits.load(now))
            .collect();
        let Some(chosen) = routing::choose(&loads) else {
            return false;
        };
        let Some(ticket) = self.queue.pop_front() else {
            return false;
        };
        let target = &self.serving.replicas[chosen];
        let permit = Permit::take(self.shared.clone(), target.credits.clone());
        match target.addr.try_send(Dispatch { ticket, permit }) {
            Ok(()) => true,
            Err(actix::dev::SendError::Full(back) | actix::dev::SendError::Closed(back)) => {
                back.permit.suspend(TICK);
                self.queue.push_front(back.ticket);
                false
            }
        }
    }
}

/// A [`Door`] as an actor.
pub struct EndpointActor {
    door: Door,
    incarnation: CancellationToken,
    _death: DeathNotice,
}

impl EndpointActor {
    /// An actor that tells `watcher` when it is gone. It ends with `incarnation`.
    pub fn new(door: Door, watcher: Recipient<Died>, incarnation: CancellationToken) -> Self {
        let death = DeathNotice::new(watcher, Who::Endpoint(door.name.clone()));
        EndpointActor {
            door,
            incarnation,
            _death: death,
        }
    }
}

impl Drop for EndpointActor {
    fn drop(&mut self) {
        self.door.close();
    }
}

impl Actor for EndpointActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
        ctx.run_interval(TICK, |actor, _| actor.door.dispatch(Instant::now()));
        wake_on(self.door.wake.clone(), ctx);
        let over = self.incarnation.clone();
        ctx.spawn(
            async move { over.cancelled().await }
                .into_actor(self)
                .map(|(), _, ctx| ctx.stop()),
        );
    }
}

/// Runs the door each time that something was given back. Wakes that come together count once.
fn wake_on(wake: Arc<Notify>, ctx: &mut Context<EndpointActor>) {
    let notified = {
        let wake = wake.clone();
        async move { wake.notified().await }
    };
    ctx.spawn(
        actix::fut::wrap_future::<_, EndpointActor>(notified).map(|(), actor, ctx| {
            actor.door.dispatch(Instant::now());
            wake_on(wake, ctx);
        }),
    );
}

impl Handler<Configure> for EndpointActor {
    type Result = ();
    fn handle(&mut self, message: Configure, _: &mut Self::Context) {
        let now = Instant::now();
        self.door.configure(message, now);
        self.door.dispatch(now);
    }
}

impl Handler<Invoke> for EndpointActor {
    type Result = ();
    fn handle(&mut self, message: Invoke, _: &mut Self::Context) {
        self.door.invoke(message, Instant::now());
    }
}
