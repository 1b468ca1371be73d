//! What a shard is planned to take against what its processes hold.

use serde_json::json;

use crate::billion;

/// Makes 2.2 GB of weights, serves them, fills the KV cache and renders a conversation. Compared are the bytes that are
/// the processes' own (anonymous and shared memory of the worker and of its template helper): pages of the program's file
/// are given back when memory is short, and the weights' files are no longer mapped once they are packed.
#[tokio::test]
#[ignore = "needs 2.2 GB of disk, 4 GB of memory and minutes: scripts/check --long, scripts/bench --memory"]
async fn planned_bytes_are_within_3_percent_of_resident_ones_for_a_billion_parameters_in_bf16() {
    let (folder, mut cluster) = billion::start().await;
    let before = cluster.worker(0).own_bytes();
    cluster.client.deploy("billion", "billion").await;

    billion::fill_cache(&cluster, "billion").await;
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
    cluster.client.invoke("billion", &chat).await.ok();

    let plan = billion::plan(&folder);
    let need = &plan.need;
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
