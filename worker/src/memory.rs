//! The device's memory as numbers: how much of it which shard has been promised.
//!
//! Owns the promises, not the bytes. A shard that is being let go still holds its bytes for a moment; whoever asks then
//! waits for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::request::{Failure, FailureKind};

/// A device's memory.
pub struct Memory {
    total: u64,
    leases: Mutex<Leases>,
    changed: Condvar,
}

#[derive(Default)]
struct Leases {
    next: u64,
    held: BTreeMap<u64, Held>,
}

#[derive(Default)]
struct Held {
    bytes: u64,
    leaving: bool,
}

/// One shard's part of the memory; given back when dropped.
pub struct Lease {
    memory: Arc<Memory>,
    id: u64,
}

impl Memory {
    /// A device with so many bytes for shards.
    pub fn new(total: u64) -> Arc<Memory> {
        Arc::new(Memory {
            total,
            leases: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// A lease of nothing yet.
    pub fn lease(self: &Arc<Memory>) -> Lease {
        let mut leases = self.lock();
        let id = leases.next;
        leases.next += 1;
        leases.held.insert(id, Held::default());
        Lease {
            memory: self.clone(),
            id,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Takes bytes. Waits, at most `within`, while shards that are being let go hold what is missing.
    ///
    /// # Errors
    /// [`FailureKind::TooLarge`] with the numbers.
    pub fn take(&self, bytes: u64, within: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + within;
        let total = self.memory.total;
        let mut leases = self.memory.lock();
        loop {
            let sum = |leaving| {
                leases
                    .held
                    .values()
                    .filter(|held| held.leaving == leaving)
                    .map(|held| held.bytes)
                    .sum::<u64>()
            };
            let (staying, leaving) = (sum(false), sum(true));
            let free = total.saturating_sub(staying + leaving);
            if bytes <= free {
                leases.held.entry(self.id).or_default().bytes += bytes;
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if bytes > total.saturating_sub(staying) || left.is_zero() {
                return Err(Failure::new(
                    FailureKind::TooLarge,
                    format!(
                        "the shard needs {} and the device has {} free of {}",
                        show(bytes),
                        show(free),
                        show(total)
                    ),
                ));
            }
            leases = self
                .memory
                .changed
                .wait_timeout(leases, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Says that these bytes will soon be given back.
    pub fn leave(&self) {
        self.memory.lock().held.entry(self.id).or_default().leaving = true;
        self.memory.changed.notify_all();
    }

    /// It was said that these bytes will be given back: nobody wants the shard any more.
    pub fn is_leaving(&self) -> bool {
        let leases = self.memory.lock();
        leases.held.get(&self.id).is_some_and(|held| held.leaving)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.memory.lock().held.remove(&self.id);
        self.memory.changed.notify_all();
    }
}

/// Bytes for people.
pub fn show(bytes: u64) -> String {
    const GIB: f64 = (1u64 << 30) as f64;
    const MIB: f64 = (1u64 << 20) as f64;
    if bytes as f64 >= GIB {
        format!("{:.2} GiB", bytes as f64 / GIB)
    } else {
        format!("{:.1} MiB", bytes as f64 / MIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_does_not_fit_is_refused_at_once_with_numbers() {
        let memory = Memory::new(100 * MIB);
        let first = memory.lease();
        first.take(60 * MIB, Duration::from_secs(60)).unwrap();
        let second = memory.lease();
        let refused = second.take(50 * MIB, Duration::from_secs(60)).unwrap_err();
        assert_eq!(refused.kind, FailureKind::TooLarge);
        assert_eq!(
            refused.message,
            "the shard needs 50.0 MiB and the device has 40.0 MiB free of 100.0 MiB"
        );
        drop(first);
        second.take(50 * MIB, Duration::ZERO).unwrap();
    }

    #[test]
    fn what_is_being_given_back_is_waited_for() {
        let memory = Memory::new(100 * MIB);
        let first = memory.lease();
        first.take(60 * MIB, Duration::ZERO).unwrap();
        first.leave();
        let second = memory.lease();
        assert!(
            second.take(50 * MIB, Duration::ZERO).is_err(),
            "no time to wait"
        );
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| second.take(50 * MIB, Duration::from_secs(60)));
            drop(first);
            waiting.join().unwrap().unwrap();
        });
    }
}
