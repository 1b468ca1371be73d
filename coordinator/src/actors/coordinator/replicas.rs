//! Replicas from wish to end: headers read, devices found, stored, started, watched, let go.

use std::sync::Arc;
use std::time::Instant;

use actix::fut::ActorFutureExt;
use actix::{Actor, AsyncContext, Context, WrapFuture};
use common::ids::{Generation, ReplicaId, WorkerId};
use common::wire::message::{Command, LogPhase};

use super::CoordinatorActor;
use crate::actors::messages::{Assigned, FactsRead, ReplicaStatus, Retire, Status};
use crate::actors::permit::Credits;
use crate::actors::record::{Assignment, StoredOptions, StoredSource, encode, replica_key};
use crate::actors::replica::{Member, Replica, ReplicaActor};
use crate::actors::slot::{ROOM_PAUSE, Running, Slot, Stage};
use crate::policy::fit::{self, NoFit, Wish};
use crate::policy::lifecycle::Entity;
use crate::policy::{bytes_text, workload};
use crate::registry::{ModelFacts, RegistryError};
use crate::store::Expect;

impl CoordinatorActor {
    pub(super) fn restore(
        &mut self,
        assignment: Assignment,
        now: Instant,
        ctx: &mut Context<Self>,
    ) {
        let Some(endpoint) = self.endpoints.get(&assignment.endpoint) else {
            return self.forget(assignment.replica);
        };
        let wanted = endpoint.record.life.wanted();
        let Some((_, entity)) = wanted
            .into_iter()
            .find(|(replica, _)| *replica == assignment.replica)
        else {
            return self.forget(assignment.replica);
        };
        let logs = &self.means.logs;
        logs.place(assignment.replica, &assignment.endpoint, &entity.spec.name);
        let members = names(&assignment.members);
        let text = format!("the coordinator was started again; asking {members} for the shards");
        logs.note(assignment.replica, LogPhase::Run, &text);
        let admitted = entity.spec.admitted();
        let credits = Credits::new(assignment.options.credits(admitted));
        let mut slot = Slot::new(assignment.replica, &assignment.endpoint, now);
        slot.shortage = assignment.options.shortage(admitted);
        slot.generation = assignment.generation;
        slot.members.clone_from(&assignment.members);
        let workload_type = self
            .means
            .cluster
            .workload_types
            .iter()
            .find(|known| known.name == entity.spec.workload_type);
        slot.stand_in = workload_type.and_then(workload::stand_in);
        let replica = Replica::restored(
            assignment.clone(),
            credits.clone(),
            endpoint.meters.clone(),
            now,
        );
        slot.stage = Stage::Running(self.run_replica(replica, assignment, credits, ctx));
        self.slots.insert(slot.replica, slot);
    }

    pub(super) fn run_replica(
        &self,
        replica: Replica,
        assignment: Assignment,
        credits: Arc<Credits>,
        ctx: &mut Context<Self>,
    ) -> Running {
        let me = ctx.address();
        let addr = ReplicaActor::new(
            replica,
            me.clone().recipient(),
            me.recipient(),
            self.incarnation.clone(),
        )
        .start();
        Running {
            assignment,
            addr,
            credits,
            status: Status::Starting("asking the workers".into()),
            retiring: false,
            has_served: false,
        }
    }

    /// Deletes where a replica was; a failure is logged: a stale record is forgotten at the next start.
    pub(super) fn forget(&self, replica: ReplicaId) {
        let store = self.means.store.clone();
        tokio::spawn(async move {
            if let Err(error) = store.delete(replica_key(replica), Expect::Any).await {
                tracing::warn!(%replica, %error, "where a replica was cannot be deleted");
            }
        });
    }

    /// Forgets a replica that is not wanted any more and has no actor: weights that were kept for it go.
    pub(super) fn drop_slot(&mut self, replica: ReplicaId) {
        if let Some(slot) = self.slots.remove(&replica) {
            // Not its members alone: others may have kept something of a formation. Before the first nobody has.
            let formed = slot.generation > Generation(0);
            for worker in self.workers.values().filter(|_| formed) {
                worker.link.command(Command::Unload {
                    term: self.means.term,
                    replica,
                    generation: slot.generation,
                    keep: false,
                });
            }
        }
        self.forget(replica);
    }

    pub(super) fn replica_status(&mut self, message: ReplicaStatus) {
        let served = self.is_served(message.replica);
        let Some(slot) = self.slots.get_mut(&message.replica) else {
            return;
        };
        let Some(running) = slot.running(message.generation) else {
            return;
        };
        let members = names(&running.assignment.members);
        let logs = &self.means.logs;
        match &message.status {
            Status::Starting(words) => slot.message = format!("{words} ({members})"),
            Status::Waiting(words) => {
                slot.message = format!("{words} ({members})");
                logs.note(slot.replica, slot.phase(), words);
            }
            Status::Ready { task, numerics_id } => {
                running.has_served = true;
                slot.members = running.assignment.members.clone();
                slot.unreliable = None;
                slot.attempts = 0;
                slot.task.clone_from(task);
                slot.message = format!("Served by {members}");
                let text = format!("serves on {members}, numerics id {numerics_id:016x}");
                logs.note(slot.replica, LogPhase::Run, &text);
                tracing::info!(endpoint = slot.endpoint, replica = %slot.replica, generation = %slot.generation, numerics_id, "replica is ready");
            }
            Status::Stalled => {
                let text = "makes no progress: it gets no new requests until it goes on";
                logs.note(slot.replica, LogPhase::Run, text);
                tracing::warn!(endpoint = slot.endpoint, replica = %slot.replica, "replica makes no progress")
            }
            Status::Over {
                fatal,
                cause,
                message: why,
            } => {
                if cause.is_some() {
                    slot.unreliable.clone_from(cause);
                }
                tracing::warn!(endpoint = slot.endpoint, replica = %slot.replica, generation = %slot.generation, why, "replica is over");
                let (fatal, why) = (*fatal, why.clone());
                return self.replica_over(message.replica, fatal, served, why);
            }
        }
        if let Some(running) = slot.running(message.generation) {
            running.status = message.status;
        }
    }

    pub(super) fn replica_over(
        &mut self,
        replica: ReplicaId,
        fatal: bool,
        served: bool,
        why: String,
    ) {
        let Some(slot) = self.slots.get_mut(&replica) else {
            return;
        };
        if slot.is_retiring() {
            let text = "let go: not wanted any more";
            self.means.logs.note(replica, LogPhase::Run, text);
            self.slots.remove(&replica);
            self.forget(replica);
        } else {
            self.formation_over(replica, fatal, served, why);
        }
        self.room_was_made();
    }

    /// A formation of a replica is over, or did not come about.
    fn formation_over(&mut self, replica: ReplicaId, fatal: bool, served: bool, why: String) {
        let Some(slot) = self.slots.get_mut(&replica) else {
            return;
        };
        let logs = &self.means.logs;
        logs.note(replica, slot.phase(), &format!("over: {why}"));
        slot.over(fatal, served, why, Instant::now());
        logs.note(replica, LogPhase::Build, slot.next_words());
    }

    /// The replica belongs to a configuration in force.
    pub(super) fn is_served(&self, replica: ReplicaId) -> bool {
        let active = self
            .endpoints
            .values()
            .filter_map(|endpoint| endpoint.record.life.active.as_ref());
        active
            .flat_map(|active| &active.entities)
            .any(|entity| entity.replicas.contains(&replica))
    }

    /// Takes a replica's next step, if one is due.
    pub(super) fn advance(
        &mut self,
        replica: ReplicaId,
        entity: &Entity,
        now: Instant,
        ctx: &mut Context<Self>,
    ) {
        let Some(slot) = self.slots.get_mut(&replica) else {
            return;
        };
        match &slot.stage {
            Stage::Idle(at) if *at <= now => {
                slot.stage = Stage::Reading;
                let model = &entity.spec.model;
                let text = format!(
                    "reads the headers of model {} version {}",
                    model.name, model.version
                );
                self.means.logs.note(replica, LogPhase::Build, &text);
                let (registry, model) = (self.means.registry.clone(), entity.spec.model.clone());
                let asked = entity.spec.quantization;
                // A task of its own: headers and answers of registries are not parsed on the actors' thread.
                let reading = tokio::spawn(async move { registry.facts(&model).await });
                let read = async move {
                    let failed =
                        |e| RegistryError::Broken(format!("reading the model failed: {e}"));
                    let facts = reading.await.map_err(failed).flatten()?;
                    Ok(facts.kept_as(asked))
                };
                ctx.spawn(
                    read.into_actor(self)
                        .map(move |facts, _, ctx| ctx.notify(FactsRead { replica, facts })),
                );
            }
            Stage::Waiting(facts, at) if *at <= now => {
                let facts = facts.clone();
                self.place(replica, facts, entity, now, ctx);
            }
            _ => {}
        }
    }

    pub(super) fn facts_read(&mut self, message: FactsRead) {
        let served = self.is_served(message.replica);
        let Some(slot) = self.slots.get_mut(&message.replica) else {
            return;
        };
        match message.facts {
            Ok(facts) => {
                slot.task.clone_from(&facts.task);
                self.means
                    .logs
                    .note(slot.replica, LogPhase::Build, &facts_words(&facts));
                slot.stage = Stage::Waiting(facts, Instant::now());
            }
            Err(error) => {
                let fatal = !matches!(error, RegistryError::Unavailable(_));
                self.formation_over(message.replica, fatal, served, error.to_string());
            }
        }
    }

    /// Looks for devices; what is found is stored before anybody is told.
    pub(super) fn place(
        &mut self,
        replica: ReplicaId,
        facts: Arc<ModelFacts>,
        entity: &Entity,
        now: Instant,
        ctx: &mut Context<Self>,
    ) {
        let types = &self.means.cluster.workload_types;
        let size = entity.spec.workload_size;
        let leaving = self.slots.values().any(Slot::is_retiring);
        let found = workload::resolve(types, &entity.spec.workload_type, size)
            .map_err(|e| NoFit::Never(e.message))
            .and_then(|workload| {
                let wish = Wish {
                    facts: &facts,
                    workload,
                    concurrency: entity.spec.admitted(),
                };
                let mut places = self.places(false, |_| false);
                if let Some(slot) = self.slots.get(&replica) {
                    for place in &mut places {
                        place.rank_before = slot.rank_before(&place.worker);
                    }
                }
                let fit = fit::fit(wish, &places, types)?;
                let members: Vec<WorkerId> = fit
                    .devices
                    .iter()
                    .map(|&device| WorkerId(places[device].worker.clone()))
                    .collect();
                Ok((members, fit.plan, workload::stand_in(workload)))
            });
        let served = self.is_served(replica);
        let Some(slot) = self.slots.get_mut(&replica) else {
            return;
        };
        let (members, plan, stand_in) = match found {
            Ok(found) => found,
            // What leaves makes room in a moment.
            Err(NoFit::Never(why)) if !served && !leaving => {
                return self.formation_over(replica, true, served, why);
            }
            Err(NoFit::Waiting(why) | NoFit::Never(why)) => {
                // It looks again every other second; that is said once.
                if slot.message != why {
                    self.means.logs.note(replica, LogPhase::Build, &why);
                }
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
            source: StoredSource::of(&facts.source),
            options: StoredOptions::of(&plan, &facts),
        };
        let text = format!(
            "placed on {} as generation {}: {} on each: {}; {} KV blocks, room for {} sequences at full length",
            names(&assignment.members),
            assignment.generation,
            bytes_text(plan.bytes()),
            plan.need.text(),
            plan.kv_blocks,
            plan.concurrency()
        );
        self.means.logs.note(replica, LogPhase::Build, &text);
        slot.stage = Stage::Placing(assignment.clone());
        let (store, generation) = (self.means.store.clone(), assignment.generation);
        let write = async move {
            store
                .put(replica_key(replica), encode(&assignment)?, Expect::Any)
                .await
                .map(drop)
        };
        ctx.spawn(write.into_actor(self).map(move |stored, _, ctx| {
            ctx.notify(Assigned {
                replica,
                generation,
                stored,
            })
        }));
    }

    /// Where the replica goes is stored: its workers are told.
    pub(super) fn assigned(&mut self, message: Assigned, ctx: &mut Context<Self>) {
        let served = self.is_served(message.replica);
        let Some(slot) = self.slots.get_mut(&message.replica) else {
            return;
        };
        let Stage::Placing(assignment) = &slot.stage else {
            return;
        };
        if assignment.generation != message.generation {
            return;
        }
        let now = Instant::now();
        if let Err(error) = message.stored {
            return self.formation_over(message.replica, false, served, error.to_string());
        }
        let assignment = assignment.clone();
        let wish = self.endpoints.get(&slot.endpoint).and_then(|endpoint| {
            let entity = endpoint
                .record
                .life
                .wanted()
                .into_iter()
                .find(|(replica, _)| *replica == message.replica)?
                .1;
            Some((entity.spec.admitted(), endpoint.meters.clone()))
        });
        let Some((admitted, meters)) = wish else {
            // Deleted or replaced meanwhile.
            return self.drop_slot(message.replica);
        };
        let member = |worker: &WorkerId| {
            let worker = self.workers.get(worker)?;
            Some(Member {
                link: worker.link.clone(),
                group_address: worker.group_address.clone(),
            })
        };
        let Some(members) = assignment
            .members
            .iter()
            .map(member)
            .collect::<Option<Vec<Member>>>()
        else {
            let why = "a worker left before it could load".to_owned();
            return self.formation_over(message.replica, false, served, why);
        };
        slot.shortage = assignment.options.shortage(admitted);
        let credits = Credits::new(assignment.options.credits(admitted));
        let replica = Replica::load(assignment.clone(), &members, credits.clone(), meters, now);
        let running = self.run_replica(replica, assignment, credits, ctx);
        if let Some(slot) = self.slots.get_mut(&message.replica) {
            slot.stage = Stage::Running(running);
        }
    }
}

/// Workers for people.
fn names(members: &[WorkerId]) -> String {
    let names: Vec<&str> = members.iter().map(|worker| worker.0.as_str()).collect();
    names.join(", ")
}

/// What a model's headers say, for people.
fn facts_words(facts: &ModelFacts) -> String {
    let shape = &facts.shape;
    format!(
        "headers read: {}, {} layers of width {}, {} tensors, context {} tokens, task {}",
        shape.architecture,
        shape.layers,
        shape.hidden,
        facts.tensors.len(),
        facts.context_max,
        facts.task.as_deref().unwrap_or("not said")
    )
}

/// Tells a replica that is not wanted any more to go, once.
pub(super) fn retire(slot: &mut Slot, how: Retire) {
    if let Stage::Running(running) = &mut slot.stage {
        if !running.retiring || matches!(how, Retire::Deleted(_)) {
            running.addr.do_send(how);
        }
        running.retiring = true;
    }
}
