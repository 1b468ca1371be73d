//! The device's memory as numbers: how much of it which shard has been promised, and what was kept of shards that are over.
//!
//! Owns the promises, and of what was kept the values that hold the bytes. A shard that is being let go still holds its
//! bytes for a moment; whoever asks then waits for it. What was kept serves the next life of the same shard. It goes as
//! soon as anybody else needs its room, when nobody wants the shard any more, or with age.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::ids::{Generation, ReplicaId};
use common::request::{Failure, FailureKind};
use common::wire::message::{ModelSource, ShardOptions, ShardSpec};

/// What was kept is freed when no next life has come for it within this time.
const KEPT_MAX: Duration = Duration::from_secs(600);

/// Why what was loaded is freed, and not kept for another life.
const UNWANTED: &str = "nobody wants the shard any more";

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
    /// The oldest first.
    kept: Vec<Kept>,
    /// Bytes of what was kept and is being freed: they are not free before that is over.
    freeing: u64,
}

struct Held {
    what: Identity,
    generation: Generation,
    bytes: u64,
    leaving: bool,
    /// The same shard will be loaded again.
    keep: bool,
}

/// What was kept of a shard, with its promise.
struct Kept {
    what: Identity,
    generation: Generation,
    bytes: u64,
    since: Instant,
    model: Model,
}

/// A loaded model: what exactly, its backend knows.
pub type Model = Box<dyn Any + Send>;

/// What tells whether a shard may go on with what was kept of another: everything but the generation and the other ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    replica: ReplicaId,
    rank: u32,
    ranks: usize,
    source: ModelSource,
    options: ShardOptions,
}

impl Identity {
    fn of(spec: &ShardSpec) -> Identity {
        Identity {
            replica: spec.replica,
            rank: spec.rank,
            ranks: spec.members.len(),
            source: spec.source.clone(),
            options: spec.options.clone(),
        }
    }
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

    /// A lease of nothing yet, for a shard.
    pub fn lease(self: &Arc<Memory>, spec: &ShardSpec) -> Lease {
        let mut leases = self.lock();
        let id = leases.next;
        leases.next += 1;
        let held = Held {
            what: Identity::of(spec),
            generation: spec.generation,
            bytes: 0,
            leaving: false,
            keep: true,
        };
        leases.held.insert(id, held);
        Lease {
            memory: self.clone(),
            id,
        }
    }

    /// Nobody wants a replica's shards of this generation or an older one any more: frees what was kept of them, and those
    /// that are not over yet will keep nothing.
    pub fn forget(&self, replica: ReplicaId, up_to: Generation) {
        let mut leases = self.lock();
        let old = |what: &Identity, generation| what.replica == replica && generation <= up_to;
        for held in leases.held.values_mut() {
            held.keep &= !old(&held.what, held.generation);
        }
        let gone = leases
            .kept
            .extract_if(.., |kept| old(&kept.what, kept.generation));
        let gone = gone.collect();
        drop(self.free(leases, gone, UNWANTED));
    }

    /// Frees what was kept for too long.
    pub fn forget_old(&self, now: Instant) {
        let mut leases = self.lock();
        let gone = leases.kept.extract_if(.., |kept| is_old(kept.since, now));
        let gone = gone.collect();
        drop(self.free(leases, gone, "no next life came"));
    }

    /// Frees what is kept no longer. That takes its time, and the lock is free meanwhile.
    fn free<'a>(
        &'a self,
        mut leases: MutexGuard<'a, Leases>,
        gone: Vec<Kept>,
        why: &str,
    ) -> MutexGuard<'a, Leases> {
        let bytes: u64 = gone.iter().map(|kept| kept.bytes).sum();
        leases.freeing += bytes;
        drop(leases);
        for kept in gone {
            let Kept {
                what,
                generation,
                bytes,
                model,
                ..
            } = kept;
            drop(model);
            tracing::info!(replica = %what.replica, %generation, rank = what.rank, bytes, why, "kept weights freed");
        }
        let mut leases = self.lock();
        leases.freeing -= bytes;
        self.changed.notify_all();
        leases
    }

    fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether what is kept since then has been kept for too long.
fn is_old(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) >= KEPT_MAX
}

impl Leases {
    fn sum(&self, leaving: bool) -> u64 {
        let held = self.held.values();
        held.filter(|held| held.leaving == leaving)
            .map(|held| held.bytes)
            .sum()
    }

    fn kept(&self) -> u64 {
        self.kept.iter().map(|kept| kept.bytes).sum()
    }
}

impl Lease {
    /// Takes what was kept of the same shard's earlier life, or else `bytes` of memory. Waits, at most `within`, while the
    /// earlier life is not over, or while shards that are being let go hold what is missing.
    ///
    /// # Errors
    /// With the numbers: [`FailureKind::TooLarge`] when what shards hold that stay leaves too little,
    /// [`FailureKind::Unavailable`] when what is missing was not given back in time.
    pub fn take(&self, bytes: u64, within: Duration) -> Result<Option<Model>, Failure> {
        let deadline = Instant::now() + within;
        let total = self.memory.total;
        let mut leases = self.memory.lock();
        loop {
            let Some(what) = leases.held.get(&self.id).map(|held| held.what.clone()) else {
                return Ok(None);
            };
            if let Some(kept) = leases.kept.iter().position(|kept| kept.what == what) {
                let kept = leases.kept.remove(kept);
                self.add(&mut leases, kept.bytes);
                return Ok(Some(kept.model));
            }
            let (staying, kept) = (leases.sum(false), leases.kept());
            let leaving = leases.sum(true) + leases.freeing;
            let free = total.saturating_sub(staying + leaving + kept);
            let left = deadline.saturating_duration_since(Instant::now());
            let will_keep =
                |held: &Held| held.leaving && held.keep && held.bytes > 0 && held.what == what;
            let earlier = leases.held.values().any(will_keep);
            if bytes <= free && (!earlier || left.is_zero()) {
                self.add(&mut leases, bytes);
                return Ok(None);
            }
            let possible = total.saturating_sub(staying);
            if bytes <= possible && bytes > possible.saturating_sub(kept) && !leases.kept.is_empty()
            {
                let oldest = leases.kept.remove(0);
                leases = self
                    .memory
                    .free(leases, vec![oldest], "others need its room");
                continue;
            }
            if bytes > possible || left.is_zero() {
                let kind = if bytes > possible {
                    FailureKind::TooLarge
                } else {
                    FailureKind::Unavailable
                };
                return Err(Failure::new(
                    kind,
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

    fn add(&self, leases: &mut Leases, bytes: u64) {
        if let Some(held) = leases.held.get_mut(&self.id) {
            held.bytes += bytes;
        }
    }

    /// Leaves the shard's model on the device for its next life: its bytes are no longer this lease's. False, and the model
    /// is dropped, when there will be no next life.
    pub fn keep(&self, model: Model) -> bool {
        let mut leases = self.memory.lock();
        let Some(held) = leases.held.get_mut(&self.id).filter(|held| held.keep) else {
            drop(leases);
            drop(model);
            return false;
        };
        let kept = Kept {
            what: held.what.clone(),
            generation: held.generation,
            bytes: std::mem::take(&mut held.bytes),
            since: Instant::now(),
            model,
        };
        tracing::info!(replica = %kept.what.replica, generation = %kept.generation, rank = kept.what.rank,
            bytes = kept.bytes, "weights kept");
        leases.kept.push(kept);
        self.memory.changed.notify_all();
        true
    }

    /// Gives the bytes back, and stays a lease of nothing.
    pub fn give_back(&self) {
        if let Some(held) = self.memory.lock().held.get_mut(&self.id) {
            held.bytes = 0;
        }
        self.memory.changed.notify_all();
    }

    /// Says that these bytes will soon be given back, or put aside where the shard's next life shall `keep` them.
    pub fn leave(&self, keep: bool) {
        if let Some(held) = self.memory.lock().held.get_mut(&self.id) {
            held.leaving = true;
            held.keep &= keep;
        }
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
mod tests;
