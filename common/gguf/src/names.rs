//! Tensors' names: a file's own, and those of Hugging Face's checkpoints.

/// Names inside a layer: a file's, then Hugging Face's.
const LLAMA: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const MPT: [(&str, &str); 8] = [
    ("attn_norm", "norm_1"),
    ("attn_qkv", "attn.Wqkv"),
    ("attn_q_norm", "attn.q_ln"),
    ("attn_k_norm", "attn.k_ln"),
    ("attn_output", "attn.out_proj"),
    ("ffn_norm", "norm_2"),
    ("ffn_up", "ffn.up_proj"),
    ("ffn_down", "ffn.down_proj"),
];
/// Names outside the layers.
const LLAMA_ENDS: [(&str, &str); 3] = [
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];
const MPT_ENDS: [(&str, &str); 3] = [
    ("token_embd", "transformer.wte"),
    ("output_norm", "transformer.norm_f"),
    ("output", "lm_head"),
];

/// An architecture's names.
struct Names {
    ends: &'static [(&'static str, &'static str)],
    layer: &'static [(&'static str, &'static str)],
    /// What goes before a layer's number in Hugging Face's names.
    layers: &'static str,
}

impl Names {
    fn of(architecture: &str) -> Option<Names> {
        match architecture {
            "llama" => Some(Names {
                ends: &LLAMA_ENDS,
                layer: &LLAMA,
                layers: "model.layers.",
            }),
            "mpt" => Some(Names {
                ends: &MPT_ENDS,
                layer: &MPT,
                layers: "transformer.blocks.",
            }),
            _ => None,
        }
    }
}

/// Hugging Face's name of a file's tensor (`blk.3.attn_q.weight`); none for one that its checkpoints do not have.
#[must_use]
pub fn hugging_face_name(architecture: &str, name: &str) -> Option<String> {
    let names = Names::of(architecture)?;
    let (stem, kind) = name.rsplit_once('.')?;
    let Some(rest) = stem.strip_prefix("blk.") else {
        return Some(format!("{}.{kind}", forth(names.ends, stem)?));
    };
    let (layer, part) = rest.split_once('.')?;
    Some(format!(
        "{}{layer}.{}.{kind}",
        names.layers,
        forth(names.layer, part)?
    ))
}

/// A file's name of a tensor that Hugging Face names so (`model.layers.3.self_attn.q_proj.weight`).
#[must_use]
pub fn gguf_name(architecture: &str, name: &str) -> Option<String> {
    let names = Names::of(architecture)?;
    let (stem, kind) = name.rsplit_once('.')?;
    let Some(rest) = stem.strip_prefix(names.layers) else {
        return Some(format!("{}.{kind}", back(names.ends, stem)?));
    };
    let (layer, part) = rest.split_once('.')?;
    Some(format!("blk.{layer}.{}.{kind}", back(names.layer, part)?))
}

fn forth(pairs: &[(&str, &'static str)], name: &str) -> Option<&'static str> {
    let found = pairs.iter().find(|(from, _)| *from == name);
    found.map(|(_, to)| *to)
}

fn back(pairs: &[(&'static str, &str)], name: &str) -> Option<&'static str> {
    let found = pairs.iter().find(|(_, to)| *to == name);
    found.map(|(from, _)| *from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (architecture, ours, theirs) in [
            (
                "llama",
                "blk.3.attn_q.weight",
                "model.layers.3.self_attn.q_proj.weight",
            ),
            (
                "llama",
                "blk.11.ffn_down.bias",
                "model.layers.11.mlp.down_proj.bias",
            ),
            ("llama", "output.weight", "lm_head.weight"),
            ("llama", "output_norm.weight", "model.norm.weight"),
            (
                "mpt",
                "blk.0.attn_qkv.weight",
                "transformer.blocks.0.attn.Wqkv.weight",
            ),
            ("mpt", "token_embd.weight", "transformer.wte.weight"),
        ] {
            assert_eq!(
                hugging_face_name(architecture, ours).as_deref(),
                Some(theirs)
            );
            assert_eq!(gguf_name(architecture, theirs).as_deref(), Some(ours));
        }
    }

    #[test]
    fn names_that_are_not_known_have_no_counterpart() {
        assert_eq!(hugging_face_name("llama", "rope_freqs.weight"), None);
        assert_eq!(hugging_face_name("llama", "blk.0.attn_qkv.weight"), None);
        assert_eq!(hugging_face_name("bert", "token_embd.weight"), None);
        assert_eq!(gguf_name("llama", "model.layers.3"), None);
    }
}
