//! The thread that looks after a group, and how it ends one.
//!
//! Owns what the thread shares with the group's owner, and the order of ending: the reason is set first, so that whoever is
//! freed finds it; the other ranks are told; recordings are destroyed; the communicator is aborted.

use std::collections::VecDeque;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nccl_rs::{Aborter, Error, ResultCode, Watchdog};

use super::watch::{Flight, Place, Signs, Verdict, watch};
use crate::collective::host::{HostGroup, LinkWatch};
use crate::collective::{AbortHandle, CollectiveError};

/// How often a group is looked at.
const PERIOD: Duration = Duration::from_millis(5);
/// NCCL may notice a death before the dead rank's connection ends, which alone tells its name.
pub(super) const NAME_GRACE: Duration = Duration::from_millis(300);

/// What a group's owner and its guard both know.
pub(super) struct Shared {
    pub(super) place: Place,
    pub(super) host: Mutex<HostGroup>,
    /// Ends the host group while its owner is inside it.
    pub(super) host_abort: AbortHandle,
    pub(super) links: LinkWatch,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    aborted: bool,
    /// Why the group is over: set once.
    fate: Option<CollectiveError>,
    flights: VecDeque<Flight>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(host: HostGroup) -> Shared {
        Shared {
            place: Place {
                rank: host.rank(),
                ranks: host.ranks(),
            },
            host_abort: host.abort_handle(),
            links: host.link_watch(),
            host: Mutex::new(host),
            state: Mutex::default(),
        }
    }

    pub(super) fn host(&self) -> MutexGuard<'_, HostGroup> {
        locked(&self.host)
    }

    /// Whether the group stands.
    pub(super) fn standing(&self) -> Result<(), CollectiveError> {
        let state = locked(&self.state);
        match &state.fate {
            Some(fate) => Err(fate.clone()),
            None if state.aborted => Err(CollectiveError::Aborted),
            None => Ok(()),
        }
    }

    /// Why the group is over, if it is.
    pub(super) fn fate(&self) -> Option<CollectiveError> {
        locked(&self.state).fate.clone()
    }

    /// Sets the reason, unless there is one; gives the one that holds.
    pub(super) fn fail(&self, error: CollectiveError) -> CollectiveError {
        let mut state = locked(&self.state);
        let error = if state.aborted {
            CollectiveError::Aborted
        } else {
            error
        };
        state.fate.get_or_insert(error).clone()
    }

    pub(super) fn set_aborted(&self) {
        locked(&self.state).aborted = true;
    }

    /// Work goes to the device.
    pub(super) fn take_off(&self, wait_max: Duration) {
        locked(&self.state).flights.push_back(Flight {
            since: Instant::now(),
            wait_max,
        });
    }

    /// As [`Shared::take_off`], unless some is there already.
    pub(super) fn take_off_if_idle(&self, wait_max: Duration) {
        if locked(&self.state).flights.is_empty() {
            self.take_off(wait_max);
        }
    }

    /// The oldest work has come back.
    pub(super) fn land(&self) {
        locked(&self.state).flights.pop_front();
    }

    fn signs(&self, nccl: Result<(), Error>) -> Signs {
        let remote = nccl.as_ref().err().and_then(Error::code) == Some(ResultCode::Remote);
        let lost = self
            .links
            .lost(if remote { NAME_GRACE } else { Duration::ZERO });
        let state = locked(&self.state);
        Signs {
            aborted: state.aborted,
            failed: state.fate.clone(),
            lost,
            nccl,
            flight: state.flights.front().copied(),
        }
    }

    /// Tells the other ranks why the group is over, and frees an owner that is inside the host group.
    pub(super) fn tell(&self, error: CollectiveError) {
        match self.host.try_lock() {
            Ok(mut host) => host.fail(error),
            Err(_) => self.host_abort.abort(),
        }
    }
}

/// What is done to a process that cannot free its device. Given a line that says why.
pub(super) type Kill = Arc<dyn Fn(&str) + Send + Sync>;

/// Says why on standard error, and ends the process.
pub(super) fn kill() -> Kill {
    Arc::new(|why| {
        eprintln!("{why}");
        std::process::abort();
    })
}

/// Starts to look after a group.
pub(super) fn start(
    shared: Arc<Shared>,
    aborter: Aborter,
    recordings: Arc<dyn Fn() + Send + Sync>,
    abort_within: Duration,
    kill: Kill,
) -> std::io::Result<Watchdog> {
    let Place { rank, ranks } = shared.place;
    let fuse = Arc::new(Mutex::new(None));
    let burning = Arc::clone(&fuse);
    let killing = Arc::clone(&kill);
    let rule = move |nccl| match watch(Instant::now(), shared.place, shared.signs(nccl)) {
        Verdict::Wait => nccl_rs::Verdict::Wait,
        Verdict::End(error) => {
            let error = shared.fail(error);
            tracing::warn!(rank, ranks, %error, "the shard group is over");
            *locked(&burning) = Some(Fuse::light(abort_within, rank, Arc::clone(&killing)));
            shared.tell(error);
            recordings();
            nccl_rs::Verdict::Abort
        }
    };
    Watchdog::start(aborter, PERIOD, abort_within, rule, move |outcome| {
        drop(locked(&fuse).take());
        if let Err(stuck) = outcome {
            kill(&stuck_line(rank, &stuck.to_string()));
        }
    })
}

/// Why a process that holds a dead group's device ends.
pub(super) fn stuck_line(rank: u32, why: &str) -> String {
    format!("rank {rank} cannot free its device from a group that is over: {why}; the process ends")
}

/// Kills, unless it is dropped in time.
struct Fuse {
    _dropped: mpsc::Sender<()>,
}

impl Fuse {
    /// Burns a little longer than the abort that it covers may take, which speaks for itself.
    fn light(abort_within: Duration, rank: u32, kill: Kill) -> Fuse {
        const LONGER: Duration = Duration::from_millis(500);
        let (dropped, burnt) = mpsc::channel::<()>();
        let burn = move || {
            if burnt.recv_timeout(abort_within + LONGER) == Err(RecvTimeoutError::Timeout) {
                kill(&stuck_line(rank, "its recordings are not destroyed"));
            }
        };
        // Without a thread nothing watches over the next steps; they are taken all the same.
        if let Err(error) = thread::Builder::new().name("group-fuse".into()).spawn(burn) {
            tracing::warn!(%error, "no thread can be started to watch over the group's end");
        }
        Fuse { _dropped: dropped }
    }
}
