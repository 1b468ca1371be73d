//! The forward pass of a decoder, from top to bottom, for every family.

use super::attention::{self, Attention};
use super::embedding::{self, Embedding};
use super::linear::Slice;
use super::mlp::{self, Mlp};
use super::norm::Norm;
use super::{LoadError, Loader, Step, Workspace};
use crate::backend::{Backend, WeightDtype};
use crate::collective::{Collective, CollectiveError};
use crate::models::forms::Forms;
use crate::models::partition::Partition;
use crate::models::spec::{ModelSpec, NormKind};
use crate::models::tensors::{LayerTensors, TensorNames};
use crate::weights::form::ReadyForm;

/// A model on a device: one rank's weights.
pub(crate) struct Decoder<B: Backend> {
    pub hidden: usize,
    /// Both ends: tokens in, logits out.
    pub embedding: Embedding<B>,
    layers: Vec<Layer<B>>,
}

struct Layer<B: Backend> {
    attention_norm: Norm<B>,
    attention: Attention<B>,
    mlp_norm: Norm<B>,
    mlp: Mlp<B>,
}

impl<B: Backend> Decoder<B> {
    /// Hands the step's tokens and positions to the device, before the first op.
    pub fn begin_step<C>(&self, step: &mut Step<'_, B, C>, work: &mut Workspace<B>) {
        step.backend.begin_step(step.batch);
        work.position.begin_step(step.backend, step.batch);
    }

    /// Computes the residual stream `x` of the step's tokens, and writes their K and V to the cache.
    pub fn forward<C: Collective<B::Buf>>(
        &self,
        step: &mut Step<'_, B, C>,
        work: &mut Workspace<B>,
        kv: &mut B::Kv,
    ) -> Result<(), CollectiveError> {
        let size = step.size(self.hidden);
        self.embedding.forward(step, work)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let norm = &layer.attention_norm;
            match i {
                0 => norm.forward(step.backend, size, &work.x, &mut work.y),
                _ => norm.forward_sum(step.backend, size, &mut work.x, &mut work.y),
            }
            layer.attention.forward(step, work, kv, i)?;
            layer
                .mlp_norm
                .forward_sum(step.backend, size, &mut work.x, &mut work.y);
            layer.mlp.forward(step, work)?;
        }
        step.backend.add(size, &mut work.x, &work.y);
        Ok(())
    }

    /// Reads this rank's weights.
    pub fn load(loader: &mut Loader<'_, B>, names: &TensorNames) -> Result<Decoder<B>, LoadError> {
        let layers: Result<_, LoadError> = names
            .layers
            .iter()
            .map(|tensors| Layer::load(loader, tensors))
            .collect();
        Ok(Decoder {
            hidden: loader.spec.hidden,
            embedding: Embedding::load(loader, names)?,
            layers: layers?,
        })
    }
}

impl<B: Backend> Layer<B> {
    fn load(loader: &mut Loader<'_, B>, tensors: &LayerTensors) -> Result<Layer<B>, LoadError> {
        Ok(Layer {
            attention_norm: Norm::load(loader, &tensors.attention_norm)?,
            attention: Attention::load(loader, tensors)?,
            mlp_norm: Norm::load(loader, &tensors.mlp_norm)?,
            mlp: Mlp::load(loader, tensors)?,
        })
    }
}

/// Bytes of one rank's weights: matrices as packed, norms and biases as f32.
pub(crate) fn weight_bytes<B: Backend>(
    spec: &ModelSpec,
    partition: &Partition,
    forms: &Forms,
    dtype: WeightDtype,
) -> u64 {
    // The second matrix is summed over ranks: its bias is rank 0's.
    let part = |slices: [Slice; 2], forms: [Option<ReadyForm>; 2], bias: bool| {
        let biased = if bias {
            1 + usize::from(partition.rank == 0)
        } else {
            0
        };
        let biases = slices.iter().take(biased);
        let biases: u64 = biases.map(|slice| 4 * slice.rows as u64).sum();
        let matrices = slices.iter().zip(forms);
        let matrices: u64 = matrices
            .map(|(slice, form)| slice.bytes::<B>(dtype, form))
            .sum();
        matrices + biases
    };
    let layer = |i: usize| {
        let (attention, mlp) = (
            attention::slices(spec, partition),
            mlp::slices(spec, partition),
        );
        let forms = forms.layer(i);
        part(attention, forms.attention(), spec.bias.attention)
            + part(mlp, forms.mlp(), spec.bias.mlp)
    };
    let layers: u64 = (0..spec.layers).map(layer).sum();
    let ends: u64 = embedding::slices(spec, partition)
        .iter()
        .map(|(end, slice)| slice.bytes::<B>(end.dtype::<B>(dtype, forms), None))
        .sum();
    let norm_vectors = match spec.norm {
        NormKind::Rms => 1,
        NormKind::Layer => 1 + usize::from(spec.bias.norm),
    };
    let norms =
        (2 * spec.layers + 1 + if spec.qk_norm { 2 * spec.layers } else { 0 }) * norm_vectors;
    ends + layers + 4 * (norms * spec.hidden) as u64
}

/// Numbers of one rank's largest quantised matrix; 0 without any.
pub(crate) fn quantised_max<B: Backend>(
    spec: &ModelSpec,
    partition: &Partition,
    forms: &Forms,
    dtype: WeightDtype,
) -> usize {
    let (attention, mlp) = (
        attention::slices(spec, partition),
        mlp::slices(spec, partition),
    );
    let layer = |i: usize| {
        let forms = forms.layer(i);
        let matrices = attention.iter().zip(forms.attention());
        let matrices = matrices.chain(mlp.iter().zip(forms.mlp()));
        let quantised =
            matrices.filter(|(slice, form)| slice.quantised::<B>(dtype, *form).is_some());
        quantised.map(|(slice, _)| slice.numbers()).max()
    };
    (0..spec.layers).filter_map(layer).max().unwrap_or(0)
}
