//! The memory that ranks on one machine share: two slots of data and a counter per rank.
//!
//! Owns the layout and the order of reads and writes. Round `s` of a rank goes through its slot `s % 2`:
//! 1. it waits until every rank has published round `s - 1`, hence has read all it wanted of round `s - 2`, whose slot
//!    is about to be overwritten;
//! 2. it fills the slot and publishes `s` (release);
//! 3. whoever reads it waits for `s` (acquire) and reads before publishing its own round `s + 1`.
//!
//! Knows nothing of who is alive: waits call back regularly and end when the callback fails.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};

use super::sys;

/// Numbers per slot: 256 KiB, so that both slots of two ranks fit a core's share of the caches. Longer data goes
/// through in rounds.
pub(super) const SLOT: usize = 64 << 10;
const HEADER_BYTES: usize = 4096;
/// One rank's counter has two cache lines for itself: adjacent lines are fetched in pairs.
const COUNTER_BYTES: usize = 128;
const MAGIC: u64 = 0x7461_6e64_656d_7331;
/// How long a wait sleeps between two looks at the living.
const SLEEP: Duration = Duration::from_millis(10);
/// A wait spins so long before it sleeps: about the skew of ranks in a decode step.
const SPIN: Duration = Duration::from_micros(40);

/// A mapping of the shared memory.
pub(super) struct Segment {
    map: MmapRaw,
    ranks: u32,
    spin: Duration,
}

/// A rank's counter, in shared memory.
#[repr(C)]
struct Counter {
    /// Last published round.
    round: AtomicU32,
    /// Ranks that sleep on `round`.
    sleepers: AtomicU32,
}

/// The file's name; removes the file when dropped. The mappings live on.
pub(super) struct Name(pub(super) String);

impl Name {
    fn path(name: &str) -> io::Result<PathBuf> {
        let valid = name.len() == 32 && name.bytes().all(|c| c.is_ascii_hexdigit());
        if !valid {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "odd name of shared memory",
            ));
        }
        Ok(PathBuf::from(format!("/dev/shm/tandem-{name}")))
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if let Ok(path) = Name::path(&self.0) {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Segment {
    /// Makes the shared memory for a group, under a random name that only this user can open.
    pub(super) fn create(ranks: u32) -> io::Result<(Segment, Name)> {
        let name = Name(
            super::random::<16>()?
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        );
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(Name::path(&name.0)?)?;
        sys::reserve(&file, bytes(ranks))?;
        let segment = Segment::map(&file, ranks)?;
        // SAFETY: the mapping is longer than the header, and nobody else knows its name yet.
        unsafe {
            segment.map.as_mut_ptr().cast::<u64>().write(MAGIC);
            segment.map.as_mut_ptr().add(8).cast::<u32>().write(ranks);
        }
        Ok((segment, name))
    }

    /// Maps the shared memory that rank 0 made.
    pub(super) fn open(name: &str, ranks: u32) -> io::Result<Segment> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(Name::path(name)?)?;
        let metadata = file.metadata()?;
        if !metadata.is_file()
            || metadata.len() != bytes(ranks) as u64
            || metadata.mode() & 0o077 != 0
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "shared memory of an odd size or mode",
            ));
        }
        let segment = Segment::map(&file, ranks)?;
        // SAFETY: the mapping is longer than the header; rank 0 wrote it before it told the name.
        let header = unsafe {
            (
                segment.map.as_ptr().cast::<u64>().read(),
                segment.map.as_ptr().add(8).cast::<u32>().read(),
            )
        };
        if header != (MAGIC, ranks) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "shared memory of another layout",
            ));
        }
        Ok(segment)
    }

    fn map(file: &File, ranks: u32) -> io::Result<Segment> {
        let map = MmapOptions::new().len(bytes(ranks)).map_raw(file)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // With more ranks than cores a spinning rank keeps the one it waits for from running.
        let spin = if cores >= ranks as usize {
            SPIN
        } else {
            Duration::ZERO
        };
        Ok(Segment { map, ranks, spin })
    }

    /// Fills this rank's slot for `round` and tells the others. The caller has waited for all ranks' `round - 1`.
    pub(super) fn publish(&mut self, rank: u32, round: u32, values: &[f32]) {
        assert!(values.len() <= SLOT && rank < self.ranks);
        let slot = self.slot(rank, round);
        // SAFETY: the slot is ours to write: every rank has published `round - 1`, so none still reads `round - 2`.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), slot, values.len()) };
        let counter = self.counter(rank);
        // Sequentially consistent on both sides: either we see the sleeper or it sees the new round.
        counter.round.store(round, Ordering::SeqCst);
        if counter.sleepers.load(Ordering::SeqCst) > 0 {
            sys::futex_wake_all(&counter.round);
        }
    }

    /// Waits until `rank` has published `round`. Spins, then sleeps, calling `alive` between two sleeps.
    pub(super) fn wait<E>(
        &self,
        rank: u32,
        round: u32,
        alive: &mut dyn FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let counter = self.counter(rank);
        let reached = || reaches(counter.round.load(Ordering::Acquire), round);
        if reached() || self.spin(&reached) {
            return Ok(());
        }
        loop {
            counter.sleepers.fetch_add(1, Ordering::SeqCst);
            let seen = counter.round.load(Ordering::SeqCst);
            if !reaches(seen, round) {
                sys::futex_wait(&counter.round, seen, SLEEP);
            }
            counter.sleepers.fetch_sub(1, Ordering::SeqCst);
            if reached() {
                return Ok(());
            }
            alive()?;
        }
    }

    fn spin(&self, reached: &dyn Fn() -> bool) -> bool {
        if self.spin.is_zero() {
            return false;
        }
        let end = Instant::now() + self.spin;
        loop {
            for _ in 0..64 {
                if reached() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    /// The first `len` numbers of `rank`'s slot for `round`. The caller has waited for it and drops the slice before
    /// it publishes `round + 1` (it borrows the segment, which publishing needs for itself).
    pub(super) fn values(&self, rank: u32, round: u32, len: usize) -> &[f32] {
        assert!(len <= SLOT && rank < self.ranks);
        // SAFETY: inside the mapping and aligned; the owner does not write the slot again before this rank has
        // published `round + 1`.
        unsafe { std::slice::from_raw_parts(self.slot(rank, round), len) }
    }

    fn slot(&self, rank: u32, round: u32) -> *mut f32 {
        let index = rank as usize * 2 + (round % 2) as usize;
        let offset =
            HEADER_BYTES + self.ranks as usize * COUNTER_BYTES + index * SLOT * size_of::<f32>();
        // SAFETY: `bytes` counts two slots per rank after the counters, so the offset lies inside the mapping.
        unsafe { self.map.as_mut_ptr().add(offset).cast() }
    }

    fn counter(&self, rank: u32) -> &Counter {
        assert!(rank < self.ranks);
        // SAFETY: inside the mapping, aligned to 128 bytes, zero at first; all access to it is atomic.
        unsafe {
            &*self
                .map
                .as_ptr()
                .add(HEADER_BYTES + rank as usize * COUNTER_BYTES)
                .cast::<Counter>()
        }
    }
}

/// Whether a counter at `at` has reached `round`; the counters wrap around.
fn reaches(at: u32, round: u32) -> bool {
    at.wrapping_sub(round) as i32 >= 0
}

fn bytes(ranks: u32) -> usize {
    HEADER_BYTES + ranks as usize * (COUNTER_BYTES + 2 * SLOT * size_of::<f32>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_gone_once_its_name_is_dropped_and_the_memory_stays() {
        let (mut first, name) = Segment::create(2).unwrap();
        let second = Segment::open(&name.0, 2).unwrap();
        let path = Name::path(&name.0).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(name);
        assert!(!path.exists());
        first.publish(0, 1, &[1.5, 2.5]);
        second.wait(0, 1, &mut || Err("not published")).unwrap();
        assert_eq!(second.values(0, 1, 2), [1.5, 2.5]);
    }

    #[test]
    fn a_name_cannot_leave_its_folder() {
        assert!(Segment::open("../../etc/passwd", 2).is_err());
        assert!(Segment::open("00000000000000000000000000/../aa", 2).is_err());
    }

    #[test]
    fn a_segment_for_another_number_of_ranks_is_refused() {
        let (_segment, name) = Segment::create(2).unwrap();
        assert!(Segment::open(&name.0, 4).is_err());
    }

    #[test]
    fn a_wait_ends_when_nobody_is_alive() {
        let (segment, _name) = Segment::create(2).unwrap();
        assert_eq!(segment.wait(1, 1, &mut || Err("all dead")), Err("all dead"));
    }

    #[test]
    fn rounds_wrap_around() {
        assert!(reaches(0, u32::MAX));
        assert!(reaches(5, 5));
        assert!(!reaches(u32::MAX, 0));
    }
}
