//! One rank's part of a model: widths, and what follows from them on every kind of device.

use common::wire::message::Quantization;

use crate::registry::form::{Form, Grouped};
use crate::registry::shape::Family;
use crate::registry::tensors::{Slice, WeightTensor};
use crate::registry::{ModelFacts, Shape};

/// One rank's widths, of the rank that has most.
pub(super) struct Part<'a> {
    pub shape: &'a Shape,
    pub ranks: u64,
    /// What floats become.
    quantization: Quantization,
    /// Query heads' numbers.
    pub q: u64,
    /// KV heads.
    pub kv_heads: u64,
    /// KV heads' numbers.
    pub kv: u64,
    /// Columns of the MLP's middle.
    pub middle: u64,
    /// Rows of the vocabulary.
    pub vocab: u64,
}

/// One rank's part of a tensor.
pub(super) enum Piece {
    /// `[rows, columns]`.
    Matrix {
        rows: u64,
        columns: Columns,
        /// How it is kept where the device has products for that; else, and without, in bf16.
        kept: Option<Grouped>,
    },
    /// `[rows, columns]` of an end of the model: the embedding table or the head.
    End {
        rows: u64,
        columns: u64,
        /// Logits are products with it, and it is quantised where the device quantises such.
        squeezed: bool,
    },
    /// Numbers of a norm or a bias, which are f32 everywhere.
    Vector(u64),
}

/// Columns of a matrix that ranks share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns {
    /// Of the whole matrix.
    pub whole: u64,
    pub sharers: u64,
}

impl Columns {
    /// Those of the rank that has most.
    pub fn most(self) -> u64 {
        self.whole.div_ceil(self.sharers)
    }

    /// The most that `count` gives for a rank's first column and the one behind its last.
    pub fn most_of(self, count: impl Fn(u64, u64) -> u64) -> u64 {
        let of_rank = |rank: u64| {
            let cut = |rank: u64| self.whole * rank / self.sharers;
            count(cut(rank), cut(rank + 1))
        };
        (0..self.sharers).map(of_rank).max().unwrap_or(0)
    }
}

/// Bytes of a number of activations, norms and biases.
pub(super) const F32: u64 = 4;

impl<'a> Part<'a> {
    /// The part of each of `ranks` ranks, which divide the heads.
    pub fn of(facts: &'a ModelFacts, ranks: u32) -> Part<'a> {
        let (shape, ranks) = (&facts.shape, u64::from(ranks));
        let kv_heads = shape.kv_heads.div_ceil(ranks);
        Part {
            shape,
            ranks,
            quantization: facts.quantization,
            q: shape.heads / ranks * shape.head_width,
            kv_heads,
            kv: kv_heads * shape.head_width,
            middle: shape.intermediate.div_ceil(ranks),
            vocab: shape.vocab.div_ceil(ranks),
        }
    }

    /// Numbers per token and layer of queries, keys and values.
    pub fn qkv(&self) -> u64 {
        self.q + 2 * self.kv
    }

    /// Whether positions are angles (RoPE); without them they are slopes of the scores (ALiBi).
    pub fn rotates(&self) -> bool {
        self.shape.family == Family::Llama
    }

    /// Whether the MLP has a gate.
    pub fn gated(&self) -> bool {
        self.shape.family == Family::Llama
    }

    /// Slopes of the rank's heads.
    pub fn slopes(&self) -> u64 {
        if self.rotates() {
            0
        } else {
            self.q / self.shape.head_width
        }
    }

    /// Numbers in the widest row that a matrix is multiplied with.
    pub fn widest(&self) -> u64 {
        self.shape.hidden.max(self.q).max(self.middle)
    }

    /// Numbers per token of a step in the buffers between layers' ops: the residual stream and what goes through
    /// attention and MLP; qkv; attention's output; gate, up and middle; all ranks' queries or keys under a norm of theirs.
    pub fn activations(&self) -> u64 {
        let middles = if self.gated() { 3 } else { 1 };
        let normed = if self.shape.qk_norm {
            self.shape.hidden
        } else {
            0
        };
        2 * self.shape.hidden + self.qkv() + self.q + middles * self.middle + normed
    }

    /// Numbers per row whose logits are computed: the last hidden state, the rank's logits, all ranks' on rank 0.
    pub fn logits(&self) -> u64 {
        let gathered = if self.ranks > 1 { self.shape.vocab } else { 0 };
        self.shape.hidden + self.vocab + gathered
    }

    /// Numbers in the rank's matrices.
    pub fn parameters(&self, facts: &ModelFacts) -> u64 {
        let numbers = |tensor| match self.piece(tensor) {
            Piece::Matrix { rows, columns, .. } => rows * columns.most(),
            Piece::End { rows, columns, .. } => rows * columns,
            Piece::Vector(_) => 0,
        };
        facts.tensors.iter().map(numbers).sum()
    }

    /// The rank's part of a tensor.
    pub fn piece(&self, tensor: &WeightTensor) -> Piece {
        let cut = |whole: u64| match tensor.slice {
            Slice::Whole => whole,
            Slice::Heads => self.q,
            Slice::KvHeads => self.kv,
            Slice::Fused => self.qkv(),
            Slice::Middle => self.middle,
            Slice::Vocabulary => self.vocab,
        };
        match (&tensor.dims[..], tensor.by_columns) {
            (&[rows, columns], _) if tensor.is_end() => Piece::End {
                rows: cut(rows),
                columns,
                squeezed: (self.shape.tied || tensor.is_head())
                    && (self.quantization != Quantization::None || tensor.form != Form::Float),
            },
            (&[rows, whole], by_columns) => Piece::Matrix {
                rows: if by_columns { rows } else { cut(rows) },
                columns: Columns {
                    whole,
                    sharers: if by_columns { self.ranks } else { 1 },
                },
                kept: match tensor.form {
                    Form::Grouped(form) => Some(form),
                    Form::Float | Form::Unpacked => Grouped::loaded(self.quantization),
                },
            },
            // The bias of a product that is summed over ranks is rank 0's, whole.
            (dims, by_columns) => {
                let whole = dims.iter().product::<u64>();
                Piece::Vector(if by_columns { whole } else { cut(whole) })
            }
        }
    }
}
