//! The compute threads of one device, shared by all engines on it.
//!
//! Owns the threads and the hand-over of work: a region is a number of items, which the calling thread and the helpers
//! claim one by one. The caller never waits for a helper that has not begun: where the processor is busy with other
//! things it computes everything itself. Helpers spin for a moment after a region, since a step is hundreds of short
//! regions, then park.
//!
//! Which thread computes an item must not matter to its result. Subnormal numbers are flushed to zero while a region
//! runs, on every thread: they cost more than tenfold.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::thread::{FlushSubnormals, pin};

#[cfg(test)]
mod tests;

/// How long a helper spins for the next region, and the caller for the last helper, before sleeping. The gaps between
/// the regions of a step are shorter.
const SPIN: Duration = Duration::from_micros(50);

/// A fixed set of compute threads: the caller of [`Pool::run`] and its helpers.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One region at a time, whichever engine it is of.
    region: Mutex<()>,
    cores: Vec<usize>,
}

struct Shared {
    /// `epoch << 16 | open << 15 | helpers inside`. The epoch counts regions.
    state: AtomicU32,
    job: UnsafeCell<*const Job<'static>>,
    stopping: AtomicBool,
    parked: Vec<AtomicBool>,
    /// The caller, while it sleeps until the last helper is out.
    waiter: Mutex<Option<Thread>>,
    waiting: AtomicBool,
    spin: Duration,
}

// SAFETY: `job` is written only by the holder of the pool's region lock while no helper is inside a region, and read
// only by helpers inside one.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is only followed inside a region, whose job outlives it.
unsafe impl Send for Shared {}

const OPEN: u32 = 1 << 15;
const INSIDE: u32 = OPEN - 1;

struct Job<'a> {
    items: usize,
    next: AtomicUsize,
    body: &'a (dyn Fn(usize, usize) + Sync),
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

impl Job<'_> {
    /// Claims and runs items until none is left.
    fn work(&self, thread: usize) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= self.items {
                return;
            }
            (self.body)(item, thread);
        }
    }

    /// As [`Job::work`]; a panic ends the region's remaining items and is kept for the caller.
    fn work_caught(&self, thread: usize) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(thread))) {
            self.next.store(self.items, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] counted. With `cores` the helpers are pinned, each to
    /// its own in turn from the second on; the first is for the engine's thread (see [`Pool::pin_caller`]).
    ///
    /// # Errors
    /// A thread cannot start.
    pub fn new(threads: usize, cores: &[usize]) -> std::io::Result<Arc<Pool>> {
        let helpers = threads.clamp(1, INSIDE as usize) - 1;
        let oversubscribed = std::thread::available_parallelism().map_or(1, usize::from) < threads;
        let shared = Arc::new(Shared {
            state: AtomicU32::new(0),
            job: UnsafeCell::new(std::ptr::null()),
            stopping: AtomicBool::new(false),
            parked: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            waiter: Mutex::new(None),
            waiting: AtomicBool::new(false),
            spin: if oversubscribed { Duration::ZERO } else { SPIN },
        });
        let mut pool = Pool {
            shared,
            helpers: Vec::with_capacity(helpers),
            region: Mutex::new(()),
            cores: cores.to_vec(),
        };
        for helper in 0..helpers {
            let shared = Arc::clone(&pool.shared);
            let core = (!cores.is_empty()).then(|| cores[(helper + 1) % cores.len()]);
            let thread = std::thread::Builder::new()
                .name(format!("compute-{}", helper + 1))
                .spawn(move || {
                    if let Some(core) = core {
                        pin(core);
                    }
                    let _flush = FlushSubnormals::new();
                    shared.help(helper);
                })?;
            pool.helpers.push(thread);
        }
        Ok(Arc::new(pool))
    }

    /// Threads, the caller counted.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Pins the calling thread to the pool's first core, if it was given cores.
    pub fn pin_caller(&self) {
        if let Some(core) = self.cores.first() {
            pin(*core);
        }
    }

    /// Runs `body(item, thread)` once for each item below `items`, on any thread below [`Pool::threads`]; no two items
    /// of this call have the same thread at one time. Returns when all are done. A panic in `body` is passed on.
    pub fn run(&self, items: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        let _flush = FlushSubnormals::new();
        let job = Job {
            items,
            next: AtomicUsize::new(0),
            body,
            panic: Mutex::new(None),
        };
        if self.helpers.is_empty() || items <= 1 {
            return job.work(0);
        }
        // Poisoned by a panic in some body: the lock guards no data.
        let _region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.open(&job);
        for (parked, helper) in self.shared.parked.iter().zip(&self.helpers).take(items - 1) {
            if parked.load(Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        job.work_caught(0);
        self.shared.close();
        let panic = job
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs `body(index, chunk, thread)` once for each `chunk_len` values (fewer at the end), as [`Pool::run`] does.
    pub fn run_chunks<T: Send>(
        &self,
        values: &mut [T],
        chunk_len: usize,
        body: &(dyn Fn(usize, &mut [T], usize) + Sync),
    ) {
        let (len, base) = (values.len(), Base::new(values));
        self.run(len.div_ceil(chunk_len), &|index, thread| {
            let start = index * chunk_len;
            let count = chunk_len.min(len - start);
            // SAFETY: inside `values`, which is borrowed for as long as the region runs; each index runs once, and the
            // chunks of different indices do not overlap.
            let chunk = unsafe { std::slice::from_raw_parts_mut(base.at(start), count) };
            body(index, chunk, thread);
        });
    }
}

/// The start of values that several threads write to, each to its own part. Sharing it is harmless; who follows it says
/// why nobody else writes there.
pub(super) struct Base<T>(*mut T);

// SAFETY: an address alone; see above.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    pub(super) fn new(values: &mut [T]) -> Base<T> {
        Base(values.as_mut_ptr())
    }

    /// The address of a value, which may lie outside.
    pub(super) fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper cannot have panicked: it catches what its jobs throw.
            let _ = helper.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .field("cores", &self.cores)
            .finish()
    }
}

impl Shared {
    /// Lets helpers in. `job` must live until [`Shared::close`] has returned.
    fn open(&self, job: &Job<'_>) {
        // SAFETY: the region lock is held and the last region was closed, so no helper is inside. The lifetime is
        // forgotten, not extended: the caller closes the region before the job ends, and nothing in between unwinds.
        unsafe { *self.job.get() = std::ptr::from_ref(job).cast() };
        let epoch = (self.state.load(Ordering::Relaxed) >> 16).wrapping_add(1);
        self.state.store(epoch << 16 | OPEN, Ordering::SeqCst);
    }

    /// Lets no more helpers in and waits until all are out.
    fn close(&self) {
        let out = || self.state.load(Ordering::SeqCst) & INSIDE == 0;
        if self.state.fetch_and(!OPEN, Ordering::SeqCst) & INSIDE == 0 || spin(self.spin, out) {
            return;
        }
        *self.waiter.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
        self.waiting.store(true, Ordering::SeqCst);
        while !out() {
            std::thread::park();
        }
        self.waiting.store(false, Ordering::SeqCst);
    }

    /// A helper's life.
    fn help(&self, helper: usize) {
        let mut last = 0;
        while !self.stopping.load(Ordering::SeqCst) {
            let called = || {
                let state = self.state.load(Ordering::SeqCst);
                (state & OPEN != 0 && state >> 16 != last) || self.stopping.load(Ordering::Relaxed)
            };
            if !spin(self.spin, called) {
                // Sequentially consistent with `run`: either it sees us parked or we see its region.
                self.parked[helper].store(true, Ordering::SeqCst);
                while !called() {
                    std::thread::park();
                }
                self.parked[helper].store(false, Ordering::SeqCst);
            }
            let state = self.state.load(Ordering::SeqCst);
            let entered = state & OPEN != 0
                && self
                    .state
                    .compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok();
            if !entered {
                continue;
            }
            last = state >> 16;
            // SAFETY: we are counted as inside the region, so its job lives and is not replaced.
            unsafe { (**self.job.get()).work_caught(helper + 1) };
            let state = self.state.fetch_sub(1, Ordering::SeqCst);
            let last_out = state & INSIDE == 1 && state & OPEN == 0;
            if last_out && self.waiting.load(Ordering::SeqCst) {
                // Left in place: the caller may be waiting for the next region's helpers by now.
                if let Some(waiter) = &*self.waiter.lock().unwrap_or_else(PoisonError::into_inner) {
                    waiter.unpark();
                }
            }
        }
    }
}

/// Spins until `done` holds; gives up after `longest`.
fn spin(longest: Duration, done: impl Fn() -> bool) -> bool {
    if done() {
        return true;
    }
    if longest.is_zero() {
        return false;
    }
    let end = Instant::now() + longest;
    loop {
        for _ in 0..32 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if Instant::now() >= end {
            return false;
        }
    }
}
