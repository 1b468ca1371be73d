//! The tensors a model is made of: names and shapes, to be held against a checkpoint before anything is allocated.
//!
//! Owns the logical matrices: a [`Stacked`] matrix may lie in the file as several tensors (Llama's q, k and v) or as one
//! (MPT's `Wqkv`); whoever reads its rows does not care.

use std::ops::Range;

/// All weights of a model.
#[derive(Debug, Clone)]
pub struct TensorNames {
    /// `[vocab, hidden]`.
    pub embedding: Stacked,
    /// By layer.
    pub layers: Vec<LayerTensors>,
    /// Before the head.
    pub final_norm: NormTensor,
    /// `[vocab, hidden]`; none where it is the embedding.
    pub head: Option<Stacked>,
}

/// The weights of one decoder layer.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// Before attention.
    pub attention_norm: NormTensor,
    /// Rows: all query heads, all key heads, all value heads.
    pub qkv: Stacked,
    /// Of queries and of keys.
    pub qk_norm: Option<[NormTensor; 2]>,
    /// Columns: all query heads.
    pub attention_out: Stacked,
    /// Before the MLP.
    pub mlp_norm: NormTensor,
    /// Rows: gate, then up; or up alone.
    pub mlp_in: Stacked,
    /// Columns: the MLP's middle.
    pub mlp_out: Stacked,
}

/// A matrix that lies in the file as one or more tensors, one upon another.
#[derive(Debug, Clone)]
pub struct Stacked {
    /// From the top.
    pub parts: Vec<Part>,
    /// Of all parts.
    pub columns: usize,
    /// Whether each part has a bias.
    pub bias: bool,
}

/// One tensor `NAME.weight [rows, columns]` and its bias `NAME.bias [rows]`.
#[derive(Debug, Clone)]
pub struct Part {
    /// Without `.weight`.
    pub name: String,
    /// Its rows.
    pub rows: usize,
}

/// A norm's `NAME.weight [width]` and `NAME.bias [width]`.
#[derive(Debug, Clone)]
pub struct NormTensor {
    /// Without `.weight`.
    pub name: String,
    /// Its length.
    pub width: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// A tensor that must be in the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its whole name.
    pub name: String,
    /// Its exact shape.
    pub shape: Vec<usize>,
}

impl Stacked {
    /// A matrix that lies in the file as one tensor.
    #[must_use]
    pub fn one(name: String, rows: usize, columns: usize, bias: bool) -> Stacked {
        Stacked {
            parts: vec![Part { name, rows }],
            columns,
            bias,
        }
    }

    /// Rows of all parts.
    #[must_use]
    pub fn rows(&self) -> Range<usize> {
        0..self.parts.iter().map(|part| part.rows).sum()
    }

    /// The names of its tensors, biases apart.
    pub fn tensors(&self) -> impl Iterator<Item = String> {
        self.parts
            .iter()
            .map(|part| format!("{}.weight", part.name))
    }

    fn expect(&self, out: &mut Vec<Expected>) {
        for part in &self.parts {
            out.push(Expected {
                name: format!("{}.weight", part.name),
                shape: vec![part.rows, self.columns],
            });
            if self.bias {
                out.push(Expected {
                    name: format!("{}.bias", part.name),
                    shape: vec![part.rows],
                });
            }
        }
    }
}

impl NormTensor {
    fn expect(&self, out: &mut Vec<Expected>) {
        out.push(Expected {
            name: format!("{}.weight", self.name),
            shape: vec![self.width],
        });
        if self.bias {
            out.push(Expected {
                name: format!("{}.bias", self.name),
                shape: vec![self.width],
            });
        }
    }
}

impl LayerTensors {
    /// Its matrices.
    #[must_use]
    pub fn matrices(&self) -> [&Stacked; 4] {
        [&self.qkv, &self.attention_out, &self.mlp_in, &self.mlp_out]
    }
}

impl TensorNames {
    /// Every tensor of the model.
    #[must_use]
    pub fn expected(&self) -> Vec<Expected> {
        let mut out = Vec::new();
        self.embedding.expect(&mut out);
        for layer in &self.layers {
            layer.attention_norm.expect(&mut out);
            layer.qkv.expect(&mut out);
            layer
                .qk_norm
                .iter()
                .flatten()
                .for_each(|norm| norm.expect(&mut out));
            layer.attention_out.expect(&mut out);
            layer.mlp_norm.expect(&mut out);
            layer.mlp_in.expect(&mut out);
            layer.mlp_out.expect(&mut out);
        }
        self.final_norm.expect(&mut out);
        self.head.iter().for_each(|head| head.expect(&mut out));
        out
    }
}
