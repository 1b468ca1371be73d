//! Fetching a version's files: several at a time, resumed where the registry can, checked before they count.
//!
//! Files on their way are `parts/N`, files that are whole and checked `files/PATH`; both are kept for the next try when
//! one fails. Runs on the opening thread, in a small runtime of its own: hashing and writing block nobody else.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::request::{Failure, FailureKind};
use common::wire::message::{RemoteFile, RemoteModel};
use futures::StreamExt;
use registry::{Error, Registry};
use sha2::{Digest, Sha256};

use super::cache::failed;
use super::library::Told;

/// Files fetched at a time.
const PARALLEL: usize = 4;
/// Tries of a file that do not bring it further, before it fails.
const TRIES_MAX: u32 = 5;
/// Pause before a file is tried again; doubles with each try in vain.
const PAUSE_FIRST: Duration = Duration::from_millis(250);
/// How often progress is told.
const TOLD_EVERY: Duration = Duration::from_millis(250);
/// Longest file whose registry does not say how long it is.
const FILE_BYTES_MAX: u64 = 1 << 40;
/// What is read at a time from a part that is there already.
const READ_BYTES: usize = 1 << 20;
const STAGE: &str = "fetching model";

/// Fetches all files into a folder; gives the one below it in which they then are, and nothing else.
pub(super) fn all(
    registry: &Arc<Registry>,
    remote: &RemoteModel,
    folder: &Path,
    told: Told<'_>,
    wanted: &dyn Fn() -> bool,
) -> Result<PathBuf, Failure> {
    let fetch = Fetch {
        registry,
        remote,
        files: folder.join("files"),
        parts: folder.join("parts"),
        done: Cell::new(0),
    };
    for folder in [&fetch.files, &fetch.parts] {
        fs::create_dir_all(folder).map_err(|e| failed(folder, &e))?;
    }
    let bytes = remote.files.iter().filter_map(|file| file.bytes);
    let total = bytes.fold(0, u64::saturating_add);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(FailureKind::Internal, e.to_string()))?;
    runtime.block_on(async {
        let files = remote.files.iter().enumerate();
        let each = files.map(|(index, file)| fetch.file(index, file));
        let mut fetching = futures::stream::iter(each).buffer_unordered(PARALLEL);
        let mut ticks = tokio::time::interval(TOLD_EVERY);
        loop {
            tokio::select! {
                biased;
                _ = ticks.tick() => {
                    told(STAGE, fetch.done.get(), total);
                    if !wanted() {
                        return Err(Failure::new(FailureKind::Unavailable, "not wanted any more"));
                    }
                }
                fetched = fetching.next() => match fetched {
                    Some(fetched) => fetched?,
                    None => return Ok(()),
                },
            }
        }
    })?;
    told(STAGE, fetch.done.get(), total);
    Ok(fetch.files)
}

struct Fetch<'a> {
    registry: &'a Registry,
    remote: &'a RemoteModel,
    files: PathBuf,
    parts: PathBuf,
    /// Bytes that are here.
    done: Cell<u64>,
}

/// Why a transfer ended early.
enum Broken {
    /// Another may bring the rest.
    Passing(Failure),
    /// It came whole and is not what it should be.
    Wrong(Failure),
    /// Trying again does not help.
    Fatal(Failure),
}

impl Fetch<'_> {
    async fn file(&self, index: usize, file: &RemoteFile) -> Result<(), Failure> {
        let target = self.files.join(&file.path);
        // Only what was checked gets there.
        if let Ok(there) = fs::metadata(&target) {
            self.count(there.len());
            return Ok(());
        }
        let part = self.parts.join(index.to_string());
        let (mut tries, mut wrong, mut pause) = (0, 0, PAUSE_FIRST);
        loop {
            let before = length(&part);
            let failure = match self.transfer(&part, file).await {
                Ok(()) => break,
                Err(Broken::Fatal(failure)) => return Err(failure),
                Err(Broken::Wrong(failure)) => {
                    wrong += 1;
                    if wrong > 1 {
                        return Err(failure);
                    }
                    failure
                }
                Err(Broken::Passing(failure)) => failure,
            };
            if length(&part) > before {
                (tries, pause) = (0, PAUSE_FIRST);
            }
            tries += 1;
            if tries >= TRIES_MAX {
                return Err(failure);
            }
            tracing::warn!(
                file = file.path,
                reason = failure.message,
                "a file is fetched on"
            );
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        let keep = || {
            if let Some(folder) = target.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::rename(&part, &target)
        };
        keep().map_err(|e| failed(&target, &e))
    }

    /// Brings a part further: to its end, checked and on the disk, or as far as it goes.
    async fn transfer(&self, path: &Path, file: &RemoteFile) -> Result<(), Broken> {
        let disk = |e: std::io::Error| Broken::Fatal(failed(path, &e));
        let mut part = Part::open(path, file).map_err(disk)?;
        self.count(part.bytes);
        let moved = self.fill(&mut part, path, file).await;
        let checked = match moved {
            Ok(()) => part
                .check(file)
                .map_err(|reason| Broken::Wrong(self.bad(file, &reason))),
            Err(broken) => Err(broken),
        };
        match checked {
            Ok(()) => part.file.sync_all().map_err(disk),
            // Begun anew: what is here is not the file.
            Err(Broken::Wrong(failure)) => {
                self.uncount(part.bytes);
                part.restart().map_err(disk)?;
                Err(Broken::Wrong(failure))
            }
            Err(broken) => {
                self.uncount(part.bytes);
                Err(broken)
            }
        }
    }

    async fn fill(&self, part: &mut Part, path: &Path, file: &RemoteFile) -> Result<(), Broken> {
        if file.bytes == Some(part.bytes) && part.bytes > 0 {
            return Ok(());
        }
        let disk = |e: std::io::Error| Broken::Fatal(failed(path, &e));
        let opened = self.registry.read(&self.remote.uri, &file.path, part.bytes);
        let mut body = opened.await.map_err(|e| self.broken(file, &e))?;
        if let (Some(said), Some(expected)) = (body.bytes, file.bytes)
            && said != expected
        {
            let reason = format!("the registry has {said} bytes of it and had listed {expected}");
            return Err(Broken::Fatal(self.bad(file, &reason)));
        }
        if body.from != part.bytes {
            if body.from != 0 {
                let reason = format!("the registry went on at byte {} of it", body.from);
                return Err(Broken::Fatal(self.bad(file, &reason)));
            }
            // It does not resume.
            self.uncount(part.bytes);
            part.restart().map_err(disk)?;
        }
        let bytes_max = file.bytes.unwrap_or(FILE_BYTES_MAX);
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|e| self.broken(file, &e))?;
            if chunk.len() as u64 > bytes_max - part.bytes {
                let reason =
                    format!("the registry sends more than the {bytes_max} bytes it listed");
                return Err(Broken::Wrong(self.bad(file, &reason)));
            }
            part.append(&chunk).map_err(disk)?;
            self.count(chunk.len() as u64);
        }
        match file.bytes.or(body.bytes) {
            Some(expected) if part.bytes < expected => {
                let reason = format!("it ended after {} of {expected} bytes", part.bytes);
                Err(Broken::Passing(self.failure(
                    FailureKind::Unavailable,
                    file,
                    &reason,
                )))
            }
            _ => Ok(()),
        }
    }

    fn broken(&self, file: &RemoteFile, error: &Error) -> Broken {
        let reason = error.to_string();
        match error {
            Error::Unavailable(_) => {
                Broken::Passing(self.failure(FailureKind::Unavailable, file, &reason))
            }
            _ => Broken::Fatal(self.bad(file, &reason)),
        }
    }

    fn bad(&self, file: &RemoteFile, reason: &str) -> Failure {
        self.failure(FailureKind::BadRequest, file, reason)
    }

    fn failure(&self, kind: FailureKind, file: &RemoteFile, reason: &str) -> Failure {
        let RemoteModel { registry, uri, .. } = self.remote;
        let path = &file.path;
        Failure::new(
            kind,
            format!("fetching {path} of {uri} from registry {registry}: {reason}"),
        )
    }

    fn count(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
    }

    fn uncount(&self, bytes: u64) {
        self.done.set(self.done.get().saturating_sub(bytes));
    }
}

/// A file on its way, and the digest of what is here of it.
struct Part {
    file: File,
    bytes: u64,
    digest: Option<Sha256>,
}

impl Part {
    fn open(path: &Path, remote: &RemoteFile) -> std::io::Result<Part> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)?;
        let mut part = Part {
            bytes: file.metadata()?.len(),
            file,
            digest: remote.sha256.is_some().then(Sha256::new),
        };
        if remote.bytes.is_some_and(|bytes| part.bytes > bytes) {
            part.restart()?;
        }
        if let Some(digest) = &mut part.digest {
            let mut buffer = vec![0; READ_BYTES];
            loop {
                match part.file.read(&mut buffer)? {
                    0 => break,
                    count => digest.update(&buffer[..count]),
                }
            }
        }
        part.file.seek(std::io::SeekFrom::End(0))?;
        Ok(part)
    }

    fn append(&mut self, chunk: &[u8]) -> std::io::Result<()> {
        self.file.write_all(chunk)?;
        self.bytes += chunk.len() as u64;
        if let Some(digest) = &mut self.digest {
            digest.update(chunk);
        }
        Ok(())
    }

    fn restart(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.bytes = 0;
        if let Some(digest) = &mut self.digest {
            *digest = Sha256::new();
        }
        Ok(())
    }

    /// Compares the digest with the registry's, if it has told one.
    fn check(&mut self, remote: &RemoteFile) -> Result<(), String> {
        let (Some(expected), Some(digest)) = (&remote.sha256, self.digest.take()) else {
            return Ok(());
        };
        let got = hex::encode(digest.finalize());
        if got.eq_ignore_ascii_case(expected) {
            return Ok(());
        }
        Err(format!(
            "its SHA-256 is {got}; the registry lists {expected}"
        ))
    }
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |there| there.len())
}

#[cfg(test)]
mod tests;
