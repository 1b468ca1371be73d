//! How a communicator ends: closed by its owner, or aborted by anybody.
//!
//! Owns the one thread that does either. Both can take long, or for ever when something still holds the communicator:
//! whoever asked waits as long as it likes.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, SUCCESS};
use crate::functions::RawCommunicator;
use crate::shared::{Phase, Shared, State};

/// How often a finalising communicator is asked whether it is done.
const POLL: Duration = Duration::from_millis(1);

/// How a communicator ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All its work was done and it was destroyed.
    Closed,
    /// Its work was broken off. What collectives were to write is undefined.
    Aborted,
}

/// Why an abort is not known to have worked. The device may still be held by a collective: end the process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AbortError {
    /// `ncclCommAbort` did not come back in time; its thread is still in there.
    #[error("ncclCommAbort did not return within {} s", .0.as_secs_f32())]
    StillRunning(Duration),
    /// `ncclCommAbort` came back with an error.
    #[error(transparent)]
    Failed(#[from] Error),
}

/// A communicator on its way to its end.
#[derive(Clone)]
pub struct Ending(Arc<Shared>);

impl Ending {
    /// Waits for the end; None when it is not there within `within`. May be asked again.
    ///
    /// # Errors
    /// NCCL's, of the last call. The communicator is gone all the same.
    #[must_use]
    pub fn wait(&self, within: Duration) -> Option<Result<End, Error>> {
        self.0.wait_ended(within)
    }
}

impl fmt::Debug for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ending")
    }
}

/// Ends a communicator from any thread. Holding one does not keep the communicator alive.
#[derive(Clone)]
pub struct Aborter {
    shared: Arc<Shared>,
}

impl Aborter {
    pub(crate) fn new(shared: Arc<Shared>) -> Aborter {
        Aborter { shared }
    }

    /// Begins to abort, on a thread made for it, and returns at once. Calls of the owner that wait return
    /// [`Error::Ended`], and so does every further one. Kernels of its collectives leave the device, so that a stream
    /// that was stuck in one goes on. Again is harmless, also after the end.
    ///
    /// Destroy CUDA graphs that hold captured collectives before: NCCL waits for them.
    pub fn begin(&self) -> Ending {
        if self.shared.advance(Phase::Aborting) == Phase::Live {
            start(&self.shared, None);
        }
        Ending(Arc::clone(&self.shared))
    }

    /// Aborts and waits for it, at most `within`. A communicator that was closed before is a success.
    ///
    /// # Errors
    /// [`AbortError`].
    pub fn abort(&self, within: Duration) -> Result<(), AbortError> {
        match self.begin().wait(within) {
            Some(end) => Ok(end.map(drop)?),
            None => Err(AbortError::StillRunning(within)),
        }
    }

    /// The communicator's asynchronous error, if there is one. While the owner is inside a call nothing is asked, and
    /// nothing told.
    ///
    /// # Errors
    /// [`Error::Failed`]; [`Error::Ended`] once the communicator is ending.
    pub fn async_error(&self) -> Result<(), Error> {
        self.shared.async_error()
    }
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Aborter")
    }
}

/// Closes the communicator in the background, unless it is ending already.
pub(crate) fn close(shared: &Arc<Shared>, within: Duration) -> Ending {
    if shared.advance(Phase::Closing) == Phase::Live {
        start(shared, Some(Instant::now() + within));
    }
    Ending(Arc::clone(shared))
}

/// Starts the ending thread. A deadline asks for a close, none for an abort.
fn start(shared: &Arc<Shared>, close_until: Option<Instant>) {
    let moved = Arc::clone(shared);
    let thread = std::thread::Builder::new()
        .name("nccl-end".into())
        .spawn(move || run(&moved, close_until));
    if let Err(error) = thread {
        shared.set_ended(Err(Error::NoThread(error.to_string())));
    }
}

fn run(shared: &Shared, close_until: Option<Instant>) {
    let Some(handle) = shared.take() else {
        return;
    };
    let raw = handle.0;
    let closed = close_until.is_some_and(|deadline| finalize(shared, raw, deadline));
    let functions = shared.library.functions();
    let (call, code, end) = if closed {
        // SAFETY: the handle was taken from the lock, so this thread alone has it, and it is finalised; nothing uses it
        // after this call.
        let code = unsafe { (functions.destroy)(raw) };
        ("ncclCommDestroy", code, End::Closed)
    } else {
        // SAFETY: the handle was taken from the lock, so this thread alone has it; nothing uses it after this call.
        let code = unsafe { (functions.abort)(raw) };
        ("ncclCommAbort", code, End::Aborted)
    };
    shared.set_ended(if code == SUCCESS {
        Ok(end)
    } else {
        // The handle is no more.
        Err(shared.library.failed(call, code, std::ptr::null_mut()))
    });
}

/// Whether the communicator came to rest before the deadline and before anybody asked for its abort.
fn finalize(shared: &Shared, raw: RawCommunicator, deadline: Instant) -> bool {
    const CALL: &str = "ncclCommFinalize";
    let settled = || loop {
        match shared.state_of(raw, CALL) {
            Ok(State::Done) => return true,
            Ok(State::InProgress)
                if shared.phase() != Phase::Aborting && Instant::now() < deadline =>
            {
                std::thread::sleep(POLL);
            }
            Ok(State::InProgress) | Err(_) => return false,
        }
    };
    // NCCL finalises no communicator that is still at its last call.
    if !settled() {
        return false;
    }
    // SAFETY: this thread alone has the handle.
    let code = unsafe { (shared.library.functions().finalize)(raw) };
    matches!(code, SUCCESS | crate::error::IN_PROGRESS) && settled()
}
