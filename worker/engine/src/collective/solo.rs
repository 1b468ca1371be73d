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

impl<Buf: AsRef<[f32]> + AsMut<[f32]>> Collective<Buf> for Solo {
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
        let (part, out) = (part.as_ref(), out.as_mut());
        let whole = check_gather(0, 1, rows, widths, part.len(), out.len())?;
        out[..rows * whole].copy_from_slice(&part[..rows * whole]);
        Ok(())
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
