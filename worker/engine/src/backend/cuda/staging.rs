//! The way between the host's memory and the device's: a few pieces of pinned memory, used in turn.
//!
//! Owns the waiting. A piece is filled again only when the copy from it is done, and that is asked for, never waited for
//! inside the driver: where a group of ranks is stuck, its watchdog ends the wait by ending the work.

use super::driver::{Context, Event, Pinned, Stream};
use super::error::CudaError;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pieces: one is filled while others are copied, and the small uploads of a step need no wait.
const SLOTS: usize = 4;

/// Longest piece: copies of this length reach a link's full speed.
pub(super) const SLOT_BYTES: usize = 8 << 20;

/// Shortest piece, enough for the arrays of most steps.
const SLOT_BYTES_MIN: usize = 64 << 10;

/// Far above any step; a device that is still at work then does not come back.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// Pinned memory in turn.
#[derive(Debug)]
pub(super) struct Staging {
    context: Arc<Context>,
    slots: Vec<Slot>,
    next: usize,
    /// For waits without a copy.
    settled: Event,
}

#[derive(Debug)]
struct Slot {
    /// Made when first used, and made longer when needed.
    memory: Option<Pinned>,
    /// Behind the last copy that uses it.
    copied: Event,
}

impl Staging {
    pub fn new(context: &Arc<Context>) -> Result<Staging, CudaError> {
        let slot = || {
            Ok(Slot {
                memory: None,
                copied: Event::new(context)?,
            })
        };
        let slots: Result<Vec<Slot>, CudaError> = (0..SLOTS).map(|_| slot()).collect();
        Ok(Staging {
            context: Arc::clone(context),
            slots: slots?,
            next: 0,
            settled: Event::new(context)?,
        })
    }

    /// Enqueues a copy of `bytes` to the device; they may change when this returns.
    pub fn upload(&mut self, stream: &Stream, bytes: &[u8], to: u64) -> Result<(), CudaError> {
        for (i, part) in bytes.chunks(SLOT_BYTES).enumerate() {
            self.fill(stream, part.len(), to + (i * SLOT_BYTES) as u64, |memory| {
                memory.copy_from_slice(part)
            })?;
        }
        Ok(())
    }

    /// Has `write` fill pinned memory of `bytes`, and enqueues a copy of it to the device.
    pub fn fill(
        &mut self,
        stream: &Stream,
        bytes: usize,
        to: u64,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let (memory, copied) = self.slot(bytes)?;
        write(&mut memory.bytes_mut()[..bytes]);
        stream.upload(memory, bytes, to)?;
        copied.record(stream)
    }

    /// Waits for all work before it and shows `bytes` of the device, piece by piece, each with its place.
    pub fn download(
        &mut self,
        stream: &Stream,
        from: u64,
        bytes: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<(), CudaError> {
        for at in (0..bytes).step_by(SLOT_BYTES) {
            let part = SLOT_BYTES.min(bytes - at);
            let (memory, copied) = self.slot(part)?;
            stream.download(from + at as u64, memory, 0, part)?;
            copied.record(stream)?;
            wait(copied)?;
            take(at, &memory.bytes()[..part]);
        }
        Ok(())
    }

    /// Waits for all work before it.
    pub fn settle(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.settled.record(stream)?;
        wait(&self.settled)
    }

    /// The next piece, of at least `bytes`, that no copy uses.
    fn slot(&mut self, bytes: usize) -> Result<(&mut Pinned, &Event), CudaError> {
        let Slot { memory, copied } = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        wait(copied)?;
        if memory
            .as_ref()
            .is_none_or(|memory| memory.bytes().len() < bytes)
        {
            // The old one goes first: pinned memory is dear.
            *memory = None;
            *memory = Some(Pinned::new(
                &self.context,
                bytes.next_power_of_two().max(SLOT_BYTES_MIN),
            )?);
        }
        let memory = memory.as_mut().expect("made above");
        Ok((memory, copied))
    }
}

/// Waits until an event is done: at first it asks without a pause, then more and more seldom.
///
/// # Errors
/// The device failed, or was not done in [`WAIT_MAX`].
pub(super) fn wait(event: &Event) -> Result<(), CudaError> {
    /// A step of a small model ends within it; sleeping costs about as much.
    const EAGER: Duration = Duration::from_micros(100);
    const PAUSE: Duration = Duration::from_micros(20);
    let started = Instant::now();
    while !event.done()? {
        match started.elapsed() {
            waited if waited < EAGER => std::thread::yield_now(),
            waited if waited < WAIT_MAX => std::thread::sleep(PAUSE),
            waited => {
                return Err(CudaError::Call {
                    call: "cuEventQuery",
                    error: format!("the device is still at work after {waited:?}"),
                });
            }
        }
    }
    Ok(())
}
