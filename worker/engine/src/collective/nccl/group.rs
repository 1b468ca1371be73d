//! One rank of a group of devices.
//!
//! Owns how the group forms, its collectives and its clean end. How it ends otherwise stands in [`super::guard`].

use std::ffi::c_void;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nccl_rs::{
    Collectives, Communicator, Config, DataType, Error, Library, Member, ReduceOp, UniqueId,
    Watchdog,
};

use super::guard::{self, Kill, NAME_GRACE, Shared};
use super::lane::{LANDING, Lane, Placement};
use super::watch;
use crate::collective::host::{HostGroup, RANKS_MAX};
use crate::collective::{AbortHandle, Collective, CollectiveError, check_gather};

/// How much later than its maker the guard gives a group up that does not form.
const FORM_GRACE: Duration = Duration::from_secs(2);
/// How long a clean end may take before it becomes an abort.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// Each rank's numbers land at a multiple of so many, for copies that take 16 bytes at a time.
const VECTOR: usize = 4;
/// How long the connections of a group that was ended are kept for its communicator's sake.
const LINGER: Duration = Duration::from_secs(10);

/// How a group behaves.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long forming may take.
    pub within: Duration,
    /// How long freeing the device from a group that is over may take, before the process is ended.
    pub abort_within: Duration,
}

impl Options {
    /// Forms within `within`; frees the device within 2 s: an abort takes about one.
    #[must_use]
    pub fn new(within: Duration) -> Options {
        Options {
            within,
            abort_within: Duration::from_secs(2),
        }
    }
}

/// One rank of a formed group of devices. After an error it is over, and so is the device's part in it: what the device
/// still had to do is broken off.
pub struct Group<L: Lane> {
    lane: L,
    /// None once it is given to its end.
    communicator: Option<Communicator>,
    shared: Arc<Shared>,
    watchdog: Arc<Watchdog>,
    wait_max: Duration,
    kill: Kill,
}

impl<L: Lane> Group<L> {
    /// Forms the group of the devices of a host group's ranks. All ranks call it; each makes its device's end of one
    /// communicator, whose id is rank 0's.
    ///
    /// # Errors
    /// [`CollectiveError`]: the host group is over too.
    pub fn form_lane(
        host: HostGroup,
        lane: L,
        library: &Arc<Library>,
        options: Options,
    ) -> Result<Group<L>, CollectiveError> {
        Self::form_or_kill(host, lane, library, options, guard::kill())
    }

    /// As [`Group::form_lane`], with what is done when the device cannot be freed.
    pub(super) fn form_or_kill(
        mut host: HostGroup,
        lane: L,
        library: &Arc<Library>,
        options: Options,
        kill: Kill,
    ) -> Result<Group<L>, CollectiveError> {
        let id = share_id(&mut host, library, options.within)?;
        let (rank, ranks, wait_max) = (host.rank(), host.ranks(), host.wait_max());
        let shared = Arc::new(Shared::new(host));
        let unformed = |error| {
            let error = shared.fail(error);
            shared.tell(error.clone());
            error
        };
        // NCCL takes the device that is current on this thread, whichever that is.
        lane.bind()
            .map_err(|reason| unformed(CollectiveError::Failed(reason)))?;
        let config = Config {
            call_wait_max: wait_max,
        };
        let forming = Communicator::begin(library, &Member { id, rank, ranks }, config)
            .map_err(|error| unformed(refusal(&shared, &error)))?;
        // From here on a rank that dies is seen at once. That it all takes too long is this thread's to say.
        shared.take_off(options.within + FORM_GRACE);
        let aborter = forming.aborter();
        let watchdog = guard::start(
            Arc::clone(&shared),
            aborter.clone(),
            lane.recordings(),
            options.abort_within,
            Arc::clone(&kill),
        )
        .map_err(|error| {
            unformed(CollectiveError::Failed(format!(
                "no thread can be started for the group: {error}"
            )))
        })?;
        let communicator = forming.wait(options.within).map_err(|error| {
            let error = unformed(refusal(&shared, &error));
            if let Err(stuck) = aborter.abort(options.abort_within) {
                kill(&guard::stuck_line(rank, &stuck.to_string()));
            }
            error
        })?;
        shared.standing()?;
        shared.land();
        Ok(Group {
            lane,
            communicator: Some(communicator),
            shared,
            watchdog: Arc::new(watchdog),
            wait_max,
            kill,
        })
    }

    /// Enqueues work of the group's.
    fn enqueue(
        &mut self,
        work: impl FnOnce(&mut L, &mut Communicator) -> Result<(), Fault>,
    ) -> Result<(), CollectiveError> {
        self.shared.standing()?;
        // A step whose plan was not sent, as tests have it.
        self.shared.take_off_if_idle(self.wait_max);
        let communicator = self.communicator.as_mut().ok_or(CollectiveError::Aborted)?;
        work(&mut self.lane, communicator).map_err(|fault| {
            self.end(match fault {
                Fault::Nccl(error) => refusal(&self.shared, &error),
                Fault::Device(reason) => CollectiveError::Failed(reason),
            })
        })
    }

    /// A step's work is to follow its plan; behind an empty one, the last, comes nothing.
    fn begin_step(&self, plan: &[u8]) {
        if !plan.is_empty() {
            self.shared.take_off(self.wait_max);
        }
    }

    /// Sends or receives over the host group.
    fn on_host(
        &mut self,
        call: impl FnOnce(&mut HostGroup) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        self.shared.standing()?;
        let result = call(&mut self.shared.host());
        result.map_err(|error| self.end(error))
    }

    /// Ends the group on this rank; gives the reason that holds.
    fn end(&self, error: CollectiveError) -> CollectiveError {
        let error = self.shared.fail(error);
        self.watchdog.look();
        error
    }
}

/// Why work could not be enqueued.
enum Fault {
    Nccl(Error),
    Device(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Nccl(error)
    }
}

/// Rank 0 makes the communicator's id and gives it to the others.
fn share_id(
    host: &mut HostGroup,
    library: &Library,
    within: Duration,
) -> Result<UniqueId, CollectiveError> {
    if host.rank() == 0 {
        let id = library
            .unique_id()
            .map_err(|error| CollectiveError::Failed(error.to_string()))?;
        host.send_plan(id.as_bytes())?;
        return Ok(id);
    }
    let mut bytes = Vec::new();
    host.recv_plan_within(&mut bytes, Some(within))?;
    UniqueId::try_from(bytes.as_slice()).map_err(|_| {
        CollectiveError::OutOfStep(format!(
            "rank 0 sent a communicator's id of {} bytes",
            bytes.len()
        ))
    })
}

/// What an error of NCCL's on the owner's thread means: the group's fate if it has one, else the rank that is lost, if one is.
fn refusal(shared: &Shared, error: &Error) -> CollectiveError {
    if let Some(fate) = shared.fate() {
        return fate;
    }
    match watch::reason(shared.place, error) {
        guess @ CollectiveError::RankLost { .. } => shared.links.lost(NAME_GRACE).unwrap_or(guess),
        other => other,
    }
}

impl<L: Lane> Collective<L::Buf> for Group<L> {
    fn rank(&self) -> u32 {
        self.shared.place.rank
    }

    fn ranks(&self) -> u32 {
        self.shared.place.ranks
    }

    fn all_reduce_sum(&mut self, buf: &mut L::Buf, len: usize) -> Result<(), CollectiveError> {
        if self.lane.len(buf) < len {
            return Err(CollectiveError::OutOfStep(format!(
                "a sum of {len} numbers was given a buffer of {}",
                self.lane.len(buf)
            )));
        }
        if len == 0 {
            return self.shared.standing();
        }
        self.enqueue(|lane, communicator| {
            let (numbers, stream) = (lane.address(buf), lane.stream());
            // SAFETY: the lane's promise: `numbers` are at least `len` numbers on the communicator's device, which this rank
            // bound when it made the communicator, and live until `stream` has passed the sum. All ranks make the same
            // calls, see `Collective`.
            unsafe {
                communicator.all_reduce(numbers, numbers, len, DataType::F32, ReduceOp::Sum, stream)
            }?;
            Ok(())
        })
    }

    fn gather_columns(
        &mut self,
        part: &L::Buf,
        rows: usize,
        widths: &[usize],
        out: &mut L::Buf,
    ) -> Result<(), CollectiveError> {
        let (rank, ranks) = (self.rank(), self.ranks());
        let (held, room) = (self.lane.len(part), self.lane.len(out));
        let whole = check_gather(rank, ranks, rows, widths, held, room)?;
        self.enqueue(|lane, communicator| {
            let (part, out) = (lane.address(part), lane.address(out));
            for (first, rows) in pieces(rows, whole - widths[0]) {
                let own = numbers_at(part, first * widths[rank as usize]);
                if rank == 0 {
                    let to = numbers_at(out, first * whole);
                    take_in(lane, communicator, widths, rows, own, to)?;
                } else {
                    hand_over(lane, communicator, rows * widths[rank as usize], own)?;
                }
            }
            Ok(())
        })
    }

    fn send_plan(&mut self, plan: &[u8]) -> Result<(), CollectiveError> {
        self.on_host(|host| host.send_plan(plan))?;
        self.begin_step(plan);
        Ok(())
    }

    fn recv_plan(&mut self, plan: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.on_host(|host| host.recv_plan(plan))?;
        self.begin_step(plan);
        Ok(())
    }

    fn check(&mut self) -> Result<(), CollectiveError> {
        self.shared.standing()?;
        if let Some(Err(error)) = self.communicator.as_ref().map(Communicator::async_error) {
            let error = refusal(&self.shared, &error);
            return Err(self.end(error));
        }
        self.shared.land();
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        let shared = Arc::downgrade(&self.shared);
        let watchdog = Arc::downgrade(&self.watchdog);
        AbortHandle::new(move || {
            if let Some(shared) = shared.upgrade() {
                shared.set_aborted();
                shared.host_abort.abort();
            }
            if let Some(watchdog) = watchdog.upgrade() {
                watchdog.look();
            }
        })
    }
}

/// A clean end happens beside the caller: NCCL waits for the work and for the other ranks, and these must not see the
/// connections close before. A group that is over is being aborted already.
impl<L: Lane> Drop for Group<L> {
    fn drop(&mut self) {
        let Some(communicator) = self.communicator.take() else {
            return;
        };
        if self.shared.standing().is_err() {
            self.watchdog.look();
            return;
        }
        // NCCL waits for recordings that hold its work.
        (self.lane.recordings())();
        let ending = communicator.close(CLOSE_MAX);
        let (shared, kill) = (Arc::clone(&self.shared), Arc::clone(&self.kill));
        let linger = move || {
            if ending.wait(LINGER).is_none() {
                let why = format!("its communicator did not end within {} s", LINGER.as_secs());
                kill(&guard::stuck_line(shared.place.rank, &why));
            }
            drop(shared);
        };
        if let Err(error) = thread::Builder::new()
            .name("group-end".into())
            .spawn(linger)
        {
            tracing::warn!(%error, "no thread can be started to end a group; its connections close at once");
        }
    }
}

impl<L: Lane> std::fmt::Debug for Group<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("place", &self.shared.place)
            .finish_non_exhaustive()
    }
}

/// Cuts rows into pieces whose foreign numbers, `width` a row, have room in the landing: first row and number of rows. A
/// single row needs no landing.
fn pieces(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    const ROOM: usize = LANDING - VECTOR * RANKS_MAX as usize;
    let step = (ROOM / width.max(1)).max(1);
    (0..rows)
        .step_by(step)
        .map(move |first| (first, step.min(rows - first)))
}

/// Rank 0's part in a piece of a gather: all ranks' columns of `rows` rows, side by side.
fn take_in<L: Lane>(
    lane: &mut L,
    communicator: &mut Communicator,
    widths: &[usize],
    rows: usize,
    own: *mut c_void,
    to: *mut c_void,
) -> Result<(), Fault> {
    let whole = widths.iter().sum::<usize>();
    // A single row lands in its place.
    let (landing, vector) = if rows == 1 {
        (numbers_at(to, widths[0]), 1)
    } else {
        (lane.landing(), VECTOR)
    };
    let stream = lane.stream();
    let mut group = communicator.group()?;
    let mut landed = 0;
    for (peer, width) in (1..).zip(&widths[1..]) {
        let count = rows * width;
        if count > 0 {
            // SAFETY: the landing has room for all foreign numbers of a piece, or the row for its own; both live until the
            // stream has passed this (the lane's promise), and the peer sends as many.
            unsafe {
                group.recv(
                    numbers_at(landing, landed),
                    count,
                    DataType::F32,
                    peer,
                    stream,
                )
            }?;
        }
        landed += count.next_multiple_of(vector);
    }
    group.end()?;
    let mut place = |from: *const c_void, width: usize, column: usize| {
        let placement = Placement {
            from,
            to,
            rows,
            width,
            whole,
            column,
        };
        if width == 0 {
            return Ok(());
        }
        // SAFETY: `from` holds `rows * width` numbers, `to` has room for `rows * whole`: checked by `check_gather` for the
        // buffers, and by `pieces` for the landing.
        unsafe { lane.place(placement) }.map_err(Fault::Device)
    };
    place(own, widths[0], 0)?;
    if rows > 1 {
        let (mut landed, mut column) = (0, widths[0]);
        for width in &widths[1..] {
            place(numbers_at(landing, landed), *width, column)?;
            landed += (rows * width).next_multiple_of(vector);
            column += width;
        }
    }
    Ok(())
}

/// Another rank's part in a piece of a gather.
fn hand_over<L: Lane>(
    lane: &mut L,
    communicator: &mut Communicator,
    count: usize,
    own: *const c_void,
) -> Result<(), Fault> {
    if count == 0 {
        return Ok(());
    }
    // SAFETY: `own` holds `count` numbers, checked by `check_gather`, which live until the stream has passed this (the lane's
    // promise); rank 0 receives as many.
    unsafe { communicator.send(own, count, DataType::F32, 0, lane.stream()) }?;
    Ok(())
}

/// The address `numbers` f32 further on.
fn numbers_at(address: *mut c_void, numbers: usize) -> *mut c_void {
    address.wrapping_byte_add(numbers * size_of::<f32>())
}
