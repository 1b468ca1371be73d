//! A store in one redb file, for one coordinator.
//!
//! Owns three tables: values, a log of the last changes (so that watches can go on), and the revision. redb blocks, so
//! every call runs on the blocking pool.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::watch;

use super::{Change, Entry, Expect, Store, StoreError};

/// Key -> (revision, bytes).
const VALUES: TableDefinition<&str, (u64, &[u8])> = TableDefinition::new("values");
/// Revision -> key.
const LOG: TableDefinition<u64, &str> = TableDefinition::new("log");
/// Changes that a watch can go back to.
const LOG_LENGTH: u64 = 1024;

/// The open file.
pub struct EmbeddedStore {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    database: Database,
    latest: watch::Sender<u64>,
}

impl EmbeddedStore {
    /// Opens the store in `folder`, making both when they are not there. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Failed`] names the file: in use by another coordinator, corrupt, not writable.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("store.redb");
        let failed =
            |reason: String| StoreError::Failed(format!("store {}: {reason}", path.display()));
        let no_folder = |reason: String| {
            StoreError::Failed(format!(
                "coordinator.data_dir {}: {reason}",
                folder.display()
            ))
        };
        if folder.exists() && !folder.is_dir() {
            return Err(no_folder("is not a folder; set another one".into()));
        }
        fs::create_dir_all(folder)
            .map_err(|e| no_folder(format!("cannot be made ({e}); set another one")))?;
        let database = Database::create(&path).map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen => failed("is in use by another coordinator; stop it or set another coordinator.data_dir".into()),
            other => failed(format!("cannot be opened ({other}); restore it from a backup, or move it away to start empty")),
        })?;
        let latest = prepare(&database).map_err(|e| failed(e.to_string()))?;
        let latest = watch::Sender::new(latest);
        Ok(EmbeddedStore {
            inner: Arc::new(Inner {
                path,
                database,
                latest,
            }),
        })
    }

    /// Runs on the blocking pool.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let inner = self.inner.clone();
        async move {
            match tokio::task::spawn_blocking(move || work(&inner)).await {
                Ok(result) => result,
                Err(e) => Err(StoreError::Failed(format!("store: {e}"))),
            }
        }
        .boxed()
    }
}

/// Makes the tables and reads the latest revision.
fn prepare(database: &Database) -> Result<u64, redb::Error> {
    let write = database.begin_write()?;
    let latest = {
        write.open_table(VALUES)?;
        let log = write.open_table(LOG)?;
        log.last()?.map_or(0, |(revision, _)| revision.value())
    };
    write.commit()?;
    Ok(latest)
}

impl Inner {
    fn failed(&self, error: redb::Error) -> StoreError {
        StoreError::Failed(format!("store {}: {error}", self.path.display()))
    }

    fn get(&self, key: &str) -> Result<Option<Entry>, redb::Error> {
        let values = self.database.begin_read()?.open_table(VALUES)?;
        Ok(values.get(key)?.map(|found| entry(key, found.value())))
    }

    fn list(&self, prefix: &str) -> Result<(Vec<Entry>, u64), redb::Error> {
        // One transaction: the revision is that of the list.
        let read = self.database.begin_read()?;
        let revision = read
            .open_table(LOG)?
            .last()?
            .map_or(0, |(revision, _)| revision.value());
        let mut entries = Vec::new();
        for item in read.open_table(VALUES)?.range(prefix..)? {
            let (key, value) = item?;
            if !key.value().starts_with(prefix) {
                break;
            }
            entries.push(entry(key.value(), value.value()));
        }
        Ok((entries, revision))
    }

    /// Writes (`Some`) or deletes (`None`); `Ok(None)` is a conflict.
    fn write(
        &self,
        key: &str,
        value: Option<&[u8]>,
        expect: Expect,
    ) -> Result<Option<u64>, redb::Error> {
        let write = self.database.begin_write()?;
        let revision = {
            let mut values = write.open_table(VALUES)?;
            let found = values.get(key)?.map(|found| found.value().0);
            let expected = match expect {
                Expect::Absent => found.is_none(),
                Expect::Revision(revision) => found == Some(revision),
                Expect::Any => true,
            };
            if !expected {
                return Ok(None);
            }
            let mut log = write.open_table(LOG)?;
            let revision = log.last()?.map_or(0, |(revision, _)| revision.value()) + 1;
            match value {
                Some(value) => values.insert(key, (revision, value))?,
                None => values.remove(key)?,
            };
            log.insert(revision, key)?;
            if let Some(old) = revision.checked_sub(LOG_LENGTH) {
                log.remove(old)?;
            }
            revision
        };
        write.commit()?;
        // Writers take turns, but they may get here out of order.
        self.latest
            .send_if_modified(|latest| std::mem::replace(latest, revision.max(*latest)) < revision);
        Ok(Some(revision))
    }

    /// `Ok(None)` when the log does not reach back to `from`.
    fn changes(&self, from: u64) -> Result<Option<Vec<Change>>, redb::Error> {
        let read = self.database.begin_read()?;
        let (values, log) = (read.open_table(VALUES)?, read.open_table(LOG)?);
        let oldest = log.first()?.map_or(1, |(revision, _)| revision.value());
        if from + 1 < oldest {
            return Ok(None);
        }
        let mut changes = Vec::new();
        for item in log.range(from + 1..)? {
            let (revision, key) = item?;
            let (revision, key) = (revision.value(), key.value());
            let found = values.get(key)?.map(|found| entry(key, found.value()));
            let deleted = found.is_none();
            let entry = found.filter(|entry| entry.revision == revision);
            changes.push(Change {
                revision,
                key: key.to_owned(),
                entry,
                deleted,
            });
        }
        Ok(Some(changes))
    }
}

fn entry(key: &str, (revision, value): (u64, &[u8])) -> Entry {
    Entry {
        key: key.to_owned(),
        value: value.to_owned(),
        revision,
    }
}

impl Store for EmbeddedStore {
    fn get(&self, key: String) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        self.run(move |inner| inner.get(&key).map_err(|e| inner.failed(e)))
    }

    fn list(&self, prefix: String) -> BoxFuture<'_, Result<(Vec<Entry>, u64), StoreError>> {
        self.run(move |inner| inner.list(&prefix).map_err(|e| inner.failed(e)))
    }

    fn put(
        &self,
        key: String,
        value: Vec<u8>,
        expect: Expect,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.run(move |inner| {
            let written = inner
                .write(&key, Some(&value), expect)
                .map_err(|e| inner.failed(e))?;
            written.ok_or(StoreError::Conflict { key })
        })
    }

    fn delete(&self, key: String, expect: Expect) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.run(move |inner| {
            let written = inner
                .write(&key, None, expect)
                .map_err(|e| inner.failed(e))?;
            written.ok_or(StoreError::Conflict { key })
        })
    }

    fn changes(&self, from: u64) -> BoxFuture<'_, Result<Vec<Change>, StoreError>> {
        let mut latest = self.inner.latest.subscribe();
        async move {
            // The sender lives as long as the store.
            if latest.wait_for(|latest| *latest > from).await.is_err() {
                return Err(StoreError::Failed("the store was closed".into()));
            }
            self.run(move |inner| match inner.changes(from) {
                Ok(Some(changes)) => Ok(changes),
                Ok(None) => Err(StoreError::Compacted(from)),
                Err(e) => Err(inner.failed(e)),
            })
            .await
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance;

    #[tokio::test]
    async fn the_embedded_store_conforms() {
        let folder = tempfile::tempdir().unwrap();
        conformance::check(&EmbeddedStore::open(folder.path()).unwrap()).await;
    }

    #[tokio::test]
    async fn values_and_revisions_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path()).unwrap();
        let first = store
            .put("a".into(), b"1".to_vec(), Expect::Absent)
            .await
            .unwrap();
        drop(store);
        let store = EmbeddedStore::open(folder.path()).unwrap();
        let found = store.get("a".into()).await.unwrap().unwrap();
        assert_eq!((found.value, found.revision), (b"1".to_vec(), first));
        assert!(
            store
                .put("a".into(), b"2".to_vec(), Expect::Revision(first))
                .await
                .unwrap()
                > first
        );
    }

    #[tokio::test]
    async fn a_watch_from_before_the_log_is_told_to_list_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path()).unwrap();
        let inner = store.inner.clone();
        for i in 0..LOG_LENGTH + 2 {
            inner
                .write("a", Some(&i.to_le_bytes()), Expect::Any)
                .unwrap();
        }
        assert_eq!(store.changes(0).await, Err(StoreError::Compacted(0)));
        assert_eq!(store.changes(LOG_LENGTH).await.unwrap().len(), 2);
    }

    #[test]
    fn a_data_dir_that_is_a_file_or_cannot_be_made_is_named_with_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let message = |path: &Path| EmbeddedStore::open(path).err().unwrap().to_string();
        let expected = format!("coordinator.data_dir {}: is not a folder", file.display());
        assert!(message(&file).contains(&expected), "{}", message(&file));
        let below = file.join("below");
        let expected = format!("coordinator.data_dir {}: cannot be made", below.display());
        assert!(message(&below).contains(&expected), "{}", message(&below));
    }

    #[test]
    fn a_file_that_is_no_store_and_one_in_use_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        fs::write(&path, vec![7; 8192]).unwrap();
        let message = EmbeddedStore::open(folder.path())
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains(&format!("store {}: cannot be opened", path.display())),
            "{message}"
        );
        fs::remove_file(&path).unwrap();
        let _open = EmbeddedStore::open(folder.path()).unwrap();
        let message = EmbeddedStore::open(folder.path())
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains("in use by another coordinator"),
            "{message}"
        );
    }
}
