//! MPT: ALiBi positions, layer norms (mostly without bias), a plain gelu MLP, fused qkv, tied head.
//!
//! Two classes read the same weights: the publisher's `MPTForCausalLM` and transformers' `MptForCausalLM`, which ignores
//! some keys (`no_bias`, `alibi`: it never has biases, always ALiBi).

use super::config::Config;
use super::spec::{Biases, Family, MlpKind, ModelSpec, NormKind, Positions, SpecError, limits};
use super::tensors::{LayerTensors, NormTensor, Stacked, TensorNames};

/// The embedding's name after the checkpoint's root.
pub const EMBEDDING: &str = "wte";

/// Reads an `MPTForCausalLM` or `MptForCausalLM`.
///
/// # Errors
/// [`SpecError`].
pub fn spec(config: &Config, architecture: &str) -> Result<ModelSpec, SpecError> {
    let transformers = architecture == "MptForCausalLM";
    let hidden = config.count("d_model", limits::WIDTH)?;
    let heads = config.count("n_heads", limits::HEADS)?;
    if !hidden.is_multiple_of(heads) {
        return Err(SpecError::Sizes(format!(
            "d_model {hidden} is not a multiple of n_heads {heads}"
        )));
    }
    let head_width = hidden / heads;
    config.one_of("norm_type", &["low_precision_layernorm", "layernorm"])?;
    if let Some(ffn) = config.object("ffn_config")? {
        ffn.one_of("ffn_type", &["mptmlp"])?;
    }
    let attention = config
        .object("attn_config")?
        .unwrap_or_else(|| config.empty("attn_config"));
    attention.one_of("attn_type", &["multihead_attention"])?;
    attention.refuse_unless_off(&["rope", "prefix_lm", "attn_uses_sequence_id"])?;
    if !attention.flag("alibi", transformers)? {
        let found = attention.get("alibi").cloned().unwrap_or(false.into());
        return Err(attention.odd(
            "alibi",
            &found,
            "true (learned positions are not supported)",
        ));
    }
    let bias = !transformers && !config.flag("no_bias", false)?;
    Ok(ModelSpec {
        family: Family::Mpt,
        hidden,
        layers: config.count("n_layers", limits::LAYERS)?,
        heads,
        kv_heads: heads,
        head_width,
        intermediate: intermediate(config, hidden)?,
        vocab: config.count("vocab_size", limits::VOCAB)?,
        context_max: config.count("max_seq_len", limits::CONTEXT)?,
        tied: config.flag("tie_word_embeddings", true)?,
        norm: NormKind::Layer,
        norm_eps: config
            .real("layer_norm_epsilon", 0.0..=1.0)?
            .unwrap_or(1e-5) as f32,
        positions: Positions::Alibi {
            bias_max: attention.real("alibi_bias_max", 1e-3..=1e3)?.unwrap_or(8.0) as f32,
        },
        window: None,
        softmax_scale: match attention.real("softmax_scale", 1e-6..=1e6)? {
            Some(scale) => scale as f32,
            None => 1.0 / (head_width as f32).sqrt(),
        },
        clip_qkv: attention
            .real("clip_qkv", 0.0..=1e9)?
            .filter(|limit| *limit > 0.0)
            .map(|limit| limit as f32),
        qk_norm: attention.flag("qk_ln", false)?,
        mlp: MlpKind::Gelu,
        bias: Biases {
            attention: bias,
            mlp: bias,
            norm: bias,
        },
        logit_scale: logit_scale(config, hidden)?,
    })
}

/// `expansion_ratio` times the width; a ratio may be a fraction, the width may not.
fn intermediate(config: &Config, hidden: usize) -> Result<usize, SpecError> {
    let ratio = config.real("expansion_ratio", 1e-3..=1e3)?.unwrap_or(4.0);
    let width = ratio * hidden as f64;
    if width.fract() != 0.0 || !limits::WIDTH.contains(&(width as usize)) {
        return Err(SpecError::Sizes(format!(
            "expansion_ratio {ratio} of d_model {hidden} is not a usable width"
        )));
    }
    Ok(width as usize)
}

/// A number, or the text `inv_sqrt_d_model`.
fn logit_scale(config: &Config, hidden: usize) -> Result<Option<f32>, SpecError> {
    match config.get("logit_scale") {
        Some(value) if value.is_string() => {
            config.one_of("logit_scale", &["inv_sqrt_d_model"])?;
            Ok(Some(1.0 / (hidden as f32).sqrt()))
        }
        _ => Ok(config
            .real("logit_scale", 1e-9..=1e9)?
            .map(|scale| scale as f32)),
    }
}

/// The weights of an MPT.
#[must_use]
pub fn tensor_names(spec: &ModelSpec, root: &str) -> TensorNames {
    let hidden = spec.hidden;
    let norm = |name: String| NormTensor {
        name,
        width: hidden,
        bias: spec.bias.norm,
    };
    let layer = |i: usize| {
        let name = |part: &str| format!("{root}blocks.{i}.{part}");
        LayerTensors {
            attention_norm: norm(name("norm_1")),
            qkv: Stacked::one(name("attn.Wqkv"), 3 * hidden, hidden, spec.bias.attention),
            qk_norm: spec
                .qk_norm
                .then(|| [norm(name("attn.q_ln")), norm(name("attn.k_ln"))]),
            attention_out: Stacked::one(name("attn.out_proj"), hidden, hidden, spec.bias.attention),
            mlp_norm: norm(name("norm_2")),
            mlp_in: Stacked::one(
                name("ffn.up_proj"),
                spec.intermediate,
                hidden,
                spec.bias.mlp,
            ),
            mlp_out: Stacked::one(
                name("ffn.down_proj"),
                hidden,
                spec.intermediate,
                spec.bias.mlp,
            ),
        }
    };
    TensorNames {
        embedding: Stacked::one(format!("{root}{EMBEDDING}"), spec.vocab, hidden, false),
        layers: (0..spec.layers).map(layer).collect(),
        final_norm: norm(format!("{root}norm_f")),
        head: (!spec.tied).then(|| Stacked::one("lm_head".to_owned(), spec.vocab, hidden, false)),
    }
}
