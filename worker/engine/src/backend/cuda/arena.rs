//! The device's memory: one piece, given out from its start.
//!
//! Owns no numbers. Nothing is given back but all at once: a model is loaded whole and leaves whole. Before a piece is
//! reserved, each place is a piece of its own: so tests work.

use super::driver::{Context, Memory};
use super::error::CudaError;
use std::sync::Arc;

/// Between places: what the widest copies and the tensor cores like, and what the driver gives too.
pub(super) const ALIGNMENT: u64 = 256;

/// Gives out the device's memory.
#[derive(Debug)]
pub(super) struct Arena {
    context: Arc<Context>,
    reserved: Option<Arc<Memory>>,
    /// Bytes of it that are given out.
    used: u64,
}

/// Some of the device's memory.
#[derive(Debug)]
pub(super) struct Place {
    /// Its address; [`ALIGNMENT`] divides it.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
    /// Keeps it.
    _memory: Arc<Memory>,
}

impl Arena {
    pub fn new(context: &Arc<Context>) -> Arena {
        Arena {
            context: Arc::clone(context),
            reserved: None,
            used: 0,
        }
    }

    /// Takes one piece of `bytes`, from which all later places are.
    pub fn reserve(&mut self, bytes: u64) -> Result<(), CudaError> {
        self.reserved = Some(Arc::new(Memory::new(&self.context, bytes)?));
        self.used = 0;
        Ok(())
    }

    /// A place of `bytes`; what it holds is not defined.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn take(&mut self, bytes: u64) -> Result<Place, CudaError> {
        let Some(memory) = &self.reserved else {
            let memory = Memory::new(&self.context, bytes)?;
            return Ok(Place {
                start: memory.start,
                bytes,
                _memory: Arc::new(memory),
            });
        };
        if bytes > memory.bytes - self.used {
            return Err(CudaError::OutOfMemory { bytes });
        }
        let place = Place {
            start: memory.start + self.used,
            bytes,
            _memory: Arc::clone(memory),
        };
        self.used = (self.used + bytes.next_multiple_of(ALIGNMENT)).min(memory.bytes);
        Ok(place)
    }
}
