//! The engine's rim towards a device: plans go in, sampled tokens come out.
//!
//! Owns the [`Runner`] trait, the one `dyn` of the engine. `submit`/`collect` are apart so that a device can run ahead
//! of the CPU; the CPU backend computes in `submit` and hands out the result in `collect`.

use crate::end::EngineEnd;
use crate::mask::MaskSlot;
use crate::plan::StepPlan;
use crate::request::{Sampling, SequenceError, TokenLogprob};

/// A submitted step. Tickets are collected in the order of their submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Ticket(pub u64);

/// How to turn one span's last row of logits into a token. One per span whose next token is wanted.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// Index of the span in the plan.
    pub span: usize,
    /// How to choose.
    pub sampling: &'a Sampling,
    /// The candidate's index, part of the generator's key.
    pub candidate: u32,
    /// Index of the token to be chosen among the candidate's outputs: the generator's counter.
    pub output_index: u32,
    /// Prompt ids, for the repetition penalty.
    pub prompt: &'a [u32],
    /// Output ids so far, for the penalties.
    pub outputs: &'a [u32],
    /// Which tokens may be chosen; all of them without one.
    pub mask: Option<&'a MaskSlot>,
}

/// Log-probabilities wanted of prompt tokens: row `i` of the span scores the id `targets[i]`.
#[derive(Debug, Clone, Copy)]
pub struct ScoreRows<'a> {
    /// Index of the span in the plan; its `logits` is `All`.
    pub span: usize,
    /// The id that follows each of the span's tokens; shorter than the span at the prompt's end.
    pub targets: &'a [u32],
    /// How many of the most probable tokens to report.
    pub top: u32,
}

/// Hidden states wanted of a span's tokens: they are added to a sum, token by token, so that the sum does not depend on
/// how the prompt is cut.
#[derive(Debug, Clone, Copy)]
pub struct PoolRows<'a> {
    /// Index of the span in the plan; its `logits` is `Hidden`.
    pub span: usize,
    /// The sum over the tokens before the span; empty at the prompt's beginning.
    pub sum: &'a [f64],
}

/// What a step gave.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// One per [`SampleRow`], in order.
    pub samples: Vec<Result<Sampled, SequenceError>>,
    /// One per [`ScoreRows`], in order: one entry per target.
    pub scores: Vec<Result<Vec<TokenLogprob>, SequenceError>>,
    /// One per [`PoolRows`], in order: the sum, the span's tokens included.
    pub pools: Vec<Result<Vec<f64>, SequenceError>>,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Present when the sampling asked for it.
    pub logprob: Option<TokenLogprob>,
}

/// A fault that ends the whole step, and with it the generation of the shard group.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A rank of the group is gone or did not answer in time.
    #[error("rank {rank} of {ranks} is lost: {reason}")]
    RankLost {
        /// Which.
        rank: u32,
        /// Of how many.
        ranks: u32,
        /// What was seen.
        reason: String,
    },
    /// This rank's group was ended from outside, by its [`AbortHandle`](crate::collective::AbortHandle).
    #[error("the shard group was ended")]
    Aborted,
    /// The device or the plan is broken.
    #[error("{0}")]
    Broken(String),
}

/// Executes plans on one rank's device.
pub trait Runner: Send {
    /// Starts a step. On followers `samples`, `scores` and `pools` are empty.
    ///
    /// # Errors
    /// [`StepError`]: the generation is over, nothing more can be submitted.
    fn submit(
        &mut self,
        plan: &StepPlan,
        samples: &[SampleRow<'_>],
        scores: &[ScoreRows<'_>],
        pools: &[PoolRows<'_>],
    ) -> Result<Ticket, StepError>;

    /// Waits until a step is over, on followers too, and shows its output: what is not taken out of it is gone with the
    /// next step's.
    ///
    /// # Errors
    /// [`StepError`], as for [`Runner::submit`].
    fn collect(&mut self, ticket: Ticket) -> Result<&mut StepOutput, StepError>;

    /// The sizes the scheduler needs to know.
    fn geometry(&self) -> Geometry;

    /// No step will follow, for this reason. Where none failed a leader tells its followers. By default the runner is just
    /// dropped.
    fn end(self: Box<Self>, _end: &EngineEnd) {}
}

/// What a scheduler must know of a model and its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// KV blocks in the pool, block 0 included.
    pub blocks: u32,
    /// Longest sequence the model can hold, prompt and output.
    pub context_max: u32,
    /// Rows of the vocabulary; ids at or above it are refused.
    pub vocab: u32,
    /// Sliding window in tokens (a token sees itself and the `window - 1` before), if the model has one.
    pub window: Option<u32>,
    /// Most tokens in one step (the workspace is sized for it).
    pub step_tokens_max: u32,
    /// Most spans in one step.
    pub spans_max: u32,
}
