//! The traffic split: what is configured is what is served, over ten thousand real requests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use cluster_tests::cluster::Cluster;
use cluster_tests::settings::Settings;
use futures::future::join_all;
use serde_json::{Value, json};

const REQUESTS: u64 = 10_000;
/// Requests under way at a time: more than one entity runs, fewer than may wait.
const CLIENTS: u64 = 48;
const SHARES: [(&str, u64); 3] = [("a", 57), ("b", 30), ("c", 13)];

fn endpoint() -> Value {
    let entity = |name: &str| {
        json!({"name": name, "entity_name": "ml.demo.tiny-llama", "entity_version": "1",
            "workload_type": "CPU", "workload_size": "Medium", "scale_to_zero_enabled": false})
    };
    let route = |(name, share): &(&str, u64)| json!({"served_model_name": name, "traffic_percentage": share});
    json!({"name": "split", "config": {
        "served_entities": SHARES.iter().map(|(name, _)| entity(name)).collect::<Vec<_>>(),
        "traffic_config": {"routes": SHARES.iter().map(route).collect::<Vec<_>>()},
    }})
}

#[tokio::test]
async fn ten_thousand_requests_on_three_entities_have_the_configured_shares() {
    let cluster = Cluster::start(Settings::with_workers(3)).await;
    cluster
        .client
        .post("/api/2.0/serving-endpoints", &endpoint())
        .await
        .ok();
    cluster.client.wait_ready("split").await;
    let body = json!({"prompt": [1, 5], "max_tokens": 1});
    let next = AtomicU64::new(0);
    let clients = join_all((0..CLIENTS).map(async |_| {
        let mut served: BTreeMap<String, u64> = BTreeMap::new();
        while next.fetch_add(1, Ordering::Relaxed) < REQUESTS {
            let reply = cluster.client.invoke("split", &body).await;
            assert_eq!(reply.status, 200, "{}", reply.text);
            *served
                .entry(reply.served_model_name.expect("who answered"))
                .or_default() += 1;
        }
        served
    }))
    .await;
    let mut served: BTreeMap<String, u64> = BTreeMap::new();
    for (name, count) in clients.into_iter().flatten() {
        *served.entry(name).or_default() += count;
    }
    assert_eq!(served.values().sum::<u64>(), REQUESTS);
    for (name, share) in SHARES {
        let (got, exact) = (served[name], REQUESTS * share / 100);
        assert!(
            got.abs_diff(exact) <= REQUESTS / 100,
            "{name} has {got} of {REQUESTS} at {share} %: {served:?}"
        );
    }
    cluster.wait_idle().await;
}
