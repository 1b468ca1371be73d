//! The group of one rank: nothing to sum, nobody to tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{AbortHandle, Collective, CollectiveError, check_gather};

/// A shard group of one.
#[derive(Debug, Default)]
pub struct Solo {
    aborted: Arc<AtomicBool>,
}

impl Solo {
    /// The group of one.
    #[must_use]
    pub fn new() -> Solo {
        Solo::default()
    }

    fn alive(&self) -> Result<(), CollectiveError> {
        if self.aborted.load(Ordering::Relaxed) {
            Err(CollectiveError::Aborted)
        } else {
            Ok(())
        }
    }
}

/// Buffers whose numbers can be copied to one another.
pub trait CopyNumbers {
    /// How many f32 numbers it has room for.
    fn numbers(&self) -> usize;

    /// Makes its first `len` numbers those of another.
    ///
    /// # Errors
    /// What the device said.
    fn copy_numbers(&mut self, from: &Self, len: usize) -> Result<(), String>;
}

impl<Buf: AsRef<[f32]> + AsMut<[f32]>> CopyNumbers for Buf {
    fn numbers(&self) -> usize {
        self.as_ref().len()
    }

    fn copy_numbers(&mut self, from: &Self, len: usize) -> Result<(), String> {
        self.as_mut()[..len].copy_from_slice(&from.as_ref()[..len]);
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl CopyNumbers for crate::backend::cuda::CudaBuf {
    fn numbers(&self) -> usize {
        self.len()
    }

    fn copy_numbers(&mut self, from: &Self, len: usize) -> Result<(), String> {
        self.copy_from(from, len).map_err(|error| error.to_string())
    }
}

impl<Buf: CopyNumbers> Collective<Buf> for Solo {
    fn rank(&self) -> u32 {
        0
    }

    fn ranks(&self) -> u32 {
        1
    }

    fn all_reduce_sum(&mut self, _buf: &mut Buf, _len: usize) -> Result<(), CollectiveError> {
        self.alive()
    }

    fn gather_columns(
        &mut self,
        part: &Buf,
        rows: usize,
        widths: &[usize],
        out: &mut Buf,
    ) -> Result<(), CollectiveError> {
        self.alive()?;
        let whole = check_gather(0, 1, rows, widths, part.numbers(), out.numbers())?;
        out.copy_numbers(part, rows * whole)
            .map_err(CollectiveError::Failed)
    }

    fn send_plan(&mut self, _plan: &[u8]) -> Result<(), CollectiveError> {
        self.alive()
    }

    fn recv_plan(&mut self, _plan: &mut Vec<u8>) -> Result<(), CollectiveError> {
        Err(CollectiveError::OutOfStep(
            "rank 0 receives no plans".into(),
        ))
    }

    fn abort_handle(&self) -> AbortHandle {
        let aborted = Arc::clone(&self.aborted);
        AbortHandle::new(move || aborted.store(true, Ordering::Relaxed))
    }
}
