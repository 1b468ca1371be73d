//! One rank's end of a communicator: how it is made, and what its owner does with it.

use std::cell::Cell;
use std::ffi::{c_int, c_uint};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use crate::collectives::Issue;
use crate::ending::{self, Aborter, Ending};
use crate::error::{Error, IN_PROGRESS, SUCCESS};
use crate::functions::{Functions, RawCommunicator, RawConfig};
use crate::group::Group;
use crate::library::Library;
use crate::shared::{Handle, Shared};
use crate::unique_id::UniqueId;

const INIT: &str = "ncclCommInitRankConfig";

/// How long the maker of a communicator that did not come about waits for its abort.
const HALF_MADE_ABORT: Duration = Duration::from_secs(2);

/// How long a communicator that is dropped may take to close before it is aborted.
const DROPPED_CLOSE: Duration = Duration::from_secs(5);

/// One rank's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The same on all ranks.
    pub id: UniqueId,
    /// This rank, from 0.
    pub rank: u32,
    /// How many there are.
    pub ranks: u32,
}

/// How a communicator behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// A call that NCCL still works at after this long has failed. Calls only enqueue, but the first ones connect the
    /// ranks.
    pub call_wait_max: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            call_wait_max: Duration::from_secs(30),
        }
    }
}

/// A communicator that waits for its other ranks. Dropped, it is aborted in the background.
#[derive(Debug)]
pub struct Forming {
    communicator: Communicator,
}

impl Forming {
    /// Ends the wait from another thread.
    #[must_use]
    pub fn aborter(&self) -> Aborter {
        self.communicator.aborter()
    }

    /// Waits for all ranks, at most `within`. A communicator that does not come about is aborted, on a thread of its
    /// own that this call waits for, but not for ever.
    ///
    /// # Errors
    /// [`Error::TimedOut`]: a rank did not come. [`Error::Ended`]: by an [`Aborter`]. [`Error::Failed`].
    pub fn wait(self, within: Duration) -> Result<Communicator, Error> {
        self.communicator
            .shared
            .settle(INIT, within)
            .inspect_err(|_| {
                let _ = self.aborter().begin().wait(HALF_MADE_ABORT);
            })?;
        Ok(self.communicator)
    }
}

/// One rank's end of a communicator. Its operations are in [`Collectives`](crate::Collectives).
///
/// It may move to another thread between two calls, but is used by one at a time. Dropped, it is closed in the
/// background: [`Communicator::close`] tells how that went.
pub struct Communicator {
    shared: Arc<Shared>,
    member: Member,
    config: Config,
    /// Not Sync: one thread at a time.
    _one_thread: PhantomData<Cell<()>>,
}

impl Communicator {
    /// Makes a communicator on the current device of this thread, and waits for all ranks, at most `within`:
    /// [`Communicator::begin`], then [`Forming::wait`].
    ///
    /// # Errors
    /// Those of both.
    pub fn init(
        library: &Arc<Library>,
        member: &Member,
        config: Config,
        within: Duration,
    ) -> Result<Communicator, Error> {
        Self::begin(library, member, config)?.wait(within)
    }

    /// Begins to make a communicator on the current device of this thread, and does not wait for the other ranks. The
    /// first one of a process starts CUDA and NCCL, which takes some tenths of a second.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`], [`Error::Failed`].
    pub fn begin(
        library: &Arc<Library>,
        member: &Member,
        config: Config,
    ) -> Result<Forming, Error> {
        let Member { id, rank, ranks } = *member;
        let (Ok(c_rank), Ok(c_ranks), true) =
            (c_int::try_from(rank), c_int::try_from(ranks), rank < ranks)
        else {
            return Err(Error::NoSuchRank { rank, ranks });
        };
        let mut raw: RawCommunicator = std::ptr::null_mut();
        let mut settings = RawConfig::non_blocking();
        // SAFETY: both pointers outlive the call. NCCL copies the settings; with blocking = 0 it writes the handle
        // before it returns and not later.
        let code = unsafe {
            (library.functions().init_rank_config)(
                &mut raw,
                c_ranks,
                id.to_raw(),
                c_rank,
                &mut settings,
            )
        };
        if !matches!(code, SUCCESS | IN_PROGRESS) || raw.is_null() {
            return Err(library.failed(INIT, code, std::ptr::null_mut()));
        }
        Ok(Forming {
            communicator: Communicator {
                shared: Arc::new(Shared::new(Arc::clone(library), Handle(raw))),
                member: *member,
                config,
                _one_thread: PhantomData,
            },
        })
    }

    /// This rank, from 0.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.member.rank
    }

    /// How many ranks there are.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.member.ranks
    }

    /// Opens a group of operations. Nothing is enqueued before [`Group::end`].
    ///
    /// # Errors
    /// [`Error::Ended`], [`Error::Failed`].
    pub fn group(&mut self) -> Result<Group<'_>, Error> {
        Group::start(&self.shared, self.config.call_wait_max)
    }

    /// What went wrong since the last call, in the background or at another rank. NCCL does not promise to notice that
    /// a rank died.
    ///
    /// # Errors
    /// [`Error::Failed`], [`Error::Ended`].
    pub fn async_error(&self) -> Result<(), Error> {
        self.shared.error()
    }

    /// A handle that ends this communicator from any thread.
    #[must_use]
    pub fn aborter(&self) -> Aborter {
        Aborter::new(Arc::clone(&self.shared))
    }

    /// Ends it cleanly, in the background: waits for all enqueued operations and the other ranks' close, then destroys
    /// it. One that is not through within `within` is aborted. All ranks must close.
    ///
    /// Destroy CUDA graphs that hold captured collectives before: NCCL waits for them.
    pub fn close(self, within: Duration) -> Ending {
        ending::close(&self.shared, within)
    }
}

impl Issue for Communicator {
    fn issue(
        &mut self,
        name: &'static str,
        call: impl FnOnce(&Functions, RawCommunicator) -> c_uint,
    ) -> Result<(), Error> {
        let entry = self.shared.enter()?;
        let functions = self.shared.library.functions();
        self.shared.call(&entry, name, |raw| call(functions, raw))?;
        drop(entry);
        self.shared.settle(name, self.config.call_wait_max)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        ending::close(&self.shared, DROPPED_CLOSE);
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.member.rank)
            .field("ranks", &self.member.ranks)
            .finish()
    }
}
