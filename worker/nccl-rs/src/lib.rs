//! NCCL, NVIDIA's library of collectives between GPUs, found at run time: a machine without it, or without a GPU,
//! builds and starts all the same.
//!
//! - [`Library`] loads `libnccl.so.2` or `libnccl.so` (NCCL 2.14 or newer) and resolves every function at once, so that
//!   nothing is found missing later.
//! - [`UniqueId`] is what ranks must share to meet: rank 0 makes one, the others get its 128 bytes by any other way.
//! - [`Communicator`] is one rank's end. It is made without blocking, with a deadline; each call on it has one too.
//! - [`Collectives`] are the operations: all-reduce, all-gather, broadcast, send and receive, on raw device pointers
//!   and streams. [`Group`] joins several into one.
//! - [`Aborter`] ends a communicator from any thread, also one whose collective is stuck on the device because a rank
//!   died; [`Watchdog`] does so by a rule of the caller's.
//! - [`Error`] tells apart what NCCL tells apart, with its own words.
//!
//! The crate does not know CUDA: memory and streams are the caller's, and so is the device. The device that is current
//! on the thread that makes a communicator becomes the communicator's, so set it (bind the context) first.
//!
//! # Example
//! The sum of one number over the ranks, in place:
//! ```no_run
//! use std::{ffi::c_void, sync::Arc, time::Duration};
//! use nccl_rs::{Collectives, Communicator, Config, DataType, Error, Library, Member, ReduceOp, UniqueId};
//!
//! /// # Safety
//! /// `number` is one f32 in the memory of the current device and `stream` a stream of it; both outlive the sum.
//! unsafe fn sum_over_ranks(
//!     library: &Arc<Library>,
//!     id: UniqueId,
//!     (rank, ranks): (u32, u32),
//!     number: *mut c_void,
//!     stream: *mut c_void,
//! ) -> Result<(), Error> {
//!     let within = Duration::from_secs(30);
//!     let member = Member { id, rank, ranks };
//!     let mut communicator = Communicator::init(library, &member, Config::default(), within)?;
//!     // SAFETY: the caller's promise; all ranks sum one f32.
//!     unsafe { communicator.all_reduce(number, number, 1, DataType::F32, ReduceOp::Sum, stream) }?;
//!     // The sum is on the stream now. Wait for the stream with a deadline of your own: when a rank has died, the
//!     // stream never gets there, and only an abort frees it.
//!     communicator.close(within).wait(within).expect("NCCL ends in time")?;
//!     Ok(())
//! }
//! ```
//!
//! # Threads
//! A communicator belongs to one thread at a time: it is [`Send`], since NCCL binds it to a device and not to a
//! thread, but not [`Sync`]. What other threads may do goes through [`Aborter`], which is both. Every entry into NCCL
//! for one communicator is serialised by a lock that is held for microseconds, because NCCL itself allows no two
//! threads in one communicator, not even to ask for its state.
//!
//! # Non-blocking
//! Communicators are made with `blocking = 0`: NCCL does the work of a call on a thread of its own and says "in
//! progress", and this crate waits for it with a deadline. Blocking communicators are cheaper to call (no thread per
//! call), but a call on one can hang for ever when a rank is gone, and no other thread can then free it safely. Captured
//! in a CUDA graph the difference is paid once.
//!
//! # Ending
//! `ncclCommAbort` takes about a second even for an idle communicator, and can block for ever when a CUDA graph still
//! holds the communicator. Here it always runs on a thread of its own, and the caller says how long to wait for it.
//! Destroy captured graphs first. Dropping a [`Communicator`] closes it in the background, and aborts it there when the
//! close does not end in time.

mod collectives;
mod communicator;
mod data;
mod ending;
mod error;
mod functions;
mod group;
mod library;
mod shared;
mod unique_id;
mod version;
mod watchdog;

#[cfg(test)]
mod tests;

pub use collectives::Collectives;
pub use communicator::{Communicator, Config, Forming, Member};
pub use data::{DataType, ReduceOp, Stream};
pub use ending::{AbortError, Aborter, End, Ending};
pub use error::{Error, ResultCode};
pub use group::Group;
pub use library::{Attempt, Library, LoadError};
pub use unique_id::{UNIQUE_ID_BYTES, UniqueId};
pub use version::Version;
pub use watchdog::{Verdict, Watchdog};
