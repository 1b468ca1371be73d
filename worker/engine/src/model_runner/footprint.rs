//! How much memory a model takes on a rank: what the caller chooses, and what follows from it.

use crate::backend::{Backend, KvDtype, KvShape, StepShape, WeightDtype};
use crate::layers::WorkspaceSizes;
use crate::layers::decoder::{quantised_max, weight_bytes};
use crate::models::checkpoint::{Checkpoint, LoadError};
use crate::models::forms::Forms;
use crate::models::partition::Partition;
use crate::models::spec::{ModelSpec, SpecError};

/// What the caller chooses about a model's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerOptions {
    /// How weights are kept.
    pub weight_dtype: WeightDtype,
    /// How K and V are kept.
    pub kv_dtype: KvDtype,
    /// KV blocks of 16 tokens, block 0 included: at least 2.
    pub blocks: u32,
    /// Most tokens in one step.
    pub step_tokens_max: u32,
    /// Most spans in one step.
    pub spans_max: u32,
    /// The shard group's generation: plans of another one are refused.
    pub generation: u64,
}

/// Bytes that one rank takes on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Packed weights.
    pub weights: u64,
    /// One KV block over all layers.
    pub kv_block: u64,
    /// Activations of the largest step, with what the backend takes to compute it; where the device's memory is the host's,
    /// with what the host keeps of it.
    pub workspace: u64,
}

impl Footprint {
    /// What [`ModelRunner::load`](super::ModelRunner::load) would allocate on a rank for a model of floats.
    ///
    /// # Errors
    /// [`SpecError::Ranks`].
    pub fn of<B: Backend>(
        spec: &ModelSpec,
        rank: usize,
        ranks: usize,
        options: &RunnerOptions,
    ) -> Result<Footprint, SpecError> {
        let partition = Partition::new(spec, rank, ranks)?;
        let forms = Forms::default();
        Ok(Footprint::of_part::<B>(spec, &partition, &forms, options))
    }

    /// What [`ModelRunner::load`](super::ModelRunner::load) would allocate on a rank for this checkpoint.
    ///
    /// # Errors
    /// [`SpecError::Ranks`], and [`Checkpoint::check_option`]'s.
    pub fn of_checkpoint<B: Backend>(
        checkpoint: &Checkpoint,
        rank: usize,
        ranks: usize,
        options: &RunnerOptions,
    ) -> Result<Footprint, LoadError> {
        let Checkpoint { spec, forms, .. } = checkpoint;
        let partition = Partition::new(spec, rank, ranks)?;
        checkpoint.check_option::<B>(&partition, options.weight_dtype)?;
        Ok(Footprint::of_part::<B>(spec, &partition, forms, options))
    }

    fn of_part<B: Backend>(
        spec: &ModelSpec,
        partition: &Partition,
        forms: &Forms,
        options: &RunnerOptions,
    ) -> Footprint {
        let step = step_shape::<B>(spec, partition, forms, options);
        Footprint {
            weights: weight_bytes::<B>(spec, partition, forms, options.weight_dtype),
            kv_block: B::kv_block_bytes(kv_shape(spec, partition, options)),
            workspace: workspace_sizes::<B>(spec, partition, options).bytes::<B>()
                + B::scratch_bytes(&step),
        }
    }

    /// All of it, with a pool of `blocks` KV blocks.
    #[must_use]
    pub const fn bytes(&self, blocks: u32) -> u64 {
        let kv = self.kv_block.saturating_mul(blocks as u64);
        self.weights
            .saturating_add(kv)
            .saturating_add(self.workspace)
    }
}

impl RunnerOptions {
    /// Refuses impossible numbers.
    pub(super) fn check(&self) -> Result<(), LoadError> {
        /// Tokens and spans of a step, far above what any device takes, far below where sizes overflow.
        const STEP_MAX: u32 = 1 << 20;
        let bad = |what: String| Err(LoadError::Options(what));
        let RunnerOptions {
            blocks,
            step_tokens_max,
            spans_max,
            ..
        } = *self;
        if blocks < 2 {
            return bad(format!(
                "a KV pool of {blocks} blocks holds nothing: block 0 is never used, at least 2 are needed"
            ));
        }
        if !(1..=STEP_MAX).contains(&step_tokens_max) || !(1..=STEP_MAX).contains(&spans_max) {
            return bad(format!(
                "a step of {step_tokens_max} tokens in {spans_max} spans; both must be 1 to {STEP_MAX}"
            ));
        }
        Ok(())
    }

    /// Rows whose logits are computed at a time.
    pub(super) fn logits_rows<B: Backend>(&self) -> usize {
        B::LOGITS_ROWS.min(self.step_tokens_max as usize)
    }

    /// Most rows of a step of decodes that a backend may record: their logits fit together.
    pub(super) fn decode_rows_max<B: Backend>(&self) -> usize {
        self.logits_rows::<B>().min(self.spans_max as usize)
    }
}

pub(super) fn kv_shape(
    spec: &ModelSpec,
    partition: &Partition,
    options: &RunnerOptions,
) -> KvShape {
    KvShape {
        layers: spec.layers,
        blocks: options.blocks as usize,
        heads: partition.heads.kv,
        head_width: spec.head_width,
        dtype: options.kv_dtype,
    }
}

/// The largest step of one rank.
pub(super) fn step_shape<B: Backend>(
    spec: &ModelSpec,
    partition: &Partition,
    forms: &Forms,
    options: &RunnerOptions,
) -> StepShape {
    StepShape {
        rows: options.step_tokens_max as usize,
        spans: options.spans_max as usize,
        logits_rows: options.logits_rows::<B>(),
        width: widest(spec, partition),
        quantised: quantised_max::<B>(spec, partition, forms, options.weight_dtype),
        heads: partition.heads,
        vocab: spec.vocab,
        context_max: spec.context_max,
        blocks: options.blocks as usize,
    }
}

/// Numbers in the widest row that a matrix of this rank is multiplied with.
fn widest(spec: &ModelSpec, partition: &Partition) -> usize {
    let middle = partition.intermediate.len();
    spec.hidden.max(partition.heads.q_width()).max(middle)
}

pub(super) fn workspace_sizes<B: Backend>(
    spec: &ModelSpec,
    partition: &Partition,
    options: &RunnerOptions,
) -> WorkspaceSizes {
    WorkspaceSizes::new(
        spec,
        partition,
        options.step_tokens_max as usize,
        options.logits_rows::<B>(),
    )
}
