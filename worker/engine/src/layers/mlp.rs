//! The MLP, divided by columns of its middle.

use super::linear::Slice;
use super::{LoadError, Loader, Step, Workspace};
use crate::backend::Backend;
use crate::collective::{Collective, CollectiveError};
use crate::models::partition::Partition;
use crate::models::spec::{MlpKind, ModelSpec};
use crate::models::tensors::LayerTensors;
use std::ops::Range;

/// One layer's MLP.
pub(crate) struct Mlp<B: Backend> {
    kind: MlpKind,
    hidden: usize,
    /// This rank's part of the middle.
    width: usize,
    /// Gate upon up, or up alone.
    mlp_in: B::Linear,
    mlp_out: B::Linear,
}

impl<B: Backend> Mlp<B> {
    /// Reads this rank's columns.
    pub fn load(loader: &mut Loader<'_, B>, tensors: &LayerTensors) -> Result<Mlp<B>, LoadError> {
        let (spec, middle) = (loader.spec, loader.partition.intermediate.clone());
        let of = |part: usize| Range {
            start: part * spec.intermediate + middle.start,
            end: part * spec.intermediate + middle.end,
        };
        let rows: Vec<Range<usize>> = (0..=gates(spec)).map(of).collect();
        Ok(Mlp {
            kind: spec.mlp,
            hidden: spec.hidden,
            width: middle.len(),
            mlp_in: loader.rows(&tensors.mlp_in, &rows)?,
            mlp_out: loader.columns(&tensors.mlp_out, middle)?,
        })
    }

    /// `y` = MLP of `y`, which holds the normed stream.
    pub fn forward<C: Collective<B::Buf>>(
        &self,
        step: &mut Step<'_, B, C>,
        work: &mut Workspace<B>,
    ) -> Result<(), CollectiveError> {
        let size = step.size(self.width);
        let middle = match self.kind {
            MlpKind::GatedSilu => {
                step.backend.linear_silu_mul(
                    size,
                    &work.y,
                    &self.mlp_in,
                    &mut work.mlp_in,
                    &mut work.mlp_mid,
                );
                &work.mlp_mid
            }
            MlpKind::Gelu => {
                step.backend
                    .linear(size.rows, &work.y, &self.mlp_in, &mut work.mlp_in);
                step.backend.gelu(size, &mut work.mlp_in);
                &work.mlp_in
            }
        };
        step.backend
            .linear(size.rows, middle, &self.mlp_out, &mut work.y);
        step.collective
            .all_reduce_sum(&mut work.y, size.rows * self.hidden)
    }
}

/// How many gates go before the up projection.
pub(crate) fn gates(spec: &ModelSpec) -> usize {
    match spec.mlp {
        MlpKind::GatedSilu => 1,
        MlpKind::Gelu => 0,
    }
}

/// One rank's matrices of a layer's MLP.
pub(crate) fn slices(spec: &ModelSpec, partition: &Partition) -> [Slice; 2] {
    let middle = &partition.intermediate;
    [
        Slice {
            rows: middle.len() * (1 + gates(spec)),
            columns: 0..spec.hidden,
            head: false,
        },
        Slice {
            rows: spec.hidden,
            columns: middle.clone(),
            head: false,
        },
    ]
}
