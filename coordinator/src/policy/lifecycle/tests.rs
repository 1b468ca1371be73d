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
        provisioned: None,
        concurrency: None,
        instance_profile_arn: None,
        quantization: None,
    };
    let route = |name: &&str| Route {
        entity: (*name).to_owned(),
        percentage: 100 / names.len() as u32,
    };
    ConfigSpec {
        entities: names.iter().map(entity).collect(),
        routes: names.iter().map(route).collect(),
        auto_capture: None,
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
