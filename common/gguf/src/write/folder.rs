//! A folder in Hugging Face's layout as a GGUF file, as llama.cpp's converter makes it: rotary rows in its order.

use super::{Writer, blocks::encode};
use crate::names::gguf_name;
use crate::tensor::TensorType;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value as Json;
use std::path::Path;

/// A file of a folder with `config.json` and one `model.safetensors`. Matrices get the type that `choose` says by the name
/// in the file; everything else is F32. The tokenizer is left to the caller.
///
/// # Panics
/// Where the folder is not a Llama, a Mistral or an MPT.
pub fn from_folder(dir: &Path, choose: impl Fn(&str) -> TensorType) -> Writer {
    let read = |name: &str| std::fs::read(dir.join(name)).expect(name);
    let config: Json = serde_json::from_slice(&read("config.json")).expect("a config");
    let class = config["architectures"][0].as_str().expect("a class");
    let mut writer = Writer::default();
    let architecture = match class {
        "LlamaForCausalLM" | "MistralForCausalLM" => {
            llama(&mut writer, &config);
            "llama"
        }
        _ => {
            mpt(&mut writer, &config);
            "mpt"
        }
    };
    let bytes = read("model.safetensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut names = file.names();
    names.sort_unstable();
    for name in names {
        let tensor = file.tensor(name).expect("named by the file");
        let mut numbers = widen(tensor.dtype(), tensor.data());
        let ours = gguf_name(architecture, name).expect("a known tensor");
        let shape = tensor.shape();
        let heads = |key: &str| config[key].as_u64().expect(key) as usize;
        if ours.ends_with("attn_q.weight") && architecture == "llama" {
            numbers = interleave(&numbers, heads("num_attention_heads"), shape);
        } else if ours.ends_with("attn_k.weight") && architecture == "llama" {
            numbers = interleave(&numbers, heads("num_key_value_heads"), shape);
        }
        let dims: Vec<u64> = shape.iter().rev().map(|dim| *dim as u64).collect();
        let tensor_type = match shape.len() {
            1 => TensorType::F32,
            _ => choose(&ours),
        };
        writer.tensor(&ours, &dims, tensor_type, encode(tensor_type, &numbers));
    }
    writer
}

fn llama(writer: &mut Writer, config: &Json) {
    writer.set("general.architecture", "llama");
    let count = |key: &str| config[key].as_u64().map(|count| count as u32);
    let keys = [
        ("llama.block_count", "num_hidden_layers"),
        ("llama.context_length", "max_position_embeddings"),
        ("llama.embedding_length", "hidden_size"),
        ("llama.feed_forward_length", "intermediate_size"),
        ("llama.attention.head_count", "num_attention_heads"),
        ("llama.attention.head_count_kv", "num_key_value_heads"),
        ("llama.attention.key_length", "head_dim"),
        ("llama.attention.sliding_window", "sliding_window"),
        ("llama.vocab_size", "vocab_size"),
    ];
    for (ours, theirs) in keys {
        if let Some(count) = count(theirs) {
            writer.set(ours, count);
        }
    }
    let eps = config["rms_norm_eps"].as_f64().unwrap_or(1e-6);
    writer.set("llama.attention.layer_norm_rms_epsilon", eps as f32);
    let theta = config["rope_theta"].as_f64().unwrap_or(10_000.0);
    writer.set("llama.rope.freq_base", theta as f32);
}

fn mpt(writer: &mut Writer, config: &Json) {
    writer.set("general.architecture", "mpt");
    let count = |key: &str| config[key].as_u64().expect(key) as u32;
    writer.set("mpt.block_count", count("n_layers"));
    writer.set("mpt.context_length", count("max_seq_len"));
    writer.set("mpt.embedding_length", count("d_model"));
    let ratio = config["expansion_ratio"].as_f64().unwrap_or(4.0);
    let middle = ratio * f64::from(count("d_model"));
    writer.set("mpt.feed_forward_length", middle as u32);
    writer.set("mpt.attention.head_count", count("n_heads"));
    let eps = config["layer_norm_epsilon"].as_f64().unwrap_or(1e-5);
    writer.set("mpt.attention.layer_norm_epsilon", eps as f32);
    let attention = &config["attn_config"];
    let bias_max = attention["alibi_bias_max"].as_f64().unwrap_or(8.0);
    writer.set("mpt.attention.max_alibi_bias", bias_max as f32);
    if let Some(limit) = attention["clip_qkv"].as_f64() {
        writer.set("mpt.attention.clamp_kqv", limit as f32);
    }
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let of = |size: usize, widen: fn(&[u8]) -> f32| bytes.chunks_exact(size).map(widen).collect();
    match dtype {
        Dtype::F32 => of(4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Dtype::F16 => of(2, |b| f16::from_le_bytes([b[0], b[1]]).to_f32()),
        Dtype::BF16 => of(2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        other => panic!("{other:?}"),
    }
}

/// Rows of each head in the order of its rotary pairs, where Hugging Face keeps the pairs' halves apart.
fn interleave(numbers: &[f32], heads: usize, shape: &[usize]) -> Vec<f32> {
    let (rows, width) = (shape[0], shape[1]);
    let head = rows / heads;
    let from = |row: usize| {
        let (first, inside) = (row / head * head, row % head);
        first + inside / 2 + inside % 2 * (head / 2)
    };
    (0..rows)
        .flat_map(|row| &numbers[from(row) * width..][..width])
        .copied()
        .collect()
}
