//! A thread that aborts a communicator when a rule of the caller's says so.

use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::Duration;

use crate::ending::{AbortError, Aborter};
use crate::error::Error;

/// What a watchdog's rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Look again after the period.
    Wait,
    /// Abort the communicator now.
    Abort,
}

/// Looks after a communicator from a thread of its own, since the thread that owns it may be waiting for a stream that
/// is stuck. Dropped, it looks no more; an abort that has begun goes on.
///
/// # Example
/// Abort when NCCL reports an error, or after a deadline:
/// ```no_run
/// # use std::time::{Duration, Instant};
/// # use nccl_rs::{Communicator, Verdict, Watchdog};
/// # fn watch(communicator: &Communicator) -> std::io::Result<Watchdog> {
/// let deadline = Instant::now() + Duration::from_secs(60);
/// Watchdog::start(
///     communicator.aborter(),
///     Duration::from_millis(5),
///     Duration::from_secs(2),
///     move |health| match health {
///         Ok(()) if Instant::now() < deadline => Verdict::Wait,
///         _ => Verdict::Abort,
///     },
///     |outcome| {
///         if let Err(stuck) = outcome {
///             eprintln!("{stuck}");
///             std::process::abort();
///         }
///     },
/// )
/// # }
/// ```
#[derive(Debug)]
pub struct Watchdog {
    wake: SyncSender<()>,
}

impl Watchdog {
    /// Starts to look. Every `period` `rule` is given the communicator's asynchronous error ([`Aborter::async_error`])
    /// and decides; what must be done before an abort, such as destroying CUDA graphs, it does itself. After its word to
    /// abort, which is its last, `ended` learns whether the abort was through within `abort_within`. Once the communicator is
    /// being ended by others, the rule is given [`Error::Ended`], and asked no more.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        aborter: Aborter,
        period: Duration,
        abort_within: Duration,
        mut rule: impl FnMut(Result<(), Error>) -> Verdict + Send + 'static,
        ended: impl FnOnce(Result<(), AbortError>) + Send + 'static,
    ) -> std::io::Result<Watchdog> {
        let (wake, woken) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("nccl-watchdog".into())
            .spawn(move || {
                while !matches!(
                    woken.recv_timeout(period),
                    Err(RecvTimeoutError::Disconnected)
                ) {
                    let health = aborter.async_error();
                    let over = health == Err(Error::Ended);
                    if rule(health) == Verdict::Abort {
                        return ended(aborter.abort(abort_within));
                    }
                    if over {
                        return;
                    }
                }
            })?;
        Ok(Watchdog { wake })
    }

    /// Has it look now and not only after its period.
    pub fn look(&self) {
        // Full: it is about to look. Disconnected: there is nothing left to look after.
        let _ = self.wake.try_send(());
    }
}
