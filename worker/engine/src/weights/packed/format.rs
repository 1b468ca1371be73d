//! The bytes of an entry: what lies where, and the digests that tell a damaged one.
//!
//! ```text
//! MAGIC, zeros up to 4096
//! matrices, each at a multiple of 4096, zeros in between
//! index (JSON): the key, the matrices, the digest of each piece of all that lies before the index
//! trailer: offset, length and digest of the index (u64, little endian), MAGIC
//! ```
//!
//! The index comes last, so that an entry is written in one go while its matrices are counted. Digests are XXH3: they are
//! against disks and cut files, at the speed of memory, and not against whoever may write to the folder.

use super::MatrixName;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use xxhash_rust::xxh3::xxh3_64;

/// Counts changes of this format.
pub(super) const VERSION: u32 = 1;
/// Bytes that a digest covers, the last fewer: a thread's share of the check, and of what is read at a time.
pub(super) const PIECE_BYTES: usize = 4 << 20;
/// Matrices lie at multiples of a page.
pub(super) const ALIGNMENT: usize = 4096;

const MAGIC: [u8; 8] = *b"tndmpack";
const TRAILER_BYTES: usize = 32;

/// What an entry holds.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    /// The text of the key.
    pub key: String,
    /// In the order of the file.
    pub matrices: Vec<Placed>,
    /// Of each piece before the index.
    pub pieces: Vec<u64>,
}

/// A matrix in an entry.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Placed {
    pub name: String,
    pub shape: String,
    pub offset: u64,
    pub bytes: u64,
}

/// The first page.
pub(super) fn head() -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.resize(ALIGNMENT, 0);
    head
}

/// The end of an entry whose pieces end at `offset`.
pub(super) fn tail(index: &Index, offset: u64) -> Result<Vec<u8>, serde_json::Error> {
    let mut tail = serde_json::to_vec(index)?;
    let numbers = [offset, tail.len() as u64, digest(&tail)];
    for number in numbers {
        tail.extend_from_slice(&number.to_le_bytes());
    }
    tail.extend_from_slice(&MAGIC);
    Ok(tail)
}

/// Reads the index, and where the pieces before it end. Believes nothing that does not fit together; the digests of the
/// pieces are still to be compared.
pub(super) fn parse(file: &[u8]) -> Result<(Index, usize), &'static str> {
    let (before, trailer) = file
        .split_last_chunk::<TRAILER_BYTES>()
        .ok_or("too short")?;
    let (numbers, magic) = trailer.split_at(TRAILER_BYTES - MAGIC.len());
    let number = |i: usize| -> u64 {
        let bytes = numbers[i * 8..][..8].iter().rev();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let [offset, length, index_digest] = [number(0), number(1), number(2)];
    if magic != MAGIC || !before.starts_with(&MAGIC) {
        return Err("it does not begin or end as entries do");
    }
    let ends = offset.checked_add(length) == Some(before.len() as u64);
    let Some(index) = usize::try_from(offset)
        .ok()
        .filter(|_| ends)
        .and_then(|offset| before.get(offset..))
    else {
        return Err("its trailer is not of this file");
    };
    let pieces_end = before.len() - index.len();
    if digest(index) != index_digest {
        return Err("its index has another digest");
    }
    let index: Index = serde_json::from_slice(index).map_err(|_| "its index cannot be read")?;
    if index.pieces.len() != pieces_end.div_ceil(PIECE_BYTES) {
        return Err("it has digests for another length");
    }
    let fits = |matrix: &Placed| {
        let end = matrix.offset.checked_add(matrix.bytes);
        matrix.offset.is_multiple_of(ALIGNMENT as u64)
            && end.is_some_and(|end| end <= pieces_end as u64)
    };
    if !index.matrices.iter().all(fits) {
        return Err("a matrix lies outside of it");
    }
    Ok((index, pieces_end))
}

/// Where a piece lies.
pub(super) fn piece(number: usize, pieces_end: usize) -> Range<usize> {
    number * PIECE_BYTES..pieces_end.min((number + 1) * PIECE_BYTES)
}

/// The digest of some bytes.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

impl Placed {
    pub(super) fn is(&self, name: &MatrixName, bytes: u64) -> bool {
        self.name == name.name && self.shape == name.shape && self.bytes == bytes
    }

    /// Where it lies; [`parse`] has seen that it does.
    pub(super) fn range(&self) -> Range<usize> {
        self.offset as usize..(self.offset + self.bytes) as usize
    }
}
