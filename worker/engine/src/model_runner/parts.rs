//! What of a loaded model outlives its group of ranks: the weights, and the memory they were loaded with.
//!
//! Reading and packing weights takes a minute where forming a group takes a second. When a rank is lost the others keep
//! theirs here, and the next group starts with them. Nothing that the old group computed is believed: an engine starts
//! with an empty cache.

use super::RunnerOptions;
use crate::backend::{Backend, Batch};
use crate::end::EngineEnd;
use crate::layers::decoder::Decoder;
use crate::layers::{Step, Workspace};
use crate::models::checkpoint::{Checkpoint, Fingerprint};
use crate::models::spec::ModelSpec;
use crate::runner::StepError;

/// One rank of a model, without a group.
pub struct Parts<B: Backend> {
    // The first to be dropped: what a device has recorded goes before the buffers that it names.
    pub(super) backend: B,
    pub(super) decoder: Decoder<B>,
    pub(super) kv: B::Kv,
    pub(super) work: Workspace<B>,
    pub(super) spec: ModelSpec,
    /// The files that it was loaded from.
    pub(super) fingerprint: Fingerprint,
    pub(super) options: RunnerOptions,
    pub(super) rank: u32,
    pub(super) ranks: u32,
}

/// Told the end of a runner, with what is left of it. Called on the thread that ran it, before the thread's `OnEnd`, and
/// only where the device can go on: the runner was stopped, a rank is lost, or the group was ended.
pub type Keeper<B> = Box<dyn FnOnce(&EngineEnd, Parts<B>) + Send>;

impl<B: Backend> Parts<B> {
    /// Whether this model would be loaded in the same way, from files that have not changed since; the generation apart.
    #[must_use]
    pub fn fits(
        &self,
        checkpoint: &Checkpoint,
        options: &RunnerOptions,
        rank: u32,
        ranks: u32,
    ) -> bool {
        self.fingerprint == checkpoint.fingerprint
            && self.spec == checkpoint.spec
            && self.is_of(options, rank, ranks)
    }

    /// The device: a group may have to be formed on it.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What a step needs of a rank: its context, and what it works on.
    pub(super) fn step<'a, C>(
        &'a mut self,
        collective: &'a mut C,
        batch: &'a Batch,
    ) -> (
        Step<'a, B, C>,
        &'a Decoder<B>,
        &'a mut B::Kv,
        &'a mut Workspace<B>,
    ) {
        let Parts {
            backend,
            decoder,
            kv,
            work,
            ..
        } = self;
        let step = Step {
            backend,
            collective,
            batch,
        };
        (step, decoder, kv, work)
    }

    pub(super) fn is_of(&self, options: &RunnerOptions, rank: u32, ranks: u32) -> bool {
        let generation = self.options.generation;
        let options = RunnerOptions {
            generation,
            ..*options
        };
        (self.options, self.rank, self.ranks) == (options, rank, ranks)
    }
}

/// Whether the device can go on after this end.
pub(super) fn survives(end: &EngineEnd) -> bool {
    match end {
        EngineEnd::Stopped => true,
        EngineEnd::Failed(error) => {
            matches!(**error, StepError::RankLost { .. } | StepError::Aborted)
        }
        EngineEnd::Panicked(_) => false,
    }
}
