//! The coordinator and a store that does not do as it should.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;

use super::*;
use crate::actors::gateway::ActorGateway;
use crate::actors::testing::{FakeWorker, cluster, config};
use crate::api::Gateway;
use crate::store::{Change, EmbeddedStore, Store};

/// A store that forgets what was watched and fails to answer anything else.
#[derive(Default)]
struct Broken {
    listed: AtomicUsize,
}

fn broken<T: Send + 'static>() -> BoxFuture<'static, Result<T, StoreError>> {
    std::future::ready(Err(StoreError::Failed("broken by the test".into()))).boxed()
}

impl Store for Broken {
    fn get(&self, _: String) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        broken()
    }

    fn list(&self, _: String) -> BoxFuture<'_, Result<(Vec<Entry>, u64), StoreError>> {
        self.listed.fetch_add(1, Ordering::SeqCst);
        // As a real one does, it lets others run.
        async {
            tokio::task::yield_now().await;
            Err(StoreError::Failed("broken by the test".into()))
        }
        .boxed()
    }

    fn put(&self, _: String, _: Vec<u8>, _: Expect) -> BoxFuture<'_, Result<u64, StoreError>> {
        broken()
    }

    fn delete(&self, _: String, _: Expect) -> BoxFuture<'_, Result<u64, StoreError>> {
        broken()
    }

    fn changes(&self, from: u64) -> BoxFuture<'_, Result<Vec<Change>, StoreError>> {
        std::future::ready(Err(StoreError::Compacted(from))).boxed()
    }
}

#[actix::test]
async fn a_store_that_cannot_be_listed_is_asked_again_after_a_pause() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    let coordinator = core.doorkeeper.directory.coordinator().unwrap();
    let store = Arc::new(Broken::default());
    let watching = watch(store.clone(), 0, coordinator, CancellationToken::new());
    let _ = tokio::time::timeout(WATCH_PAUSE * 3 / 2, watching).await;
    let listed = store.listed.load(Ordering::SeqCst);
    assert!((1..=2).contains(&listed), "{listed} times in 1.5 pauses");
}

#[actix::test]
async fn the_coordinator_is_not_ready_while_its_store_does_not_answer() {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    assert!(core.gateway.health().await.ready);
    let means = Means {
        store: Arc::new(Broken::default()),
        ..core.gateway.means.clone()
    };
    let health = ActorGateway::new(means).health().await;
    assert_eq!((health.live, health.ready), (true, false));
}

#[actix::test]
async fn a_record_that_cannot_be_read_is_left_out_and_the_others_serve() {
    let folder = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&folder.path().join("var/coordinator")).unwrap();
    for key in ["endpoints/bad", "replicas/bad"] {
        let garbage = b"{\"from\": \"the future\"}".to_vec();
        store.put(key.into(), garbage, Expect::Any).await.unwrap();
    }
    drop(store);
    let core = cluster(folder.path(), |text| text).await;
    assert!(
        core.gateway
            .means
            .store
            .get("endpoints/bad".into())
            .await
            .unwrap()
            .is_some()
    );
    let mut worker = FakeWorker::join(&core, "0").await;
    core.create("good", config("tiny", "CPU")).await.unwrap();
    worker.serve().await;
    core.until_ready("good").await;
    // And it can be made away with.
    core.gateway.delete("bad".into()).await.unwrap();
}
