//! Endpoints that are sized by tokens per second.

use std::time::Duration;

use common::model_ref::ModelRef;
use common::request::End;

use crate::actors::testing::{FakeWorker, call, cluster, config, held, soon, whole};
use crate::api::{
    ConfigSpec, EndpointView, ErrorKind, Gateway, OptimizationInfo, Provisioned, UpdateState,
};

fn provisioned(min: u64, max: u64, units: Option<u64>) -> ConfigSpec {
    let mut config = config("tiny", "");
    config.entities[0].provisioned = Some(Provisioned {
        min_tokens_per_s: min,
        max_tokens_per_s: max,
        model_units: units,
    });
    config
}

fn model(name: &str) -> ModelRef {
    ModelRef::new(name, "1").unwrap()
}

#[actix::test]
async fn a_chunk_is_told_once_a_device_was_measured_and_stays_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let unknown = core.gateway.optimization_info(model("gone")).await;
    assert_eq!(unknown.unwrap_err().kind, ErrorKind::NotFound);
    let early = core.gateway.optimization_info(model("tiny")).await;
    let early = early.unwrap_err();
    assert_eq!(early.kind, ErrorKind::Unavailable);
    assert!(early.message.contains("start workers"), "{early}");
    let worker = FakeWorker::join(&core, "0").await;
    let told = core.gateway.optimization_info(model("tiny")).await.unwrap();
    let OptimizationInfo::Servable {
        ref model_type,
        chunk_tokens_per_s,
    } = told
    else {
        panic!("{told:?}")
    };
    assert!(model_type == "llama" && chunk_tokens_per_s > 10, "{told:?}");
    // Also when the worker is away.
    drop(worker);
    let gone = async {
        while core.gateway.health().await.workers > 0 {
            tokio::task::yield_now().await;
        }
    };
    soon("the worker to be gone", gone).await;
    let again = core.gateway.optimization_info(model("tiny")).await.unwrap();
    assert_eq!(again, told);
}

#[actix::test]
async fn the_smallest_type_is_chosen_and_shown_and_rates_are_whole_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    let told = core.gateway.optimization_info(model("tiny")).await.unwrap();
    let OptimizationInfo::Servable {
        chunk_tokens_per_s: chunk,
        ..
    } = told
    else {
        panic!("{told:?}")
    };
    let refused = core.create("e", provisioned(0, chunk + 1, None)).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::InvalidParameter);
    assert!(
        refused
            .message
            .contains(&format!("chunks of {chunk} tokens")),
        "{refused}"
    );
    let created = core.create("e", provisioned(0, 0, Some(2))).await.unwrap();
    let spec = &created.pending.unwrap().entities[0].spec;
    assert_eq!(spec.workload_type, "CPU");
    let settled = spec.provisioned.unwrap();
    assert_eq!(settled.max_tokens_per_s, 2 * chunk);
    worker.serve().await;
    core.until_ready("e").await;
    let updated = core
        .gateway
        .update("user".into(), "e".into(), provisioned(0, 4 * chunk, None))
        .await
        .unwrap();
    let asked = updated.pending.or(updated.active).unwrap();
    let now = asked.entities[0].spec.provisioned.unwrap();
    assert_eq!((now.min_tokens_per_s, now.max_tokens_per_s), (0, 4 * chunk));
}

#[actix::test]
async fn what_an_endpoint_has_it_keeps_when_devices_are_measured_anew() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut worker = FakeWorker::join(&core, "0").await;
    let created = core.create("e", provisioned(0, 0, Some(1))).await.unwrap();
    let had = created.pending.unwrap().entities[0].spec.clone();
    let shard = worker.serve().await;
    core.until_ready("e").await;
    let rate = had.provisioned.unwrap().max_tokens_per_s;
    drop(worker);
    let mut slower = FakeWorker::hello(&core, "0");
    slower.shards = vec![held(&shard)];
    if let Some(rates) = &mut slower.device.rates {
        rates.flops_per_s /= 3;
    }
    let mut worker = FakeWorker::dial(&core, slower).await;
    assert!(worker.command().await.is_some(), "welcomed");
    let settled = |view: &EndpointView| view.ready && view.update == UpdateState::NotUpdating;
    core.until("e", "settled", settled).await;
    for same in [provisioned(0, 0, Some(1)), provisioned(rate, rate, None)] {
        core.gateway
            .update("user".into(), "e".into(), same)
            .await
            .unwrap();
        let view = core.until("e", "settled", settled).await;
        let now = view.active.unwrap().entities[0].spec.clone();
        assert_eq!(now, had, "nothing is deployed anew");
    }
    let other = core.create("f", provisioned(0, rate, None)).await;
    let other = other.unwrap_err();
    assert!(other.message.contains("cannot be had"), "{other}");
}

#[actix::test]
async fn what_is_above_the_rate_waits() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let mut slow = FakeWorker::hello(&core, "0");
    // So slow that a chunk is one token per second.
    if let Some(rates) = &mut slow.device.rates {
        rates.flops_per_s = 1_000;
    }
    let mut worker = FakeWorker::dial(&core, slow).await;
    worker.command().await;
    core.create("e", provisioned(0, 1, None)).await.unwrap();
    worker.serve().await;
    core.until_ready("e").await;
    // The first finds a full bucket, of one token; its prompt of three and its output of one are waited for.
    let (answer, start) = tokio::join!(core.ask("e", "a"), worker.accept());
    worker.token(&start, "x").await;
    worker.end(&start, End::Stop).await;
    assert_eq!(whole(answer.unwrap()).await.0, "x");
    let second = {
        let core = core.gateway.clone();
        actix_rt::spawn(async move { core.generate(call("e", &["b"])).await })
    };
    worker.is_left_alone(Duration::from_millis(1_500)).await;
    let start = worker.accept().await;
    worker.token(&start, "y").await;
    worker.end(&start, End::Stop).await;
    let answer = soon("the second answer", second).await.unwrap().unwrap();
    assert_eq!(whole(answer).await.0, "y");
}
