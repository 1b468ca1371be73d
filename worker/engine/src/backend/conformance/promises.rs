//! What a backend promises, and so what is asked of it.

use crate::backend::{FloatDtype, KvDtype};

/// The promises of a backend under test.
#[derive(Debug, Clone, Copy)]
pub struct Promises {
    /// Formats of weights that it keeps.
    pub weights: &'static [FloatDtype],
    /// Formats of the cache that it keeps.
    pub caches: &'static [KvDtype],
    /// Widths of heads that it has attention for; none stands for any.
    pub head_widths: &'static [usize],
    /// Whether it has products of quantised weights.
    pub quantised: bool,
    /// Whether activations are rounded to 127 steps on their way into a product of quantised weights.
    pub steps: bool,
    /// Whether activations are rounded to bf16 on their way into a product of bf16 weights, and queries and the weights of
    /// values where the cache is bf16.
    pub rounds_inputs: bool,
    /// Whether an op rounds to bf16 what it leaves for a product alone.
    pub rounds: bool,
    /// Whether a row of a product or of attention has the same bits whatever rows are computed with it.
    pub rows_alone: bool,
}

impl Promises {
    /// Of backends on the host.
    pub const HOST: Promises = Promises {
        weights: &[FloatDtype::Bf16, FloatDtype::F32],
        caches: &[KvDtype::F32, KvDtype::Bf16, KvDtype::Int8],
        head_widths: &[],
        quantised: true,
        steps: true,
        rounds_inputs: false,
        rounds: false,
        rows_alone: true,
    };

    /// Tolerance of a result that is left for a product: half a step of bf16, where it is rounded.
    pub fn left(&self, tolerance: f32) -> f32 {
        if self.rounds { 1.0 / 256.0 } else { tolerance }
    }

    /// Tolerance of attention. Where queries are rounded, the weights of the values are too.
    pub fn attended(&self, tolerance: f32, cache: KvDtype) -> f32 {
        if self.rounds_inputs && cache == KvDtype::Bf16 {
            0.02
        } else {
            tolerance
        }
    }

    /// Whether it has attention for heads of this width.
    pub fn attends(&self, head_width: usize) -> bool {
        self.head_widths.is_empty() || self.head_widths.contains(&head_width)
    }
}
