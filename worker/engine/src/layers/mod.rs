//! The layers of a decoder, written once for all families, over [`Backend`] and [`Collective`] alone.
//!
//! Read [`decoder`] first: the forward pass from top to bottom. Owns what all layers share: the loading context, the
//! step's context and the workspace. Which rank this is shows in two places only: the slices that `Loader` takes of the
//! weights, and the sum over ranks after each row-parallel part.
//!
//! [`Collective`]: crate::collective::Collective

pub mod attention;
pub mod decoder;
pub mod embedding;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod position;

use crate::backend::{Backend, Batch, DeviceError, Size, WeightDtype};
use crate::models::checkpoint::LoadError;
use crate::models::forms::Forms;
use crate::models::partition::Partition;
use crate::models::spec::{ModelSpec, Positions};
use crate::weights::Weights;
use crate::weights::packed::Packing;
use position::Position;

/// What loading a layer needs.
pub(crate) struct Loader<'a, B> {
    /// Packs and keeps the weights.
    pub backend: &'a mut B,
    /// The checkpoint, checked against the spec.
    pub weights: &'a Weights,
    /// In which forms it has its matrices.
    pub forms: &'a Forms,
    /// The model.
    pub spec: &'a ModelSpec,
    /// This rank's part of it.
    pub partition: &'a Partition,
    /// How matrices are kept.
    pub dtype: WeightDtype,
    /// Where matrices may lie packed already, or are left for the next load.
    pub packing: Packing,
    /// Bytes of matrices packed so far.
    pub packed: u64,
    /// Told how many, after each matrix.
    pub progress: &'a mut dyn FnMut(u64),
}

/// What every layer needs of the running step.
pub(crate) struct Step<'a, B, C> {
    /// Computes.
    pub backend: &'a mut B,
    /// Sums over ranks.
    pub collective: &'a mut C,
    /// The tokens and their places.
    pub batch: &'a Batch,
}

impl<B, C> Step<'_, B, C> {
    /// All tokens of the step, rows of `width`.
    pub fn size(&self, width: usize) -> Size {
        Size {
            rows: self.batch.len(),
            width,
        }
    }
}

/// The buffers of a step, allocated once for the largest one.
pub(crate) struct Workspace<B: Backend> {
    /// The residual stream `[tokens, hidden]`.
    pub x: B::Buf,
    /// What goes into and comes out of attention and MLP `[tokens, hidden]`.
    pub y: B::Buf,
    /// `[tokens, (q + 2 kv) * d]`.
    pub qkv: B::Buf,
    /// Attention's output `[tokens, q * d]`.
    pub attended: B::Buf,
    /// `[tokens, 2 * intermediate]`, or `[tokens, intermediate]` without a gate.
    pub mlp_in: B::Buf,
    /// `[tokens, intermediate]`; empty without a gate.
    pub mlp_mid: B::Buf,
    /// All ranks' queries or keys `[tokens, hidden]`; empty without their norm.
    pub qk_whole: B::Buf,
    /// Normed rows whose logits are wanted `[rows, hidden]`.
    pub rows: B::Buf,
    /// This rank's slice of their logits `[rows, vocabulary slice]`.
    pub logits_part: B::Buf,
    /// Their logits `[rows, vocabulary]`; on rank 0 of several only.
    pub logits: B::Buf,
    /// Angles or slopes.
    pub position: Position<B>,
}

/// How many numbers each buffer of the workspace holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkspaceSizes {
    hidden: usize,
    qkv: usize,
    attended: usize,
    mlp_in: usize,
    mlp_mid: usize,
    qk_whole: usize,
    rows: usize,
    logits_part: usize,
    logits: usize,
    position: usize,
    /// On the host: logits of rank 0, angles.
    host: usize,
}

impl WorkspaceSizes {
    /// For steps of up to `tokens` tokens, whose logits are computed up to `rows` at a time.
    pub fn new(
        spec: &ModelSpec,
        partition: &Partition,
        tokens: usize,
        rows: usize,
    ) -> WorkspaceSizes {
        let heads = partition.heads;
        let (middle, gates) = (partition.intermediate.len(), mlp::gates(spec));
        WorkspaceSizes {
            hidden: tokens * spec.hidden,
            qkv: tokens * heads.qkv_width(),
            attended: tokens * heads.q_width(),
            mlp_in: tokens * middle * (1 + gates),
            mlp_mid: tokens * middle * gates,
            qk_whole: if spec.qk_norm {
                tokens * spec.hidden
            } else {
                0
            },
            rows: rows * spec.hidden,
            logits_part: rows * partition.vocab.len(),
            logits: if partition.rank == 0 && partition.ranks > 1 {
                rows * spec.vocab
            } else {
                0
            },
            position: match spec.positions {
                Positions::Rope { .. } => tokens * heads.width,
                Positions::Alibi { .. } => heads.q,
            },
            host: {
                let angles = match spec.positions {
                    Positions::Rope { .. } => tokens * heads.width,
                    Positions::Alibi { .. } => 0,
                };
                let logits = if partition.rank == 0 {
                    rows * spec.vocab
                } else {
                    0
                };
                angles + logits
            },
        }
    }

    /// Bytes of all buffers on the device; those on the host too where its memory is the device's.
    pub fn bytes<B: Backend>(&self) -> u64 {
        let WorkspaceSizes {
            hidden,
            qkv,
            attended,
            mlp_in,
            mlp_mid,
            qk_whole,
            rows,
            logits_part,
            logits,
            position,
            host,
        } = *self;
        let numbers = [
            2 * hidden,
            qkv,
            attended,
            mlp_in,
            mlp_mid,
            qk_whole,
            rows,
            logits_part,
            logits,
            position,
            if B::ON_HOST { host } else { 0 },
        ];
        4 * numbers.iter().map(|&numbers| numbers as u64).sum::<u64>()
    }
}

impl<B: Backend> Workspace<B> {
    /// Allocates all buffers.
    pub fn new(
        backend: &mut B,
        sizes: &WorkspaceSizes,
        position: Position<B>,
    ) -> Result<Workspace<B>, DeviceError> {
        Ok(Workspace {
            x: backend.alloc(sizes.hidden)?,
            y: backend.alloc(sizes.hidden)?,
            qkv: backend.alloc(sizes.qkv)?,
            attended: backend.alloc(sizes.attended)?,
            mlp_in: backend.alloc(sizes.mlp_in)?,
            mlp_mid: backend.alloc(sizes.mlp_mid)?,
            qk_whole: backend.alloc(sizes.qk_whole)?,
            rows: backend.alloc(sizes.rows)?,
            logits_part: backend.alloc(sizes.logits_part)?,
            logits: backend.alloc(sizes.logits)?,
            position,
        })
    }
}
