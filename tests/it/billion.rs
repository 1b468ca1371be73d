//! A cluster that serves a billion random parameters, with a KV cache that short sequences fill, and what is planned for it.

use cluster_tests::cluster::Cluster;
use cluster_tests::random_model::{self, LlamaShape};
use cluster_tests::settings::{Model, Settings};
use common::config::ServingDefaults;
use common::model_ref::ModelRef;
use common::wire::message::DeviceKind;
use coordinator::policy::memory_plan::{self, MemoryPlan};
use coordinator::registry::{Context, read_facts};
use serde_json::json;
use tempfile::TempDir;

/// Sequences of this length fill the cache: long enough to touch all of it, short enough to be computed in a minute.
const CONTEXT: u32 = 512;
/// A small workload's requests at a time.
const REQUESTS: u32 = 4;

/// The model's folder, and one worker of 4 GiB that has not loaded it.
pub async fn start() -> (TempDir, Cluster) {
    let folder = tempfile::tempdir().unwrap();
    random_model::write(&LlamaShape::BILLION, folder.path());
    let mut model = Model::at("ml.demo.billion", folder.path());
    model.context_max = Some(CONTEXT);
    let mut settings = Settings::new().model(model);
    settings.memory = "4GiB".into();
    let cluster = Cluster::start(settings).await;
    (folder, cluster)
}

/// All blocks but the null one: each prompt is a sequence of its own, and as long as can be.
pub async fn fill_cache(cluster: &Cluster, endpoint: &str) {
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
        .map(|body| cluster.client.invoke(endpoint, body));
    for reply in futures::future::join_all(calls).await {
        reply.ok();
    }
}

/// What the coordinator plans for the model in `folder`.
pub fn plan(folder: &TempDir) -> MemoryPlan {
    let name = ModelRef::new("ml.demo.billion", "1").unwrap();
    let serving = ServingDefaults {
        context_max: Some(CONTEXT),
        ..ServingDefaults::default()
    };
    let facts = read_facts(&Context::exact(&name, serving), folder.path()).unwrap();
    let need = memory_plan::need(&facts, DeviceKind::Cpu, 1, REQUESTS).unwrap();
    need.fit(4 << 30, REQUESTS).unwrap()
}
