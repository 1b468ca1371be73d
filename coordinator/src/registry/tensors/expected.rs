//! The tensors that a model needs: their names by family, their dimensions, and how ranks cut each.

use super::super::shape::{Family, Shape};
use super::Slice;

/// The head's name, whatever the prefix of the others is.
pub(super) const HEAD: &str = "lm_head";

/// The prefixes in use, and the embedding's name behind them.
pub(super) fn roots(family: Family) -> (&'static [&'static str], &'static str) {
    match family {
        Family::Llama => (&["model.", ""], "embed_tokens"),
        Family::Mpt => (&["transformer.", "", "model.transformer.", "model."], "wte"),
    }
}

/// Name, dimensions, and how ranks share it.
pub(super) type Expected = (String, Vec<u64>, Slice);

/// All that `shape` needs, named from `root` on.
pub(super) fn expected(shape: &Shape, root: &str) -> Vec<Expected> {
    let mut all: Vec<Expected> = Vec::new();
    let embedding = roots(shape.family).1;
    let mut matrix = |name: String, dims: [u64; 2], slice: Slice, bias: bool| {
        if bias {
            // A row-parallel product is summed over ranks, so that its bias is added once: whole on each rank.
            all.push((format!("{name}.bias"), vec![dims[0]], slice));
        }
        all.push((format!("{name}.weight"), dims.to_vec(), slice));
    };
    let (hidden, middle, vocab) = (shape.hidden, shape.intermediate, shape.vocab);
    let (q, kv) = (
        shape.heads * shape.head_width,
        shape.kv_heads * shape.head_width,
    );
    matrix(
        format!("{root}{embedding}"),
        [vocab, hidden],
        Slice::Vocabulary,
        false,
    );
    for layer in 0..shape.layers {
        match shape.family {
            Family::Llama => {
                let mut part = |name: &str, dims, slice, bias| {
                    matrix(format!("{root}layers.{layer}.{name}"), dims, slice, bias)
                };
                part(
                    "self_attn.q_proj",
                    [q, hidden],
                    Slice::Heads,
                    shape.attention_bias,
                );
                part(
                    "self_attn.k_proj",
                    [kv, hidden],
                    Slice::KvHeads,
                    shape.attention_bias,
                );
                part(
                    "self_attn.v_proj",
                    [kv, hidden],
                    Slice::KvHeads,
                    shape.attention_bias,
                );
                part(
                    "self_attn.o_proj",
                    [hidden, q],
                    Slice::Heads,
                    shape.attention_bias,
                );
                part(
                    "mlp.gate_proj",
                    [middle, hidden],
                    Slice::Middle,
                    shape.mlp_bias,
                );
                part(
                    "mlp.up_proj",
                    [middle, hidden],
                    Slice::Middle,
                    shape.mlp_bias,
                );
                part(
                    "mlp.down_proj",
                    [hidden, middle],
                    Slice::Middle,
                    shape.mlp_bias,
                );
            }
            Family::Mpt => {
                let mut part = |name: &str, dims, slice, bias| {
                    matrix(format!("{root}blocks.{layer}.{name}"), dims, slice, bias)
                };
                part(
                    "attn.Wqkv",
                    [3 * hidden, hidden],
                    Slice::Fused,
                    shape.attention_bias,
                );
                part(
                    "attn.out_proj",
                    [hidden, hidden],
                    Slice::Heads,
                    shape.attention_bias,
                );
                part(
                    "ffn.up_proj",
                    [middle, hidden],
                    Slice::Middle,
                    shape.mlp_bias,
                );
                part(
                    "ffn.down_proj",
                    [hidden, middle],
                    Slice::Middle,
                    shape.mlp_bias,
                );
            }
        }
    }
    if !shape.tied {
        matrix(HEAD.to_owned(), [vocab, hidden], Slice::Vocabulary, false);
    }
    let mut norm = |name: String| {
        if shape.norm_bias {
            all.push((format!("{name}.bias"), vec![hidden], Slice::Whole));
        }
        all.push((format!("{name}.weight"), vec![hidden], Slice::Whole));
    };
    for layer in 0..shape.layers {
        match shape.family {
            Family::Llama => {
                norm(format!("{root}layers.{layer}.input_layernorm"));
                norm(format!("{root}layers.{layer}.post_attention_layernorm"));
            }
            Family::Mpt => {
                norm(format!("{root}blocks.{layer}.norm_1"));
                norm(format!("{root}blocks.{layer}.norm_2"));
                if shape.qk_norm {
                    norm(format!("{root}blocks.{layer}.attn.q_ln"));
                    norm(format!("{root}blocks.{layer}.attn.k_ln"));
                }
            }
        }
    }
    norm(format!(
        "{root}{}",
        if shape.family == Family::Llama {
            "norm"
        } else {
            "norm_f"
        }
    ));
    all
}
