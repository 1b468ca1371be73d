//! One generation of one replica: a shard group from its loading to its end.
//!
//! Owns the members' links and states, and says how the group stands; gives requests to rank 0. Decides nothing about
//! where a replica goes: when it is over it says why, and the coordinator makes another generation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::fut::ActorFutureExt;
use actix::{Actor, ActorContext, AsyncContext, Context, Handler, Recipient, WrapFuture};
use common::ids::{Generation, ReplicaId, WorkerId};
use common::request::FailureKind;
use common::wire::message::{Command, GroupMember, HeldShard, ShardSpec, ShardState};

use tokio_util::sync::CancellationToken;

use super::death::DeathNotice;
use super::flight::Flight;
use super::link::Link;
use super::messages::{
    Died, Dispatch, MemberJoined, MemberLeft, MemberNews, ReplicaStatus, Retire, ShardNews, Status,
    Who,
};
use super::meters::{Meters, ReplicaMeters};
use super::permit::{Credits, Permit};
use super::record::Assignment;
use super::ticket::Ticket;
use crate::policy::bytes_text;
use crate::policy::progress::{LOAD_SILENCE_MAX, Progress};

/// Requests on their way to a replica: more than any size admits.
const MAILBOX: usize = 256;
/// How often time-outs are looked at.
const TICK: Duration = Duration::from_millis(200);
/// A replica that is not wanted any more serves for so long: its endpoint may still give it requests that it took in
/// before it heard of the new configuration.
const HANDOVER: Duration = Duration::from_secs(1);
/// A busy link is left alone for so long.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// A worker whose link broke redials at once; one that does not is lost.
pub const LOST_GRACE: Duration = Duration::from_millis(1500);
/// The stage of a shard whose worker has not said anything yet.
const ASKING: &str = "asking the workers";
/// After a restart of the coordinator, workers come back within their longest redial pause.
pub const RESTART_GRACE: Duration = Duration::from_secs(10);

/// A shard group.
pub struct Replica {
    assignment: Assignment,
    ranks: Vec<Rank>,
    credits: Arc<Credits>,
    meters: ReplicaMeters,
    progress: Progress,
    /// Until when missing members may come back.
    grace_until: Instant,
    /// When it is to be let go.
    retirement: Option<Retirement>,
    /// Why it is over.
    over: Option<Over>,
}

/// Why a replica is over.
struct Over {
    /// Another attempt would end the same way.
    fatal: bool,
    /// Of no use to another formation either.
    refused: bool,
    cause: Option<WorkerId>,
    message: String,
}

struct Rank {
    worker: WorkerId,
    link: Option<Arc<Link>>,
    state: Option<ShardState>,
}

/// A member to load a shard on.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its link.
    pub link: Arc<Link>,
    /// Where it accepts other ranks.
    pub group_address: String,
}

/// How a replica goes that is not wanted any more.
struct Retirement {
    /// Takes requests until then.
    serves_until: Instant,
    /// Goes then at the latest.
    at: Instant,
}

impl Retirement {
    fn is_due(&self, running: u32, now: Instant) -> bool {
        now >= self.at || (now >= self.serves_until && running == 0)
    }
}

impl Replica {
    /// A replica whose members are told to load now.
    pub fn load(
        assignment: Assignment,
        members: &[Member],
        credits: Arc<Credits>,
        meters: Arc<Meters>,
        now: Instant,
    ) -> Self {
        let group_key: [u8; 32] = rand::random();
        let group: Vec<GroupMember> = members
            .iter()
            .map(|member| GroupMember {
                worker: member.link.worker.clone(),
                group_address: member.group_address.clone(),
            })
            .collect();
        let mut ranks = Vec::new();
        for (rank, member) in members.iter().enumerate() {
            let shard = ShardSpec {
                replica: assignment.replica,
                generation: assignment.generation,
                rank: rank as u32,
                members: group.clone(),
                group_key,
                source: assignment.source.wire(),
                options: assignment.options.wire(),
            };
            member.link.command(Command::Load {
                term: member.link.term(),
                shard: Box::new(shard),
            });
            ranks.push(Rank {
                worker: member.link.worker.clone(),
                link: Some(member.link.clone()),
                state: None,
            });
        }
        Self::with_ranks(assignment, ranks, credits, meters, now, LOST_GRACE)
    }

    /// A replica of before the coordinator's restart: its members may come back with their shards.
    pub fn restored(
        assignment: Assignment,
        credits: Arc<Credits>,
        meters: Arc<Meters>,
        now: Instant,
    ) -> Self {
        let rank = |worker: &WorkerId| Rank {
            worker: worker.clone(),
            link: None,
            state: None,
        };
        let ranks = assignment.members.iter().map(rank).collect();
        Self::with_ranks(assignment, ranks, credits, meters, now, RESTART_GRACE)
    }

    fn with_ranks(
        assignment: Assignment,
        ranks: Vec<Rank>,
        credits: Arc<Credits>,
        meters: Arc<Meters>,
        now: Instant,
        grace: Duration,
    ) -> Self {
        Replica {
            assignment,
            ranks,
            credits,
            meters: ReplicaMeters::new(meters),
            progress: Progress::new(now),
            grace_until: now + grace,
            retirement: None,
            over: None,
        }
    }

    fn id(&self) -> (ReplicaId, Generation) {
        (self.assignment.replica, self.assignment.generation)
    }

    fn rank_of(&mut self, link: &Link) -> Option<&mut Rank> {
        self.ranks
            .iter_mut()
            .find(|rank| rank.worker == link.worker)
    }

    /// A member's worker is there again, with its shard or without.
    fn joined(&mut self, link: Arc<Link>, held: Option<HeldShard>, now: Instant) {
        let Some(position) = self
            .ranks
            .iter()
            .position(|rank| rank.worker == link.worker)
        else {
            return;
        };
        match held {
            Some(held) if held.rank as usize == position => {
                self.ranks[position].link = Some(link);
                self.progress.load_went_on(now);
                self.state(position, held.state, now);
            }
            _ => {
                let message = format!("worker {} came back without its shard", link.worker);
                self.end_because_of(position, message);
            }
        }
    }

    /// A member's link is gone.
    fn left(&mut self, link: &Arc<Link>, reason: &str, now: Instant) {
        let Some(rank) = self.rank_of(link) else {
            return;
        };
        // A newer link of the same worker stays.
        if rank
            .link
            .as_ref()
            .is_some_and(|current| !Arc::ptr_eq(current, link))
        {
            return;
        }
        rank.link = None;
        self.progress.forget_stall();
        tracing::warn!(worker = %link.worker, reason, "a member of a replica is gone");
        self.grace_until = now + LOST_GRACE;
    }

    fn news(&mut self, link: &Link, news: ShardNews, now: Instant) {
        let Some(position) = self
            .ranks
            .iter()
            .position(|rank| rank.worker == link.worker)
        else {
            return;
        };
        match news {
            ShardNews::State(state) => self.state(position, state, now),
            ShardNews::Health(health) if position == 0 => {
                if let Some(stood) = self.progress.health(&health, now) {
                    let message = format!(
                        "the engine on {} has work and has not finished a step for {} s since it was called stalled",
                        link.worker,
                        stood.as_secs()
                    );
                    self.end(message);
                }
                self.meters.health(*health);
            }
            ShardNews::Health(_) => {}
        }
    }

    fn state(&mut self, position: usize, state: ShardState, now: Instant) {
        let rank = &mut self.ranks[position];
        let worker = rank.worker.clone();
        if rank.state.as_ref() != Some(&state) {
            self.progress.load_went_on(now);
        }
        rank.state = Some(state.clone());
        match state {
            ShardState::Failed(failure) => {
                let fatal = matches!(
                    failure.kind,
                    FailureKind::BadRequest | FailureKind::TooLarge
                );
                self.over.get_or_insert(Over {
                    fatal,
                    refused: failure.kind == FailureKind::BadRequest,
                    // A rank that is not to blame fails too: it has lost the others.
                    cause: (failure.kind == FailureKind::TooLarge).then(|| worker.clone()),
                    message: format!("rank {position} on {worker}: {}", failure.message),
                });
            }
            ShardState::Unloaded => self.end(format!("rank {position} on {worker} was let go")),
            ShardState::Loading { .. } | ShardState::Ready(_) => {}
        }
    }

    /// Looks at the time-outs.
    fn tick(&mut self, now: Instant) {
        let missing = self.ranks.iter().position(|rank| rank.link.is_none());
        let all_there = missing.is_none();
        if let Some(position) = missing
            && now >= self.grace_until
        {
            let message = format!("worker {} is lost", self.ranks[position].worker);
            self.end_because_of(position, message);
        }
        if all_there && self.progress.load_hangs(now) {
            self.end_hanging_load();
        }
        if self
            .retirement
            .as_ref()
            .is_some_and(|retirement| retirement.is_due(self.credits.running(), now))
        {
            self.end("the replica is not wanted any more".to_owned());
        }
    }

    /// No rank has had news for long: over, if there is one that is not loaded.
    fn end_hanging_load(&mut self) {
        let hanging = self.ranks.iter().enumerate().find_map(|(position, rank)| {
            let stage = match &rank.state {
                Some(ShardState::Ready(_)) => return None,
                Some(ShardState::Loading { stage, .. }) => stage.as_str(),
                _ => ASKING,
            };
            Some(format!(
                "rank {position} on {} has reported no progress of its loading for {} s; its last stage: {stage}",
                rank.worker,
                LOAD_SILENCE_MAX.as_secs()
            ))
        });
        if let Some(message) = hanging {
            self.end(message);
        }
    }

    /// Another attempt may do. The first reason counts.
    fn end(&mut self, message: String) {
        self.over.get_or_insert(Over {
            fatal: false,
            refused: false,
            cause: None,
            message,
        });
    }

    /// As [`Replica::end`], where it is known whose fault it is.
    fn end_because_of(&mut self, position: usize, message: String) {
        let cause = self.ranks[position].worker.clone();
        self.over.get_or_insert(Over {
            fatal: false,
            refused: false,
            cause: Some(cause),
            message,
        });
    }

    fn status(&self) -> Status {
        if let Some(over) = &self.over {
            return Status::Over {
                fatal: over.fatal,
                cause: over.cause.clone(),
                message: over.message.clone(),
            };
        }
        if let Some(rank) = self.ranks.iter().find(|rank| rank.link.is_none()) {
            return Status::Waiting(format!("waiting for worker {}", rank.worker));
        }
        if self.progress.is_stalled() {
            return Status::Stalled;
        }
        let (mut stage, mut done, mut total, mut ready) = (None, 0u128, 0u128, None);
        for rank in &self.ranks {
            match &rank.state {
                Some(ShardState::Ready(facts)) => {
                    done += u128::from(facts.weight_bytes);
                    total += u128::from(facts.weight_bytes);
                    ready = ready.or(Some(facts));
                }
                Some(ShardState::Loading {
                    stage: said,
                    done_bytes,
                    total_bytes,
                }) => {
                    done += u128::from(*done_bytes);
                    total += u128::from(*total_bytes);
                    stage = stage.or(Some(said.as_str()));
                }
                _ => stage = stage.or(Some(ASKING)),
            }
        }
        match (stage, ready) {
            (None, Some(facts)) => Status::Ready {
                task: facts.task.clone(),
                numerics_id: facts.numerics_id,
            },
            (stage, _) => {
                let how_far = (done * 100)
                    .checked_div(total)
                    .map(|percent| format!(" {percent} %: {}", of_bytes(done, total)))
                    .unwrap_or_default();
                Status::Starting(format!("{}{how_far}", stage.unwrap_or(ASKING)))
            }
        }
    }

    /// Gives a request to rank 0, or back to the queue.
    fn dispatch(&self, ticket: Ticket, permit: Permit) {
        let (replica, generation) = self.id();
        let flight = Flight::new(ticket, replica, generation, permit);
        let leader = self
            .ranks
            .first()
            .and_then(|rank| rank.link.clone())
            .filter(|_| self.over.is_none());
        let Some(leader) = leader else {
            return flight.put_back(BUSY_PAUSE);
        };
        if let Err(flight) = leader.start(flight, Flight::start) {
            flight.put_back(BUSY_PAUSE);
        }
    }

    /// Its requests end: their endpoint is deleted.
    fn endpoint_deleted(&self, endpoint: &str) {
        for link in self.ranks.iter().filter_map(|rank| rank.link.as_ref()) {
            link.flights.endpoint_deleted(self.id().0, endpoint);
        }
    }

    /// It is over: requests go elsewhere, shards go. What may be formed again keeps its weights, also where a device
    /// lacked room: on others they are of use.
    fn let_go(&self, reason: &str) {
        let (replica, generation) = self.id();
        let refused = self.over.as_ref().is_some_and(|over| over.refused);
        self.credits.set_up(false, Instant::now());
        for link in self.ranks.iter().filter_map(|rank| rank.link.as_ref()) {
            link.replica_lost(replica, reason);
            link.command(Command::Unload {
                term: link.term(),
                replica,
                generation,
                keep: !refused && self.retirement.is_none(),
            });
        }
    }
}

/// A [`Replica`] as an actor.
pub struct ReplicaActor {
    replica: Replica,
    told: Option<Status>,
    parent: Recipient<ReplicaStatus>,
    incarnation: CancellationToken,
    death: DeathNotice,
}

impl ReplicaActor {
    /// An actor that tells `parent` how the replica stands and `watcher` when it is gone. It ends with `incarnation`.
    pub fn new(
        replica: Replica,
        parent: Recipient<ReplicaStatus>,
        watcher: Recipient<Died>,
        incarnation: CancellationToken,
    ) -> Self {
        let (id, generation) = replica.id();
        let death = DeathNotice::new(watcher, Who::Replica(id, generation));
        ReplicaActor {
            replica,
            told: None,
            parent,
            incarnation,
            death,
        }
    }

    /// After each message: tells the parent what is new, and ends when the replica is over.
    fn settle(&mut self, ctx: &mut Context<Self>) {
        let (status, now) = (self.replica.status(), Instant::now());
        let retirement = self.replica.retirement.as_ref();
        let wanted = retirement.is_none_or(|retirement| now < retirement.serves_until);
        let serving = matches!(status, Status::Ready { .. }) && wanted;
        self.replica.credits.set_up(serving, now);
        if self.told.as_ref() == Some(&status) {
            return;
        }
        if let Status::Over { message, .. } = &status {
            self.replica.let_go(message);
            self.death.orderly();
            ctx.stop();
        }
        let (replica, generation) = self.replica.id();
        // Once per change of a status: control, and it must arrive.
        self.parent.do_send(ReplicaStatus {
            replica,
            generation,
            status: status.clone(),
        });
        self.told = Some(status);
    }
}

impl Actor for ReplicaActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
        ctx.run_interval(TICK, |actor, ctx| {
            actor.replica.tick(Instant::now());
            actor.settle(ctx);
        });
        let over = self.incarnation.clone();
        ctx.spawn(
            async move { over.cancelled().await }
                .into_actor(self)
                .map(|(), _, ctx| ctx.stop()),
        );
        self.settle(ctx);
    }
}

impl Handler<Dispatch> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, message: Dispatch, _: &mut Self::Context) {
        self.replica.dispatch(message.ticket, message.permit);
    }
}

impl Handler<MemberJoined> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, message: MemberJoined, ctx: &mut Self::Context) {
        self.replica
            .joined(message.link, message.held, Instant::now());
        self.settle(ctx);
    }
}

impl Handler<MemberLeft> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, message: MemberLeft, ctx: &mut Self::Context) {
        self.replica
            .left(&message.link, &message.reason, Instant::now());
        self.settle(ctx);
    }
}

impl Handler<MemberNews> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, message: MemberNews, ctx: &mut Self::Context) {
        self.replica
            .news(&message.link, message.news, Instant::now());
        self.settle(ctx);
    }
}

impl Handler<Retire> for ReplicaActor {
    type Result = ();
    fn handle(&mut self, message: Retire, ctx: &mut Self::Context) {
        let now = Instant::now();
        self.replica.retirement = Some(match message {
            Retire::After(drain) => Retirement {
                serves_until: now + HANDOVER,
                at: now + drain,
            },
            Retire::Deleted(endpoint) => {
                self.replica.endpoint_deleted(&endpoint);
                Retirement {
                    serves_until: now,
                    at: now,
                }
            }
        });
        self.replica.tick(now);
        self.settle(ctx);
    }
}

/// How many bytes of how many, of all ranks: workers say what they like, so that sums may be large.
fn of_bytes(done: u128, total: u128) -> String {
    let text = |bytes: u128| bytes_text(u64::try_from(bytes).unwrap_or(u64::MAX));
    format!("{} of {}", text(done), text(total))
}

#[cfg(test)]
mod tests;
