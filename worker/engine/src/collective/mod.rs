//! What the ranks of a shard group do together: sums, gathers and the plan stream.
//!
//! Owns the [`Collective`] trait and its error. [`solo`] is the group of one; [`host`] joins processes by shared memory
//! on one machine or TCP between machines; `nccl` joins the devices of such a group. Knows no model and no schedule.
//!
//! All ranks make the same calls in the same order. A rank that fails is an error on every other rank, never a hang;
//! after an error the group is over, each further call gives the same error.

use crate::runner::StepError;

pub mod host;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
pub mod nccl;
pub mod solo;

#[cfg(test)]
mod tests;

/// One rank's end of a shard group, over buffers of type `Buf` (the backend's).
pub trait Collective<Buf>: Send {
    /// This rank, from 0. Rank 0 leads.
    fn rank(&self) -> u32;

    /// Ranks in the group.
    fn ranks(&self) -> u32;

    /// Replaces the first `len` numbers of `buf` by their sums over the ranks. All ranks get the same bits. Host groups add
    /// in rank order, `((x0 + x1) + x2) + ...`; the library between devices chooses its order, which matters from three
    /// ranks on.
    ///
    /// # Errors
    /// [`CollectiveError`]; the buffer's content is then undefined.
    fn all_reduce_sum(&mut self, buf: &mut Buf, len: usize) -> Result<(), CollectiveError>;

    /// Puts the ranks' column slices side by side on rank 0: rank `r` holds `part [rows, widths[r]]`, and rank 0's
    /// `out` becomes `[rows, sum(widths)]`. Other ranks' `out` is left alone. Widths may differ and may be 0.
    ///
    /// # Errors
    /// [`CollectiveError`]; the content of `out` is then undefined.
    fn gather_columns(
        &mut self,
        part: &Buf,
        rows: usize,
        widths: &[usize],
        out: &mut Buf,
    ) -> Result<(), CollectiveError>;

    /// Rank 0 only: sends the same bytes to every other rank.
    ///
    /// # Errors
    /// [`CollectiveError`]; also when `plan` is longer than [`PLAN_BYTES_MAX`] or another rank calls it.
    fn send_plan(&mut self, plan: &[u8]) -> Result<(), CollectiveError>;

    /// Ranks above 0: waits for the next bytes of rank 0, however long it takes, and puts them in `plan`.
    ///
    /// # Errors
    /// [`CollectiveError`]; also when rank 0 calls it.
    fn recv_plan(&mut self, plan: &mut Vec<u8>) -> Result<(), CollectiveError>;

    /// Whether the group still stands. A device computes after a call has returned: what was read from it since the last
    /// check counts only when this says so. Host groups know at once, and say so by default.
    ///
    /// # Errors
    /// [`CollectiveError`]: what was read is void.
    fn check(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    /// A handle that ends the group from another thread.
    fn abort_handle(&self) -> AbortHandle;
}

/// Longest plan that the plan stream carries.
pub const PLAN_BYTES_MAX: usize = 16 << 20;

/// Why a collective failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank is gone or did not answer in time.
    #[error("rank {rank} of {ranks} is lost: {reason}")]
    RankLost {
        /// Which.
        rank: u32,
        /// Of how many.
        ranks: u32,
        /// What was seen.
        reason: String,
    },
    /// This rank ended the group itself, by its [`AbortHandle`].
    #[error("the shard group was ended")]
    Aborted,
    /// The ranks do not agree on what comes next, or an argument is impossible: a defect, not a loss.
    #[error("the shard group is out of step: {0}")]
    OutOfStep(String),
    /// This rank's device, or the library between devices, failed.
    #[error("the shard group failed on this rank: {0}")]
    Failed(String),
}

impl From<CollectiveError> for StepError {
    fn from(error: CollectiveError) -> StepError {
        match error {
            CollectiveError::RankLost {
                rank,
                ranks,
                reason,
            } => StepError::RankLost {
                rank,
                ranks,
                reason,
            },
            CollectiveError::Aborted => StepError::Aborted,
            other => StepError::Broken(other.to_string()),
        }
    }
}

/// Ends a group from another thread: a blocked call of this rank returns [`CollectiveError::Aborted`], the other
/// ranks see this one as lost.
#[derive(Clone)]
pub struct AbortHandle(std::sync::Arc<dyn Fn() + Send + Sync>);

impl AbortHandle {
    /// A handle that runs `abort`, which must be harmless when called again.
    pub fn new(abort: impl Fn() + Send + Sync + 'static) -> AbortHandle {
        AbortHandle(std::sync::Arc::new(abort))
    }

    /// Ends the group. Does not wait.
    pub fn abort(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AbortHandle")
    }
}

/// Checks the arguments of [`Collective::gather_columns`]; gives the sum of the widths.
fn check_gather(
    rank: u32,
    ranks: u32,
    rows: usize,
    widths: &[usize],
    part: usize,
    out: usize,
) -> Result<usize, CollectiveError> {
    let whole = widths.iter().sum::<usize>();
    if widths.len() != ranks as usize {
        return Err(CollectiveError::OutOfStep(format!(
            "a gather over {ranks} ranks was given {} widths",
            widths.len()
        )));
    }
    let own = rows * widths[rank as usize];
    if part < own || (rank == 0 && out < rows * whole) {
        return Err(CollectiveError::OutOfStep(format!(
            "a gather of {rows} rows of {whole} columns was given buffers of {part} and {out} numbers"
        )));
    }
    Ok(whole)
}
