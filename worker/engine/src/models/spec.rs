//! What a model is, in numbers: everything the forward pass, the memory plan and the weights' shapes follow from.
//!
//! Owns the checked [`ModelSpec`]; a value of it has passed its last check, so products of its sizes do not
//! overflow and heads divide. How a family spells it in `config.json` is in the family's file.

/// A checked description of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Which family's weight names.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads; divides `heads`.
    pub kv_heads: usize,
    /// Numbers per head.
    pub head_width: usize,
    /// Width of the MLP's middle.
    pub intermediate: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Longest sequence, prompt and output.
    pub context_max: usize,
    /// The head is the embedding.
    pub tied: bool,
    /// Kind of all norms.
    pub norm: NormKind,
    /// Added to the norms' variance.
    pub norm_eps: f32,
    /// How attention knows positions.
    pub positions: Positions,
    /// A token sees itself and the `window - 1` before it.
    pub window: Option<usize>,
    /// Factor of the attention scores.
    pub softmax_scale: f32,
    /// Queries, keys and values are clamped to this magnitude.
    pub clip_qkv: Option<f32>,
    /// Queries and keys are layer-normed over their whole width, all heads together.
    pub qk_norm: bool,
    /// Kind of the MLP.
    pub mlp: MlpKind,
    /// Which parts have a bias.
    pub bias: Biases,
    /// Factor of the logits.
    pub logit_scale: Option<f32>,
}

/// Model families, by their weights' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `MPTForCausalLM` (the first publisher's name) and `MptForCausalLM` (transformers').
    Mpt,
}

/// Kinds of norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, no bias.
    Rms,
    /// Mean and variance.
    Layer,
}

/// Kinds of MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))`.
    GatedSilu,
    /// `down(gelu(up(x)))`, the exact gelu.
    Gelu,
}

/// How attention knows positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Positions {
    /// Rotary embedding.
    Rope {
        /// Base of the frequencies.
        theta: f64,
        /// Stretches them for contexts longer than trained for.
        scaling: RopeScaling,
    },
    /// Linear biases by distance.
    Alibi {
        /// The steepest exponent.
        bias_max: f32,
    },
}

/// Changes of the rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by a factor, high ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original_context / low` are divided.
        low: f64,
        /// Wavelengths below `original_context / high` are kept.
        high: f64,
        /// The context the model was first trained for.
        original_context: f64,
    },
}

/// Which parts have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Query, key, value and output projections.
    pub attention: bool,
    /// The MLP's projections.
    pub mlp: bool,
    /// The norms.
    pub norm: bool,
}

/// Greatest sizes that are believed. They keep every product of sizes far inside 64 bits, so that a hostile config ends
/// in an error and not in an overflow; the largest published models are far smaller.
pub mod limits {
    use std::ops::RangeInclusive;

    /// Layers.
    pub const LAYERS: RangeInclusive<usize> = 1..=4096;
    /// Query or KV heads.
    pub const HEADS: RangeInclusive<usize> = 1..=4096;
    /// Numbers per head.
    pub const HEAD_WIDTH: RangeInclusive<usize> = 1..=4096;
    /// Hidden and intermediate widths.
    pub const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
    /// Rows of the vocabulary.
    pub const VOCAB: RangeInclusive<usize> = 1..=1 << 24;
    /// Positions.
    pub const CONTEXT: RangeInclusive<usize> = 1..=1 << 26;
}

/// Why a model is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The file is not a JSON object.
    #[error("config.json cannot be read: {reason}")]
    NotJson {
        /// Why not.
        reason: String,
    },
    /// The architecture is none of ours.
    #[error(
        "architecture {found} is not supported; supported are LlamaForCausalLM, MistralForCausalLM, MPTForCausalLM and MptForCausalLM"
    )]
    Architecture {
        /// What the config names.
        found: String,
    },
    /// A key that must be there is not.
    #[error("config.json has no {field}")]
    Missing {
        /// Which.
        field: String,
    },
    /// A key's value is of another kind, out of range or asks for something unknown.
    #[error("config.json: {field} is {found}; supported: {supported}")]
    Field {
        /// Which.
        field: String,
        /// Its value, as in the file.
        found: String,
        /// What would do.
        supported: String,
    },
    /// The sizes contradict one another.
    #[error("config.json: {0}")]
    Sizes(String),
    /// The model cannot be divided among so many ranks.
    #[error("{what} cannot be divided among {ranks} ranks; it needs {needs}")]
    Ranks {
        /// What does not divide, with its number.
        what: String,
        /// How many ranks.
        ranks: usize,
        /// Which numbers of ranks would do.
        needs: String,
    },
}

impl ModelSpec {
    /// The last check of a family's reading: the sizes fit together.
    pub(super) fn check(self) -> Result<ModelSpec, SpecError> {
        let ModelSpec {
            heads,
            kv_heads,
            head_width,
            ..
        } = self;
        if !heads.is_multiple_of(kv_heads) {
            return Err(SpecError::Sizes(format!(
                "{heads} attention heads are not a multiple of {kv_heads} KV heads"
            )));
        }
        if matches!(self.positions, Positions::Rope { .. }) && !head_width.is_multiple_of(2) {
            return Err(SpecError::Sizes(format!(
                "rotary positions need an even head width, it is {head_width}"
            )));
        }
        if self.qk_norm && (kv_heads != heads || heads * head_width != self.hidden) {
            return Err(SpecError::Sizes(
                "qk_ln needs as many KV heads as heads, together as wide as the model".to_owned(),
            ));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests;
