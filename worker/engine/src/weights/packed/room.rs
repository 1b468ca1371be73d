//! Room for one more entry: what nobody has mapped goes, the longest unused first.

use super::{ENTRY, NotWritten, PARTIAL, PackedCache, PackedKey};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What is left free on the disk: other programs need it more than this cache.
const DISK_RESERVE_BYTES: u64 = 1 << 30;

struct Found {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// Makes room for an entry of `needed` bytes, which is written as `partial`.
pub(super) fn make(cache: &PackedCache, needed: u64, partial: &Path) -> Result<(), NotWritten> {
    let folder = &cache.folder;
    let no_room = |reason: String| NotWritten::NoRoom {
        folder: folder.clone(),
        needed,
        reason,
    };
    let io = |error| NotWritten::Io {
        path: folder.clone(),
        error,
    };
    if needed > cache.bytes_max {
        return Err(no_room(format!("it may hold {}", cache.bytes_max)));
    }
    let mut promised = Promised::default();
    let mut entries = look(folder, partial, &mut promised).map_err(io)?;
    entries.sort_by_key(|entry| entry.used);
    let mut held: u64 = promised.bytes + entries.iter().map(|entry| entry.bytes).sum::<u64>();
    let free = free_bytes(folder).map_err(io)?;
    let mut free = free.saturating_sub(promised.missing);
    let fits = |held: u64, free: u64| {
        held + needed <= cache.bytes_max && needed.saturating_add(DISK_RESERVE_BYTES) <= free
    };
    for entry in entries {
        if fits(held, free) {
            break;
        }
        if remove_unused(&entry.path) {
            tracing::info!(path = %entry.path.display(), bytes = entry.bytes, "packed weights were taken out of the cache");
            held -= entry.bytes;
            free += entry.bytes;
        }
    }
    if fits(held, free) {
        return Ok(());
    }
    Err(no_room(format!(
        "it holds {held} of {} that are in use, and the disk has {free} free, of which {DISK_RESERVE_BYTES} stay so",
        cache.bytes_max
    )))
}

/// What others are writing.
#[derive(Default)]
struct Promised {
    /// Bytes of all of it, when it is whole.
    bytes: u64,
    /// Of these, what the disk has not given yet.
    missing: u64,
}

/// The entries in a folder, and what others are adding. What processes that were killed left half written is removed; files
/// that are not named like entries are somebody else's.
fn look(folder: &Path, partial: &Path, promised: &mut Promised) -> io::Result<Vec<Found>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if !PackedKey::is_name_of(&path) {
            continue;
        }
        let extension = path.extension().unwrap_or_default();
        if extension == PARTIAL && path != partial {
            if !remove_unused(&path)
                && let Ok(found) = fs::metadata(&path)
            {
                promised.bytes += found.len();
                promised.missing += found.len().saturating_sub(512 * found.blocks());
            }
        } else if extension == ENTRY {
            // Others may remove it meanwhile.
            if let Ok(found) = fs::metadata(&path) {
                let (bytes, used) = (found.len(), found.modified()?);
                entries.push(Found { path, bytes, used });
            }
        }
    }
    Ok(entries)
}

/// Removes a file, unless somebody has it locked.
fn remove_unused(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_ok() && fs::remove_file(path).is_ok())
}

fn free_bytes(folder: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(folder)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
