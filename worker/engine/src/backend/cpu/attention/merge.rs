//! Records: what one vector found in some keys, and how two of them become one.
//!
//! A record is the values' weighted sum (filled up to whole panels), the largest score and the sum of the weights, which
//! are relative to the largest score. A vector that sees none of the keys has the sum 0, and its record counts for
//! nothing.

use super::super::isa::Kernel;
use super::super::kv::value_width;
use super::super::simd::{LANES, Simd};

/// Where a record's last numbers lie, counted from its end: the rest of the line is not used.
pub(super) const LARGEST: usize = LANES;
pub(super) const SUM: usize = LANES - 1;

/// Numbers of a record.
pub(super) fn record_len(head_width: usize) -> usize {
    value_width(head_width) + LANES
}

/// Merges records of later keys, one per vector, into those of earlier ones.
pub(super) struct Merge<'a> {
    pub(super) found: &'a [f32],
    pub(super) merged: &'a mut [f32],
    pub(super) record_len: usize,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.record_len;
        let pairs = self
            .found
            .chunks_exact(len)
            .zip(self.merged.chunks_exact_mut(len));
        for (found, merged) in pairs {
            if found[len - SUM] == 0.0 {
                continue;
            }
            if merged[len - SUM] == 0.0 {
                merged.copy_from_slice(found);
                continue;
            }
            let largest = merged[len - LARGEST].max(found[len - LARGEST]);
            // SAFETY: records are whole vectors; the features are the caller's promise.
            unsafe {
                let factor = |record: &[f32]| S::exp(S::splat(record[len - LARGEST] - largest));
                let (ours, theirs) = (factor(merged), factor(found));
                let blocks = merged
                    .chunks_exact_mut(LANES)
                    .zip(found.chunks_exact(LANES));
                for (merged, found) in blocks {
                    let sum = S::mul(S::load(merged.as_ptr()), ours);
                    S::store(
                        merged.as_mut_ptr(),
                        S::fma(S::load(found.as_ptr()), theirs, sum),
                    );
                }
            }
            // The sum was scaled with the rest.
            merged[len - LARGEST] = largest;
        }
    }
}

/// Writes a record's quotient: the values' mean.
pub(super) struct Divide<'a> {
    pub(super) record: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for Divide<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let norm = 1.0 / self.record[self.record.len() - SUM];
        for (out, x) in self.out.iter_mut().zip(self.record) {
            *out = x * norm;
        }
    }
}
