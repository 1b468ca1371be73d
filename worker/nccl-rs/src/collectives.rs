//! The operations between ranks.

use std::ffi::{c_int, c_uint, c_void};

use crate::data::{DataType, ReduceOp, Stream};
use crate::error::Error;
use crate::functions::{Functions, RawCommunicator};

/// Takes calls: at once, or into a group.
pub trait Issue {
    /// Makes the call `name`, if the communicator is alive.
    #[doc(hidden)]
    fn issue(
        &mut self,
        name: &'static str,
        call: impl FnOnce(&Functions, RawCommunicator) -> c_uint,
    ) -> Result<(), Error>;
}

/// Operations over a communicator's ranks, given to [`Communicator`](crate::Communicator) and
/// [`Group`](crate::Group) alike. They are enqueued on a stream and done when the stream gets there; a rank that never
/// comes leaves the stream stuck, which no call reports: see [`Watchdog`](crate::Watchdog).
///
/// # Safety
/// Of each of them the caller promises:
/// - pointers are to memory of the communicator's device, long enough for what the operation reads and writes, and stay
///   valid until the stream has passed it, or the communicator's end is known ([`Ending::wait`](crate::Ending::wait));
/// - nothing else touches that memory meanwhile, but for work that is ordered by the stream;
/// - `stream` is a stream of that device;
/// - all ranks make the same operations in the same order, with counts and types that fit.
///
/// # Errors
/// Those of [`Error`] but for `NoSuchRank`. After an error the communicator is of no more use.
pub trait Collectives: Issue {
    /// `recv = op over the ranks of send`, `count` numbers each. `recv` may be `send`.
    ///
    /// # Safety
    /// See [`Collectives`].
    ///
    /// # Errors
    /// See [`Collectives`].
    unsafe fn all_reduce(
        &mut self,
        send: *const c_void,
        recv: *mut c_void,
        count: usize,
        data: DataType,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise, see the trait.
        self.issue("ncclAllReduce", |nccl, comm| unsafe {
            (nccl.all_reduce)(send, recv, count, data.raw(), op.raw(), comm, stream)
        })
    }

    /// Rank `r`'s `send`, `count` numbers, becomes numbers `r * count ..` of everybody's `recv`. `send` may be this
    /// rank's place in `recv`.
    ///
    /// # Safety
    /// See [`Collectives`].
    ///
    /// # Errors
    /// See [`Collectives`].
    unsafe fn all_gather(
        &mut self,
        send: *const c_void,
        recv: *mut c_void,
        count: usize,
        data: DataType,
        stream: Stream,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise, see the trait.
        self.issue("ncclAllGather", |nccl, comm| unsafe {
            (nccl.all_gather)(send, recv, count, data.raw(), comm, stream)
        })
    }

    /// Rank `root`'s `send`, `count` numbers, becomes everybody's `recv`. Other ranks' `send` is not read.
    ///
    /// # Safety
    /// See [`Collectives`].
    ///
    /// # Errors
    /// See [`Collectives`].
    unsafe fn broadcast(
        &mut self,
        send: *const c_void,
        recv: *mut c_void,
        count: usize,
        data: DataType,
        root: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise, see the trait.
        self.issue("ncclBroadcast", |nccl, comm| unsafe {
            (nccl.broadcast)(send, recv, count, data.raw(), rank_of(root), comm, stream)
        })
    }

    /// Sends `count` numbers to rank `peer`, which receives as many. Sends and receives that wait for each other must
    /// be in one [`Group`](crate::Group).
    ///
    /// # Safety
    /// See [`Collectives`].
    ///
    /// # Errors
    /// See [`Collectives`].
    unsafe fn send(
        &mut self,
        send: *const c_void,
        count: usize,
        data: DataType,
        peer: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise, see the trait.
        self.issue("ncclSend", |nccl, comm| unsafe {
            (nccl.send)(send, count, data.raw(), rank_of(peer), comm, stream)
        })
    }

    /// Receives `count` numbers from rank `peer`, which sends as many.
    ///
    /// # Safety
    /// See [`Collectives`].
    ///
    /// # Errors
    /// See [`Collectives`].
    unsafe fn recv(
        &mut self,
        recv: *mut c_void,
        count: usize,
        data: DataType,
        peer: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise, see the trait.
        self.issue("ncclRecv", |nccl, comm| unsafe {
            (nccl.recv)(recv, count, data.raw(), rank_of(peer), comm, stream)
        })
    }
}

/// A rank as NCCL takes it; one that is none becomes one that NCCL refuses.
fn rank_of(rank: u32) -> c_int {
    c_int::try_from(rank).unwrap_or(c_int::MAX)
}

impl<T: Issue> Collectives for T {}
