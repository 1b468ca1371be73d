//! An endpoint's life, event by event: which configuration serves, which is being deployed, how each entity stands.
//!
//! A pure state machine that is stored as it is. Events may come late, twice or for replicas of the past: those change
//! nothing. `ready` and the update state flip in one step, because clients that wait for one of them act on the other.

use common::ids::ReplicaId;
use serde::{Deserialize, Serialize};

use crate::api::{ConfigSpec, DeploymentState, EntitySpec, InferenceTable, Route, UpdateState};

/// Shown while nothing more is known.
const CREATING: &str = "Creating resources for served entity.";

/// An endpoint's configurations and how they stand.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lifecycle {
    /// The newest configuration's number.
    pub version: u64,
    /// How the last change stands.
    pub update: UpdateState,
    /// What serves.
    pub active: Option<Deployment>,
    /// What is being deployed, or failed to be.
    pub pending: Option<Deployment>,
}

/// A configuration and its entities.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// Counts from 1.
    pub version: u64,
    /// When its deployment began, in milliseconds since 1970.
    pub started_ms: u64,
    /// The traffic.
    pub routes: Vec<Route>,
    /// What it serves.
    pub entities: Vec<Entity>,
    /// The older switch of the table of requests and answers.
    #[serde(default)]
    pub auto_capture: Option<InferenceTable>,
}

/// A served entity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entity {
    /// As asked for.
    pub spec: EntitySpec,
    /// Who asked.
    pub creator: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
    /// Its copies. An entity that an update leaves as it is keeps its copies.
    pub replicas: Vec<ReplicaId>,
    /// How it stands.
    pub state: DeploymentState,
    /// The same in words.
    pub message: String,
}

/// What happens to an endpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Another configuration is asked for.
    Update {
        /// What it shall serve.
        config: ConfigSpec,
        /// Who asks.
        user: String,
        /// When, in milliseconds since 1970.
        now_ms: u64,
    },
    /// A replica can take requests.
    Up {
        /// Which.
        replica: ReplicaId,
        /// What serves, for people.
        message: String,
    },
    /// A replica is gone and will be brought back.
    Lost {
        /// Which.
        replica: ReplicaId,
        /// Why.
        message: String,
    },
    /// A replica cannot be brought up.
    Failed {
        /// Which.
        replica: ReplicaId,
        /// Why.
        message: String,
    },
    /// The coordinator has started anew: nothing is known to be up.
    Restarted,
}

/// The update was refused: another one is going on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an update is in progress; wait until it is done")]
pub struct InProgress;

impl Lifecycle {
    /// A new endpoint: nothing serves, version 1 is being deployed.
    pub fn create(config: ConfigSpec, user: &str, now_ms: u64) -> Self {
        let pending = Deployment::new(1, config, user, now_ms, None);
        Lifecycle {
            version: 1,
            update: UpdateState::InProgress,
            active: None,
            pending: Some(pending),
        }
    }

    /// All entities of the active configuration are up.
    pub fn ready(&self) -> bool {
        let up = |entity: &Entity| entity.state == DeploymentState::Ready;
        self.active
            .as_ref()
            .is_some_and(|active| active.entities.iter().all(up))
    }

    /// Why the first deployment failed, if it did: the endpoint will not be ready without a change.
    pub fn failed_for_good(&self) -> Option<&str> {
        if self.active.is_some() || self.update != UpdateState::Failed {
            return None;
        }
        let failed = |entity: &&Entity| entity.state == DeploymentState::Failed;
        Some(
            self.pending
                .as_ref()?
                .entities
                .iter()
                .find(failed)
                .map_or("", |entity| entity.message.as_str()),
        )
    }

    /// What was asked for of the entities of all its configurations, the active one's first.
    pub fn specs(&self) -> impl Iterator<Item = &EntitySpec> {
        let deployments = self.active.iter().chain(&self.pending);
        deployments
            .flat_map(|deployment| &deployment.entities)
            .map(|entity| &entity.spec)
    }

    /// The replicas that shall exist, each with its entity.
    pub fn wanted(&self) -> Vec<(ReplicaId, &Entity)> {
        let pending = self
            .pending
            .as_ref()
            .filter(|_| self.update == UpdateState::InProgress);
        let mut wanted: Vec<(ReplicaId, &Entity)> = Vec::new();
        for entity in self
            .active
            .iter()
            .chain(pending)
            .flat_map(|deployment| &deployment.entities)
        {
            for &replica in &entity.replicas {
                if !wanted.iter().any(|(known, _)| *known == replica) {
                    wanted.push((replica, entity));
                }
            }
        }
        wanted
    }

    /// Takes an event in. Says whether anything changed.
    ///
    /// # Errors
    /// [`InProgress`] for an update during an update.
    pub fn apply(&mut self, event: Event) -> Result<bool, InProgress> {
        let before = self.clone();
        match event {
            Event::Update {
                config,
                user,
                now_ms,
            } => self.update(config, &user, now_ms)?,
            Event::Up { replica, message } => self.up(replica, &message),
            Event::Lost { replica, message } => self.lost(replica, &message),
            Event::Failed { replica, message } => self.failed(replica, &message),
            Event::Restarted => self.restarted(),
        }
        Ok(*self != before)
    }

    fn update(&mut self, config: ConfigSpec, user: &str, now_ms: u64) -> Result<(), InProgress> {
        if self.update == UpdateState::InProgress {
            return Err(InProgress);
        }
        self.version += 1;
        self.pending = Some(Deployment::new(
            self.version,
            config,
            user,
            now_ms,
            self.active.as_ref(),
        ));
        self.update = UpdateState::InProgress;
        self.promote();
        Ok(())
    }

    fn up(&mut self, replica: ReplicaId, message: &str) {
        for entity in self.living(replica) {
            entity.state = DeploymentState::Ready;
            message.clone_into(&mut entity.message);
        }
        self.promote();
    }

    fn lost(&mut self, replica: ReplicaId, message: &str) {
        let recovering = |entity: &mut Entity, state| {
            entity.state = state;
            message.clone_into(&mut entity.message);
        };
        if let Some(entity) = self
            .active
            .as_mut()
            .and_then(|active| active.holding(replica))
        {
            recovering(entity, DeploymentState::Recovering);
        }
        if self.update == UpdateState::InProgress
            && let Some(entity) = self
                .pending
                .as_mut()
                .and_then(|pending| pending.holding(replica))
        {
            recovering(entity, DeploymentState::Creating);
        }
    }

    /// A replica of the active configuration that fails is brought back, again and again; one of a new configuration
    /// alone fails the update.
    fn failed(&mut self, replica: ReplicaId, message: &str) {
        if self
            .active
            .as_mut()
            .is_some_and(|active| active.holding(replica).is_some())
        {
            return self.lost(replica, message);
        }
        if self.update != UpdateState::InProgress {
            return;
        }
        let Some(pending) = self.pending.as_mut().filter(|pending| {
            pending
                .entities
                .iter()
                .any(|e| e.replicas.contains(&replica))
        }) else {
            return;
        };
        for entity in &mut pending.entities {
            if entity.replicas.contains(&replica) {
                entity.state = DeploymentState::Failed;
                message.clone_into(&mut entity.message);
            } else {
                entity.state = DeploymentState::Aborted;
                entity.message =
                    "Given up because another served entity of this configuration failed."
                        .to_owned();
            }
        }
        self.update = UpdateState::Failed;
    }

    fn restarted(&mut self) {
        for entity in self
            .active
            .iter_mut()
            .flat_map(|active| &mut active.entities)
        {
            entity.state = DeploymentState::Recovering;
            entity.message = "The coordinator was started; waiting for the workers.".to_owned();
        }
        if self.update == UpdateState::InProgress {
            for entity in self
                .pending
                .iter_mut()
                .flat_map(|pending| &mut pending.entities)
            {
                entity.state = DeploymentState::Creating;
                entity.message = CREATING.to_owned();
            }
        }
    }

    /// The entities that a live replica belongs to: of the active configuration, and of one being deployed.
    fn living(&mut self, replica: ReplicaId) -> impl Iterator<Item = &mut Entity> {
        let deploying = self.update == UpdateState::InProgress;
        let pending = self.pending.as_mut().filter(|_| deploying);
        let entities = self
            .active
            .iter_mut()
            .chain(pending)
            .flat_map(|deployment| &mut deployment.entities);
        entities.filter(move |entity| entity.replicas.contains(&replica))
    }

    /// Everything of the new configuration is up: it serves from here on.
    fn promote(&mut self) {
        let up = |entity: &Entity| entity.state == DeploymentState::Ready;
        if self.update == UpdateState::InProgress
            && let Some(done) = self
                .pending
                .take_if(|pending| pending.entities.iter().all(up))
        {
            self.active = Some(done);
            self.update = UpdateState::NotUpdating;
        }
    }
}

impl Deployment {
    fn new(
        version: u64,
        config: ConfigSpec,
        user: &str,
        now_ms: u64,
        active: Option<&Deployment>,
    ) -> Self {
        let entity = |spec: EntitySpec| {
            let same = |old: &&Entity| {
                (
                    &old.spec.name,
                    &old.spec.model,
                    &old.spec.workload_type,
                    old.spec.admitted(),
                ) == (
                    &spec.name,
                    &spec.model,
                    &spec.workload_type,
                    spec.admitted(),
                )
            };
            match active.and_then(|active| active.entities.iter().find(same)) {
                Some(old) => Entity {
                    spec,
                    ..old.clone()
                },
                None => Entity {
                    spec,
                    creator: user.to_owned(),
                    created_ms: now_ms,
                    replicas: vec![ReplicaId::random()],
                    state: DeploymentState::Creating,
                    message: CREATING.to_owned(),
                },
            }
        };
        let entities = config.entities.into_iter().map(entity).collect();
        Deployment {
            version,
            started_ms: now_ms,
            routes: config.routes,
            entities,
            auto_capture: config.auto_capture,
        }
    }

    fn holding(&mut self, replica: ReplicaId) -> Option<&mut Entity> {
        self.entities
            .iter_mut()
            .find(|entity| entity.replicas.contains(&replica))
    }
}

#[cfg(test)]
mod tests;
