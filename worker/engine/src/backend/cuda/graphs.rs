//! Recorded steps of decodes, one for each number of rows.
//!
//! Owns when a step is recorded: not the first time, when libraries still set themselves up, but the second. A recorded
//! step holds the group's communicator, so that another thread may have to destroy all of them before it can end the
//! group: the store is shared, and closed from then on. The next group's steps go to a store of their own.

use super::driver::{Graph, Stream};
use super::error::CudaError;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The recorded steps of one backend.
#[derive(Debug, Default)]
pub struct GraphStore {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// By rows.
    steps: HashMap<usize, Step>,
}

#[derive(Debug)]
enum Step {
    /// Ran once.
    Seen,
    Recorded(Graph),
}

/// What is to be done with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Its ops are to run.
    Run,
    /// Its ops are to be recorded.
    Record,
    /// It was recorded, and is enqueued.
    Replayed,
}

impl GraphStore {
    /// Destroys all recorded steps, for good: none is kept from now on. From any thread.
    pub fn destroy_all(&self) {
        let mut state = self.state();
        state.closed = true;
        state.steps.clear();
    }

    /// How many steps are recorded.
    #[must_use]
    pub fn recorded(&self) -> usize {
        self.state()
            .steps
            .values()
            .filter(|step| matches!(step, Step::Recorded(_)))
            .count()
    }

    /// Forgets all steps, whose memory has moved.
    pub(super) fn clear(&self) {
        self.state().steps.clear();
    }

    /// Begins a step of `rows`, and enqueues it where it is recorded.
    pub(super) fn begin(&self, rows: usize, stream: &Stream) -> Result<Next, CudaError> {
        let mut state = self.state();
        if state.closed {
            return Ok(Next::Run);
        }
        match state.steps.get(&rows) {
            None => {
                state.steps.insert(rows, Step::Seen);
                Ok(Next::Run)
            }
            Some(Step::Seen) => Ok(Next::Record),
            Some(Step::Recorded(graph)) => graph.launch(stream).map(|()| Next::Replayed),
        }
    }

    /// Keeps a recorded step and enqueues it; false where the store was closed meanwhile.
    pub(super) fn keep(
        &self,
        rows: usize,
        graph: Graph,
        stream: &Stream,
    ) -> Result<bool, CudaError> {
        let mut state = self.state();
        if state.closed {
            return Ok(false);
        }
        graph.launch(stream)?;
        state.steps.insert(rows, Step::Recorded(graph));
        Ok(true)
    }

    /// A thread that panicked left nothing half done here.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
