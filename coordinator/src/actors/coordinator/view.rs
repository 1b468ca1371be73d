//! An endpoint as clients see it: the stored record, with live words over it.

use super::{CoordinatorActor, Endpoint};
use crate::actors::slot::Slot;
use crate::api::{ConfigView, DeploymentState, EndpointView, EntityView};
use crate::policy::lifecycle::{Deployment, Entity};

impl CoordinatorActor {
    pub(super) fn view(&self, endpoint: &Endpoint) -> EndpointView {
        let record = &endpoint.record;
        let life = &record.life;
        let task = life.active.iter().chain(&life.pending).flat_map(|deployment| &deployment.entities);
        let task = task.flat_map(|entity| &entity.replicas).find_map(|replica| self.slots.get(replica)?.task.clone());
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
            tags: record.tags.clone(),
            description: record.description.clone(),
        }
    }

    fn config(&self, deployment: &Deployment) -> ConfigView {
        ConfigView {
            version: deployment.version,
            started_ms: deployment.started_ms,
            entities: deployment.entities.iter().map(|entity| self.entity(entity)).collect(),
            routes: deployment.routes.clone(),
        }
    }

    fn entity(&self, entity: &Entity) -> EntityView {
        // Progress is not stored: what is on its way has live words.
        let moving = matches!(entity.state, DeploymentState::Creating | DeploymentState::Recovering);
        let slot = entity.replicas.iter().find_map(|replica| self.slots.get(replica)).filter(|_| moving);
        EntityView {
            spec: entity.spec.clone(),
            creator: entity.creator.clone(),
            created_ms: entity.created_ms,
            state: entity.state,
            message: slot.map_or_else(|| entity.message.clone(), Slot::words),
        }
    }
}
