//! An entry to be: the matrices of a loaded model, written to the cache while the model already serves.
//!
//! Holds no weights: each piece is borrowed for the moment of its copying, and when the model is gone in between the entry
//! is given up. Takes the memory of one piece.

use super::format::{self, ALIGNMENT, Index, PIECE_BYTES, Placed};
use super::{ENTRY, MatrixName, PARTIAL, PackedCache, PackedKey, is_at, room};
use crate::backend::{PackedBytes, WeakBytes};
use crate::models::checkpoint::Fingerprint;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Matrices that are not written yet.
#[derive(Debug)]
pub struct Draft {
    cache: PackedCache,
    key: PackedKey,
    matrices: Vec<(MatrixName, WeakBytes)>,
    /// Of the files that they were read from.
    model: Fingerprint,
}

/// Why an entry was not written: the next load packs again, and nothing else comes of it.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// Somebody else has written it, or is about to.
    #[error("another process writes it")]
    Elsewhere,
    /// The model was unloaded.
    #[error("the model was unloaded in between")]
    Unloaded,
    /// The files were written to while they were loaded, or since.
    #[error("the model's files were changed in between")]
    ModelChanged,
    /// The cache may not hold so much, or the disk has not the room.
    #[error("{needed} bytes are needed in {}, {reason}", folder.display())]
    NoRoom {
        /// The cache.
        folder: PathBuf,
        /// Bytes of the entry.
        needed: u64,
        /// What stands against them.
        reason: String,
    },
    /// The disk says no.
    #[error("{}: {error}", path.display())]
    Io {
        /// What was to be made.
        path: PathBuf,
        /// The system's words.
        error: io::Error,
    },
}

impl Draft {
    pub(super) fn new(cache: PackedCache, key: PackedKey, model: Fingerprint) -> Draft {
        Draft {
            cache,
            key,
            matrices: Vec::new(),
            model,
        }
    }

    pub(super) fn add(&mut self, name: MatrixName, bytes: &PackedBytes) {
        self.matrices.push((name, bytes.downgrade()));
    }

    /// Writes the entry; it becomes visible when it is whole and on the disk. Gives the bytes of its file.
    ///
    /// # Errors
    /// [`NotWritten`]; nothing is left behind, but by a process that is killed: the next one cleans up.
    pub fn write(&self) -> Result<u64, NotWritten> {
        let folder = &self.cache.folder;
        fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
        let partial = self.cache.path(&self.key, PARTIAL);
        let file = claim(&partial)?;
        let entry = self.cache.path(&self.key, ENTRY);
        let written = self.write_claimed(&file, &partial, &entry);
        if written.is_err() {
            // Renamed or not, the name is gone.
            let _ = fs::remove_file(&partial);
        }
        written
    }

    /// Writes the claimed file, and gives it its name.
    fn write_claimed(&self, file: &File, partial: &Path, entry: &Path) -> Result<u64, NotWritten> {
        if entry.exists() {
            return Err(NotWritten::Elsewhere);
        }
        let io = |error| failed(partial, error);
        // Empty, and so long: others that look for room see what this will take.
        file.set_len(0).map_err(io)?;
        file.set_len(self.bytes()).map_err(io)?;
        room::make(&self.cache, self.bytes(), partial)?;
        let mut pieces = Pieces::new(file);
        pieces.put(&format::head()).map_err(io)?;
        let mut matrices = Vec::with_capacity(self.matrices.len());
        for (name, bytes) in &self.matrices {
            matrices.push(Placed {
                name: name.name.clone(),
                shape: name.shape.clone(),
                offset: pieces.written,
                bytes: bytes.len() as u64,
            });
            for start in (0..bytes.len()).step_by(PIECE_BYTES) {
                let bytes = bytes.upgrade().ok_or(NotWritten::Unloaded)?;
                let bytes = &bytes.as_ref()[start..];
                let part = &bytes[..bytes.len().min(PIECE_BYTES)];
                pieces.put(part).map_err(io)?;
            }
            pieces.align().map_err(io)?;
        }
        let (offset, digests) = pieces.finish().map_err(io)?;
        let index = Index {
            key: self.key.text().to_owned(),
            matrices,
            pieces: digests,
        };
        let tail = format::tail(&index, offset).map_err(|error| io(error.into()))?;
        (&mut &*file).write_all(&tail).map_err(io)?;
        file.set_len(offset + tail.len() as u64).map_err(io)?;
        file.sync_all().map_err(io)?;
        if !self.model.stands() {
            return Err(NotWritten::ModelChanged);
        }
        fs::rename(partial, entry)
            .and_then(|()| File::open(&self.cache.folder)?.sync_all())
            .map_err(|error| failed(entry, error))?;
        Ok(offset + tail.len() as u64)
    }

    /// Bytes of all matrices.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = self.matrices.iter().map(|(_, bytes)| bytes.len() as u64);
        bytes.sum()
    }
}

/// The file of an entry on its way, for this process alone.
fn claim(partial: &Path) -> Result<File, NotWritten> {
    let io = |error| failed(partial, error);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(partial)
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(NotWritten::Elsewhere),
        Err(TryLockError::Error(error)) => return Err(io(error)),
    }
    // Who had it before has renamed it, or somebody cleaned up.
    if !is_at(&file, partial).map_err(io)? {
        return Err(NotWritten::Elsewhere);
    }
    Ok(file)
}

/// What is written before the index, a piece at a time: large writes come to lie in large pages.
struct Pieces<'a> {
    file: &'a File,
    piece: Vec<u8>,
    digests: Vec<u64>,
    written: u64,
}

impl Pieces<'_> {
    fn new(file: &File) -> Pieces<'_> {
        Pieces {
            file,
            piece: Vec::with_capacity(PIECE_BYTES),
            digests: Vec::new(),
            written: 0,
        }
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at(bytes.len().min(PIECE_BYTES - self.piece.len()));
            self.piece.extend_from_slice(part);
            bytes = rest;
            if self.piece.len() == PIECE_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Zeros up to where a matrix may begin.
    fn align(&mut self) -> io::Result<()> {
        let end = self.written.next_multiple_of(ALIGNMENT as u64);
        self.put(&vec![0; (end - self.written) as usize])
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            self.digests.push(format::digest(&self.piece));
            (&mut &*self.file).write_all(&self.piece)?;
            self.piece.clear();
        }
        Ok(())
    }

    /// Where the pieces end, and their digests.
    fn finish(mut self) -> io::Result<(u64, Vec<u64>)> {
        self.flush()?;
        Ok((self.written, self.digests))
    }
}

fn failed(path: &Path, error: io::Error) -> NotWritten {
    NotWritten::Io {
        path: path.to_owned(),
        error,
    }
}
