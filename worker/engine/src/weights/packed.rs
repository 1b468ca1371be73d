//! The cache of packed weights: matrices as a backend multiplies with them, in files that the next load of the same model
//! maps instead of packing them again.
//!
//! ```text
//! KEY.packed     an entry, whole: made by renaming; locked shared by who has it mapped; its time is the last use
//! KEY.partial    one on its way; locked by who writes it
//! ```
//!
//! Owns the keys, finding, and what a load takes from an entry or leaves for one. A key is a digest of all that the bytes
//! depend on. The processes of one machine may share the folder. Nothing here makes a load fail: without a usable entry
//! weights are packed, and an entry that cannot be written is not there.

mod draft;
mod entry;
mod format;
mod room;

pub use draft::{Draft, NotWritten};

use crate::backend::{Backend, PackedBytes, PackedShape, WeightDtype};
use crate::models::checkpoint::Checkpoint;
use crate::weights::quant;
use entry::{Entry, EntryError};
use sha2::{Digest, Sha256};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Name of entries.
const ENTRY: &str = "packed";
/// Name of those on their way.
const PARTIAL: &str = "partial";

/// A folder of packed weights.
#[derive(Debug, Clone)]
pub struct PackedCache {
    folder: PathBuf,
    bytes_max: u64,
}

/// Where the matrices of a loaded model come from.
#[derive(Debug)]
pub enum Origin {
    /// The checkpoint: without a cache, or on a backend whose matrices cannot be kept.
    Checkpoint,
    /// An entry of the cache, with so many bytes of matrices.
    Mapped(u64),
    /// The checkpoint, and the next load may find them in the cache if the draft is written.
    Packed {
        /// The entry to be.
        draft: Draft,
        /// Why an entry that is there was not used.
        unusable: Option<String>,
    },
}

/// What the bytes of an entry depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackedKey(String);

/// One matrix of a model: how it is named in an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MatrixName {
    /// Its tensors.
    pub name: String,
    /// Its shape and form.
    pub shape: String,
}

/// What a load does with the cache.
#[derive(Debug)]
pub(crate) enum Packing {
    /// Nothing.
    Apart,
    /// Takes what is there.
    Mapped(Entry),
    /// Leaves what it has packed.
    Draft(Draft, Option<String>),
}

/// Runs a body once for each number below a bound, on several threads.
type Parallel<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

impl PackedCache {
    /// A cache in `folder`, which is made when something is written: entries that are not mapped go, the longest unused
    /// first, when it would come to hold more than `bytes_max`.
    #[must_use]
    pub fn new(folder: PathBuf, bytes_max: u64) -> PackedCache {
        PackedCache { folder, bytes_max }
    }

    /// What a load of this rank on this backend has to do with the cache. An entry is read whole to be checked; `progress` is
    /// told how many bytes were.
    pub(crate) fn packing<B: Backend>(
        &self,
        checkpoint: &Checkpoint,
        (rank, ranks): (usize, usize),
        dtype: WeightDtype,
        backend: &B,
        progress: &mut dyn FnMut(u64),
    ) -> Packing {
        let Some(layout) = backend.packed_layout() else {
            return Packing::Apart;
        };
        let key = PackedKey::new(&checkpoint.digest(), (rank, ranks), dtype, &layout);
        let parallel = |items: usize, body: &(dyn Fn(usize) + Sync)| {
            backend.in_parallel(items, body);
        };
        let unusable = match self.find(&key, &parallel, progress) {
            Ok(Some(entry)) => return Packing::Mapped(entry),
            Ok(None) => None,
            Err(reason) => Some(reason),
        };
        let draft = Draft::new(self.clone(), key, checkpoint.fingerprint.clone());
        Packing::Draft(draft, unusable)
    }

    /// An entry, mapped and checked. A damaged one is removed.
    fn find(
        &self,
        key: &PackedKey,
        parallel: Parallel<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Entry>, String> {
        let path = self.path(key, ENTRY);
        match Entry::open(&path, key, parallel, progress) {
            Ok(entry) => Ok(entry),
            Err(EntryError::Damaged(reason)) => {
                let removed = match fs::remove_file(&path) {
                    Ok(()) => "it was removed".to_owned(),
                    Err(error) => format!("it cannot be removed: {error}"),
                };
                Err(format!(
                    "{} is damaged, {reason}; {removed}",
                    path.display()
                ))
            }
            Err(EntryError::Io(error)) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn path(&self, key: &PackedKey, extension: &str) -> PathBuf {
        self.folder.join(key.name()).with_extension(extension)
    }
}

/// Bytes of a key's digest that make the name of its files.
const NAME_BYTES: usize = 20;

impl PackedKey {
    fn new(
        model: &str,
        (rank, ranks): (usize, usize),
        dtype: WeightDtype,
        layout: &str,
    ) -> PackedKey {
        PackedKey(format!(
            "format-{}/{}/model-{model}/rank-{rank}-of-{ranks}/weights-{}-{}-{}/{layout}",
            format::VERSION,
            env!("CARGO_PKG_VERSION"),
            dtype.name(),
            quant::GROUP,
            quant::VERSION,
        ))
    }

    /// As entries have it.
    fn text(&self) -> &str {
        &self.0
    }

    /// Whether a file is named as those of keys are, whatever its extension.
    fn is_name_of(path: &Path) -> bool {
        let digits = |stem: &str| {
            stem.len() == 2 * NAME_BYTES && stem.bytes().all(|digit| digit.is_ascii_hexdigit())
        };
        path.file_stem().and_then(OsStr::to_str).is_some_and(digits)
    }

    /// The name of its files.
    fn name(&self) -> String {
        Sha256::digest(&self.0)[..NAME_BYTES]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl MatrixName {
    pub(crate) fn new(name: String, shape: PackedShape) -> MatrixName {
        MatrixName {
            name,
            shape: format!("{shape:?}"),
        }
    }
}

impl Packing {
    /// The bytes of a matrix, if an entry has them.
    pub(crate) fn take(&self, name: &MatrixName, bytes: u64) -> Option<PackedBytes> {
        match self {
            Packing::Mapped(entry) => entry.matrix(name, bytes),
            Packing::Apart | Packing::Draft(..) => None,
        }
    }

    /// Notes a matrix that was packed.
    pub(crate) fn leave(&mut self, name: MatrixName, bytes: Option<PackedBytes>) {
        match (self, bytes) {
            (Packing::Draft(draft, _), Some(bytes)) => draft.add(name, &bytes),
            // An entry that lacks a matrix is not that of this program: the key should have told, and did not.
            (Packing::Mapped(entry), _) => entry.discard(),
            _ => {}
        }
    }

    /// Where the matrices came from in the end.
    pub(crate) fn origin(self) -> Origin {
        match self {
            Packing::Apart => Origin::Checkpoint,
            Packing::Mapped(entry) => Origin::Mapped(entry.bytes()),
            Packing::Draft(draft, unusable) => Origin::Packed { draft, unusable },
        }
    }
}

/// Whether an open file is the one that has this name now: nobody removed or replaced it before it was locked.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
