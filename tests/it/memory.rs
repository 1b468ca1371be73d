//! What a shard is planned to take against what its processes hold.

use cluster_tests::cluster::Cluster;
use cluster_tests::random_model::{self, LlamaShape};
use cluster_tests::settings::{Model, Settings};
use common::config::ServingDefaults;
use common::model_ref::ModelRef;
use common::wire::message::DeviceKind;
use coordinator::policy::memory_plan;
use coordinator::registry::{Context, read_facts};
use serde_json::json;

/// Sequences of this length fill the cache: long enough to touch all of it, short enough to be computed in a minute.
const CONTEXT: u32 = 512;
/// A small workload's requests at a time.
const REQUESTS: u32 = 4;

/// Makes 2.2 GB of weights, serves them, fills the KV cache and renders a conversation. Compared are the bytes that are
/// the processes' own (anonymous and shared memory of the worker and of its template helper): pages of the program's file
/// are given back when memory is short, and the weights' files are no longer mapped once they are packed.
#[tokio::test]
#[ignore = "needs 2.2 GB of disk, 4 GB of memory and minutes: scripts/check --long, scripts/bench --memory"]
async fn planned_bytes_are_within_3_percent_of_resident_ones_for_a_billion_parameters_in_bf16() {
    let folder = tempfile::tempdir().unwrap();
    random_model::write(&LlamaShape::BILLION, folder.path());
    let mut model = Model::at("ml.demo.billion", folder.path());
    model.context_max = Some(CONTEXT);
    let mut settings = Settings::new().model(model);
    settings.memory = "4GiB".into();
    let mut cluster = Cluster::start(settings).await;
    let before = cluster.worker(0).own_bytes();
    cluster.client.deploy("billion", "billion").await;

    // All blocks but the null one: each prompt is a sequence of its own, and as long as can be.
    let prompt = |first: u32| -> Vec<u32> {
        (0..CONTEXT - 1)
            .map(|i| 100 + (first * 7919 + i * 31) % 3000)
            .collect()
    };
    let bodies: Vec<_> = (0..REQUESTS)
        .map(|i| json!({"prompt": prompt(i), "max_tokens": 1, "temperature": 0}))
        .collect();
    let calls = bodies
        .iter()
        .map(|body| cluster.client.invoke("billion", body));
    for reply in futures::future::join_all(calls).await {
        reply.ok();
    }
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    cluster.client.invoke("billion", &chat).await.ok();

    let name = ModelRef::new("ml.demo.billion", "1").unwrap();
    let serving = ServingDefaults {
        context_max: Some(CONTEXT),
        ..ServingDefaults::default()
    };
    let facts = read_facts(&Context::exact(&name, serving), folder.path()).unwrap();
    let need = memory_plan::need(&facts, DeviceKind::Cpu, 1, REQUESTS).unwrap();
    let plan = need.fit(4 << 30, REQUESTS).unwrap();
    let (planned, measured) = (plan.bytes(), cluster.worker(0).own_bytes());
    let ratio = planned as f64 / measured as f64;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "planned {:.1} MiB (weights {:.1}, workspace {:.1}, overhead {:.1}, KV {:.1}), measured {:.1} MiB \
         ({:.1} before the model was loaded; {:.1} with the program's own pages), ratio {ratio:.4}",
        mib(planned),
        mib(need.weight_bytes),
        mib(need.workspace_bytes + need.scratch_bytes),
        mib(need.overhead_bytes),
        mib(plan.kv_bytes()),
        mib(measured),
        mib(before),
        mib(cluster.worker(0).resident_bytes())
    );
    assert!(
        (0.97..=1.03).contains(&ratio),
        "planned {planned}, measured {measured}: {ratio:.4}"
    );
}
