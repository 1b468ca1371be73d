//! What every store must do. Each implementation's tests call [`check`].

use std::time::Duration;

use super::{Expect, Store, StoreError};

/// Checks an empty store.
pub async fn check(store: &impl Store) {
    writes_compare_and_swap(store).await;
    lists_are_by_prefix(store).await;
    watches_go_on_from_a_revision(store).await;
    one_of_many_writers_wins(store).await;
}

async fn put(
    store: &impl Store,
    key: &str,
    value: &str,
    expect: Expect,
) -> Result<u64, StoreError> {
    store
        .put(key.into(), value.as_bytes().to_vec(), expect)
        .await
}

async fn writes_compare_and_swap(store: &impl Store) {
    let conflict = |key: &str| Err(StoreError::Conflict { key: key.into() });
    assert_eq!(store.get("cas".into()).await, Ok(None));
    assert_eq!(
        put(store, "cas", "0", Expect::Revision(1)).await,
        conflict("cas")
    );
    let first = put(store, "cas", "1", Expect::Absent).await.unwrap();
    assert_eq!(
        put(store, "cas", "x", Expect::Absent).await,
        conflict("cas")
    );
    let second = put(store, "cas", "2", Expect::Revision(first))
        .await
        .unwrap();
    assert!(second > first);
    assert_eq!(
        put(store, "cas", "x", Expect::Revision(first)).await,
        conflict("cas")
    );
    assert_eq!(store.get("cas".into()).await.unwrap().unwrap().value, b"2");
    assert_eq!(
        store.delete("cas".into(), Expect::Revision(first)).await,
        conflict("cas")
    );
    store
        .delete("cas".into(), Expect::Revision(second))
        .await
        .unwrap();
    assert_eq!(store.get("cas".into()).await, Ok(None));
    assert!(
        put(store, "cas", "3", Expect::Absent).await.unwrap() > second,
        "revisions never come back"
    );
}

async fn lists_are_by_prefix(store: &impl Store) {
    for key in ["list/b", "list/a", "lisu", "lis"] {
        put(store, key, key, Expect::Any).await.unwrap();
    }
    let (entries, revision) = store.list("list/".into()).await.unwrap();
    let keys: Vec<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys, ["list/a", "list/b"]);
    assert!(entries.iter().all(|entry| entry.revision <= revision));
}

async fn watches_go_on_from_a_revision(store: &impl Store) {
    let (_, from) = store.list("".into()).await.unwrap();
    let waiting = store.changes(from);
    let first = put(store, "w", "1", Expect::Any).await.unwrap();
    let seen = tokio::time::timeout(Duration::from_secs(10), waiting)
        .await
        .expect("a change wakes the watch")
        .unwrap();
    assert_eq!(
        seen.iter()
            .map(|change| change.revision)
            .collect::<Vec<_>>(),
        [first]
    );
    assert_eq!(seen[0].entry.as_ref().unwrap().value, b"1");
    let second = put(store, "w", "2", Expect::Any).await.unwrap();
    let third = store.delete("w".into(), Expect::Any).await.unwrap();
    let seen = store.changes(from).await.unwrap();
    assert_eq!(
        seen.iter()
            .map(|change| change.revision)
            .collect::<Vec<_>>(),
        [first, second, third]
    );
    assert!(
        seen.iter()
            .all(|change| change.key == "w" && change.entry.is_none() && change.deleted),
        "what is gone is not shown"
    );
    let last = put(store, "w", "3", Expect::Any).await.unwrap();
    let seen = store.changes(third).await.unwrap();
    assert_eq!((seen[0].revision, seen[0].deleted), (last, false));
}

async fn one_of_many_writers_wins(store: &impl Store) {
    let start = put(store, "race", "0", Expect::Any).await.unwrap();
    let writers = (0..8).map(|i| store.put("race".into(), vec![i], Expect::Revision(start)));
    let results = futures::future::join_all(writers).await;
    assert_eq!(
        results.iter().filter(|result| result.is_ok()).count(),
        1,
        "{results:?}"
    );
}
