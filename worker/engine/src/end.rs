//! How an engine's thread ends: a typed reason that callers can read, wait for and be told.

use crate::runner::StepError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Why an engine or a follower is over.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineEnd {
    /// It was told to stop.
    #[error("the engine was stopped")]
    Stopped,
    /// A step failed; the shard group's generation is over.
    #[error("{0}")]
    Failed(Arc<StepError>),
    /// A defect: its thread panicked, with this message.
    #[error("the engine panicked: {0}")]
    Panicked(String),
}

impl From<StepError> for EngineEnd {
    fn from(error: StepError) -> Self {
        EngineEnd::Failed(Arc::new(error))
    }
}

/// Told once, on the ending thread, after everything the thread owned is dropped.
pub type OnEnd = Box<dyn FnOnce(EngineEnd) + Send>;

/// Where the end is written, once.
#[derive(Default)]
pub(crate) struct EndCell {
    end: Mutex<Option<EngineEnd>>,
    written: Condvar,
}

impl EndCell {
    pub fn get(&self) -> Option<EngineEnd> {
        self.end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub fn wait(&self) -> EngineEnd {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(end) = &*end {
                return end.clone();
            }
            end = self
                .written
                .wait(end)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn set(&self, end: EngineEnd) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.written.notify_all();
    }
}

/// Runs `work` to its end; a panic inside is an end like others. What `work` borrows may be left half changed: the
/// caller must not decide anything by it afterwards.
pub(crate) fn guarded(work: impl FnOnce() -> EngineEnd) -> EngineEnd {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        EngineEnd::Panicked(text.unwrap_or_else(|| "no message".into()))
    })
}
