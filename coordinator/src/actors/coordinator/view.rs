//! What the gateway asks: endpoints as clients see them (the stored record, with live words over it), whether a
//! configuration fits, how the cluster is.

use common::wire::message::DeviceRates;

use super::{CoordinatorActor, Endpoint};
use crate::actors::messages::{CheckFit, Offer, Status};
use crate::actors::slot::{Running, Slot, Stage};
use crate::api::{
    ApiError, ClusterHealth, ConfigView, DeploymentState, EndpointView, EntityView, ErrorKind,
    WorkloadSize,
};
use crate::policy::fit::{self, NoFit, Wish};
use crate::policy::lifecycle::{Deployment, Entity};
use crate::policy::throughput::Forecast;
use crate::policy::workload;
use crate::registry::ModelFacts;

impl CoordinatorActor {
    pub(super) fn view(&self, endpoint: &Endpoint) -> EndpointView {
        let record = &endpoint.record;
        let life = &record.life;
        let task = life
            .active
            .iter()
            .chain(&life.pending)
            .flat_map(|deployment| &deployment.entities);
        let task = task
            .flat_map(|entity| &entity.replicas)
            .find_map(|replica| self.slots.get(replica)?.task.clone());
        EndpointView {
            name: record.name.clone(),
            id: record.id.clone(),
            creator: record.creator.clone(),
            created_ms: record.created_ms,
            updated_ms: record.updated_ms,
            ready: life.ready(),
            update: life.update,
            active: life.active.as_ref().map(|active| self.config(active)),
            pending: life.pending.as_ref().map(|pending| self.config(pending)),
            task,
            settings: record.settings.clone(),
        }
    }

    fn config(&self, deployment: &Deployment) -> ConfigView {
        ConfigView {
            version: deployment.version,
            started_ms: deployment.started_ms,
            entities: deployment
                .entities
                .iter()
                .map(|entity| self.entity(entity))
                .collect(),
            routes: deployment.routes.clone(),
            auto_capture: deployment.auto_capture.clone(),
        }
    }

    fn entity(&self, entity: &Entity) -> EntityView {
        // Progress is not stored: what is on its way has live words.
        let moving = matches!(
            entity.state,
            DeploymentState::Creating | DeploymentState::Recovering
        );
        let slot = entity
            .replicas
            .iter()
            .find_map(|replica| self.slots.get(replica))
            .filter(|_| moving);
        EntityView {
            spec: entity.spec.clone(),
            creator: entity.creator.clone(),
            created_ms: entity.created_ms,
            state: entity.state,
            message: slot.map_or_else(|| entity.message.clone(), Slot::words),
        }
    }

    /// Whether all entities of a configuration can be placed if all workers are there.
    pub(super) fn check_fit(&self, message: &CheckFit) -> Result<(), ApiError> {
        let own = |slot: &Slot| message.instead_of.as_deref() == Some(&slot.endpoint);
        let mut places = self.places(true, |slot| slot.is_retiring() || own(slot));
        let types = &self.means.cluster.workload_types;
        for (entity, facts) in message.config.entities.iter().zip(&message.facts) {
            let workload = workload::resolve(types, &entity.workload_type, entity.workload_size)?;
            let wish = Wish {
                facts,
                workload,
                concurrency: entity.admitted(),
            };
            match fit::fit(wish, &places, types) {
                Ok(fit) => {
                    for device in fit.devices {
                        places[device].free_bytes = places[device]
                            .free_bytes
                            .map(|free| free.saturating_sub(fit.plan.bytes()));
                    }
                }
                Err(NoFit::Waiting(_)) => {}
                Err(NoFit::Never(why)) => {
                    return Err(ApiError::new(ErrorKind::InvalidParameter, why));
                }
            }
        }
        Ok(())
    }

    /// The smallest workload type that a model fits, and what a replica on it gives: by the slowest device of its kind,
    /// which the replica may get.
    pub(super) fn offer(&self, facts: &ModelFacts) -> Result<Option<Offer>, ApiError> {
        let places = self.places(true, |_| true);
        let types = &self.means.cluster.workload_types;
        let concurrency = WorkloadSize::Large.concurrency();
        let Some((workload, fit)) = fit::smallest(facts, concurrency, &places, types) else {
            return Ok(None);
        };
        let slowest = self
            .rates
            .values()
            .filter(|(kind, _)| *kind == workload.device)
            .map(|(_, rates)| *rates)
            .reduce(|a, b| DeviceRates {
                bytes_per_s: a.bytes_per_s.min(b.bytes_per_s),
                flops_per_s: a.flops_per_s.min(b.flops_per_s),
            });
        let Some(rates) = slowest else {
            let message = format!(
                "no worker has told yet how fast the devices of workload type {} are: start workers",
                workload.name
            );
            return Err(ApiError::new(ErrorKind::Unavailable, message).retry_after(2));
        };
        Ok(Some(Offer {
            workload_type: workload.name.clone(),
            forecast: Forecast::of(&fit.plan, rates),
        }))
    }

    pub(super) fn health(&self) -> ClusterHealth {
        let stalled = |slot: &&Slot| {
            matches!(
                &slot.stage,
                Stage::Running(Running {
                    status: Status::Stalled,
                    ..
                })
            )
        };
        ClusterHealth {
            live: true,
            ready: true,
            workers: self.workers.len() as u32,
            workers_expected: self.means.cluster.workers().count() as u32,
            endpoints_ready: self
                .endpoints
                .values()
                .filter(|endpoint| endpoint.record.life.ready())
                .count() as u32,
            endpoints: self.endpoints.len() as u32,
            stalled: self.slots.values().filter(stalled).count() as u32,
        }
    }
}
