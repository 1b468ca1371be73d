//! The forms in which a checkpoint has its matrices, as far as they change what is packed and how much memory it takes.
//!
//! Owns which matrix may be kept as it is: one whose stacked parts all have the very same form. Whether it then is kept is
//! the backend's and the option's matter.

use super::tensors::{LayerTensors, Stacked, TensorNames};
use crate::weights::Weights;
use crate::weights::form::ReadyForm;
use std::collections::BTreeMap;

/// The forms of all matrices of a model. The default is a checkpoint of floats.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Forms {
    layers: Vec<LayerForms>,
    /// Whether the matrix that the head multiplies with is quantised, in whatever form.
    pub head_quantised: bool,
}

/// The forms of a layer's matrices; none where a matrix is floats, or has no form that could be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerForms {
    /// Of queries, keys and values together.
    pub qkv: Option<ReadyForm>,
    /// Of attention's output.
    pub attention_out: Option<ReadyForm>,
    /// Of gate and up together.
    pub mlp_in: Option<ReadyForm>,
    /// Of down.
    pub mlp_out: Option<ReadyForm>,
}

impl Forms {
    /// Those of a checkpoint.
    #[must_use]
    pub fn of(names: &TensorNames, weights: &Weights) -> Forms {
        let layer = |layer: &LayerTensors| LayerForms {
            qkv: form(&layer.qkv, weights),
            attention_out: form(&layer.attention_out, weights),
            mlp_in: form(&layer.mlp_in, weights),
            mlp_out: form(&layer.mlp_out, weights),
        };
        let head = names.head.as_ref().unwrap_or(&names.embedding);
        Forms {
            layers: names.layers.iter().map(layer).collect(),
            head_quantised: head.tensors().any(|name| {
                let tensor = weights.tensor(&name);
                tensor.is_ok_and(|tensor| tensor.is_quantised())
            }),
        }
    }

    /// Those of a layer.
    #[must_use]
    pub fn layer(&self, index: usize) -> LayerForms {
        self.layers.get(index).copied().unwrap_or_default()
    }
}

impl LayerForms {
    /// Of attention's two matrices.
    #[must_use]
    pub fn attention(&self) -> [Option<ReadyForm>; 2] {
        [self.qkv, self.attention_out]
    }

    /// Of the MLP's two matrices.
    #[must_use]
    pub fn mlp(&self) -> [Option<ReadyForm>; 2] {
        [self.mlp_in, self.mlp_out]
    }
}

/// The form of a matrix that lies in the file as some tensors.
pub(crate) fn form(matrix: &Stacked, weights: &Weights) -> Option<ReadyForm> {
    let mut forms = matrix
        .tensors()
        .map(|name| weights.tensor(&name).ok()?.form());
    let first = forms.next()??;
    forms.all(|form| form == Some(first)).then_some(first)
}

/// How many of the layers' matrices the files have in each form, by the files' names for them; stacked ones of several
/// forms under all of their names. Nothing where all are floats.
pub(crate) fn counts(names: &TensorNames, weights: &Weights) -> BTreeMap<String, usize> {
    let (mut counts, mut quantised) = (BTreeMap::new(), false);
    for matrix in names.layers.iter().flat_map(LayerTensors::matrices) {
        let tensors = || {
            matrix
                .tensors()
                .filter_map(|name| weights.tensor(&name).ok())
        };
        quantised |= tensors().any(|tensor| tensor.is_quantised());
        let mut forms: Vec<String> = tensors().map(|tensor| tensor.form_name()).collect();
        forms.dedup();
        *counts.entry(forms.join(" and ")).or_default() += 1;
    }
    if quantised { counts } else { BTreeMap::new() }
}
