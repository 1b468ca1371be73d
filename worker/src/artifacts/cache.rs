//! The cache of fetched versions: a folder that the workers of one machine share.
//!
//! ```text
//! KEY/                 a version, whole: made by renaming, so that a half one is never seen
//! KEY.partial/         one on its way, kept for the next try
//! KEY.lock             shared by who uses the version, exclusive for who fetches or removes it; its time is the last use
//! ```
//!
//! A key is a digest of what tells the version from any other, and of the files that are fetched of it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::config::CacheConfig;
use common::request::{Failure, FailureKind};
use common::wire::message::RemoteModel;
use sha2::{Digest, Sha256};

use super::library::{Held, Told};
use crate::memory::show;

/// How often one who waits for another's download looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// What is left free on the disk.
const DISK_RESERVE_BYTES: u64 = 64 << 20;
const PARTIAL: &str = "partial";
const LOCK: &str = "lock";

/// Fetches a version's files into a folder, completely or with an error.
pub(super) type Fetch<'a> = &'a dyn Fn(&Path) -> Result<PathBuf, Failure>;

/// A cache folder.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    bytes_max: Option<u64>,
}

/// What a try to get at a version came to.
enum Turn {
    Held(Held),
    /// Another process is at it.
    Wait,
    /// Things changed in between.
    Again,
}

impl Cache {
    pub(super) fn new(config: &CacheConfig) -> Cache {
        Cache {
            folder: config.folder.clone(),
            bytes_max: config.bytes_max,
        }
    }

    /// A version's folder: as it is in the cache, or after `fetch`. Of several who want it at a time one fetches, and
    /// the others wait.
    pub(super) fn hold(
        &self,
        remote: &RemoteModel,
        fetch: Fetch<'_>,
        told: Told<'_>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Held, Failure> {
        fs::create_dir_all(&self.folder).map_err(|e| failed(&self.folder, &e))?;
        let version = Version {
            remote,
            folder: self.folder.join(key(remote)),
        };
        while wanted() {
            match self.turn(&version, fetch)? {
                Turn::Held(held) => return Ok(held),
                Turn::Again => {}
                Turn::Wait => {
                    let done = bytes_in(&version.with(PARTIAL));
                    told(WAITING, done, version.bytes());
                    std::thread::sleep(LOOK_AGAIN);
                }
            }
        }
        Err(Failure::new(
            FailureKind::Unavailable,
            "not wanted any more",
        ))
    }

    fn turn(&self, version: &Version<'_>, fetch: Fetch<'_>) -> Result<Turn, Failure> {
        let lock = version.lock()?;
        if version.is_whole() {
            return match lock.try_lock_shared() {
                Ok(()) => Ok(version.used(lock)),
                Err(TryLockError::WouldBlock) => Ok(Turn::Wait),
                Err(TryLockError::Error(e)) => Err(failed(&version.with(LOCK), &e)),
            };
        }
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Turn::Wait),
            Err(TryLockError::Error(e)) => return Err(failed(&version.with(LOCK), &e)),
        }
        if !version.owns(&lock) || version.is_whole() {
            return Ok(Turn::Again);
        }
        // What is there and not whole was damaged: nobody uses it, or the lock would not be ours.
        remove(&version.folder)?;
        let partial = version.with(PARTIAL);
        fs::create_dir_all(&partial).map_err(|e| failed(&partial, &e))?;
        self.make_room(version)?;
        let fetched = fetch(&partial)?;
        fs::rename(&fetched, &version.folder)
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .map_err(|e| failed(&version.folder, &e))?;
        remove(&partial)?;
        // Another may come in between: the next turn looks again.
        Ok(Turn::Again)
    }

    /// Removes versions that nobody uses, the longest unused first, until there is room for one more.
    fn make_room(&self, version: &Version<'_>) -> Result<(), Failure> {
        let missing = version
            .bytes()
            .saturating_sub(bytes_in(&version.with(PARTIAL)));
        let free = free_bytes(&self.folder).map_err(|e| failed(&self.folder, &e))?;
        let too_large = |reason: String| Err(Failure::new(FailureKind::TooLarge, reason));
        let cache = self.folder.display();
        if let Some(bytes_max) = self.bytes_max
            && version.bytes() > bytes_max
        {
            return too_large(format!(
                "the model's files have {} and the cache in {cache} may hold {}; raise worker.cache_bytes_max",
                show(version.bytes()),
                show(bytes_max)
            ));
        }
        let mut entries = self.entries().map_err(|e| failed(&self.folder, &e))?;
        entries.sort_by_key(|entry| entry.used);
        let mut held: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut free = free;
        let fits = |held: u64, free: u64| {
            let in_cache = self.bytes_max.is_none_or(|max| held + missing <= max);
            in_cache && missing.saturating_add(DISK_RESERVE_BYTES) <= free
        };
        for entry in entries {
            if fits(held, free) {
                return Ok(());
            }
            if entry.stem != version.folder && self.evict(&entry)? {
                tracing::info!(folder = %entry.stem.display(), bytes = entry.bytes, "a version was taken out of the cache");
                held -= entry.bytes;
                free += entry.bytes;
            }
        }
        if fits(held, free) {
            return Ok(());
        }
        too_large(format!(
            "{} are to be fetched into {cache}: the disk has {} free, and the versions in use have {}{}; free some disk, \
             or set worker.cache_dir",
            show(missing),
            show(free),
            show(held),
            self.bytes_max
                .map(|max| format!(" of {} (worker.cache_bytes_max)", show(max)))
                .unwrap_or_default()
        ))
    }

    /// The versions here, whole or not.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for lock in fs::read_dir(&self.folder)? {
            let lock = lock?;
            let path = lock.path();
            if path.extension().is_none_or(|extension| extension != LOCK) {
                continue;
            }
            let stem = path.with_extension("");
            let bytes = bytes_in(&stem) + bytes_in(&stem.with_extension(PARTIAL));
            let used = lock.metadata()?.modified()?;
            entries.push(Entry { stem, bytes, used });
        }
        Ok(entries)
    }

    /// Removes a version, unless somebody uses it.
    fn evict(&self, entry: &Entry) -> Result<bool, Failure> {
        let path = entry.stem.with_extension(LOCK);
        let Ok(lock) = File::open(&path) else {
            return Ok(false);
        };
        if lock.try_lock().is_err() {
            return Ok(false);
        }
        remove(&entry.stem)?;
        remove(&entry.stem.with_extension(PARTIAL))?;
        fs::remove_file(&path).map_err(|e| failed(&path, &e))?;
        Ok(true)
    }
}

/// What is said while another process fetches.
const WAITING: &str = "waiting for another worker's download";

struct Entry {
    stem: PathBuf,
    bytes: u64,
    used: SystemTime,
}

struct Version<'a> {
    remote: &'a RemoteModel,
    folder: PathBuf,
}

impl Version<'_> {
    fn with(&self, extension: &str) -> PathBuf {
        self.folder.with_extension(extension)
    }

    /// All its bytes, as far as the registry says.
    fn bytes(&self) -> u64 {
        let bytes = self.remote.files.iter().filter_map(|file| file.bytes);
        bytes.fold(0, u64::saturating_add)
    }

    fn lock(&self) -> Result<File, Failure> {
        let path = self.with(LOCK);
        let options = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        options.map_err(|e| failed(&path, &e))
    }

    /// The lock is the file that others will lock: nobody removed it before it was locked.
    fn owns(&self, lock: &File) -> bool {
        match (lock.metadata(), fs::metadata(self.with(LOCK))) {
            (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }

    /// All files are there in their lengths.
    fn is_whole(&self) -> bool {
        self.folder.is_dir()
            && self.remote.files.iter().all(|file| {
                let there = fs::metadata(self.folder.join(&file.path));
                there.is_ok_and(|there| {
                    there.is_file() && file.bytes.is_none_or(|bytes| bytes == there.len())
                })
            })
    }

    /// A shared lock is held: the version is ours to use, if it is still there.
    fn used(&self, lock: File) -> Turn {
        if !self.owns(&lock) || !self.is_whole() {
            return Turn::Again;
        }
        // Its time orders evictions; a version whose time cannot be set goes early.
        let _ = lock.set_modified(SystemTime::now());
        Turn::Held(Held::cached(self.folder.clone(), lock))
    }
}

fn key(remote: &RemoteModel) -> String {
    const CHARS: usize = 40;
    let mut digest = Sha256::new();
    let mut field = |text: &str| {
        digest.update((text.len() as u64).to_le_bytes());
        digest.update(text.as_bytes());
    };
    field(&remote.identity);
    for file in &remote.files {
        field(&file.path);
    }
    let mut key = hex::encode(digest.finalize());
    key.truncate(CHARS);
    key
}

/// Bytes of the files in a folder and those below; 0 for one that is not there.
fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

fn free_bytes(folder: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

fn remove(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(folder, &e)),
        _ => Ok(()),
    }
}

/// A disk that says no.
pub(super) fn failed(path: &Path, error: &io::Error) -> Failure {
    let full = matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    );
    let (kind, help) = match full {
        true => (
            FailureKind::TooLarge,
            "; free some disk, or set worker.cache_dir in cluster.toml",
        ),
        false => (FailureKind::BadRequest, ""),
    };
    Failure::new(kind, format!("{}: {error}{help}", path.display()))
}

#[cfg(test)]
mod tests;
