//! An endpoint's life, event by event: which configuration serves, which is being deployed, how each entity stands.
//!
//! A pure state machine that is stored as it is. Events may come late, twice or for replicas of the past: those change
//! nothing. `ready` and the update state flip in one step, because clients that wait for one of them act on the other.

use common::ids::ReplicaId;
use serde::{Deserialize, Serialize};

use crate::api::{ConfigSpec, DeploymentState, EntitySpec, Route, UpdateState};

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
                    old.spec.workload_size,
                ) == (
                    &spec.name,
                    &spec.model,
                    &spec.workload_type,
                    spec.workload_size,
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
        }
    }

    fn holding(&mut self, replica: ReplicaId) -> Option<&mut Entity> {
        self.entities
            .iter_mut()
            .find(|entity| entity.replicas.contains(&replica))
    }
}

#[cfg(test)]
mod tests {
    use common::model_ref::ModelRef;
    use proptest::prelude::*;

    use super::*;
    use crate::api::WorkloadSize;

    fn config(names: &[&str]) -> ConfigSpec {
        let entity = |name: &&str| EntitySpec {
            name: (*name).to_owned(),
            model: ModelRef::new("m", "1").unwrap(),
            workload_type: "CPU".into(),
            workload_size: WorkloadSize::Small,
            scale_to_zero: false,
            environment_vars: vec![],
        };
        let route = |name: &&str| Route {
            entity: (*name).to_owned(),
            percentage: 100 / names.len() as u32,
        };
        ConfigSpec {
            entities: names.iter().map(entity).collect(),
            routes: names.iter().map(route).collect(),
        }
    }

    fn replica(deployment: &Option<Deployment>, entity: usize) -> ReplicaId {
        deployment.as_ref().unwrap().entities[entity].replicas[0]
    }

    fn state(deployment: &Option<Deployment>) -> Vec<DeploymentState> {
        deployment
            .as_ref()
            .map(|d| d.entities.iter().map(|e| e.state).collect())
            .unwrap_or_default()
    }

    fn up(life: &mut Lifecycle, replica: ReplicaId) {
        life.apply(Event::Up {
            replica,
            message: "up".into(),
        })
        .unwrap();
    }

    fn update(life: &mut Lifecycle, names: &[&str]) -> Result<bool, InProgress> {
        life.apply(Event::Update {
            config: config(names),
            user: "u".into(),
            now_ms: 2,
        })
    }

    /// ready, update state, version that serves, version in the making.
    fn row(life: &Lifecycle) -> (bool, UpdateState, Option<u64>, Option<u64>) {
        (
            life.ready(),
            life.update,
            life.active.as_ref().map(|d| d.version),
            life.pending.as_ref().map(|d| d.version),
        )
    }

    #[test]
    fn create_and_deploy() {
        let mut life = Lifecycle::create(config(&["a", "b"]), "u", 1);
        assert_eq!(row(&life), (false, UpdateState::InProgress, None, Some(1)));
        let (a, b) = (replica(&life.pending, 0), replica(&life.pending, 1));
        up(&mut life, a);
        assert_eq!(row(&life), (false, UpdateState::InProgress, None, Some(1)));
        up(&mut life, b);
        assert_eq!(row(&life), (true, UpdateState::NotUpdating, Some(1), None));
    }

    fn deployed(names: &[&str]) -> Lifecycle {
        let mut life = Lifecycle::create(config(names), "u", 1);
        for (replica, _) in life.clone().wanted() {
            up(&mut life, replica);
        }
        life
    }

    #[test]
    fn the_old_version_serves_until_the_new_one_is_up() {
        let mut life = deployed(&["a"]);
        update(&mut life, &["b"]).unwrap();
        assert_eq!(
            row(&life),
            (true, UpdateState::InProgress, Some(1), Some(2))
        );
        assert_eq!(life.wanted().len(), 2, "the update needs room for both");
        assert_eq!(update(&mut life, &["c"]), Err(InProgress));
        let new = replica(&life.pending, 0);
        up(&mut life, new);
        assert_eq!(row(&life), (true, UpdateState::NotUpdating, Some(2), None));
        assert_eq!(life.wanted().len(), 1);
    }

    #[test]
    fn an_update_that_fails_leaves_the_old_version_serving() {
        let mut life = deployed(&["a"]);
        update(&mut life, &["b", "c"]).unwrap();
        let new = replica(&life.pending, 0);
        life.apply(Event::Failed {
            replica: new,
            message: "no room".into(),
        })
        .unwrap();
        assert_eq!(row(&life), (true, UpdateState::Failed, Some(1), Some(2)));
        assert_eq!(
            state(&life.pending),
            [DeploymentState::Failed, DeploymentState::Aborted]
        );
        assert_eq!(life.wanted().len(), 1);
        assert_eq!(life.failed_for_good(), None);
        update(&mut life, &["d"]).unwrap();
        assert_eq!(
            row(&life),
            (true, UpdateState::InProgress, Some(1), Some(3))
        );
    }

    #[test]
    fn a_first_deployment_that_fails_says_why_and_can_be_replaced() {
        let mut life = Lifecycle::create(config(&["a"]), "u", 1);
        let first = replica(&life.pending, 0);
        life.apply(Event::Failed {
            replica: first,
            message: "corrupt shard".into(),
        })
        .unwrap();
        assert_eq!(row(&life), (false, UpdateState::Failed, None, Some(1)));
        assert_eq!(life.failed_for_good(), Some("corrupt shard"));
        assert!(life.wanted().is_empty());
        update(&mut life, &["b"]).unwrap();
        assert_eq!(life.failed_for_good(), None);
    }

    #[test]
    fn a_lost_worker_makes_the_endpoint_not_ready_until_it_is_back() {
        let mut life = deployed(&["a"]);
        let lost = replica(&life.active, 0);
        life.apply(Event::Lost {
            replica: lost,
            message: "worker lost".into(),
        })
        .unwrap();
        assert_eq!(row(&life), (false, UpdateState::NotUpdating, Some(1), None));
        assert_eq!(state(&life.active), [DeploymentState::Recovering]);
        life.apply(Event::Failed {
            replica: lost,
            message: "again".into(),
        })
        .unwrap();
        assert_eq!(
            state(&life.active),
            [DeploymentState::Recovering],
            "what served is brought back"
        );
        up(&mut life, lost);
        assert_eq!(row(&life), (true, UpdateState::NotUpdating, Some(1), None));
    }

    #[test]
    fn an_update_of_routes_alone_keeps_the_replicas_and_is_done_at_once() {
        let mut life = deployed(&["a", "b"]);
        let before = (replica(&life.active, 0), replica(&life.active, 1));
        let mut changed = config(&["a", "b"]);
        changed.routes[0].percentage = 10;
        changed.routes[1].percentage = 90;
        life.apply(Event::Update {
            config: changed,
            user: "u".into(),
            now_ms: 2,
        })
        .unwrap();
        assert_eq!(row(&life), (true, UpdateState::NotUpdating, Some(2), None));
        assert_eq!((replica(&life.active, 0), replica(&life.active, 1)), before);
    }

    #[test]
    fn a_restart_forgets_what_is_up_and_nothing_else() {
        let mut life = deployed(&["a"]);
        life.apply(Event::Restarted).unwrap();
        assert_eq!(row(&life), (false, UpdateState::NotUpdating, Some(1), None));
        let back = replica(&life.active, 0);
        up(&mut life, back);
        assert_eq!(row(&life), (true, UpdateState::NotUpdating, Some(1), None));
    }

    fn assert_table(life: &Lifecycle) {
        let (ready, update, active, pending) = row(life);
        match update {
            UpdateState::NotUpdating => assert!(active.is_some() && pending.is_none()),
            UpdateState::InProgress => {
                assert!(pending.is_some());
                let new = state(&life.pending);
                assert!(
                    !new.iter().all(|s| *s == DeploymentState::Ready),
                    "all up, yet not promoted"
                );
                assert!(!new.contains(&DeploymentState::Failed));
            }
            UpdateState::Failed => assert!(state(&life.pending).contains(&DeploymentState::Failed)),
            UpdateState::Cancelled => panic!("nothing cancels"),
        }
        assert!(!ready || active.is_some());
        assert!(active.is_none_or(|active| pending.is_none_or(|pending| active < pending)));
        let serving = [DeploymentState::Ready, DeploymentState::Recovering];
        assert!(state(&life.active).iter().all(|s| serving.contains(s)));
        for entity in life.active.iter().flat_map(|d| &d.entities) {
            assert!(
                life.wanted()
                    .iter()
                    .any(|(replica, _)| entity.replicas.contains(replica))
            );
        }
    }

    proptest! {
        #[test]
        fn any_events_in_any_order_keep_the_table(
            events in proptest::collection::vec((0u8..5, 0usize..12, 1usize..4), 1..80),
        ) {
            let names = ["a", "b", "c"];
            let mut life = Lifecycle::create(config(&names[..2]), "u", 1);
            let mut seen: Vec<ReplicaId> = Vec::new();
            for (kind, pick, count) in events {
                seen.extend(life.wanted().iter().map(|(replica, _)| *replica).filter(|r| !seen.contains(r)).collect::<Vec<_>>());
                let replica = seen[pick % seen.len()];
                let message = "x".to_owned();
                let event = match kind {
                    0 => Event::Update { config: config(&names[..count]), user: "u".into(), now_ms: 3 },
                    1 => Event::Up { replica, message },
                    2 => Event::Lost { replica, message },
                    3 => Event::Failed { replica, message },
                    _ => Event::Restarted,
                };
                let before = life.clone();
                let updating = life.update == UpdateState::InProgress;
                match life.apply(event.clone()) {
                    Err(InProgress) => prop_assert!(updating && kind == 0 && life == before),
                    Ok(changed) => prop_assert_eq!(changed, life != before),
                }
                assert_table(&life);
                // Level-triggered callers repeat themselves.
                if kind != 0 {
                    prop_assert!(!life.apply(event).unwrap(), "an event twice changes nothing");
                }
            }
        }
    }
}
