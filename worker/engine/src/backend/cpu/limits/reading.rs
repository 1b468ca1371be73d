//! Reading as fast as a thread can: in one or several streams, with and without asking for what comes next.

use super::super::isa::Kernel;
use super::super::simd::{LANES, Simd};

/// Reads all values.
pub(super) struct Read<'a> {
    values: &'a [f32],
    /// Parts read side by side.
    streams: usize,
    /// Lines are asked for so many bytes before they are read; 0 leaves it to the processor.
    ahead_bytes: usize,
}

impl<'a> Read<'a> {
    /// Ways to read. Which one is the fastest differs by processor.
    pub(super) const WAYS: [fn(&'a [f32]) -> Read<'a>; 3] = [
        |values| Read {
            values,
            streams: 1,
            ahead_bytes: 0,
        },
        |values| Read {
            values,
            streams: 1,
            ahead_bytes: 4 << 10,
        },
        |values| Read {
            values,
            streams: 4,
            ahead_bytes: 1 << 10,
        },
    ];
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        /// Vectors of one stream in one go: eight lines.
        const GO: usize = 8;
        let stream = self.values.len() / self.streams;
        let start = self.values.as_ptr();
        // SAFETY: loads stay inside the streams' parts, prefetches may go anywhere; the features are the caller's promise.
        unsafe {
            let mut sums = [S::zero(); GO];
            for at in (0..stream / (GO * LANES)).map(|go| go * GO * LANES) {
                for number in 0..self.streams {
                    let from = start.wrapping_add(number * stream + at);
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let from = from.wrapping_add(i * LANES);
                        if self.ahead_bytes > 0 {
                            S::prefetch(from.cast::<u8>().wrapping_add(self.ahead_bytes));
                        }
                        *sum = S::max(*sum, S::load(from));
                    }
                }
            }
            sums.into_iter().fold(0.0, |sum, v| sum + S::sum(v))
        }
    }
}
