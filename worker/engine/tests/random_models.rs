//! Features that the tiny trained models do not have, on small random checkpoints: biases, tied heads, scaled rotary
//! positions, odd numbers of heads, clipped and normed queries, f16 and f32 files, shards, sizes that do not divide.
//!
//! Expected logits come from [`naive`](support::naive), which shares nothing with the engine.

mod support;

use engine::backend::reference::ReferenceBackend;
use engine::backend::{KvDtype, WeightDtype};
use engine::models::checkpoint::Checkpoint;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use support::naive::Naive;
use support::{AllLogits, Cut, Sequence, Setup, cpu, run};

/// A random checkpoint, written to a folder of its own.
struct RandomModel {
    config: Value,
    root: &'static str,
    dtype: Dtype,
    /// More than one: shards with an index.
    files: usize,
    tensors: Vec<(String, Vec<usize>)>,
}

impl RandomModel {
    fn llama(config: Value, root: &'static str, dtype: Dtype, files: usize) -> RandomModel {
        let count = |key: &str| config[key].as_u64().map(|n| n as usize);
        let flag = |key: &str| config[key].as_bool() == Some(true);
        let (hidden, heads, middle) = (
            count("hidden_size").unwrap(),
            count("num_attention_heads").unwrap(),
            count("intermediate_size").unwrap(),
        );
        let (d, vocab) = (
            count("head_dim").unwrap_or(hidden / heads),
            count("vocab_size").unwrap(),
        );
        let (q, kv) = (heads * d, count("num_key_value_heads").unwrap() * d);
        let mut tensors = vec![
            (format!("{root}embed_tokens.weight"), vec![vocab, hidden]),
            (format!("{root}norm.weight"), vec![hidden]),
        ];
        if !flag("tie_word_embeddings") {
            tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        }
        for i in 0..count("num_hidden_layers").unwrap() {
            let matrices = [
                ("self_attn.q_proj", q, hidden, "attention_bias"),
                ("self_attn.k_proj", kv, hidden, "attention_bias"),
                ("self_attn.v_proj", kv, hidden, "attention_bias"),
                ("self_attn.o_proj", hidden, q, "attention_bias"),
                ("mlp.gate_proj", middle, hidden, "mlp_bias"),
                ("mlp.up_proj", middle, hidden, "mlp_bias"),
                ("mlp.down_proj", hidden, middle, "mlp_bias"),
            ];
            for (name, n, k, bias) in matrices {
                tensors.push((format!("{root}layers.{i}.{name}.weight"), vec![n, k]));
                if flag(bias) {
                    tensors.push((format!("{root}layers.{i}.{name}.bias"), vec![n]));
                }
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                tensors.push((format!("{root}layers.{i}.{name}.weight"), vec![hidden]));
            }
        }
        RandomModel {
            config,
            root,
            dtype,
            files,
            tensors,
        }
    }

    fn mpt(config: Value, root: &'static str, dtype: Dtype, files: usize) -> RandomModel {
        let count = |key: &str| config[key].as_u64().unwrap() as usize;
        let (hidden, vocab) = (count("d_model"), count("vocab_size"));
        let middle = (config["expansion_ratio"].as_f64().unwrap_or(4.0) * hidden as f64) as usize;
        let mut names = vec![("norm_f".to_owned(), vec![hidden])];
        for i in 0..count("n_layers") {
            let name = |part: &str| format!("blocks.{i}.{part}");
            names.extend([
                (name("norm_1"), vec![hidden]),
                (name("norm_2"), vec![hidden]),
            ]);
            names.extend([
                (name("attn.Wqkv"), vec![3 * hidden, hidden]),
                (name("attn.out_proj"), vec![hidden, hidden]),
            ]);
            names.extend([
                (name("ffn.up_proj"), vec![middle, hidden]),
                (name("ffn.down_proj"), vec![hidden, middle]),
            ]);
            if config["attn_config"]["qk_ln"].as_bool() == Some(true) {
                names.extend([
                    (name("attn.q_ln"), vec![hidden]),
                    (name("attn.k_ln"), vec![hidden]),
                ]);
            }
        }
        let biases = names
            .iter()
            .filter(|_| config["no_bias"].as_bool() == Some(false));
        let biases: Vec<_> = biases
            .map(|(name, shape)| (format!("{root}{name}.bias"), vec![shape[0]]))
            .collect();
        let mut tensors: Vec<_> = names
            .iter()
            .map(|(name, shape)| (format!("{root}{name}.weight"), shape.clone()))
            .collect();
        tensors.extend(biases);
        tensors.push((format!("{root}wte.weight"), vec![vocab, hidden]));
        if config["tie_word_embeddings"].as_bool() == Some(false) {
            tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        }
        RandomModel {
            config,
            root,
            dtype,
            files,
            tensors,
        }
    }

    /// Writes the folder; gives the numbers by name after the root, as rounded to the files' dtype.
    fn write(&self, dir: &Path) -> HashMap<String, Vec<f64>> {
        let mut random = 0x1234_5678_9abc_def1u64;
        let mut number = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let (mut numbers, mut data) = (HashMap::new(), Vec::new());
        for (name, shape) in &self.tensors {
            // Activations stay near 1: matrices by their inputs, norms around 1.
            let (middle, spread) = match shape[..] {
                [_, k] => (0.0, 1.5 / (k as f32).sqrt()),
                _ if name.contains("norm") || name.contains("_ln") => {
                    (if name.ends_with("weight") { 1.0 } else { 0.0 }, 0.3)
                }
                _ => (0.0, 0.3),
            };
            let (mut bytes, mut rounded) = (Vec::new(), Vec::new());
            for _ in 0..shape.iter().product() {
                let value = middle + spread * number();
                let value = match self.dtype {
                    Dtype::BF16 => {
                        bytes.extend(half::bf16::from_f32(value).to_le_bytes());
                        half::bf16::from_f32(value).to_f32()
                    }
                    Dtype::F16 => {
                        bytes.extend(half::f16::from_f32(value).to_le_bytes());
                        half::f16::from_f32(value).to_f32()
                    }
                    _ => {
                        bytes.extend(value.to_le_bytes());
                        value
                    }
                };
                rounded.push(f64::from(value));
            }
            data.push((name.clone(), shape.clone(), bytes));
            numbers.insert(
                name.strip_prefix(self.root).unwrap_or(name).to_owned(),
                rounded,
            );
        }
        let save = |file: &str, tensors: &[(String, Vec<usize>, Vec<u8>)]| {
            let views = tensors.iter().map(|(name, shape, bytes)| {
                (
                    name,
                    TensorView::new(self.dtype, shape.clone(), bytes).expect("fits"),
                )
            });
            std::fs::write(
                dir.join(file),
                safetensors::serialize(views, None).expect("serialises"),
            )
            .expect("written");
        };
        std::fs::write(dir.join("config.json"), self.config.to_string()).expect("written");
        if self.files == 1 {
            save("model.safetensors", &data);
            return numbers;
        }
        let mut map = serde_json::Map::new();
        for (i, part) in data.chunks(data.len().div_ceil(self.files)).enumerate() {
            let file = format!("model-{i:05}.safetensors");
            save(&file, part);
            map.extend(part.iter().map(|(name, ..)| (name.clone(), json!(file))));
        }
        std::fs::write(
            dir.join("model.safetensors.index.json"),
            json!({"weight_map": map}).to_string(),
        )
        .expect("written");
        numbers
    }

    /// Runs it on several numbers of ranks and compares every token's logits with the naive forward pass.
    fn compare(&self, ranks: &[u32]) {
        let dir = tempfile::tempdir().expect("a folder");
        let naive = Naive {
            config: &self.config,
            tensors: self.write(dir.path()),
        };
        let vocab = self.config["vocab_size"].as_u64().expect("a number") as u32;
        let sequence = |len: u32, prefill: usize| Sequence {
            tokens: (0..len).map(|i| (i * 37 + len) % vocab).collect(),
            prefill,
        };
        let sequences = [sequence(40, 33), sequence(3, 1), sequence(19, 19)];
        let expected: Vec<_> = sequences
            .iter()
            .map(|sequence| naive.logits(&sequence.tokens))
            .collect();
        let weights = if self.dtype == Dtype::BF16 {
            WeightDtype::Bf16
        } else {
            WeightDtype::F32
        };
        for ranks in ranks {
            let setup = Setup {
                ranks: *ranks,
                weights,
                kv: KvDtype::F32,
                cut: Cut {
                    chunk: 10,
                    step_tokens: 24,
                },
            };
            let found = run(dir.path(), setup, || ReferenceBackend, &sequences);
            near(&format!("reference, {ranks} ranks"), &found, &expected);
            let found = run(dir.path(), setup, cpu, &sequences);
            near(&format!("cpu, {ranks} ranks"), &found, &expected);
        }
    }
}

fn near(what: &str, found: &AllLogits, expected: &AllLogits) {
    for (sequence, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.len(), expected.len());
            for (id, (found, expected)) in found.iter().zip(expected).enumerate() {
                let place = format!("{what}, sequence {sequence}, token {token}, id {id}");
                let off = (found - expected).abs();
                assert!(off < 1e-4, "{place}: {found}, expected {expected}");
            }
        }
    }
}

fn llama_config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 45, "vocab_size": 101, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0
    });
    config
        .as_object_mut()
        .expect("an object")
        .extend(changes.as_object().expect("an object").clone());
    config
}

fn mpt_config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["MPTForCausalLM"], "d_model": 48, "n_layers": 2, "n_heads": 6, "vocab_size": 101,
        "max_seq_len": 64, "no_bias": true, "attn_config": {"alibi": true}
    });
    config
        .as_object_mut()
        .expect("an object")
        .extend(changes.as_object().expect("an object").clone());
    config
}

#[test]
fn a_llama_with_biases_and_wide_heads_on_ranks_that_do_not_divide_its_sizes() {
    let config = llama_config(json!({"attention_bias": true, "mlp_bias": true, "head_dim": 16}));
    RandomModel::llama(config, "model.", Dtype::BF16, 1).compare(&[1, 2, 4]);
}

#[test]
fn a_llama_with_a_tied_head_and_llama_3_positions_in_f16_shards() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    let config = llama_config(
        json!({"tie_word_embeddings": true, "rope_scaling": scaling, "rope_theta": 500.0}),
    );
    RandomModel::llama(config, "model.", Dtype::F16, 3).compare(&[1, 2]);
}

#[test]
fn a_llama_with_linear_positions_and_one_kv_head_for_all_ranks() {
    let config = llama_config(
        json!({"num_key_value_heads": 1, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    );
    RandomModel::llama(config, "", Dtype::F32, 1).compare(&[1, 2, 4]);
}

#[test]
fn a_mistral_with_a_window_smaller_than_a_block() {
    let config =
        llama_config(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 5}));
    RandomModel::llama(config, "model.", Dtype::F32, 2).compare(&[1, 2]);
}

#[test]
fn a_mistral_without_a_window() {
    let config =
        llama_config(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null}));
    RandomModel::llama(config, "model.", Dtype::BF16, 1).compare(&[1]);
}

#[test]
fn an_mpt_with_biases_clipped_and_normed_queries_and_six_heads() {
    let attention = json!({"alibi": true, "alibi_bias_max": 4, "clip_qkv": 0.7, "qk_ln": true, "softmax_scale": 0.2});
    let config = mpt_config(
        json!({"no_bias": false, "attn_config": attention, "logit_scale": 0.5, "expansion_ratio": 1.5}),
    );
    RandomModel::mpt(config, "transformer.", Dtype::F32, 1).compare(&[1, 2, 3, 6]);
}

#[test]
fn an_mpt_by_transformers_names_with_a_head_of_its_own() {
    let config =
        mpt_config(json!({"architectures": ["MptForCausalLM"], "tie_word_embeddings": false}));
    RandomModel::mpt(config, "", Dtype::BF16, 2).compare(&[1, 3]);
}

#[test]
fn a_checkpoint_that_differs_from_its_config_is_refused_by_the_tensors_name() {
    let message = |config: Value, change: &dyn Fn(&mut RandomModel)| {
        let mut model = RandomModel::llama(config, "model.", Dtype::F32, 1);
        change(&mut model);
        let dir = tempfile::tempdir().expect("a folder");
        model.write(dir.path());
        Checkpoint::open(dir.path())
            .expect_err("refused")
            .to_string()
    };
    let plain = || llama_config(json!({}));
    assert_eq!(
        message(plain(), &|model| model.config["attention_bias"] =
            json!(true)),
        "the checkpoint has no tensor model.layers.0.self_attn.q_proj.bias [40]"
    );
    assert_eq!(
        message(llama_config(json!({"attention_bias": true})), &|model| {
            model.config["attention_bias"] = json!(false)
        }),
        "the checkpoint has a tensor model.layers.0.self_attn.k_proj.bias that config.json does not account for"
    );
    assert_eq!(
        message(plain(), &|model| model.config["intermediate_size"] =
            json!(44)),
        "tensor model.layers.0.mlp.gate_proj.weight has the shape [45, 40]; config.json asks for [44, 40]"
    );
    assert_eq!(
        message(plain(), &|model| model.config["num_hidden_layers"] =
            json!(3)),
        "the checkpoint has no tensor model.layers.2.input_layernorm.weight [40]"
    );
    assert_eq!(
        message(plain(), &|model| model.tensors.push((
            "model.layers.0.self_attn.q_norm.weight".to_owned(),
            vec![8]
        ))),
        "the checkpoint has a tensor model.layers.0.self_attn.q_norm.weight that config.json does not account for"
    );
}
