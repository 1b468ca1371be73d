//! The coordinator: roster of workers, endpoints' records, replicas. Brings what is there to what the store wishes.
//!
//! Level-triggered: after every message it compares wish and state and takes the next steps; a step that is lost is
//! taken again. The store is the truth: this actor writes where replicas go, hands lifecycle events to the keeper, and
//! learns of every change of an endpoint from the watch. All of its memory can be rebuilt from store and workers.

mod view;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, MessageResult, WrapFuture};
use actix::fut::ActorFutureExt;
use common::config::Cluster;
use common::ids::{BootId, Generation, ReplicaId, Term, WorkerId};
use common::wire::message::{Command, Device, HeldShard};
use tokio_util::sync::CancellationToken;

use super::death::DeathNotice;
use super::directory::Directory;
use super::endpoint::{Door, EndpointActor};
use super::keeper::Keeper;
use super::link::Link;
use super::messages::{
    Assigned, Changed, CheckFit, Configure, Died, FactsRead, Gate, GetHealth, GetView, Joined, Left, ListViews,
    MemberJoined, MemberLeft, MemberNews, Relisted, ReplicaStatus, Retire, Serving, ShardReport, Status, Target, Who,
};
use super::meters::Meters;
use super::permit::Credits;
use super::record::{
    Assignment, ENDPOINTS, EndpointRecord, REPLICAS, StoredOptions, decode, encode, endpoint_key, replica_key,
};
use super::replica::{Member, Replica, ReplicaActor};
use super::slot::{ROOM_PAUSE, Running, Slot, Stage};
use crate::api::{ApiError, ClusterHealth, EndpointView, ErrorKind};
use crate::policy::fit::{self, NoFit, Wish};
use crate::policy::lifecycle::{Entity, Event};
use crate::policy::placement::Place;
use crate::policy::workload;
use crate::registry::{LocalRegistry, ModelFacts, RegistryError};
use crate::store::{Entry, Expect, SharedStore, StoreError};

/// How often pauses and time-outs are looked at.
const TICK: Duration = Duration::from_millis(250);
/// How long requests of a replaced version may still run.
const DRAIN: Duration = Duration::from_secs(60);
/// After a failed read of the store the watch waits for so long.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// What the coordinator works with.
#[derive(Clone)]
pub struct Means {
    /// The configuration.
    pub cluster: Arc<Cluster>,
    /// The models.
    pub registry: Arc<LocalRegistry>,
    /// The truth.
    pub store: SharedStore,
    /// Where it publishes addresses.
    pub directory: Arc<Directory>,
    /// This start's number.
    pub term: Term,
}

/// What a start found in the store.
pub struct Restored {
    endpoints: Vec<EndpointRecord>,
    replicas: Vec<Assignment>,
    revision: u64,
}

impl Restored {
    /// Reads the store; what served is marked as being brought back.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read(store: &SharedStore) -> Result<Self, StoreError> {
        for entry in store.list(ENDPOINTS.into()).await?.0 {
            let mut record: EndpointRecord = decode(&entry.key, &entry.value)?;
            if record.life.apply(Event::Restarted).unwrap_or(false) {
                store.put(entry.key, encode(&record)?, Expect::Revision(entry.revision)).await?;
            }
        }
        let replicas = store.list(REPLICAS.into()).await?.0;
        let replicas = replicas.iter().map(|entry| decode(&entry.key, &entry.value)).collect::<Result<_, _>>()?;
        let (endpoints, revision) = store.list(ENDPOINTS.into()).await?;
        let endpoints = endpoints.iter().map(|entry| decode(&entry.key, &entry.value)).collect::<Result<_, _>>()?;
        Ok(Restored { endpoints, replicas, revision })
    }
}

/// The coordinator as an actor.
pub struct CoordinatorActor {
    means: Means,
    keeper: Keeper,
    workers: BTreeMap<WorkerId, Worker>,
    endpoints: BTreeMap<String, Endpoint>,
    slots: HashMap<ReplicaId, Slot>,
    revision: u64,
    /// Ends with this life of the actor, and with it its children, its watch and its links.
    incarnation: CancellationToken,
    _death: DeathNotice,
}

struct Worker {
    boot: BootId,
    link: Arc<Link>,
    device: Device,
    group_address: String,
}

struct Endpoint {
    record: EndpointRecord,
    meters: Arc<Meters>,
    door: Addr<EndpointActor>,
    over: CancellationToken,
    /// What the door was last told, in short.
    told: Option<Told>,
}

#[derive(PartialEq, Eq)]
struct Told {
    gate: Gate,
    version: u64,
    replicas: Vec<(ReplicaId, Generation)>,
}

impl CoordinatorActor {
    /// A coordinator that goes on from what was stored. `incarnation` is cancelled when it is gone.
    pub fn new(means: Means, restored: Restored, incarnation: CancellationToken, death: DeathNotice, ctx: &mut Context<Self>) -> Self {
        let now = Instant::now();
        let mut coordinator = CoordinatorActor {
            keeper: Keeper::start(means.store.clone()),
            means,
            workers: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            slots: HashMap::new(),
            revision: restored.revision,
            incarnation,
            _death: death,
        };
        for record in restored.endpoints {
            coordinator.put_endpoint(record, ctx);
        }
        for assignment in restored.replicas {
            coordinator.restore(assignment, now, ctx);
        }
        let directory = &coordinator.means.directory;
        directory.set_seen(coordinator.revision);
        directory.set_coordinator(Some((ctx.address(), coordinator.incarnation.clone())));
        coordinator
    }

    // Workers.

    fn joined(&mut self, message: Joined) {
        let Joined { hello, link } = message;
        let id = hello.worker.clone();
        if let Some(before) = self.workers.remove(&id) {
            tracing::info!(worker = %id, same_life = before.boot == hello.boot, "a newer link replaces the worker's older one");
            if before.boot == hello.boot {
                before.link.cut();
            } else {
                before.link.refuse(format!("another process has joined as {id}; give each worker its own device in cluster.toml"));
            }
            self.member_left(&before.link, "a newer link of the worker took its place");
        }
        tracing::info!(worker = %id, device = hello.device.name, shards = hello.shards.len(), "worker joined");
        for slot in self.slots.values_mut() {
            let Stage::Running(running) = &slot.stage else { continue };
            if running.assignment.members.contains(&id) {
                let generation = running.assignment.generation;
                let held = |shard: &&HeldShard| (shard.replica, shard.generation) == (slot.replica, generation);
                let held = hello.shards.iter().find(held).cloned();
                running.addr.do_send(MemberJoined { link: link.clone(), held });
            }
        }
        for shard in &hello.shards {
            let wanted = self.slots.get_mut(&shard.replica).and_then(|slot| slot.running(shard.generation)).is_some();
            if !wanted {
                let (replica, generation) = (shard.replica, shard.generation);
                link.command(Command::Unload { term: self.means.term, replica, generation });
            }
        }
        let worker = Worker { boot: hello.boot, link, device: hello.device, group_address: hello.group_address };
        self.workers.insert(id, worker);
        metrics::gauge!("tandem_workers").set(self.workers.len() as f64);
        self.room_was_made();
    }

    fn left(&mut self, link: &Arc<Link>, reason: &str) {
        let current = self.workers.get(&link.worker).is_some_and(|worker| Arc::ptr_eq(&worker.link, link));
        if current {
            tracing::warn!(worker = %link.worker, reason, "worker left");
            self.workers.remove(&link.worker);
            metrics::gauge!("tandem_workers").set(self.workers.len() as f64);
            self.member_left(link, reason);
        }
    }

    fn member_left(&mut self, link: &Arc<Link>, reason: &str) {
        for slot in self.slots.values() {
            if let Stage::Running(running) = &slot.stage
                && running.assignment.members.contains(&link.worker)
            {
                running.addr.do_send(MemberLeft { link: link.clone(), reason: reason.to_owned() });
            }
        }
    }

    fn shard_report(&mut self, message: ShardReport) {
        let running = self.slots.get_mut(&message.replica).and_then(|slot| slot.running(message.generation));
        if let Some(running) = running {
            running.addr.do_send(MemberNews { link: message.link, news: message.news });
        }
    }

    fn room_was_made(&mut self) {
        let now = Instant::now();
        self.slots.values_mut().for_each(|slot| slot.retry_now(now));
    }

    /// The devices of cluster.toml with what is free on them. `ignore` says whose claims do not count.
    fn places(&self, all_there: bool, ignore: impl Fn(&Slot) -> bool) -> Vec<Place> {
        let mut places = Vec::new();
        for node in &self.means.cluster.nodes {
            for device in &node.devices {
                let worker = self.workers.get(&device.worker);
                let bytes = worker.map(|worker| worker.device.memory_bytes).or(device.memory_bytes);
                let claimed: u64 =
                    self.slots.values().filter(|slot| !ignore(slot)).map(|slot| slot.claim(&device.worker)).sum();
                places.push(Place {
                    worker: device.worker.0.clone(),
                    node: node.name.clone(),
                    kind: device.kind,
                    free_bytes: bytes.map(|bytes| bytes.saturating_sub(claimed)),
                    linked: all_there || worker.is_some(),
                });
            }
        }
        places
    }

    // Endpoints, as the store has them.

    fn changed(&mut self, key: &str, entry: Option<Entry>, ctx: &mut Context<Self>) {
        let Some(name) = key.strip_prefix(ENDPOINTS) else { return };
        match entry {
            Some(entry) => match decode::<EndpointRecord>(key, &entry.value) {
                Ok(record) => self.put_endpoint(record, ctx),
                Err(error) => tracing::error!(%error, "an endpoint's record is left out"),
            },
            None => self.remove_endpoint(name),
        }
    }

    fn put_endpoint(&mut self, record: EndpointRecord, ctx: &mut Context<Self>) {
        // The same name, made anew: nothing of the old one stays.
        if self.endpoints.get(&record.name).is_some_and(|endpoint| endpoint.record.id != record.id) {
            self.remove_endpoint(&record.name);
        }
        if let Some(endpoint) = self.endpoints.get_mut(&record.name) {
            endpoint.record = record;
            return;
        }
        let meters = Arc::new(Meters::new(&record.name));
        let over = self.incarnation.child_token();
        let door = self.open_door(&record.name, meters.clone(), over.clone(), ctx);
        self.endpoints.insert(record.name.clone(), Endpoint { record, meters, door, over, told: None });
    }

    fn open_door(&self, name: &str, meters: Arc<Meters>, over: CancellationToken, ctx: &mut Context<Self>) -> Addr<EndpointActor> {
        let door = Door::new(name, self.means.cluster.limits.clone(), meters);
        let door = EndpointActor::new(door, ctx.address().recipient(), over).start();
        self.means.directory.set_endpoint(name, Some(door.clone()));
        door
    }

    fn remove_endpoint(&mut self, name: &str) {
        let Some(endpoint) = self.endpoints.remove(name) else { return };
        self.means.directory.set_endpoint(name, None);
        endpoint.over.cancel();
        // Deleted: what runs on its replicas ends now.
        for slot in self.slots.values_mut().filter(|slot| slot.endpoint == name) {
            retire(slot, Duration::ZERO);
        }
    }

    // Replicas.

    fn restore(&mut self, assignment: Assignment, now: Instant, ctx: &mut Context<Self>) {
        let Some(endpoint) = self.endpoints.get(&assignment.endpoint) else {
            return self.forget(assignment.replica);
        };
        let wanted = endpoint.record.life.wanted();
        let Some((_, entity)) = wanted.into_iter().find(|(replica, _)| *replica == assignment.replica) else {
            return self.forget(assignment.replica);
        };
        let credits = Credits::new(entity.spec.workload_size.concurrency());
        let mut slot = Slot::new(assignment.replica, &assignment.endpoint, now);
        slot.generation = assignment.generation;
        let workload_type = self.means.cluster.workload_types.iter().find(|known| known.name == entity.spec.workload_type);
        slot.stand_in = workload_type.and_then(workload::stand_in);
        let replica = Replica::restored(assignment.clone(), credits.clone(), endpoint.meters.clone(), now);
        slot.stage = Stage::Running(self.run_replica(replica, assignment, credits, ctx));
        self.slots.insert(slot.replica, slot);
    }

    fn run_replica(&self, replica: Replica, assignment: Assignment, credits: Arc<Credits>, ctx: &mut Context<Self>) -> Running {
        let me = ctx.address();
        let addr = ReplicaActor::new(replica, me.clone().recipient(), me.recipient(), self.incarnation.clone()).start();
        Running { assignment, addr, credits, status: Status::Starting("asking the workers".into()), retiring: false }
    }

    /// Deletes where a replica was; a failure is logged: a stale record is forgotten at the next start.
    fn forget(&self, replica: ReplicaId) {
        let store = self.means.store.clone();
        tokio::spawn(async move {
            if let Err(error) = store.delete(replica_key(replica), Expect::Any).await {
                tracing::warn!(%replica, %error, "where a replica was cannot be deleted");
            }
        });
    }

    fn replica_status(&mut self, message: ReplicaStatus) {
        let served = self.is_served(message.replica);
        let Some(slot) = self.slots.get_mut(&message.replica) else { return };
        let Some(running) = slot.running(message.generation) else { return };
        let members = running.assignment.members.iter().map(|worker| worker.0.as_str()).collect::<Vec<_>>().join(", ");
        match &message.status {
            Status::Starting(words) | Status::Waiting(words) => slot.message = format!("{words} ({members})"),
            Status::Ready { task, numerics_id } => {
                slot.attempts = 0;
                slot.task.clone_from(task);
                slot.message = format!("Served by {members}");
                tracing::info!(endpoint = slot.endpoint, replica = %slot.replica, generation = %slot.generation, numerics_id, "replica is ready");
            }
            Status::Stalled => tracing::warn!(endpoint = slot.endpoint, replica = %slot.replica, "replica makes no progress"),
            Status::Over { fatal, message: why } => {
                tracing::warn!(endpoint = slot.endpoint, replica = %slot.replica, generation = %slot.generation, why, "replica is over");
                let (fatal, why) = (*fatal, why.clone());
                return self.replica_over(message.replica, fatal, served, why);
            }
        }
        if let Some(running) = slot.running(message.generation) {
            running.status = message.status;
        }
    }

    fn replica_over(&mut self, replica: ReplicaId, fatal: bool, served: bool, why: String) {
        let Some(slot) = self.slots.get_mut(&replica) else { return };
        if slot.is_retiring() {
            self.slots.remove(&replica);
            self.forget(replica);
        } else {
            slot.over(fatal, served, why, Instant::now());
        }
        self.room_was_made();
    }

    /// The replica belongs to a configuration in force.
    fn is_served(&self, replica: ReplicaId) -> bool {
        let active = self.endpoints.values().filter_map(|endpoint| endpoint.record.life.active.as_ref());
        active.flat_map(|active| &active.entities).any(|entity| entity.replicas.contains(&replica))
    }

    // Reconciling.

    /// Takes the next steps towards what is wished.
    fn reconcile(&mut self, ctx: &mut Context<Self>) {
        let now = Instant::now();
        let mut wanted: Vec<(ReplicaId, String, Entity)> = Vec::new();
        for (name, endpoint) in &self.endpoints {
            for (replica, entity) in endpoint.record.life.wanted() {
                wanted.push((replica, name.clone(), entity.clone()));
            }
        }
        for slot in self.slots.values_mut() {
            if !wanted.iter().any(|(replica, ..)| *replica == slot.replica) {
                retire(slot, DRAIN);
            }
        }
        let gone = |slot: &Slot| !matches!(slot.stage, Stage::Running(_) | Stage::Placing(_));
        self.slots.retain(|replica, slot| !gone(slot) || wanted.iter().any(|(wanted, ..)| wanted == replica));
        for (replica, endpoint, entity) in &wanted {
            self.slots.entry(*replica).or_insert_with(|| Slot::new(*replica, endpoint, now));
            self.advance(*replica, entity, now, ctx);
            if let Some(event) = self.slots.get(replica).and_then(|slot| slot.event(entity)) {
                self.keeper.hand_in(endpoint, event);
            }
        }
        self.configure_doors();
    }

    /// Takes a replica's next step, if one is due.
    fn advance(&mut self, replica: ReplicaId, entity: &Entity, now: Instant, ctx: &mut Context<Self>) {
        let Some(slot) = self.slots.get_mut(&replica) else { return };
        match &slot.stage {
            Stage::Idle(at) if *at <= now => {
                slot.stage = Stage::Reading;
                let (registry, model) = (self.means.registry.clone(), entity.spec.model.clone());
                let read = async move {
                    let facts = tokio::task::spawn_blocking(move || registry.facts(&model).map(Arc::new)).await;
                    facts.unwrap_or_else(|e| Err(RegistryError::Broken(format!("reading the model failed: {e}"))))
                };
                ctx.spawn(read.into_actor(self).map(move |facts, _, ctx| ctx.notify(FactsRead { replica, facts })));
            }
            Stage::Waiting(facts, at) if *at <= now => {
                let facts = facts.clone();
                self.place(replica, facts, entity, now, ctx);
            }
            _ => {}
        }
    }

    fn facts_read(&mut self, message: FactsRead) {
        let served = self.is_served(message.replica);
        let Some(slot) = self.slots.get_mut(&message.replica) else { return };
        match message.facts {
            Ok(facts) => {
                slot.task.clone_from(&facts.task);
                slot.stage = Stage::Waiting(facts, Instant::now());
            }
            Err(error) => slot.over(true, served, error.to_string(), Instant::now()),
        }
    }

    /// Looks for devices; what is found is stored before anybody is told.
    fn place(&mut self, replica: ReplicaId, facts: Arc<ModelFacts>, entity: &Entity, now: Instant, ctx: &mut Context<Self>) {
        let types = &self.means.cluster.workload_types;
        let size = entity.spec.workload_size;
        let leaving = self.slots.values().any(Slot::is_retiring);
        let found = workload::resolve(types, &entity.spec.workload_type, size).map_err(|e| NoFit::Never(e.message)).and_then(|workload| {
            let wish = Wish { facts: &facts, workload, concurrency: size.concurrency() };
            let places = self.places(false, |_| false);
            let fit = fit::fit(wish, &places, types)?;
            let members: Vec<WorkerId> = fit.devices.iter().map(|&device| WorkerId(places[device].worker.clone())).collect();
            Ok((members, fit.plan, workload::stand_in(workload)))
        });
        let served = self.is_served(replica);
        let Some(slot) = self.slots.get_mut(&replica) else { return };
        let (members, plan, stand_in) = match found {
            Ok(found) => found,
            // What leaves makes room in a moment.
            Err(NoFit::Never(why)) if !served && !leaving => return slot.over(true, served, why, now),
            Err(NoFit::Waiting(why) | NoFit::Never(why)) => {
                slot.message = why;
                slot.stage = Stage::Waiting(facts, now + ROOM_PAUSE);
                return;
            }
        };
        slot.stand_in = stand_in;
        slot.generation = Generation(slot.generation.0 + 1);
        slot.message = "assigned to workers".to_owned();
        let assignment = Assignment {
            replica,
            generation: slot.generation,
            endpoint: slot.endpoint.clone(),
            members,
            folder: facts.folder.display().to_string(),
            options: StoredOptions::of(&plan, facts.kv_dtype),
        };
        slot.stage = Stage::Placing(assignment.clone());
        let (store, generation) = (self.means.store.clone(), assignment.generation);
        let write = async move { store.put(replica_key(replica), encode(&assignment)?, Expect::Any).await.map(drop) };
        ctx.spawn(write.into_actor(self).map(move |stored, _, ctx| ctx.notify(Assigned { replica, generation, stored })));
    }

    /// Where the replica goes is stored: its workers are told.
    fn assigned(&mut self, message: Assigned, ctx: &mut Context<Self>) {
        let served = self.is_served(message.replica);
        let Some(slot) = self.slots.get_mut(&message.replica) else { return };
        let Stage::Placing(assignment) = &slot.stage else { return };
        if assignment.generation != message.generation {
            return;
        }
        let now = Instant::now();
        if let Err(error) = message.stored {
            return slot.over(false, served, error.to_string(), now);
        }
        let assignment = assignment.clone();
        let wish = self.endpoints.get(&slot.endpoint).and_then(|endpoint| {
            let entity = endpoint.record.life.wanted().into_iter().find(|(replica, _)| *replica == message.replica)?.1;
            Some((entity.spec.workload_size, endpoint.meters.clone()))
        });
        let Some((size, meters)) = wish else {
            // Deleted or replaced meanwhile.
            self.slots.remove(&message.replica);
            return self.forget(message.replica);
        };
        let member = |worker: &WorkerId| {
            let worker = self.workers.get(worker)?;
            Some(Member { link: worker.link.clone(), group_address: worker.group_address.clone() })
        };
        let Some(members) = assignment.members.iter().map(member).collect::<Option<Vec<Member>>>() else {
            return slot.over(false, served, "a worker left before it could load".to_owned(), now);
        };
        let credits = Credits::new(size.concurrency());
        let replica = Replica::load(assignment.clone(), &members, credits.clone(), meters, now);
        let running = self.run_replica(replica, assignment, credits, ctx);
        if let Some(slot) = self.slots.get_mut(&message.replica) {
            slot.stage = Stage::Running(running);
        }
    }

    /// Tells each door what it serves, when that has changed.
    fn configure_doors(&mut self) {
        for endpoint in self.endpoints.values_mut() {
            let life = &endpoint.record.life;
            let gate = match (&life.active, life.failed_for_good()) {
                (Some(_), _) => Gate::Open,
                (None, Some(why)) => Gate::Failed(why.to_owned()),
                (None, None) => {
                    let first = life.wanted().into_iter().find_map(|(replica, _)| self.slots.get(&replica));
                    Gate::NotReady(first.map_or_else(|| "it is being deployed".to_owned(), Slot::words))
                }
            };
            let mut entities = Vec::new();
            let mut replicas = Vec::new();
            for entity in life.active.iter().flat_map(|active| &active.entities) {
                let mut targets = Vec::new();
                let mut context_max = u32::MAX;
                for replica in &entity.replicas {
                    let Some(Slot { stage: Stage::Running(running), .. }) = self.slots.get(replica) else { continue };
                    replicas.push((*replica, running.assignment.generation));
                    context_max = context_max.min(running.assignment.options.context_max);
                    targets.push(Target { replica: *replica, addr: running.addr.clone(), credits: running.credits.clone() });
                }
                let routes = life.active.iter().flat_map(|active| &active.routes);
                let percentage = routes.filter(|route| route.entity == entity.spec.name).map(|route| route.percentage).sum();
                let (name, size) = (entity.spec.name.clone(), entity.spec.workload_size);
                entities.push(Serving { name, percentage, size, context_max, replicas: targets });
            }
            let version = life.active.as_ref().map_or(0, |active| active.version);
            let told = Told { gate: gate.clone(), version, replicas };
            if endpoint.told.as_ref() != Some(&told) {
                endpoint.told = Some(told);
                // Control, and it must arrive before clients see the state it belongs to.
                endpoint.door.do_send(Configure { gate, entities });
            }
        }
    }

    // What the gateway asks.

    /// Whether all entities of a configuration can be placed if all workers are there.
    fn check_fit(&self, message: &CheckFit) -> Result<(), ApiError> {
        let own = |slot: &Slot| message.instead_of.as_deref() == Some(&slot.endpoint);
        let mut places = self.places(true, |slot| slot.is_retiring() || own(slot));
        let types = &self.means.cluster.workload_types;
        for (entity, facts) in message.config.entities.iter().zip(&message.facts) {
            let workload = workload::resolve(types, &entity.workload_type, entity.workload_size)?;
            let wish = Wish { facts, workload, concurrency: entity.workload_size.concurrency() };
            match fit::fit(wish, &places, types) {
                Ok(fit) => {
                    for device in fit.devices {
                        places[device].free_bytes = places[device].free_bytes.map(|free| free.saturating_sub(fit.plan.bytes()));
                    }
                }
                Err(NoFit::Waiting(_)) => {}
                Err(NoFit::Never(why)) => return Err(ApiError::new(ErrorKind::InvalidParameter, why)),
            }
        }
        Ok(())
    }

    fn health(&self) -> ClusterHealth {
        let stalled = |slot: &&Slot| matches!(&slot.stage, Stage::Running(Running { status: Status::Stalled, .. }));
        ClusterHealth {
            live: true,
            ready: true,
            workers: self.workers.len() as u32,
            workers_expected: self.means.cluster.workers().count() as u32,
            endpoints_ready: self.endpoints.values().filter(|endpoint| endpoint.record.life.ready()).count() as u32,
            endpoints: self.endpoints.len() as u32,
            stalled: self.slots.values().filter(stalled).count() as u32,
        }
    }

    /// A child is gone without having meant to: it panicked.
    fn died(&mut self, message: Died, ctx: &mut Context<Self>) {
        match message.who {
            Who::Endpoint(name) => {
                let Some(endpoint) = self.endpoints.get(&name).filter(|endpoint| !endpoint.door.connected()) else { return };
                tracing::error!(endpoint = name, "an endpoint's actor ended unexpectedly; it is started again");
                let door = self.open_door(&name, endpoint.meters.clone(), endpoint.over.clone(), ctx);
                if let Some(endpoint) = self.endpoints.get_mut(&name) {
                    (endpoint.door, endpoint.told) = (door, None);
                }
            }
            Who::Replica(replica, generation) if !message.orderly => {
                let served = self.is_served(replica);
                let Some(running) = self.slots.get_mut(&replica).and_then(|slot| slot.running(generation)) else { return };
                tracing::error!(%replica, "a replica's actor ended unexpectedly; its shards are loaded again");
                let members = running.assignment.members.clone();
                for link in members.iter().filter_map(|worker| self.workers.get(worker)).map(|worker| &worker.link) {
                    link.replica_lost(replica, "its actor ended unexpectedly");
                    link.command(Command::Unload { term: self.means.term, replica, generation });
                }
                self.replica_over(replica, false, served, "its actor ended unexpectedly".to_owned());
            }
            _ => {}
        }
    }
}

/// Tells a replica that is not wanted any more to go, once.
fn retire(slot: &mut Slot, drain: Duration) {
    if let Stage::Running(running) = &mut slot.stage {
        if !running.retiring || drain.is_zero() {
            running.addr.do_send(Retire { drain });
        }
        running.retiring = true;
    }
}

impl Drop for CoordinatorActor {
    fn drop(&mut self) {
        self.incarnation.cancel();
    }
}

impl Actor for CoordinatorActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        tokio::spawn(watch(self.means.store.clone(), self.revision, ctx.address(), self.incarnation.clone()));
        ctx.run_interval(TICK, |actor, ctx| actor.reconcile(ctx));
        let over = self.incarnation.clone();
        ctx.spawn(async move { over.cancelled().await }.into_actor(self).map(|(), _, ctx| ctx.stop()));
        self.reconcile(ctx);
    }

}

/// Passes the store's changes on, from `revision`, until the coordinator is gone.
async fn watch(store: SharedStore, mut revision: u64, coordinator: Addr<CoordinatorActor>, over: CancellationToken) {
    loop {
        let changes = tokio::select! {
            changes = store.changes(revision) => changes,
            () = over.cancelled() => return,
        };
        let told = match changes {
            Ok(changes) => {
                revision = changes.last().map_or(revision, |change| change.revision);
                coordinator.send(Changed(changes)).await
            }
            Err(StoreError::Compacted(_)) => match store.list(ENDPOINTS.into()).await {
                Ok((entries, at)) => {
                    revision = at;
                    coordinator.send(Relisted(entries, at)).await
                }
                Err(_) => continue,
            },
            Err(error) => {
                tracing::error!(%error, "the store cannot be watched; trying again");
                tokio::time::sleep(WATCH_PAUSE).await;
                continue;
            }
        };
        if told.is_err() {
            return;
        }
    }
}

macro_rules! handle {
    ($message:ty, |$actor:ident, $value:ident, $ctx:ident| $body:expr) => {
        impl Handler<$message> for CoordinatorActor {
            type Result = ();
            fn handle(&mut self, $value: $message, $ctx: &mut Self::Context) {
                let $actor = &mut *self;
                $body;
                self.reconcile($ctx);
            }
        }
    };
}

handle!(Joined, |actor, message, ctx| actor.joined(message));
handle!(Left, |actor, message, ctx| actor.left(&message.link, &message.reason));
handle!(ReplicaStatus, |actor, message, ctx| actor.replica_status(message));
handle!(FactsRead, |actor, message, ctx| actor.facts_read(message));
handle!(Assigned, |actor, message, ctx| actor.assigned(message, ctx));
handle!(Died, |actor, message, ctx| actor.died(message, ctx));

impl Handler<ShardReport> for CoordinatorActor {
    type Result = ();
    fn handle(&mut self, message: ShardReport, _: &mut Self::Context) {
        self.shard_report(message);
    }
}

impl Handler<Changed> for CoordinatorActor {
    type Result = ();
    fn handle(&mut self, message: Changed, ctx: &mut Self::Context) {
        for change in message.0 {
            self.revision = change.revision;
            // A value that was written again since comes with its later change.
            if change.entry.is_some() || change.deleted {
                self.changed(&change.key, change.entry, ctx);
            }
        }
        self.reconcile(ctx);
        self.means.directory.set_seen(self.revision);
    }
}

impl Handler<Relisted> for CoordinatorActor {
    type Result = ();
    fn handle(&mut self, Relisted(entries, revision): Relisted, ctx: &mut Self::Context) {
        let gone: Vec<String> = self
            .endpoints
            .keys()
            .filter(|name| !entries.iter().any(|entry| entry.key == endpoint_key(name)))
            .cloned()
            .collect();
        gone.iter().for_each(|name| self.remove_endpoint(name));
        for entry in entries {
            let key = entry.key.clone();
            self.changed(&key, Some(entry), ctx);
        }
        self.revision = revision;
        self.reconcile(ctx);
        self.means.directory.set_seen(revision);
    }
}

impl Handler<GetView> for CoordinatorActor {
    type Result = Option<EndpointView>;
    fn handle(&mut self, GetView(name): GetView, _: &mut Self::Context) -> Self::Result {
        self.endpoints.get(&name).map(|endpoint| self.view(endpoint))
    }
}

impl Handler<ListViews> for CoordinatorActor {
    type Result = Vec<EndpointView>;
    fn handle(&mut self, _: ListViews, _: &mut Self::Context) -> Self::Result {
        self.endpoints.values().map(|endpoint| self.view(endpoint)).collect()
    }
}

impl Handler<CheckFit> for CoordinatorActor {
    type Result = Result<(), ApiError>;
    fn handle(&mut self, message: CheckFit, _: &mut Self::Context) -> Self::Result {
        self.check_fit(&message)
    }
}

impl Handler<GetHealth> for CoordinatorActor {
    type Result = MessageResult<GetHealth>;
    fn handle(&mut self, _: GetHealth, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.health())
    }
}
