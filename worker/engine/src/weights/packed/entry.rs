//! An entry that is mapped: checked whole before anything of it is used, and locked for as long as it is.

use super::format::{self, Index};
use super::{MatrixName, PackedKey, Parallel, is_at};
use crate::backend::PackedBytes;
use memmap2::{Advice, Mmap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

/// Pieces that are checked between two words of progress: some tenths of a second's worth from a disk.
const ROUND_PIECES: usize = 64;

/// The matrices of an entry.
#[derive(Debug)]
pub(crate) struct Entry {
    path: PathBuf,
    file: Arc<Mapped>,
    index: Index,
}

/// A mapped file; those who remove entries see its lock.
#[derive(Debug)]
struct Mapped {
    map: Mmap,
    _lock: File,
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

/// Why an entry is not used.
#[derive(Debug)]
pub(super) enum EntryError {
    /// It is not what was written.
    Damaged(String),
    /// It cannot be read.
    Io(io::Error),
}

impl From<io::Error> for EntryError {
    fn from(error: io::Error) -> EntryError {
        EntryError::Io(error)
    }
}

impl Entry {
    /// The entry of a key; none where there is none.
    pub(super) fn open(
        path: &Path,
        key: &PackedKey,
        parallel: Parallel<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Entry>, EntryError> {
        let lock = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Those who lock it for themselves only look whether they may remove it.
        lock.lock_shared()?;
        if !is_at(&lock, path)? {
            return Ok(None);
        }
        let map = map(&lock)?;
        // Its time orders evictions; an entry whose time cannot be set goes early.
        let _ = lock.set_modified(SystemTime::now());
        let (index, pieces_end) = format::parse(&map)
            .map_err(|reason| EntryError::Damaged(format!("{reason} ({} bytes)", map.len())))?;
        if index.key != key.text() {
            return Err(EntryError::Damaged(format!("it is of {}", index.key)));
        }
        check(&map, &index, pieces_end, parallel, progress)?;
        Ok(Some(Entry {
            path: path.to_owned(),
            file: Arc::new(Mapped { map, _lock: lock }),
            index,
        }))
    }

    /// The bytes of a matrix, if it is here in this shape.
    pub(super) fn matrix(&self, name: &MatrixName, bytes: u64) -> Option<PackedBytes> {
        let mut matrices = self.index.matrices.iter();
        let placed = matrices.find(|placed| placed.is(name, bytes))?;
        PackedBytes::part(&self.file, placed.range())
    }

    /// Bytes of all matrices.
    pub(super) fn bytes(&self) -> u64 {
        self.index.matrices.iter().map(|placed| placed.bytes).sum()
    }

    /// Takes it out of the cache; who has it mapped keeps it.
    pub(super) fn discard(&self) {
        // Where it cannot be removed the next load finds the same, and packs the same.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Compares the digests of all pieces. Reading them also brings the file into memory, in large pages where the system has
/// them for files.
fn check(
    map: &Mmap,
    index: &Index,
    pieces_end: usize,
    parallel: Parallel<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), EntryError> {
    // Advice only: older systems refuse it.
    let _ = map.advise(Advice::HugePage);
    let damaged: Vec<AtomicBool> = index
        .pieces
        .iter()
        .map(|_| AtomicBool::new(false))
        .collect();
    for first in (0..index.pieces.len()).step_by(ROUND_PIECES) {
        let round = ROUND_PIECES.min(index.pieces.len() - first);
        parallel(round, &|i| {
            let piece = format::piece(first + i, pieces_end);
            let _ = map.advise_range(Advice::PopulateRead, piece.start, piece.len());
            let differs = format::digest(&map[piece]) != index.pieces[first + i];
            damaged[first + i].store(differs, Ordering::Relaxed);
        });
        progress(format::piece(first + round - 1, pieces_end).end as u64);
    }
    match damaged
        .iter()
        .position(|damaged| damaged.load(Ordering::Relaxed))
    {
        Some(piece) => Err(EntryError::Damaged(format!(
            "the bytes {:?} have another digest",
            format::piece(piece, pieces_end)
        ))),
        None => Ok(()),
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is read-only and only ever read as plain numbers, so no content can break a type. Entries are
    // written under another name and never changed under theirs; removing one leaves the mapping as it is. That a
    // stranger writes into the file is outside this process's power.
    unsafe { Mmap::map(file) }
}
