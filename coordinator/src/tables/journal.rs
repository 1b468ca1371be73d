//! An append-only table in files: rows go to the newest segment, whole segments go when they are old.
//!
//! Owns the files of one folder. What a crash can leave is a torn last row: it is cut off when the folder is opened, and
//! never read. A failed write is taken back, so that rows stay whole; what cannot be written is lost, and said to be.
//! Blocks.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::segment::{Position, Segment, SegmentName};
use crate::calendar::{DAY_MS, Day};

/// When segments begin and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// A segment takes no row that would make it longer.
    pub segment_bytes_max: u64,
    /// All segments together; the oldest go.
    pub bytes_max: u64,
    /// Segments go when their last row is older.
    pub days_max: u64,
}

/// A row as a line without its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The row's time.
    pub time_ms: u64,
    /// The row.
    pub text: Vec<u8>,
}

/// Rows that could not be written.
#[derive(Debug)]
pub struct Loss {
    /// How many.
    pub rows: usize,
    /// Why.
    pub error: std::io::Error,
}

/// The files of a table.
pub struct Journal {
    folder: PathBuf,
    bounds: Bounds,
    segments: Vec<Segment>,
    /// The newest segment, when it is open.
    current: Option<File>,
    /// The newest segment takes no more rows: what stands behind its last row could not be cut off.
    spoiled: bool,
    /// Something was written since the last sync.
    unsynced: bool,
}

impl Journal {
    /// Opens a folder's segments. `known` is what an earlier life knew of them; `visit` sees every row that it did not
    /// know.
    ///
    /// # Errors
    /// When the folder or a file in it cannot be read or repaired.
    pub fn open(
        folder: PathBuf,
        bounds: Bounds,
        known: &[Segment],
        mut visit: impl FnMut(&[u8]),
    ) -> Result<Journal> {
        let mut segments = Vec::new();
        let names = names(&folder)?;
        for name in &names {
            let path = folder.join(name.to_string());
            let length = fs::metadata(&path)?.len();
            let before = known
                .iter()
                .find(|segment| segment.name == *name)
                .filter(|segment| segment.bytes <= length);
            let (mut segment, count) = match before {
                Some(segment) => (segment.clone(), true),
                // Shorter than it was: rows that were counted are gone with a power cut, and not to be counted again.
                None => (
                    Segment::empty(*name),
                    !known.iter().any(|segment| segment.name == *name),
                ),
            };
            if length > segment.bytes {
                scan(&path, &mut segment, |line| {
                    if count {
                        visit(line);
                    }
                })?;
            }
            if length > segment.bytes && Some(name) == names.last() {
                OpenOptions::new()
                    .write(true)
                    .open(&path)?
                    .set_len(segment.bytes)?;
            }
            segments.push(segment);
        }
        Ok(Journal {
            folder,
            bounds,
            segments,
            current: None,
            spoiled: false,
            unsynced: false,
        })
    }

    /// Its segments, the oldest first.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Adds rows. True when a new segment was begun.
    ///
    /// # Errors
    /// [`Loss`]: these last rows are not in the table.
    pub fn append(&mut self, rows: &[Line]) -> std::result::Result<bool, Loss> {
        let mut rest = rows;
        let mut rolled = false;
        while let Some(first) = rest.first() {
            let lost = |error| Loss {
                rows: rest.len(),
                error,
            };
            rolled |= self.make_ready(first).map_err(lost)?;
            let Some(newest) = self.segments.last() else {
                return Err(lost(ErrorKind::NotFound.into()));
            };
            let mut after = newest.clone();
            let mut bytes = Vec::new();
            let mut taken = 0;
            for row in rest {
                let more = row.text.len() as u64 + 1;
                let fits = after.bytes + more <= self.bounds.segment_bytes_max;
                if taken > 0 && (!fits || Day::of_ms(row.time_ms) > after.name.day) {
                    break;
                }
                bytes.extend_from_slice(&row.text);
                bytes.push(b'\n');
                after.add(row.time_ms, more);
                taken += 1;
            }
            self.write(&bytes).map_err(lost)?;
            if let Some(newest) = self.segments.last_mut() {
                *newest = after;
            }
            rest = &rest[taken..];
        }
        Ok(rolled)
    }

    /// Opens the segment that `row` goes to. True when it is a new one.
    fn make_ready(&mut self, row: &Line) -> Result<bool> {
        let day = Day::of_ms(row.time_ms);
        let more = row.text.len() as u64 + 1;
        let newest = self.segments.last();
        let name = match newest {
            Some(newest) if day > newest.name.day => SegmentName::first_of(day),
            // A clock that was set back does not bring old days back.
            Some(newest)
                if self.spoiled
                    || (newest.rows > 0 && newest.bytes + more > self.bounds.segment_bytes_max) =>
            {
                newest.name.next_part()
            }
            Some(newest) => newest.name,
            None => SegmentName::first_of(day),
        };
        let is_new = newest.is_none_or(|newest| newest.name != name);
        if is_new {
            self.sync()?;
            self.current = None;
        }
        if self.current.is_none() {
            if is_new {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&self.folder)?;
            }
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(self.folder.join(name.to_string()))?;
            self.current = Some(file);
        }
        if is_new {
            self.segments.push(Segment::empty(name));
            self.spoiled = false;
        }
        Ok(is_new)
    }

    /// Writes whole rows behind the newest segment's last one, or nothing.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let (Some(file), Some(newest)) = (&mut self.current, self.segments.last()) else {
            return Err(ErrorKind::NotFound.into());
        };
        let written = file.write_all(bytes);
        if let Err(error) = written {
            self.spoiled = file.set_len(newest.bytes).is_err();
            self.current = None;
            return Err(error);
        }
        self.unsynced = true;
        Ok(())
    }

    /// Brings what was written to the disk.
    ///
    /// # Errors
    /// What the disk says.
    pub fn sync(&mut self) -> Result<()> {
        if let Some(file) = self.current.as_ref().filter(|_| self.unsynced) {
            file.sync_data()?;
        }
        self.unsynced = false;
        Ok(())
    }

    /// Closes the newest segment's file; the next row opens it again.
    ///
    /// # Errors
    /// What the disk says of the last sync.
    pub fn rest(&mut self) -> Result<()> {
        let synced = self.sync();
        self.current = None;
        synced
    }

    /// Deletes the segments that are too old or too many. True when one went.
    ///
    /// # Errors
    /// When one cannot be deleted; it stays, and is tried again the next time.
    pub fn retain(&mut self, now_ms: u64) -> Result<bool> {
        let mut bytes = self.bytes();
        let mut gone = false;
        while let Some(oldest) = self.segments.first() {
            let age_ms = now_ms.saturating_sub(oldest.last_ms.max(oldest.name.day.start_ms()));
            let old = age_ms > self.bounds.days_max.saturating_mul(DAY_MS);
            let much = bytes > self.bounds.bytes_max && self.segments.len() > 1;
            if !old && !much {
                break;
            }
            match fs::remove_file(self.folder.join(oldest.name.to_string())) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            bytes -= oldest.bytes;
            self.segments.remove(0);
            gone = true;
            if self.segments.is_empty() {
                self.current = None;
            }
        }
        Ok(gone)
    }
}

/// The segments in a folder, in order; none when there is no folder.
fn names(folder: &Path) -> Result<Vec<SegmentName>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().to_str().and_then(SegmentName::parse));
    }
    names.sort_unstable();
    Ok(names)
}

/// What every row has.
#[derive(Deserialize)]
struct Timed {
    time_ms: u64,
}

/// Reads on behind a segment's known rows. Lines that are no rows count as bytes only.
fn scan(path: &Path, segment: &mut Segment, mut visit: impl FnMut(&[u8])) -> Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(segment.bytes))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line)? as u64;
        if line.pop() != Some(b'\n') {
            return Ok(());
        }
        match serde_json::from_slice::<Timed>(&line) {
            Ok(Timed { time_ms }) => {
                segment.add(time_ms, bytes);
                visit(&line);
            }
            Err(_) => segment.bytes += bytes,
        }
    }
}

/// Reads the rows of these segments, from `from` on, each with the place behind it, until `visit` breaks. A segment that
/// was deleted meanwhile has no rows.
///
/// # Errors
/// What the disk says. A place that is not between two rows is [`ErrorKind::InvalidInput`].
pub fn read(
    folder: &Path,
    segments: &[Segment],
    from: Option<Position>,
    mut visit: impl FnMut(Position, &[u8]) -> ControlFlow<()>,
) -> Result<()> {
    let mut line = Vec::new();
    for segment in segments {
        let mut offset = match from {
            Some(from) if from.segment > segment.name => continue,
            Some(from) if from.segment == segment.name => from.offset,
            _ => 0,
        };
        if offset >= segment.bytes {
            continue;
        }
        let mut file = match File::open(folder.join(segment.name.to_string())) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            file => file?,
        };
        if offset > 0 {
            let mut before = [0];
            file.seek(SeekFrom::Start(offset - 1))?;
            file.read_exact(&mut before)?;
            if before != *b"\n" {
                return Err(ErrorKind::InvalidInput.into());
            }
        }
        let mut reader = BufReader::new(file.take(segment.bytes - offset));
        loop {
            line.clear();
            let bytes = reader.read_until(b'\n', &mut line)? as u64;
            if line.pop() != Some(b'\n') {
                break;
            }
            offset += bytes;
            let behind = Position {
                segment: segment.name,
                offset,
            };
            if visit(behind, &line).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
