//! What can go wrong in NCCL, with its own words.

use std::ffi::c_uint;
use std::fmt;
use std::time::Duration;

/// `ncclResult_t` of a call that did not go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResultCode {
    /// A call into CUDA failed.
    UnhandledCuda,
    /// A call into the operating system failed.
    System,
    /// A check inside NCCL failed: a defect there, or memory overwritten.
    Internal,
    /// An argument is impossible, or the communicator was used while a call on it was in progress.
    InvalidArgument,
    /// The calls as a whole are wrong: two ranks on one device, for example.
    InvalidUsage,
    /// Another rank is gone, or the network between them.
    Remote,
    /// The call goes on in the background.
    InProgress,
    /// A code that this crate does not know.
    Other(u32),
}

pub(crate) const SUCCESS: c_uint = 0;
pub(crate) const IN_PROGRESS: c_uint = 7;

impl ResultCode {
    pub(crate) fn from_raw(code: c_uint) -> ResultCode {
        match code {
            1 => ResultCode::UnhandledCuda,
            2 => ResultCode::System,
            3 => ResultCode::Internal,
            4 => ResultCode::InvalidArgument,
            5 => ResultCode::InvalidUsage,
            6 => ResultCode::Remote,
            IN_PROGRESS => ResultCode::InProgress,
            other => ResultCode::Other(other),
        }
    }
}

impl fmt::Display for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ResultCode::UnhandledCuda => "ncclUnhandledCudaError",
            ResultCode::System => "ncclSystemError",
            ResultCode::Internal => "ncclInternalError",
            ResultCode::InvalidArgument => "ncclInvalidArgument",
            ResultCode::InvalidUsage => "ncclInvalidUsage",
            ResultCode::Remote => "ncclRemoteError",
            ResultCode::InProgress => "ncclInProgress",
            ResultCode::Other(code) => return write!(f, "ncclResult_t {code}"),
        })
    }
}

/// Why a call on NCCL failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// NCCL says so.
    #[error("{call} failed: {code} ({words})")]
    Failed {
        /// The function of NCCL.
        call: &'static str,
        /// Its answer, or the communicator's asynchronous error after it.
        code: ResultCode,
        /// `ncclGetErrorString`, then `ncclGetLastError` where it has more to say. The latter is one text for the whole
        /// process, so that another communicator's trouble may stand there.
        words: String,
    },
    /// The call was still in progress at its deadline. The communicator is of no more use: abort it.
    #[error("{call} was still in progress after {} s", waited.as_secs_f32())]
    TimedOut {
        /// The function of NCCL.
        call: &'static str,
        /// How long it was given.
        waited: Duration,
    },
    /// The communicator was ended by an [`Aborter`](crate::Aborter) or is closed.
    #[error("the communicator was ended")]
    Ended,
    /// No call was made: the ranks make no communicator.
    #[error("rank {rank} of {ranks} is no place in a communicator")]
    NoSuchRank {
        /// The rank asked for.
        rank: u32,
        /// Of how many.
        ranks: u32,
    },
    /// A thread that NCCL needs cannot be started.
    #[error("no thread can be started to end the communicator: {0}")]
    NoThread(String),
}

impl Error {
    /// NCCL's answer, where it gave one.
    #[must_use]
    pub fn code(&self) -> Option<ResultCode> {
        match self {
            Error::Failed { code, .. } => Some(*code),
            _ => None,
        }
    }
}
