//! One communicator as its owner, its aborters and its ending thread share it.
//!
//! Owns the lock around every entry into NCCL, and how a call that goes on in the background is waited for.

use std::ffi::c_uint;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use crate::ending::End;
use crate::error::{Error, IN_PROGRESS, SUCCESS};
use crate::functions::RawCommunicator;
use crate::library::Library;

/// What an asynchronous error is of.
const EARLIER: &str = "an earlier call";

/// A call that goes on in the background is asked after without a pause for so long: about the time that NCCL's thread
/// takes to launch a collective.
const SPIN: Duration = Duration::from_micros(200);
/// Then it is asked after so often.
const PAUSE: Duration = Duration::from_micros(200);

/// `ncclComm_t`, owned by whoever took it out of the lock.
pub(crate) struct Handle(pub(crate) RawCommunicator);

// SAFETY: NCCL binds a communicator to a device, not to a thread; it asks only that no two threads use one at a time,
// which the lock around the handle sees to.
unsafe impl Send for Handle {}

/// How a communicator is doing, as far as its threads must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// In use.
    Live = 0,
    /// Being finalised.
    Closing = 1,
    /// To be aborted at once.
    Aborting = 2,
}

pub(crate) struct Shared {
    pub(crate) library: Arc<Library>,
    /// None once the ending thread has it.
    handle: Mutex<Option<Handle>>,
    phase: AtomicU8,
    /// How it ended, once it has.
    ended: Mutex<Option<Result<End, Error>>>,
    has_ended: Condvar,
}

/// The right to call NCCL with the handle.
pub(crate) type Entry<'a> = MutexGuard<'a, Option<Handle>>;

fn unpoisoned<T>(result: Result<T, PoisonError<T>>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(library: Arc<Library>, handle: Handle) -> Shared {
        Shared {
            library,
            handle: Mutex::new(Some(handle)),
            phase: AtomicU8::new(Phase::Live as u8),
            ended: Mutex::new(None),
            has_ended: Condvar::new(),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            0 => Phase::Live,
            1 => Phase::Closing,
            _ => Phase::Aborting,
        }
    }

    /// Goes on to a later phase; gives the one before. Phases never go back.
    pub(crate) fn advance(&self, phase: Phase) -> Phase {
        match self.phase.fetch_max(phase as u8, Ordering::SeqCst) {
            0 => Phase::Live,
            1 => Phase::Closing,
            _ => Phase::Aborting,
        }
    }

    /// Enters NCCL. Waits for another thread's entry, which takes microseconds.
    pub(crate) fn enter(&self) -> Result<Entry<'_>, Error> {
        if self.phase() != Phase::Live {
            return Err(Error::Ended);
        }
        let entry = unpoisoned(self.handle.lock());
        if entry.is_none() {
            return Err(Error::Ended);
        }
        Ok(entry)
    }

    /// Makes one call.
    pub(crate) fn call(
        &self,
        entry: &Entry<'_>,
        call: &'static str,
        f: impl FnOnce(RawCommunicator) -> c_uint,
    ) -> Result<(), Error> {
        let raw = entry.as_ref().ok_or(Error::Ended)?.0;
        match f(raw) {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.library.failed(call, code, raw)),
        }
    }

    /// Waits until what `call` began is done, or failed. Others may enter meanwhile, an aborter above all.
    pub(crate) fn settle(&self, call: &'static str, wait_max: Duration) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            let state = {
                let entry = self.enter()?;
                self.state(&entry, call)?
            };
            let waited = start.elapsed();
            match state {
                State::Done => return Ok(()),
                State::InProgress if waited >= wait_max => {
                    return Err(Error::TimedOut {
                        call,
                        waited: wait_max,
                    });
                }
                State::InProgress if waited < SPIN => std::thread::yield_now(),
                State::InProgress => std::thread::sleep(PAUSE),
            }
        }
    }

    /// The communicator's asynchronous state.
    fn state(&self, entry: &Entry<'_>, call: &'static str) -> Result<State, Error> {
        let raw = entry.as_ref().ok_or(Error::Ended)?.0;
        self.state_of(raw, call)
    }

    /// As [`Shared::state`], of a handle that this thread owns.
    pub(crate) fn state_of(
        &self,
        raw: RawCommunicator,
        call: &'static str,
    ) -> Result<State, Error> {
        let mut state = SUCCESS;
        // SAFETY: the handle is alive and this thread alone has it; `state` outlives the call.
        let code = unsafe { (self.library.functions().get_async_error)(raw, &mut state) };
        match (code, state) {
            (SUCCESS, SUCCESS) => Ok(State::Done),
            (SUCCESS, IN_PROGRESS) => Ok(State::InProgress),
            (SUCCESS, state) => Err(self.library.failed(call, state, raw)),
            (code, _) => Err(self.library.failed("ncclCommGetAsyncError", code, raw)),
        }
    }

    /// The asynchronous error, for the owner: waits while another thread asks.
    pub(crate) fn error(&self) -> Result<(), Error> {
        let entry = self.enter()?;
        self.state(&entry, EARLIER).map(drop)
    }

    /// The asynchronous error, for threads beside the owner. Says nothing while the owner is inside NCCL.
    pub(crate) fn async_error(&self) -> Result<(), Error> {
        match self.handle.try_lock() {
            Ok(entry) if entry.is_some() => self.state(&entry, EARLIER).map(drop),
            Err(TryLockError::WouldBlock) => Ok(()),
            Ok(_) => Err(Error::Ended),
            Err(TryLockError::Poisoned(poisoned)) => {
                self.state(&poisoned.into_inner(), EARLIER).map(drop)
            }
        }
    }

    /// Takes the handle away from everybody else, once its owner is out of NCCL.
    pub(crate) fn take(&self) -> Option<Handle> {
        unpoisoned(self.handle.lock()).take()
    }

    pub(crate) fn set_ended(&self, end: Result<End, Error>) {
        *unpoisoned(self.ended.lock()) = Some(end);
        self.has_ended.notify_all();
    }

    /// How it ended; None when it has not within `within`.
    pub(crate) fn wait_ended(&self, within: Duration) -> Option<Result<End, Error>> {
        let ended = unpoisoned(self.ended.lock());
        let (ended, _) = unpoisoned(
            self.has_ended
                .wait_timeout_while(ended, within, |ended| ended.is_none()),
        );
        ended.clone()
    }
}

/// Whether the last call is through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Done,
    InProgress,
}
