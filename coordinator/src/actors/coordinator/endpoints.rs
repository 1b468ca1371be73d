//! Endpoints as the store has them, and what their doors are told.

use std::sync::Arc;
use std::time::Instant;

use actix::{Actor, Addr, AsyncContext, Context};
use common::ids::{Generation, ReplicaId};
use tokio_util::sync::CancellationToken;

use super::replicas::retire;
use super::{CoordinatorActor, Endpoint};
use crate::actors::allowance::Allowance;
use crate::actors::directory::Published;
use crate::actors::endpoint::{Door, EndpointActor};
use crate::actors::messages::{Configure, Gate, Retire, Serving, Target};
use crate::actors::meters::Meters;
use crate::actors::record::{ENDPOINTS, EndpointRecord, decode};
use crate::actors::slot::{Slot, Stage};
use crate::store::Entry;

/// What a door was last told, in short.
#[derive(PartialEq, Eq)]
pub(super) struct Told {
    gate: Gate,
    version: u64,
    replicas: Vec<(ReplicaId, Generation)>,
    waits: Vec<Option<String>>,
    falls_back: bool,
}

impl CoordinatorActor {
    pub(super) fn changed(&mut self, key: &str, entry: Option<Entry>, ctx: &mut Context<Self>) {
        let Some(name) = key.strip_prefix(ENDPOINTS) else {
            return;
        };
        match entry {
            Some(entry) => match decode::<EndpointRecord>(key, &entry.value) {
                Ok(record) => self.put_endpoint(record, ctx),
                Err(error) => tracing::error!(%error, "an endpoint's record is left out"),
            },
            None => self.remove_endpoint(name),
        }
    }

    pub(super) fn put_endpoint(&mut self, record: EndpointRecord, ctx: &mut Context<Self>) {
        // The same name, made anew: nothing of the old one stays.
        if self
            .endpoints
            .get(&record.name)
            .is_some_and(|endpoint| endpoint.record.id != record.id)
        {
            self.remove_endpoint(&record.name);
        }
        if let Some(endpoint) = self.endpoints.get_mut(&record.name) {
            endpoint.record = record;
            let name = endpoint.record.name.clone();
            return self.publish(&name);
        }
        let meters = Arc::new(Meters::new(&record.name));
        let over = self.incarnation.child_token();
        let door = self.open_door(&record.name, meters.clone(), over.clone(), ctx);
        let name = record.name.clone();
        self.endpoints.insert(
            name.clone(),
            Endpoint {
                record,
                meters,
                allowance: Allowance::new(Instant::now()),
                door,
                over,
                told: None,
            },
        );
        self.publish(&name);
    }

    /// Tells callers on other threads where an endpoint's door is and what its settings are.
    pub(super) fn publish(&self, name: &str) {
        let published = self.endpoints.get(name).map(|endpoint| Published {
            door: endpoint.door.clone(),
            access: Arc::new(endpoint.record.access()),
            allowance: endpoint.allowance.clone(),
            meters: endpoint.meters.clone(),
        });
        self.means.directory.set_endpoint(name, published);
        let endpoint = self.endpoints.get(name);
        let known = endpoint.map(|endpoint| endpoint.record.known());
        self.means.tables.know(name, known);
    }

    pub(super) fn open_door(
        &self,
        name: &str,
        meters: Arc<Meters>,
        over: CancellationToken,
        ctx: &mut Context<Self>,
    ) -> Addr<EndpointActor> {
        let door = Door::new(name, self.means.cluster.limits.clone(), meters);
        EndpointActor::new(door, ctx.address().recipient(), over).start()
    }

    pub(super) fn remove_endpoint(&mut self, name: &str) {
        let Some(endpoint) = self.endpoints.remove(name) else {
            return;
        };
        self.means.directory.set_endpoint(name, None);
        self.means.logs.forget(name);
        self.means.tables.know(name, None);
        endpoint.over.cancel();
        // Deleted: what runs on its replicas ends now.
        for slot in self.slots.values_mut().filter(|slot| slot.endpoint == name) {
            retire(slot, Retire::Deleted(name.to_owned()));
        }
    }

    /// Tells each door what it serves, when that has changed.
    pub(super) fn configure_doors(&mut self) {
        for endpoint in self.endpoints.values_mut() {
            let life = &endpoint.record.life;
            let gate = match (&life.active, life.failed_for_good()) {
                (Some(_), _) => Gate::Open,
                (None, Some(why)) => Gate::Failed(why.to_owned()),
                (None, None) => {
                    let first = life
                        .wanted()
                        .into_iter()
                        .find_map(|(replica, _)| self.slots.get(&replica));
                    Gate::NotReady(
                        first.map_or_else(|| "it is being deployed".to_owned(), Slot::words),
                    )
                }
            };
            let mut entities = Vec::new();
            let mut replicas = Vec::new();
            for entity in life.active.iter().flat_map(|active| &active.entities) {
                let mut targets = Vec::new();
                let mut context_max = u32::MAX;
                for replica in &entity.replicas {
                    let Some(Slot {
                        stage: Stage::Running(running),
                        ..
                    }) = self.slots.get(replica)
                    else {
                        continue;
                    };
                    replicas.push((*replica, running.assignment.generation));
                    context_max = context_max.min(running.assignment.options.context_max);
                    targets.push(Target {
                        replica: *replica,
                        addr: running.addr.clone(),
                        credits: running.credits.clone(),
                    });
                }
                let routes = life.active.iter().flat_map(|active| &active.routes);
                let percentage = routes
                    .filter(|route| route.entity == entity.spec.name)
                    .map(|route| route.percentage)
                    .sum();
                let (name, concurrency) = (entity.spec.name.clone(), entity.spec.admitted());
                let slots = entity.replicas.iter().map(|id| self.slots.get(id));
                let waits = slots
                    .flatten()
                    .find(|slot| !slot.is_ready())
                    .map(Slot::words);
                entities.push(Serving {
                    name,
                    percentage,
                    concurrency,
                    tokens_per_s_max: entity.spec.provisioned.map(|p| p.max_tokens_per_s),
                    context_max,
                    replicas: targets,
                    waits,
                });
            }
            let version = life.active.as_ref().map_or(0, |active| active.version);
            let told = Told {
                gate: gate.clone(),
                version,
                replicas,
                waits: entities.iter().map(|entity| entity.waits.clone()).collect(),
                falls_back: endpoint.record.settings.falls_back(),
            };
            if endpoint.told.as_ref() != Some(&told) {
                let falls_back = told.falls_back;
                endpoint.told = Some(told);
                // Control, and it must arrive before clients see the state it belongs to.
                endpoint.door.do_send(Configure {
                    gate,
                    entities,
                    falls_back,
                });
            }
        }
    }
}
