//! Logs as files: appended to, cut by half at a time, read from the end. Blocks.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::names;
use common::wire::message::LogPhase;

use super::Place;

/// A file that would become longer is put aside, in the place of the one that was put aside before: a log takes at
/// most twice as much.
const FILE_BYTES_MAX: u64 = 512 << 10;
/// Most of a log that is shown at a time.
const SHOWN_BYTES_MAX: u64 = 256 << 10;
/// Files of one endpoint; the oldest of entities that are no more go first.
const FILES_MAX: usize = 128;

/// The folder of all logs.
pub(super) struct Files {
    folder: PathBuf,
}

impl Files {
    pub fn new(folder: PathBuf) -> Self {
        Files { folder }
    }

    /// Adds lines to a log.
    pub fn append(&self, place: &Place, phase: LogPhase, text: &str) -> Result<()> {
        let path = self.path(place, phase)?;
        let bytes = match fs::metadata(&path) {
            Ok(found) => found.len(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let folder = self.folder.join(&place.endpoint);
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&folder)?;
                make_room(&folder)?;
                0
            }
            Err(error) => return Err(error),
        };
        if bytes > 0 && bytes + text.len() as u64 > FILE_BYTES_MAX {
            fs::rename(&path, aside(&path))?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)?;
        file.write_all(text.as_bytes())
    }

    /// The newest part of a log, in whole lines.
    pub fn read(&self, place: &Place, phase: LogPhase) -> Result<String> {
        let path = self.path(place, phase)?;
        let newer = tail(&path, SHOWN_BYTES_MAX)?;
        let older = tail(&aside(&path), SHOWN_BYTES_MAX - newer.len() as u64)?;
        Ok(older + &newer)
    }

    /// Deletes an endpoint's logs; what cannot be deleted is logged and stays.
    pub fn forget(&self, endpoint: &str) {
        if names::check_entity(endpoint).is_err() {
            return;
        }
        match fs::remove_dir_all(self.folder.join(endpoint)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(endpoint, %error, "the logs of a deleted endpoint cannot be deleted");
            }
            _ => {}
        }
    }

    fn path(&self, Place { endpoint, entity }: &Place, phase: LogPhase) -> Result<PathBuf> {
        // Names are checked when they are given; nothing else becomes a path.
        for name in [endpoint, entity] {
            names::check_entity(name)
                .map_err(|e| std::io::Error::new(ErrorKind::InvalidInput, e.to_string()))?;
        }
        let phase = match phase {
            LogPhase::Build => "build",
            LogPhase::Run => "run",
        };
        Ok(self
            .folder
            .join(endpoint)
            .join(format!("{entity}.{phase}.log")))
    }
}

/// Where a full file is put.
fn aside(path: &Path) -> PathBuf {
    path.with_extension("log.old")
}

/// The last lines of a file, at most so many bytes; empty when it is not there.
fn tail(path: &Path, bytes_max: u64) -> Result<String> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        file => file?,
    };
    let bytes = file.metadata()?.len();
    let skipped = bytes.saturating_sub(bytes_max);
    // One byte before tells whether the first line is whole.
    file.seek(SeekFrom::Start(skipped.saturating_sub(1)))?;
    let mut read = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut read)?;
    let mut from = 0;
    if skipped > 0 {
        let line_end = read.iter().position(|byte| *byte == b'\n');
        from = line_end.map_or(read.len(), |at| at + 1);
    }
    Ok(String::from_utf8_lossy(&read[from..]).into_owned())
}

/// Deletes the oldest files of a folder that has too many for another one.
fn make_room(folder: &Path) -> Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    if files.len() < FILES_MAX {
        return Ok(());
    }
    files.sort();
    for (_, path) in &files[..=files.len() - FILES_MAX] {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(entity: &str) -> Place {
        Place {
            endpoint: "e".into(),
            entity: entity.into(),
        }
    }

    #[test]
    fn a_log_is_bounded_and_its_newest_lines_stay() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path().join("logs"));
        let text = |i: usize| format!("{i:0>1022}\n");
        for i in 0..2000 {
            files.append(&place("m"), LogPhase::Run, &text(i)).unwrap();
        }
        let bytes: u64 = fs::read_dir(folder.path().join("logs/e"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(
            (FILE_BYTES_MAX..=2 * FILE_BYTES_MAX).contains(&bytes),
            "{bytes}"
        );
        let shown = files.read(&place("m"), LogPhase::Run).unwrap();
        assert!(
            shown.len() as u64 <= SHOWN_BYTES_MAX && shown.len() > 250 << 10,
            "{}",
            shown.len()
        );
        let lines: Vec<usize> = shown.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(lines.last(), Some(&1999));
        assert!(lines.windows(2).all(|pair| pair[0] + 1 == pair[1]));
    }

    #[test]
    fn a_log_that_fits_is_shown_whole_over_both_files() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path().to_owned());
        let long = format!("{}\n", "x".repeat(FILE_BYTES_MAX as usize - 10_000));
        files.append(&place("m"), LogPhase::Run, &long).unwrap();
        files
            .append(&place("m"), LogPhase::Run, "before\n")
            .unwrap();
        let more = format!("{}\n", "y".repeat(20_000));
        files.append(&place("m"), LogPhase::Run, &more).unwrap();
        let shown = files.read(&place("m"), LogPhase::Run).unwrap();
        assert_eq!(shown, format!("before\n{more}"));
    }

    #[test]
    fn entities_that_come_and_go_do_not_leave_files_without_bound() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path().to_owned());
        for i in 0..FILES_MAX + 40 {
            files
                .append(&place(&format!("m-{i}")), LogPhase::Build, "x\n")
                .unwrap();
        }
        let kept = fs::read_dir(folder.path().join("e")).unwrap().count();
        assert_eq!(kept, FILES_MAX);
    }

    #[test]
    fn nothing_but_a_name_becomes_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(folder.path().join("logs"));
        for entity in ["..", "a/b", "", ".hidden"] {
            assert!(
                files.append(&place(entity), LogPhase::Run, "x\n").is_err(),
                "{entity}"
            );
        }
        assert!(!folder.path().join("logs").exists());
    }
}
