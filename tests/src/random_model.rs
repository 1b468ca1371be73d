//! A checkpoint of a given shape with weights of no meaning: for tests of memory, where only sizes count.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::golden;

/// A llama's sizes.
#[derive(Debug, Clone, Copy)]
pub struct LlamaShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP's middle.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
}

impl LlamaShape {
    /// TinyLlama's.
    pub const BILLION: LlamaShape = LlamaShape {
        hidden: 2048,
        intermediate: 5632,
        layers: 22,
        heads: 32,
        kv_heads: 4,
        vocab: 32000,
        context: 2048,
    };

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, middle) = (self.hidden, self.intermediate);
        let kv = hidden / self.heads * self.kv_heads;
        let mut all = vec![("model.embed_tokens".into(), vec![self.vocab, hidden])];
        for layer in 0..self.layers {
            let mut part = |name: &str, dims: &[usize]| {
                all.push((format!("model.layers.{layer}.{name}"), dims.to_vec()));
            };
            part("input_layernorm", &[hidden]);
            part("self_attn.q_proj", &[hidden, hidden]);
            part("self_attn.k_proj", &[kv, hidden]);
            part("self_attn.v_proj", &[kv, hidden]);
            part("self_attn.o_proj", &[hidden, hidden]);
            part("post_attention_layernorm", &[hidden]);
            part("mlp.gate_proj", &[middle, hidden]);
            part("mlp.up_proj", &[middle, hidden]);
            part("mlp.down_proj", &[hidden, middle]);
        }
        all.push(("model.norm".into(), vec![hidden]));
        all.push(("lm_head".into(), vec![self.vocab, hidden]));
        all
    }

    fn config(&self) -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": self.context, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"})
    }
}

/// Writes the model into `folder`, in bf16, with the tokenizer and the chat template of a tiny model.
pub fn write(shape: &LlamaShape, folder: &Path) {
    let tokenizer = golden::model_folder("tiny-llama");
    for entry in fs::read_dir(&tokenizer).expect("the tiny model is there") {
        let entry = entry.expect("its folder can be read");
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("tokenizer") || name.starts_with("special_tokens") {
            fs::copy(entry.path(), folder.join(&name)).expect("a file can be copied");
        }
    }
    fs::write(folder.join("config.json"), shape.config().to_string())
        .expect("config.json can be written");
    let (mut header, mut end) = (Map::new(), 0);
    let mut sizes = Vec::new();
    for (name, dims) in shape.tensors() {
        let bytes = 2 * dims.iter().product::<usize>();
        header.insert(
            format!("{name}.weight"),
            json!({"dtype": "BF16", "shape": dims, "data_offsets": [end, end + bytes]}),
        );
        end += bytes;
        sizes.push((dims.len() == 1, bytes));
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let file = File::create(folder.join("model.safetensors")).expect("weights can be written");
    let mut file = BufWriter::new(file);
    let mut put = |bytes: &[u8]| file.write_all(bytes).expect("there is room on the disk");
    put(&(header.len() as u64).to_le_bytes());
    put(header.as_bytes());
    let (ones, noise) = (1.0f32.to_bits().to_le_bytes()[2..].repeat(1 << 12), noise());
    for (norm, bytes) in sizes {
        let slab = if norm { &ones } else { &noise };
        let mut left = bytes;
        while left > 0 {
            let part = left.min(slab.len());
            put(&slab[..part]);
            left -= part;
        }
    }
}

/// Some small numbers in bf16, as many as do not repeat within a row.
fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes = Vec::new();
    for _ in 0..(1 << 19) + 3 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let unit = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        bytes.extend_from_slice(&(unit * 0.05).to_bits().to_le_bytes()[2..]);
    }
    bytes
}
