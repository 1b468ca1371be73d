//! What is known of a table without reading its rows, kept beside them: so that a start takes no longer for many rows,
//! and totals outlive the segments they were summed from.
//!
//! Never needed: without it everything that the rows still say is read from them. Blocks.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Result, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::segment::Segment;
use super::totals::Total;

/// The file's name in a table's folder.
const FILE: &str = "index.json";
/// Longer than any that was written.
const BYTES_MAX: u64 = 64 << 20;

/// A table at one moment.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Index {
    /// Its segments.
    pub segments: Vec<Segment>,
    /// What their rows, and those of segments before them, sum up to.
    pub totals: Vec<Total>,
}

impl Index {
    /// Reads a folder's; an empty one when there is none that can be read.
    pub fn read(folder: &Path) -> Index {
        let path = folder.join(FILE);
        let read = fs::metadata(&path).and_then(|found| {
            if found.len() > BYTES_MAX {
                return Err(ErrorKind::InvalidData.into());
            }
            Ok(serde_json::from_slice(&fs::read(&path)?)?)
        });
        match read {
            Ok(index) => index,
            Err(error) if error.kind() == ErrorKind::NotFound => Index::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a table's index cannot be read; its rows are read instead");
                Index::default()
            }
        }
    }

    /// Replaces a folder's, wholly or not at all.
    ///
    /// # Errors
    /// What the disk says.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let new = folder.join(format!("{FILE}.new"));
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&new, folder.join(FILE))?;
        File::open(folder)?.sync_all()
    }
}
