//! The store: the only truth for endpoints. Keys and bytes with revisions.
//!
//! Every change gets the next revision of the whole store. Writes compare and swap; a watch goes on from any revision
//! that is still remembered. Owns no meaning of what is stored. Implementations: [`embedded`] (one file on this
//! machine); all must pass `conformance`.

pub mod embedded;

#[cfg(test)]
pub mod conformance;

use std::sync::Arc;

use futures::future::BoxFuture;

pub use embedded::EmbeddedStore;

/// A store that actors and the gateway share.
pub type SharedStore = Arc<dyn Store>;

/// A stored value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub value: Vec<u8>,
    /// The revision that wrote it.
    pub revision: u64,
}

/// What a write expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// No value.
    Absent,
    /// The value that this revision wrote.
    Revision(u64),
    /// Anything.
    Any,
}

/// A change, in the order of revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The store's revision after it.
    pub revision: u64,
    /// The key.
    pub key: String,
    /// What was written; `None` when the key was deleted or has been written again since.
    pub entry: Option<Entry>,
    /// The key is not there any more.
    pub deleted: bool,
}

/// Why the store did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The value is another one than expected: read again and decide anew.
    #[error("{key} was changed by someone else")]
    Conflict {
        /// The key.
        key: String,
    },
    /// The revision to watch from is forgotten: list again.
    #[error("changes since revision {0} are forgotten")]
    Compacted(u64),
    /// The store is broken or full. Whether the write happened is not known.
    #[error("{0}")]
    Failed(String),
}

/// Keys and bytes with revisions.
pub trait Store: Send + Sync + 'static {
    /// The value of a key.
    fn get(&self, key: String) -> BoxFuture<'_, Result<Option<Entry>, StoreError>>;

    /// All values whose key starts with `prefix`, by key, and the store's revision at that moment.
    fn list(&self, prefix: String) -> BoxFuture<'_, Result<(Vec<Entry>, u64), StoreError>>;

    /// Writes a value and gives its revision. The write is durable when this answers.
    fn put(
        &self,
        key: String,
        value: Vec<u8>,
        expect: Expect,
    ) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Deletes a value and gives the revision of that. Deleting what is not there is a conflict, except with
    /// [`Expect::Any`].
    fn delete(&self, key: String, expect: Expect) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Waits until there are changes after revision `from` and gives them, oldest first.
    fn changes(&self, from: u64) -> BoxFuture<'_, Result<Vec<Change>, StoreError>>;
}
