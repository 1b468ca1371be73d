use serde_json::{Value, json};

use super::super::tests::fake::{endpoint_view, with_state};
use super::*;

fn detailed(view: &EndpointView) -> Value {
    serde_json::to_value(Detailed::of(view, Level::Manage)).unwrap()
}

#[test]
fn an_endpoint_being_created_has_the_recorded_shape() {
    let view = endpoint_view("taka-llama2-7b");
    let common = json!({
        "name": "llama2-7b-1", "workload_size": "Small", "workload_type": "GPU_LARGE",
        "scale_to_zero_enabled": false, "creator": "ann", "creation_timestamp": 1_710_327_769_000_u64,
        "state": {"deployment": "DEPLOYMENT_CREATING",
                  "deployment_state_message": "Creating resources for served entity."},
    });
    let named = |noun: &str| {
        let mut entity = common.clone();
        entity[format!("{noun}_name")] = json!("cat.default.llama2-7b");
        entity[format!("{noun}_version")] = json!("1");
        entity
    };
    let expected = json!({
        "name": "taka-llama2-7b", "creator": "ann",
        "creation_timestamp": 1_710_327_769_000_u64, "last_updated_timestamp": 1_710_327_769_000_u64,
        "state": {"ready": "NOT_READY", "config_update": "IN_PROGRESS"},
        "pending_config": {
            "start_time": 1_710_327_769_000_u64,
            "served_models": [named("model")], "served_entities": [named("entity")],
            "config_version": 1,
            "traffic_config": {"routes": [{"served_model_name": "llama2-7b-1", "traffic_percentage": 100,
                                           "served_entity_name": "llama2-7b-1"}]},
        },
        "id": "08f9f293f47247588069fa4e4e61a9be", "permission_level": "CAN_MANAGE", "route_optimized": false,
    });
    assert_eq!(detailed(&view), expected);
}

#[test]
fn a_ready_endpoint_has_config_without_start_time_and_no_pending_config() {
    let mut view = with_state(endpoint_view("e"), DeploymentState::Ready);
    view.task = Some("llm/v1/completions".into());
    view.settings.tags = vec![("team".into(), "x".into())];
    let json = detailed(&view);
    assert_eq!(
        json["state"],
        json!({"ready": "READY", "config_update": "NOT_UPDATING"})
    );
    assert!(json.get("pending_config").is_none() && json["config"].get("start_time").is_none());
    assert_eq!(
        json["config"]["served_models"][0]["state"]["deployment"],
        "DEPLOYMENT_READY"
    );
    assert_eq!(json["task"], "llm/v1/completions");
    assert_eq!(json["tags"], json!([{"key": "team", "value": "x"}]));
}

#[test]
fn every_state_has_the_vendors_word() {
    let words = [
        (DeploymentState::Creating, "DEPLOYMENT_CREATING"),
        (DeploymentState::Ready, "DEPLOYMENT_READY"),
        (DeploymentState::Recovering, "DEPLOYMENT_RECOVERING"),
        (DeploymentState::Failed, "DEPLOYMENT_FAILED"),
        (DeploymentState::Aborted, "DEPLOYMENT_ABORTED"),
    ];
    for (state, word) in words {
        let mut view = endpoint_view("e");
        view.pending.as_mut().unwrap().entities[0].state = state;
        let json = detailed(&view);
        assert_eq!(
            json["pending_config"]["served_entities"][0]["state"]["deployment"],
            word
        );
    }
    let updates = [
        (UpdateState::NotUpdating, "NOT_UPDATING"),
        (UpdateState::InProgress, "IN_PROGRESS"),
        (UpdateState::Failed, "UPDATE_FAILED"),
        (UpdateState::Cancelled, "UPDATE_CANCELED"),
    ];
    for (update, word) in updates {
        let view = EndpointView {
            update,
            ..endpoint_view("e")
        };
        assert_eq!(detailed(&view)["state"]["config_update"], word);
    }
}

#[test]
fn a_list_item_is_short() {
    let views = [with_state(endpoint_view("e"), DeploymentState::Ready)];
    let json = serde_json::to_value(List::of(&views)).unwrap();
    let expected = json!({"endpoints": [{
        "name": "e", "creator": "ann", "id": "08f9f293f47247588069fa4e4e61a9be",
        "creation_timestamp": 1_710_327_769_000_u64, "last_updated_timestamp": 1_710_327_769_000_u64,
        "state": {"ready": "READY", "config_update": "NOT_UPDATING"},
        "config": {
            "served_entities": [{"name": "llama2-7b-1", "entity_name": "cat.default.llama2-7b",
                                 "entity_version": "1"}],
            "served_models": [{"name": "llama2-7b-1", "model_name": "cat.default.llama2-7b",
                               "model_version": "1"}]},
    }]});
    assert_eq!(json, expected);
}
