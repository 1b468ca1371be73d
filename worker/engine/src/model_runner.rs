//! Executes plans on one rank's device: a checked plan becomes a batch, the batch goes through the decoder, and rank 0
//! samples.
//!
//! Owns the device's memory (weights, cache, workspace), all of it allocated when the model is loaded. Decides nothing:
//! plans come from the scheduler, and one that does not fit the cache or the model is refused, never executed.

mod batch;
mod footprint;
mod outputs;

pub use batch::WantedRow;
pub use footprint::{Footprint, RunnerOptions};

use crate::backend::{Backend, Batch};
use crate::collective::Collective;
use crate::follower::PlanSource;
use crate::layers::decoder::Decoder;
use crate::layers::position::Position;
use crate::layers::{Loader, Step, Workspace};
use crate::models::checkpoint::{Checkpoint, LoadError};
use crate::models::partition::Partition;
use crate::numerics::numerics_id;
use crate::plan::{Logits, StepPlan};
use crate::runner::{
    Geometry, PoolRows, Runner, SampleRow, ScoreRows, StepError, StepOutput, Ticket,
};
use footprint::{kv_shape, workspace_sizes};
use outputs::Outputs;
use std::collections::VecDeque;

/// One rank of a model, ready to execute plans.
pub struct ModelRunner<B: Backend, C> {
    backend: B,
    collective: C,
    decoder: Decoder<B>,
    kv: B::Kv,
    work: Workspace<B>,
    geometry: Geometry,
    generation: u64,
    numerics_id: String,
    batch: Batch,
    wanted: Vec<WantedRow>,
    /// Rows of the batch whose logits are computed together.
    rows: Vec<u32>,
    /// Their logits on the host; rank 0 only.
    logits: Vec<f32>,
    /// Rows of hidden states on the host; rank 0 only, and empty before the first embedding.
    hidden: Vec<f32>,
    logits_rows: usize,
    /// One row that a sampler may change.
    scratch: Vec<f32>,
    encoded: Vec<u8>,
    submitted: u64,
    finished: VecDeque<(Ticket, StepOutput)>,
}

impl<B: Backend, C: Collective<B::Buf>> ModelRunner<B, C> {
    /// Loads this rank's part of a model; which rank it is, the collective says. `progress` is told the bytes of
    /// weights packed so far, of [`Footprint::weights`](Footprint) in all.
    ///
    /// # Errors
    /// [`LoadError`]: the model cannot be divided among so many ranks, the options are impossible, or the device has
    /// not the memory.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &RunnerOptions,
        mut backend: B,
        collective: C,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let spec = &checkpoint.spec;
        options.check()?;
        let partition = Partition::new(
            spec,
            collective.rank() as usize,
            collective.ranks() as usize,
        )?;
        let mut loader = Loader {
            backend: &mut backend,
            weights: &checkpoint.weights,
            spec,
            partition: &partition,
            dtype: options.weight_dtype,
            packed: 0,
            progress,
        };
        let decoder = Decoder::load(&mut loader, &checkpoint.names)?;
        let kv = backend.alloc_kv(kv_shape(spec, &partition, options))?;
        let position = Position::new(
            &mut backend,
            spec,
            &partition,
            options.step_tokens_max as usize,
        )?;
        let work = Workspace::new(
            &mut backend,
            &workspace_sizes(spec, &partition, options),
            position,
        )?;
        let host_rows = if partition.rank == 0 {
            options.logits_rows()
        } else {
            0
        };
        Ok(ModelRunner {
            numerics_id: numerics_id(
                &backend.numerics(),
                options.weight_dtype,
                options.kv_dtype,
                collective.ranks(),
            ),
            backend,
            collective,
            decoder,
            kv,
            work,
            geometry: Geometry {
                blocks: options.blocks,
                context_max: spec.context_max as u32,
                vocab: spec.vocab as u32,
                window: spec.window.map(|window| window as u32),
                step_tokens_max: options.step_tokens_max,
                spans_max: options.spans_max,
            },
            generation: options.generation,
            batch: Batch::default(),
            wanted: Vec::new(),
            rows: Vec::new(),
            logits: vec![0.0; host_rows * spec.vocab],
            hidden: Vec::new(),
            logits_rows: options.logits_rows(),
            scratch: Vec::new(),
            encoded: Vec::new(),
            submitted: 0,
            finished: VecDeque::new(),
        })
    }

    /// Names the arithmetic: replicas of one id give the same bits.
    #[must_use]
    pub fn numerics_id(&self) -> &str {
        &self.numerics_id
    }

    /// Runs a plan and shows each wanted row of logits, in the order of the spans' tokens; on rank 0 only. All ranks of
    /// a group must run the same plan. [`Runner::submit`] is this with the sampler behind it.
    ///
    /// # Errors
    /// [`StepError`]: the plan does not fit this runner, or a rank or the device is lost.
    pub fn run(
        &mut self,
        plan: &StepPlan,
        mut on_row: impl FnMut(WantedRow, &mut [f32]),
    ) -> Result<(), StepError> {
        batch::check(plan, &self.geometry, self.generation)?;
        self.execute(plan, &mut Taking(&mut on_row))
    }

    /// Runs a checked plan.
    fn execute(&mut self, plan: &StepPlan, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        batch::fill(&mut self.batch, &mut self.wanted, plan);
        let mut step = Step {
            backend: &mut self.backend,
            collective: &mut self.collective,
            batch: &self.batch,
        };
        self.decoder
            .forward(&mut step, &mut self.work, &mut self.kv)?;
        let vocab = self.geometry.vocab as usize;
        for wanted in self.wanted.chunks(self.logits_rows) {
            let row = |row: &WantedRow| (self.batch.spans[row.span].rows.start + row.token) as u32;
            self.rows.clear();
            self.rows.extend(wanted.iter().map(row));
            let ends = &self.decoder.embedding;
            let device_logits = ends.logits(&mut step, &self.rows, &mut self.work)?;
            if step.collective.rank() != 0 {
                continue;
            }
            let logits = &mut self.logits[..wanted.len() * vocab];
            step.backend
                .read(device_logits, logits)
                .map_err(|error| StepError::Broken(error.to_string()))?;
            for (row, logits) in wanted.iter().zip(logits.chunks_exact_mut(vocab)) {
                taker.take_row(*row, logits);
            }
        }
        self.read_hidden(plan, taker)
    }

    /// Shows the hidden states that a plan asks for. Every rank has them whole; rank 0's are taken.
    fn read_hidden(&mut self, plan: &StepPlan, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        if self.collective.rank() != 0 {
            return Ok(());
        }
        let mut step = Step {
            backend: &mut self.backend,
            collective: &mut self.collective,
            batch: &self.batch,
        };
        let width = self.decoder.hidden;
        for (index, span) in plan.spans.iter().enumerate() {
            if span.logits != Logits::Hidden {
                continue;
            }
            let mut left = self.batch.spans[index].rows.clone();
            while !left.is_empty() {
                let rows = left.start..left.end.min(left.start + self.logits_rows);
                left.start = rows.end;
                self.rows.clear();
                self.rows.extend(rows.map(|row| row as u32));
                let states = self
                    .decoder
                    .embedding
                    .hidden(&mut step, &self.rows, &mut self.work);
                self.hidden.resize(self.rows.len() * width, 0.0);
                step.backend
                    .read(states, &mut self.hidden)
                    .map_err(|error| StepError::Broken(error.to_string()))?;
                for row in self.hidden.chunks_exact(width) {
                    taker.take_hidden(index, row);
                }
            }
        }
        Ok(())
    }
}

/// Who is shown the rows that a plan asks for.
trait TakeRows {
    fn take_row(&mut self, row: WantedRow, logits: &mut [f32]);
    fn take_hidden(&mut self, span: usize, hidden: &[f32]);
}

/// Only logits are looked at.
struct Taking<F>(F);

impl<F: FnMut(WantedRow, &mut [f32])> TakeRows for Taking<F> {
    fn take_row(&mut self, row: WantedRow, logits: &mut [f32]) {
        (self.0)(row, logits);
    }

    fn take_hidden(&mut self, _: usize, _: &[f32]) {}
}

impl TakeRows for Outputs<'_> {
    fn take_row(&mut self, row: WantedRow, logits: &mut [f32]) {
        Outputs::take_row(self, row, logits);
    }

    fn take_hidden(&mut self, span: usize, hidden: &[f32]) {
        Outputs::take_hidden(self, span, hidden);
    }
}

impl<B: Backend, C: Collective<B::Buf>> Runner for ModelRunner<B, C> {
    fn submit(
        &mut self,
        plan: &StepPlan,
        samples: &[SampleRow<'_>],
        scores: &[ScoreRows<'_>],
        pools: &[PoolRows<'_>],
    ) -> Result<Ticket, StepError> {
        batch::check(plan, &self.geometry, self.generation)?;
        outputs::check_wanted(plan, samples, scores, pools)?;
        if self.collective.rank() == 0 && self.collective.ranks() > 1 {
            plan.encode(&mut self.encoded);
            self.collective.send_plan(&self.encoded)?;
        }
        let scratch = std::mem::take(&mut self.scratch);
        let mut outputs = Outputs::new(samples, scores, pools, scratch);
        self.execute(plan, &mut outputs)?;
        let (output, scratch) = outputs.finish();
        self.scratch = scratch;
        self.submitted += 1;
        let ticket = Ticket(self.submitted);
        self.finished.push_back((ticket, output));
        Ok(ticket)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<StepOutput, StepError> {
        match self.finished.pop_front() {
            Some((first, output)) if first == ticket => Ok(output),
            other => {
                let first = other.map(|(first, _)| first);
                Err(StepError::Broken(format!(
                    "{ticket:?} was collected where {first:?} is the next"
                )))
            }
        }
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn close(&mut self) {
        if self.collective.rank() == 0 && self.collective.ranks() > 1 {
            // A follower that does not hear it sees the connection end.
            let _ = self.collective.send_plan(&[]);
        }
    }
}

impl<B: Backend, C: Collective<B::Buf>> PlanSource for ModelRunner<B, C> {
    fn recv_plan(&mut self, bytes: &mut Vec<u8>) -> Result<(), StepError> {
        Ok(self.collective.recv_plan(bytes)?)
    }
}

#[cfg(test)]
mod tests;
