//! Provisioned throughput on a real cluster: chunks measured, types chosen, rates shown. (That rates are kept: `actors/tests/provisioned`.)

use cluster_tests::cluster::Cluster;
use cluster_tests::settings::Settings;
use reqwest::Method;
use serde_json::{Value, json};

const ENDPOINTS: &str = "/api/2.0/serving-endpoints";

fn body(fields: &Value) -> Value {
    let mut entity = json!({"entity_name": "ml.demo.tiny-llama", "entity_version": "1"});
    let given = fields.as_object().unwrap().clone();
    entity.as_object_mut().unwrap().extend(given);
    json!({"name": "rated", "config": {"served_entities": [entity]}})
}

#[tokio::test]
async fn an_endpoint_is_sized_by_chunks_that_its_hardware_gives() {
    let cluster = Cluster::start(Settings::new()).await;
    let client = &cluster.client;
    let info = |model: &str| format!("{ENDPOINTS}/get-model-optimization-info/{model}");
    let told = client.get(&info("ml.demo.tiny-llama/1")).await.ok();
    assert_eq!(
        (&told["optimizable"], &told["model_type"]),
        (&json!(true), &json!("llama"))
    );
    let chunk = told["throughput_chunk_size"].as_u64().unwrap();
    assert!(chunk > 0, "{told}");
    client.get(&info("ml.demo.nothing/1")).await.refused(
        404,
        "RESOURCE_DOES_NOT_EXIST",
        &["ml.demo.nothing"],
    );

    let odd = body(&json!({"max_provisioned_throughput": 5 * chunk}));
    client.post(ENDPOINTS, &odd).await.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        &["at most 4 of them", &chunk.to_string()],
    );
    // As the vendor's own example: the least is one chunk, the most two.
    let two = json!({"min_provisioned_throughput": chunk, "max_provisioned_throughput": 2 * chunk});
    let created = client.post(ENDPOINTS, &body(&two)).await.ok();
    let entity = &created["pending_config"]["served_entities"][0];
    assert_eq!(entity["workload_type"], "CPU", "{entity}");
    assert_eq!(entity["max_provisioned_throughput"], 2 * chunk);
    client.wait_ready("rated").await;

    let units = body(&json!({"provisioned_model_units": 1}));
    let wrapped = json!({"config": units["config"]});
    let path = format!("{ENDPOINTS}/pt/rated/config");
    client.call(Method::PUT, &path, &wrapped).await.ok();
    let ready = client
        .wait_for("rated", "updated", |view| {
            view["config"]["served_entities"][0]["provisioned_model_units"] == 1
                && view["state"]["config_update"] == "NOT_UPDATING"
        })
        .await;
    let entity = &ready["config"]["served_models"][0];
    assert_eq!(entity["min_provisioned_throughput"], chunk);
    assert_eq!(entity["max_provisioned_throughput"], chunk);

    let text = client.continue_text("rated", "Once upon a time", 5).await;
    assert!(!text.is_empty());
    client
        .call(Method::DELETE, &format!("{ENDPOINTS}/rated"), &Value::Null)
        .await
        .ok();
}
