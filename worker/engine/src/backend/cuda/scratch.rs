//! Memory that ops work in: one region for each use, made once for the largest step, or as needed before any is known.
//!
//! Owns no contents. Recorded steps hold the regions' addresses: whoever makes a region longer forgets them.

use super::arena::{Arena, Place};
use super::bytes;
use super::error::CudaError;
use super::step::Capacity;
use crate::backend::StepShape;

/// The regions.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// cuBLAS works here.
    pub workspace: Region,
    /// Draws, their results, and rows that are wanted: see [`bytes::SMALL`].
    pub small: Region,
    /// Slices of quantised matrices, widened to bf16.
    pub widened: Region,
    /// Activations rounded for a product.
    pub rounded: Region,
    /// Unfinished attention.
    pub partial: Region,
    /// The step's arrays.
    pub arrays: Region,
}

/// Some memory.
#[derive(Debug, Default)]
pub(super) struct Region(Option<Place>);

impl Scratch {
    /// Makes all regions for steps up to `step`.
    pub fn set_aside(&mut self, arena: &mut Arena, step: &StepShape) -> Result<(), CudaError> {
        let widened = if step.quantised > 0 {
            bytes::WIDENED
        } else {
            0
        };
        for (region, bytes) in [
            (&mut self.workspace, bytes::BLAS_WORKSPACE),
            (&mut self.small, bytes::SMALL),
            (&mut self.widened, widened),
            (&mut self.rounded, bytes::rounded(step.rows, step.width)),
            (&mut self.partial, bytes::partial_most(step)),
            (&mut self.arrays, Capacity::of(step).bytes()),
        ] {
            *region = Region(Some(arena.take(bytes)?));
        }
        Ok(())
    }
}

impl Region {
    /// Its address, with at least `bytes` behind it; and whether it is another one than before.
    pub fn at_least(&mut self, arena: &mut Arena, bytes: u64) -> Result<(u64, bool), CudaError> {
        if let Some(place) = &self.0
            && place.bytes >= bytes
        {
            return Ok((place.start, false));
        }
        let place = arena.take(bytes)?;
        let start = place.start;
        self.0 = Some(place);
        Ok((start, true))
    }
}
