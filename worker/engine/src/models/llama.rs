//! Llama: rotary positions, RMS norms, gated silu MLP, grouped-query attention; Llama 2, Code Llama and Llama 3.

use super::config::Config;
use super::spec::{
    Biases, Family, MlpKind, ModelSpec, NormKind, Positions, RopeScaling, SpecError, limits,
};
use super::tensors::{LayerTensors, NormTensor, Part, Stacked, TensorNames};

/// The embedding's name after the checkpoint's root.
pub const EMBEDDING: &str = "embed_tokens";

/// Reads a `LlamaForCausalLM`.
///
/// # Errors
/// [`SpecError`].
pub fn spec(config: &Config) -> Result<ModelSpec, SpecError> {
    config.one_of("hidden_act", &["silu"])?;
    let hidden = config.count("hidden_size", limits::WIDTH)?;
    let heads = config.count("num_attention_heads", limits::HEADS)?;
    let head_width = match config.get("head_dim") {
        Some(_) => config.count("head_dim", limits::HEAD_WIDTH)?,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(SpecError::Sizes(format!(
                "hidden_size {hidden} is not a multiple of {heads} attention heads"
            )));
        }
    };
    Ok(ModelSpec {
        family: Family::Llama,
        hidden,
        layers: config.count("num_hidden_layers", limits::LAYERS)?,
        heads,
        kv_heads: config.count_or("num_key_value_heads", limits::HEADS, heads)?,
        head_width,
        intermediate: config.count("intermediate_size", limits::WIDTH)?,
        vocab: config.count("vocab_size", limits::VOCAB)?,
        context_max: config.count("max_position_embeddings", limits::CONTEXT)?,
        tied: config.flag("tie_word_embeddings", false)?,
        norm: NormKind::Rms,
        norm_eps: config.real("rms_norm_eps", 0.0..=1.0)?.unwrap_or(1e-6) as f32,
        positions: rope(config)?,
        window: None,
        softmax_scale: 1.0 / (head_width as f32).sqrt(),
        clip_qkv: None,
        qk_norm: false,
        mlp: MlpKind::GatedSilu,
        bias: Biases {
            attention: config.flag("attention_bias", false)?,
            mlp: config.flag("mlp_bias", false)?,
            norm: false,
        },
        logit_scale: None,
    })
}

/// The rotary frequencies: `rope_theta` and `rope_scaling`, or both in `rope_parameters` as newer files have it.
fn rope(config: &Config) -> Result<Positions, SpecError> {
    const THETA: std::ops::RangeInclusive<f64> = 1.0..=1e12;
    const FACTOR: std::ops::RangeInclusive<f64> = 1e-3..=1e6;
    let parameters = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let outer = config.real("rope_theta", THETA)?;
    let Some(parameters) = parameters else {
        return Ok(Positions::Rope {
            theta: outer.unwrap_or(10_000.0),
            scaling: RopeScaling::None,
        });
    };
    let theta = parameters
        .real("rope_theta", THETA)?
        .or(outer)
        .unwrap_or(10_000.0);
    let factor = |key: &str| {
        parameters
            .real(key, FACTOR)?
            .ok_or_else(|| parameters.missing(key))
    };
    let key = if parameters.get("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    let scaling = match parameters.text(key)? {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear {
            factor: factor("factor")?,
        },
        Some("llama3") => {
            let (low, high) = (factor("low_freq_factor")?, factor("high_freq_factor")?);
            if low >= high {
                return Err(SpecError::Sizes(format!(
                    "rope low_freq_factor {low} is not below high_freq_factor {high}"
                )));
            }
            let original = parameters.count("original_max_position_embeddings", limits::CONTEXT)?;
            RopeScaling::Llama3 {
                factor: factor("factor")?,
                low,
                high,
                original_context: original as f64,
            }
        }
        Some(_) => {
            let found = parameters.get(key).cloned().unwrap_or_default();
            return Err(parameters.odd(key, &found, "default, linear or llama3"));
        }
    };
    Ok(Positions::Rope { theta, scaling })
}

/// The weights of a Llama.
#[must_use]
pub fn tensor_names(spec: &ModelSpec, root: &str) -> TensorNames {
    let (q, kv) = (
        spec.heads * spec.head_width,
        spec.kv_heads * spec.head_width,
    );
    let norm = |name: String| NormTensor {
        name,
        width: spec.hidden,
        bias: false,
    };
    let layer = |i: usize| {
        let name = |part: &str| format!("{root}layers.{i}.{part}");
        let part = |name: String, rows: usize| Part { name, rows };
        LayerTensors {
            attention_norm: norm(name("input_layernorm")),
            qkv: Stacked {
                parts: vec![
                    part(name("self_attn.q_proj"), q),
                    part(name("self_attn.k_proj"), kv),
                    part(name("self_attn.v_proj"), kv),
                ],
                columns: spec.hidden,
                bias: spec.bias.attention,
            },
            qk_norm: None,
            attention_out: Stacked::one(
                name("self_attn.o_proj"),
                spec.hidden,
                q,
                spec.bias.attention,
            ),
            mlp_norm: norm(name("post_attention_layernorm")),
            mlp_in: Stacked {
                parts: vec![
                    part(name("mlp.gate_proj"), spec.intermediate),
                    part(name("mlp.up_proj"), spec.intermediate),
                ],
                columns: spec.hidden,
                bias: spec.bias.mlp,
            },
            mlp_out: Stacked::one(
                name("mlp.down_proj"),
                spec.hidden,
                spec.intermediate,
                spec.bias.mlp,
            ),
        }
    };
    TensorNames {
        embedding: Stacked::one(format!("{root}{EMBEDDING}"), spec.vocab, spec.hidden, false),
        layers: (0..spec.layers).map(layer).collect(),
        final_norm: norm(format!("{root}norm")),
        head: (!spec.tied)
            .then(|| Stacked::one("lm_head".to_owned(), spec.vocab, spec.hidden, false)),
    }
}
