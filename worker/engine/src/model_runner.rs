//! Executes plans on one rank's device: a checked plan becomes a batch, the batch goes through the decoder, and rank 0
//! samples.
//!
//! Owns the device's memory (weights, cache, workspace), all of it allocated when the model is loaded. Decides nothing:
//! plans come from the scheduler, and one that does not fit the cache or the model is refused, never executed.
//!
//! `submit` hands a step to the device, `collect` waits for it. Only rows that the host must see are waited for in
//! `submit`: those whose tokens the device cannot draw. The group is asked once a step, in `collect`, whether it still
//! stands: before that nothing that was read counts.

mod batch;
mod footprint;
mod outputs;
mod parts;
mod reserve;

pub use batch::WantedRow;
pub use footprint::{Footprint, RunnerOptions};
pub use parts::{Keeper, Parts};

use crate::backend::{Backend, Batch, DecodeOps, DeviceError, Draw};
use crate::collective::Collective;
use crate::end::EngineEnd;
use crate::follower::PlanSource;
use crate::layers::decoder::Decoder;
use crate::layers::position::Position;
use crate::layers::{Loader, Workspace};
use crate::models::checkpoint::{Checkpoint, LoadError};
use crate::models::partition::Partition;
use crate::numerics::numerics_id;
use crate::plan::{Logits, StepPlan};
use crate::runner::{
    Geometry, PoolRows, Runner, SampleRow, ScoreRows, StepError, StepOutput, Ticket,
};
use crate::weights::packed::{Origin, PackedCache, Packing};
use footprint::{kv_shape, step_shape, workspace_sizes};
use outputs::{Outputs, Pending};
use std::collections::VecDeque;
use std::ops::Range;

/// One rank of a model, ready to execute plans.
pub struct ModelRunner<B: Backend, C> {
    // Before the group: what a device has recorded holds it.
    parts: Parts<B>,
    collective: C,
    keeper: Option<Keeper<B>>,
    geometry: Geometry,
    generation: u64,
    numerics_id: String,
    batch: Batch,
    wanted: Vec<WantedRow>,
    /// Rows of the batch whose logits are computed together.
    rows: Vec<u32>,
    /// Tokens that the device is to draw from them.
    draws: Vec<Draw>,
    /// Tokens it has drawn for steps that are not collected yet.
    drawn: Vec<u32>,
    /// Their logits on the host; rank 0 only.
    logits: Vec<f32>,
    /// Rows of hidden states on the host; rank 0 only, and empty before the first embedding.
    hidden: Vec<f32>,
    logits_rows: usize,
    decode_rows_max: usize,
    /// One row that a sampler may change.
    scratch: Vec<f32>,
    encoded: Vec<u8>,
    submitted: u64,
    pending: VecDeque<(Ticket, Pending)>,
    /// Lists of collected steps, for steps to come.
    spare: Vec<Pending>,
    /// Of the step that was collected last.
    output: StepOutput,
    /// A step failed: what lies on the device is undefined.
    failed: bool,
}

impl<B: Backend, C: Collective<B::Buf>> ModelRunner<B, C> {
    /// Loads this rank's part of a model; which rank it is, the collective says. `progress` is told the bytes of
    /// weights packed so far, of [`Footprint::weights`](Footprint) in all.
    ///
    /// # Errors
    /// [`LoadError`]: the model cannot be divided among so many ranks, the options are impossible, or the device has
    /// not the memory or does not serve what is asked for.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &RunnerOptions,
        backend: B,
        collective: C,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let (runner, _) =
            Self::load_through(None, checkpoint, options, backend, collective, progress)?;
        Ok(runner)
    }

    /// As [`ModelRunner::load`], but takes packed weights from a cache where it has them, and says where they came from.
    ///
    /// # Errors
    /// As [`ModelRunner::load`]; none for the cache.
    pub fn load_through(
        cache: Option<&PackedCache>,
        checkpoint: &Checkpoint,
        options: &RunnerOptions,
        mut backend: B,
        collective: C,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Self, Origin), LoadError> {
        let spec = &checkpoint.spec;
        options.check()?;
        let (rank, ranks) = (collective.rank() as usize, collective.ranks() as usize);
        let partition = Partition::new(spec, rank, ranks)?;
        let footprint = Footprint::of_checkpoint::<B>(checkpoint, rank, ranks, options)?;
        let step = step_shape::<B>(spec, &partition, &checkpoint.forms, options);
        let bytes = footprint.bytes(options.blocks);
        reserve::patiently(reserve::WAIT_MAX, || backend.reserve(bytes, &step))?;
        let dtype = options.weight_dtype;
        let packing = cache.map_or(Packing::Apart, |cache| {
            cache.packing(checkpoint, (rank, ranks), dtype, &backend, progress)
        });
        let mut loader = Loader {
            backend: &mut backend,
            weights: &checkpoint.weights,
            forms: &checkpoint.forms,
            spec,
            partition: &partition,
            dtype,
            packing,
            packed: 0,
            progress,
        };
        let decoder = Decoder::load(&mut loader, &checkpoint.names)?;
        let origin = loader.packing.origin();
        let kv = backend.alloc_kv(kv_shape(spec, &partition, options))?;
        let position = Position::new(
            &mut backend,
            spec,
            &partition,
            options.step_tokens_max as usize,
        )?;
        let sizes = workspace_sizes::<B>(spec, &partition, options);
        let work = Workspace::new(&mut backend, &sizes, position)?;
        let parts = Parts {
            backend,
            decoder,
            kv,
            work,
            spec: spec.clone(),
            fingerprint: checkpoint.fingerprint.clone(),
            options: *options,
            rank: rank as u32,
            ranks: ranks as u32,
        };
        Ok((Self::from_parts(parts, options, collective)?, origin))
    }

    /// A rank of a new group with the weights of an old one.
    ///
    /// # Errors
    /// [`LoadError::Options`]: the parts are of another rank or were loaded with other options, the generation apart.
    pub fn from_parts(
        parts: Parts<B>,
        options: &RunnerOptions,
        collective: C,
    ) -> Result<Self, LoadError> {
        let (rank, ranks) = (collective.rank(), collective.ranks());
        if !parts.is_of(options, rank, ranks) {
            return Err(LoadError::Options(format!(
                "the weights kept are those of rank {} of {} with {:?}; rank {rank} of {ranks} is to have {options:?}",
                parts.rank, parts.ranks, parts.options
            )));
        }
        let spec = &parts.spec;
        let logits_rows = options.logits_rows::<B>();
        let host_rows = if rank == 0 { logits_rows } else { 0 };
        Ok(ModelRunner {
            numerics_id: numerics_id(
                &parts.backend.numerics(),
                options.weight_dtype,
                options.kv_dtype,
                ranks,
            ),
            geometry: Geometry {
                blocks: options.blocks,
                context_max: spec.context_max as u32,
                vocab: spec.vocab as u32,
                window: spec.window.map(|window| window as u32),
                step_tokens_max: options.step_tokens_max,
                spans_max: options.spans_max,
            },
            generation: options.generation,
            logits: vec![0.0; host_rows * spec.vocab],
            parts,
            collective,
            keeper: None,
            batch: Batch::default(),
            wanted: Vec::new(),
            rows: Vec::new(),
            draws: Vec::new(),
            drawn: Vec::new(),
            hidden: Vec::new(),
            logits_rows,
            decode_rows_max: options.decode_rows_max::<B>(),
            scratch: Vec::new(),
            encoded: Vec::new(),
            submitted: 0,
            pending: VecDeque::new(),
            spare: Vec::new(),
            output: StepOutput::default(),
            failed: false,
        })
    }

    /// Leaves the group, with all that outlives it. Nothing runs on the device any more.
    pub fn into_parts(mut self) -> Parts<B> {
        self.parts.backend.renew();
        self.parts
    }

    /// Who is to have the parts when the runner's [end](Runner::end) leaves them usable.
    pub fn keep(&mut self, keeper: Keeper<B>) {
        self.keeper = Some(keeper);
    }

    /// Names the arithmetic: replicas of one id give the same bits.
    #[must_use]
    pub fn numerics_id(&self) -> &str {
        &self.numerics_id
    }

    /// Runs a plan and shows each wanted row of logits, in the order of the spans' tokens; on rank 0 only. What was shown
    /// counts when it returns without an error. All ranks of a group must run the same plan. [`Runner::submit`] and
    /// [`Runner::collect`] are this with the sampler behind it.
    ///
    /// # Errors
    /// [`StepError`]: the plan does not fit this runner, or a rank or the device is lost.
    pub fn run(
        &mut self,
        plan: &StepPlan,
        mut on_row: impl FnMut(WantedRow, &mut [f32]),
    ) -> Result<(), StepError> {
        self.check(plan)?;
        self.execute(plan, &mut Taking(&mut on_row))?;
        self.wait(0)
    }

    fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        self.check_stands()?;
        batch::check(plan, &self.geometry, self.generation)
    }

    /// Runs a checked plan.
    fn execute(&mut self, plan: &StepPlan, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        // Until it has gone well.
        self.failed = true;
        batch::fill(&mut self.batch, &mut self.wanted, plan);
        match batch::decode_rows(plan, self.decode_rows_max) {
            Some(rows) => self.decode(rows, taker)?,
            None => self.forward(plan, taker)?,
        }
        self.failed = false;
        Ok(())
    }

    /// A step of decodes: filled up, so that the device may record its ops or has recorded them.
    fn decode(&mut self, rows: usize, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        let padded = self.parts.backend.padded_rows(rows);
        let padded = padded.clamp(rows, self.decode_rows_max);
        batch::pad(&mut self.batch, padded);
        self.rows.clear();
        self.rows.extend(0..padded as u32);
        let (mut step, decoder, kv, work) = self.parts.step(&mut self.collective, &self.batch);
        decoder.begin_step(&mut step, work);
        let mut ops = step.backend.begin_decode(padded);
        while ops == DecodeOps::Wanted {
            decoder.forward(&mut step, work, kv)?;
            decoder.embedding.logits(&mut step, &self.rows, work)?;
            ops = step.backend.end_decode();
        }
        self.take(0..rows, taker)
    }

    /// A step of any kind.
    fn forward(&mut self, plan: &StepPlan, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        let (mut step, decoder, kv, work) = self.parts.step(&mut self.collective, &self.batch);
        decoder.begin_step(&mut step, work);
        decoder.forward(&mut step, work, kv)?;
        for first in (0..self.wanted.len()).step_by(self.logits_rows) {
            let wanted = first..self.wanted.len().min(first + self.logits_rows);
            let row = |row: &WantedRow| (self.batch.spans[row.span].rows.start + row.token) as u32;
            self.rows.clear();
            self.rows
                .extend(self.wanted[wanted.clone()].iter().map(row));
            let (mut step, decoder, _, work) = self.parts.step(&mut self.collective, &self.batch);
            decoder.embedding.logits(&mut step, &self.rows, work)?;
            self.take(wanted, taker)?;
        }
        self.read_hidden(plan, taker)
    }

    /// Has tokens drawn from the logits that were last computed, those of some wanted rows, and shows the rows that the
    /// host must see.
    fn take(&mut self, wanted: Range<usize>, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        if self.parts.rank != 0 {
            return Ok(());
        }
        let (wanted, vocab) = (&self.wanted[wanted], self.geometry.vocab as usize);
        let Parts {
            backend,
            decoder,
            work,
            ..
        } = &mut self.parts;
        let on_device = decoder.embedding.logits_in(work);
        if backend.draws(vocab) {
            self.draws.clear();
            taker.draw_rows(wanted, &mut self.draws);
            if !self.draws.is_empty() {
                backend.draw(vocab, on_device, &self.draws);
            }
        }
        // A read begins at the first row.
        let rows = taker.rows_read(wanted);
        if rows > 0 {
            let logits = &mut self.logits[..rows * vocab];
            let read = backend.read(on_device, logits);
            read.map_err(|error| fault(&error, &mut self.collective))?;
            for (row, logits) in wanted.iter().zip(logits.chunks_exact_mut(vocab)) {
                taker.take_row(*row, logits);
            }
        }
        Ok(())
    }

    /// Shows the hidden states that a plan asks for. Every rank has them whole; rank 0's are taken.
    fn read_hidden(&mut self, plan: &StepPlan, taker: &mut dyn TakeRows) -> Result<(), StepError> {
        if self.parts.rank != 0 {
            return Ok(());
        }
        let width = self.parts.decoder.hidden;
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
                let (mut step, decoder, _, work) =
                    self.parts.step(&mut self.collective, &self.batch);
                let states = decoder.embedding.hidden(&mut step, &self.rows, work);
                self.hidden.resize(self.rows.len() * width, 0.0);
                let read = step.backend.read(states, &mut self.hidden);
                read.map_err(|error| fault(&error, step.collective))?;
                for row in self.hidden.chunks_exact(width) {
                    taker.take_hidden(index, row);
                }
            }
        }
        Ok(())
    }

    /// Waits until the device is through with a step, whose tokens it draws last.
    fn wait(&mut self, draws: usize) -> Result<(), StepError> {
        self.check_stands()?;
        self.failed = true;
        let Parts { backend, work, .. } = &mut self.parts;
        let waited = if draws > self.drawn.len() {
            backend.drawn(&mut self.drawn)
        } else {
            backend.read(&work.x, &mut [])
        };
        waited.map_err(|error| fault(&error, &mut self.collective))?;
        self.collective.check()?;
        if draws > self.drawn.len() {
            return Err(StepError::Broken(format!(
                "the device drew {} of {draws} tokens",
                self.drawn.len()
            )));
        }
        self.failed = false;
        Ok(())
    }

    fn check_stands(&self) -> Result<(), StepError> {
        if self.failed {
            let reason = "an earlier step failed: this group runs no more".to_owned();
            return Err(StepError::Broken(reason));
        }
        Ok(())
    }
}

/// Why a device failed: a group that fell is the reason, where it did.
fn fault<Buf>(error: &DeviceError, collective: &mut impl Collective<Buf>) -> StepError {
    match collective.check() {
        Ok(()) => StepError::Broken(error.to_string()),
        Err(fallen) => fallen.into(),
    }
}

/// Who is shown the rows that a plan asks for.
trait TakeRows {
    /// Lists what a device can draw from some wanted rows, which lie in its logits in this order.
    fn draw_rows(&mut self, wanted: &[WantedRow], draws: &mut Vec<Draw>);
    /// How many of these rows, from the first on, must be read.
    fn rows_read(&self, wanted: &[WantedRow]) -> usize;
    fn take_row(&mut self, row: WantedRow, logits: &mut [f32]);
    fn take_hidden(&mut self, span: usize, hidden: &[f32]);
}

/// Only logits are looked at, and all of them.
struct Taking<F>(F);

impl<F: FnMut(WantedRow, &mut [f32])> TakeRows for Taking<F> {
    fn draw_rows(&mut self, _: &[WantedRow], _: &mut Vec<Draw>) {}

    fn rows_read(&self, wanted: &[WantedRow]) -> usize {
        wanted.len()
    }

    fn take_row(&mut self, row: WantedRow, logits: &mut [f32]) {
        (self.0)(row, logits);
    }

    fn take_hidden(&mut self, _: usize, _: &[f32]) {}
}

impl TakeRows for Outputs<'_> {
    fn draw_rows(&mut self, wanted: &[WantedRow], draws: &mut Vec<Draw>) {
        Outputs::draw_rows(self, wanted, draws);
    }

    fn rows_read(&self, wanted: &[WantedRow]) -> usize {
        Outputs::rows_read(self, wanted)
    }

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
        self.check(plan)?;
        outputs::check_wanted(plan, samples, scores, pools)?;
        if self.parts.rank == 0 && self.parts.ranks > 1 {
            plan.encode(&mut self.encoded);
            self.collective.send_plan(&self.encoded)?;
        }
        let scratch = std::mem::take(&mut self.scratch);
        let pending = self.spare.pop().unwrap_or_default();
        let mut outputs = Outputs::new(samples, scores, pools, pending, scratch);
        self.execute(plan, &mut outputs)?;
        let (pending, scratch) = outputs.finish();
        self.scratch = scratch;
        self.submitted += 1;
        let ticket = Ticket(self.submitted);
        self.pending.push_back((ticket, pending));
        Ok(ticket)
    }

    fn collect(&mut self, ticket: Ticket) -> Result<&mut StepOutput, StepError> {
        match self.pending.pop_front() {
            Some((first, mut pending)) if first == ticket => {
                let draws = pending.draws;
                self.wait(draws)?;
                pending.finish(&self.drawn[..draws], &mut self.output);
                self.spare.push(pending);
                self.drawn.drain(..draws);
                Ok(&mut self.output)
            }
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

    fn end(mut self: Box<Self>, end: &EngineEnd) {
        match end {
            EngineEnd::Stopped if self.parts.rank == 0 && self.parts.ranks > 1 => {
                // A follower that does not hear it sees the connection end.
                let _ = self.collective.send_plan(&[]);
            }
            // The others may wait for this rank in a sum that it will never join.
            EngineEnd::Failed(_) | EngineEnd::Panicked(_) => self.collective.abort_handle().abort(),
            EngineEnd::Stopped => {}
        }
        if let Some(keeper) = self.keeper.take()
            && parts::survives(end)
        {
            keeper(end, self.into_parts());
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
