//! Many clients at once: every stream ends with its typed reason and its own text, and memory stays steady.

use std::time::Instant;

use cluster_tests::cluster::Cluster;
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::settings::Settings;
use futures::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

use crate::soak_time;

const CLIENTS: u64 = 64;

/// Growth that is not a leak: caches that fill, allocators that keep pages.
const GROWTH_BYTES_MAX: u64 = 48 << 20;

fn resident_bytes(cluster: &mut Cluster) -> u64 {
    cluster.coordinator.resident_bytes() + cluster.worker(0).resident_bytes()
}

#[tokio::test]
async fn sixty_four_streams_each_get_their_own_text_and_end() {
    let time = soak_time(10, 60);
    let mut cluster = Cluster::start(Settings::new()).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama", "CPU", "Large")
        .await;
    let goldens = golden::exact("tiny-llama");
    let (client, started) = (cluster.client.clone(), Instant::now());
    let clients = async |part: u32| {
        let until = time * part / 3;
        let streams = join_all((0..CLIENTS).map(async |id| {
            let client = client.clone();
            let mut random = StdRng::seed_from_u64(id + CLIENTS * u64::from(part));
            let mut streams = 0u64;
            while started.elapsed() < until {
                let golden = &goldens[random.random_range(0..goldens.len())];
                let body = json!({"prompt": golden.prompt, "max_tokens": TOKENS_MAX, "temperature": 0, "stream": true});
                let streamed = client.stream("llama", &body).await.collect().await;
                assert_eq!(streamed.text(), golden.text, "client {id}, prompt {}", golden.name);
                assert_eq!(streamed.finish_reason(), golden.finish_reason, "client {id}, prompt {}", golden.name);
                assert!(streamed.done && streamed.error.is_none(), "client {id}: {streamed:?}");
                streams += 1;
            }
            streams
        }))
        .await;
        assert!(
            streams.iter().all(|count| *count > 0),
            "some clients were starved: {streams:?}"
        );
    };
    clients(1).await;
    let warm = resident_bytes(&mut cluster);
    clients(2).await;
    clients(3).await;
    let end = resident_bytes(&mut cluster);
    assert!(
        end < warm + GROWTH_BYTES_MAX,
        "memory grew from {warm} to {end} bytes"
    );
    cluster.wait_idle().await;
}
