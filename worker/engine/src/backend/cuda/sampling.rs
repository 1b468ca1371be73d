//! Drawing tokens on the device.
//!
//! Owns the way of the draws there and of the tokens back: pinned memory that collects the tokens of a step, with an event
//! behind the last. The choice itself is the kernel's, the same as the host's.

use super::CudaBackend;
use super::buffer::CudaBuf;
use super::bytes;
use super::driver::{Context, Event, Pinned, Stream};
use super::error::CudaError;
use super::kernels::Draw as KernelDraw;
use super::pointer::{Ptr, PtrMut};
use super::staging;
use crate::backend::Draw;
use std::sync::Arc;

/// Draws of one launch.
const DRAWS: usize = 1024;

/// Rows of one upload of wanted rows.
const WANTED: usize = 4096;

/// Tokens that wait for the host.
const TOKENS: usize = 4096;

/// Largest vocabulary that the kernel takes.
pub(super) const VOCAB_MAX: usize = 1 << 20;

/// Places in the small region: draws, their tokens, wanted rows.
const TOKENS_AT: u64 = (DRAWS * size_of::<KernelDraw>()) as u64;
const WANTED_AT: u64 = TOKENS_AT + 4 * DRAWS as u64;
const _: () = assert!(WANTED_AT + 4 * WANTED as u64 <= bytes::SMALL);

/// Tokens on their way back.
#[derive(Debug)]
pub(super) struct Draws {
    tokens: Pinned,
    /// How many are under way.
    waiting: usize,
    /// Behind the last of them.
    done: Event,
    /// Those that had to make room.
    taken: Vec<u32>,
}

impl Draws {
    pub fn new(context: &Arc<Context>) -> Result<Draws, CudaError> {
        Ok(Draws {
            tokens: Pinned::new(context, 4 * TOKENS)?,
            waiting: 0,
            done: Event::new(context)?,
            taken: Vec::new(),
        })
    }

    /// Waits for the tokens under way, and appends all to `out`.
    pub fn take(&mut self, out: &mut Vec<u32>) -> Result<(), CudaError> {
        self.collect()?;
        out.append(&mut self.taken);
        Ok(())
    }

    /// Gives up all tokens, once nothing is under way.
    pub fn forget(&mut self) {
        self.waiting = 0;
        self.taken.clear();
    }

    fn collect(&mut self) -> Result<(), CudaError> {
        let waiting = std::mem::take(&mut self.waiting);
        if waiting > 0 {
            staging::wait(&self.done)?;
            let tokens: &[u32] = bytemuck::cast_slice(&self.tokens.bytes()[..4 * waiting]);
            self.taken.extend_from_slice(tokens);
        }
        Ok(())
    }

    /// Enqueues the copy of `count` tokens.
    fn bring(&mut self, stream: &Stream, from: u64, count: usize) -> Result<(), CudaError> {
        if self.waiting + count > TOKENS {
            self.collect()?;
        }
        stream.download(from, &self.tokens, 4 * self.waiting, 4 * count)?;
        self.waiting += count;
        self.done.record(stream)
    }
}

impl CudaBackend {
    pub(super) fn enqueue_draws(
        &mut self,
        vocab: usize,
        logits: &CudaBuf,
        draws: &[Draw],
    ) -> Result<(), CudaError> {
        assert!(
            vocab <= VOCAB_MAX,
            "a vocabulary of {vocab} is the host's to draw from"
        );
        let rows = draws
            .iter()
            .map(|draw| draw.row as usize + 1)
            .max()
            .unwrap_or(0);
        let logits = logits.floats(rows * vocab);
        let small = self.small()?;
        for draws in draws.chunks(DRAWS) {
            let bytes = draws.len() * size_of::<KernelDraw>();
            self.staging.fill(&self.stream, bytes, small, |memory| {
                let places: &mut [KernelDraw] = bytemuck::cast_slice_mut(memory);
                for (place, draw) in places.iter_mut().zip(draws) {
                    *place = of_kernel(draw);
                }
            })?;
            let launch = self.grid([draws.len(), 1, 1], 1024, 0);
            let tokens = PtrMut::new(small + TOKENS_AT);
            self.device.kernels.sample_rows(
                launch,
                tokens,
                logits,
                Ptr::new(small),
                vocab as i32,
            )?;
            self.draws
                .bring(&self.stream, tokens.address(), draws.len())?;
        }
        Ok(())
    }

    /// Where wanted rows go, and how many fit.
    pub(super) fn wanted_rows(&mut self) -> Result<(PtrMut<u32>, usize), CudaError> {
        Ok((PtrMut::new(self.small()? + WANTED_AT), WANTED))
    }

    fn small(&mut self) -> Result<u64, CudaError> {
        let (start, _) = self.scratch.small.at_least(&mut self.arena, bytes::SMALL)?;
        Ok(start)
    }
}

fn of_kernel(draw: &Draw) -> KernelDraw {
    let Draw {
        row,
        temperature,
        top_k,
        top_p,
        min_p,
        u,
    } = *draw;
    // More tokens than any vocabulary has are all tokens.
    let top_k = top_k.min(VOCAB_MAX as u32) as i32;
    KernelDraw {
        row: row as i32,
        temperature,
        top_k,
        top_p,
        min_p,
        unused: 0,
        u,
    }
}
