//! The coordinator: roster of workers, endpoints' records, replicas. Brings what is there to what the store wishes.
//!
//! Level-triggered: after every message it compares wish and state and takes the next steps; a step that is lost is
//! taken again. The store is the truth: this actor writes where replicas go, hands lifecycle events to the keeper, and
//! learns of every change of an endpoint from the watch. All of its memory can be rebuilt from store and workers.

mod endpoints;
mod replicas;
mod roster;
mod view;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::fut::ActorFutureExt;
use actix::{Actor, ActorContext, Addr, AsyncContext, Context, Handler, MessageResult, WrapFuture};
use common::config::Cluster;
use common::ids::{BootId, ReplicaId, Term, WorkerId};
use common::wire::message::{Command, Device, DeviceKind, DeviceRates};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::allowance::Allowance;
use super::death::DeathNotice;
use super::directory::Directory;
use super::endpoint::EndpointActor;
use super::keeper::Keeper;
use super::link::Link;
use super::messages::{
    Assigned, Changed, CheckFit, Died, FactsRead, GetHealth, GetOffer, GetView, Joined, Left,
    ListViews, Offer, Relisted, ReplicaStatus, Retire, ShardReport, Who,
};
use super::meters::Meters;
use super::record::{
    Assignment, ENDPOINTS, EndpointRecord, REPLICAS, decode, encode, endpoint_key,
};
use super::slot::{Slot, Stage};
use crate::api::{ApiError, EndpointView};
use crate::logs::Logs;
use crate::policy::lifecycle::{Entity, Event};
use crate::registry::Registry;
use crate::store::{Entry, Expect, SharedStore, StoreError};
use crate::tables::Tables;
use endpoints::Told;
use replicas::retire;

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
    pub registry: Arc<Registry>,
    /// The truth.
    pub store: SharedStore,
    /// Where it publishes addresses.
    pub directory: Arc<Directory>,
    /// What clients may read of deployments and replicas.
    pub logs: Arc<Logs>,
    /// What calls come to; hears what is known of endpoints.
    pub tables: Arc<Tables>,
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
    /// Reads the store; what served is marked as being brought back. Records that cannot be read are left out, as the
    /// watch does: everything else serves.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read(store: &SharedStore) -> Result<Self, StoreError> {
        for entry in store.list(ENDPOINTS.into()).await?.0 {
            // The second reading says so.
            let Ok(mut record) = decode::<EndpointRecord>(&entry.key, &entry.value) else {
                continue;
            };
            if record.life.apply(Event::Restarted).unwrap_or(false) {
                store
                    .put(
                        entry.key,
                        encode(&record)?,
                        Expect::Revision(entry.revision),
                    )
                    .await?;
            }
        }
        let replicas = store.list(REPLICAS.into()).await?.0;
        let (endpoints, revision) = store.list(ENDPOINTS.into()).await?;
        Ok(Restored {
            endpoints: readable(&endpoints),
            replicas: readable(&replicas),
            revision,
        })
    }
}

fn readable<T: DeserializeOwned>(entries: &[Entry]) -> Vec<T> {
    let read = |entry: &Entry| match decode(&entry.key, &entry.value) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::error!(%error, "a record is left out");
            None
        }
    };
    entries.iter().filter_map(read).collect()
}

/// The coordinator as an actor.
pub struct CoordinatorActor {
    means: Means,
    keeper: Keeper,
    workers: BTreeMap<WorkerId, Worker>,
    endpoints: BTreeMap<String, Endpoint>,
    slots: HashMap<ReplicaId, Slot>,
    /// How fast devices are, of workers that are away too.
    rates: BTreeMap<WorkerId, (DeviceKind, DeviceRates)>,
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
    allowance: Arc<Allowance>,
    door: Addr<EndpointActor>,
    over: CancellationToken,
    /// What the door was last told, in short.
    told: Option<Told>,
}

impl CoordinatorActor {
    /// A coordinator that goes on from what was stored. `incarnation` is cancelled when it is gone.
    pub fn new(
        means: Means,
        restored: Restored,
        incarnation: CancellationToken,
        death: DeathNotice,
        ctx: &mut Context<Self>,
    ) -> Self {
        let now = Instant::now();
        let mut coordinator = CoordinatorActor {
            keeper: Keeper::start(means.store.clone()),
            means,
            workers: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            slots: HashMap::new(),
            rates: BTreeMap::new(),
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
                retire(slot, Retire::After(DRAIN));
            }
        }
        let stays = |slot: &Slot| {
            matches!(slot.stage, Stage::Running(_) | Stage::Placing(_))
                || wanted.iter().any(|(wanted, ..)| *wanted == slot.replica)
        };
        let gone: Vec<ReplicaId> = self
            .slots
            .values()
            .filter(|slot| !stays(slot))
            .map(|slot| slot.replica)
            .collect();
        for replica in gone {
            self.drop_slot(replica);
        }
        for (replica, endpoint, entity) in &wanted {
            self.slots.entry(*replica).or_insert_with(|| {
                self.means.logs.place(*replica, endpoint, &entity.spec.name);
                Slot::new(*replica, endpoint, now)
            });
            self.advance(*replica, entity, now, ctx);
            if let Some(event) = self.slots.get(replica).and_then(|slot| slot.event(entity)) {
                self.keeper.hand_in(endpoint, event);
            }
        }
        self.configure_doors();
    }

    /// A child is gone without having meant to: it panicked.
    fn died(&mut self, message: Died, ctx: &mut Context<Self>) {
        match message.who {
            Who::Endpoint(name) => {
                let Some(endpoint) = self
                    .endpoints
                    .get(&name)
                    .filter(|endpoint| !endpoint.door.connected())
                else {
                    return;
                };
                tracing::error!(
                    endpoint = name,
                    "an endpoint's actor ended unexpectedly; it is started again"
                );
                let door =
                    self.open_door(&name, endpoint.meters.clone(), endpoint.over.clone(), ctx);
                if let Some(endpoint) = self.endpoints.get_mut(&name) {
                    (endpoint.door, endpoint.told) = (door, None);
                }
                self.publish(&name);
            }
            Who::Replica(replica, generation) if !message.orderly => {
                let served = self.is_served(replica);
                let Some(running) = self
                    .slots
                    .get_mut(&replica)
                    .and_then(|slot| slot.running(generation))
                else {
                    return;
                };
                tracing::error!(%replica, "a replica's actor ended unexpectedly; its shards are loaded again");
                let members = running.assignment.members.clone();
                for link in members
                    .iter()
                    .filter_map(|worker| self.workers.get(worker))
                    .map(|worker| &worker.link)
                {
                    link.replica_lost(replica, "its actor ended unexpectedly");
                    link.command(Command::Unload {
                        term: self.means.term,
                        replica,
                        generation,
                        keep: true,
                    });
                }
                self.replica_over(
                    replica,
                    false,
                    served,
                    "its actor ended unexpectedly".to_owned(),
                );
            }
            _ => {}
        }
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
        tokio::spawn(watch(
            self.means.store.clone(),
            self.revision,
            ctx.address(),
            self.incarnation.clone(),
        ));
        ctx.run_interval(TICK, |actor, ctx| actor.reconcile(ctx));
        let over = self.incarnation.clone();
        ctx.spawn(
            async move { over.cancelled().await }
                .into_actor(self)
                .map(|(), _, ctx| ctx.stop()),
        );
        self.reconcile(ctx);
    }
}

/// Passes the store's changes on, from `revision`, until the coordinator is gone.
async fn watch(
    store: SharedStore,
    mut revision: u64,
    coordinator: Addr<CoordinatorActor>,
    over: CancellationToken,
) {
    loop {
        let changes = tokio::select! {
            changes = store.changes(revision) => changes,
            () = over.cancelled() => return,
        };
        let told = match changes {
            Ok(changes) => {
                revision = changes.last().map_or(revision, |change| change.revision);
                Ok(coordinator.send(Changed(changes)).await)
            }
            Err(StoreError::Compacted(_)) => match store.list(ENDPOINTS.into()).await {
                Ok((entries, at)) => {
                    revision = at;
                    Ok(coordinator.send(Relisted(entries, at)).await)
                }
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let told = match told {
            Ok(told) => told,
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
handle!(Left, |actor, message, ctx| actor
    .left(&message.link, &message.reason));
handle!(ReplicaStatus, |actor, message, ctx| actor
    .replica_status(message));
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
        self.endpoints
            .get(&name)
            .map(|endpoint| self.view(endpoint))
    }
}

impl Handler<ListViews> for CoordinatorActor {
    type Result = Vec<EndpointView>;
    fn handle(&mut self, _: ListViews, _: &mut Self::Context) -> Self::Result {
        self.endpoints
            .values()
            .map(|endpoint| self.view(endpoint))
            .collect()
    }
}

impl Handler<CheckFit> for CoordinatorActor {
    type Result = Result<(), ApiError>;
    fn handle(&mut self, message: CheckFit, _: &mut Self::Context) -> Self::Result {
        self.check_fit(&message)
    }
}

impl Handler<GetOffer> for CoordinatorActor {
    type Result = Result<Option<Offer>, ApiError>;
    fn handle(&mut self, GetOffer(facts): GetOffer, _: &mut Self::Context) -> Self::Result {
        self.offer(&facts)
    }
}

impl Handler<GetHealth> for CoordinatorActor {
    type Result = MessageResult<GetHealth>;
    fn handle(&mut self, _: GetHealth, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.health())
    }
}

#[cfg(test)]
mod tests;
