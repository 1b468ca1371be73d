//! A second opinion on the forward pass: one sequence, the whole of it at once, f64, no cache, no slices, no backend.
//!
//! Written against the publishers' code, sharing nothing with the engine; it reads `config.json` and tensors by name.

use serde_json::Value;
use std::collections::HashMap;

/// A checkpoint's numbers, by tensor name after the root.
pub struct Naive<'a> {
    pub config: &'a Value,
    pub tensors: HashMap<String, Vec<f64>>,
}

type Rows = Vec<Vec<f64>>;

impl Naive<'_> {
    /// The logits of every token.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let rows = if self.config["architectures"][0]
            .as_str()
            .unwrap()
            .to_lowercase()
            .starts_with("mpt")
        {
            self.mpt(tokens)
        } else {
            self.llama(tokens)
        };
        rows.into_iter()
            .map(|row| row.into_iter().map(|x| x as f32).collect())
            .collect()
    }

    fn llama(&self, tokens: &[u32]) -> Rows {
        let count = |key: &str| self.config[key].as_u64().map(|n| n as usize);
        let (hidden, heads) = (
            count("hidden_size").unwrap(),
            count("num_attention_heads").unwrap(),
        );
        let (kv_heads, d) = (
            count("num_key_value_heads").unwrap(),
            count("head_dim").unwrap_or(hidden / heads),
        );
        let eps = self.config["rms_norm_eps"].as_f64().unwrap();
        let mut x = self.embed("embed_tokens", tokens, hidden);
        for layer in 0..count("num_hidden_layers").unwrap() {
            let name = |part: &str| format!("layers.{layer}.{part}");
            let y = self.rms_norm(&name("input_layernorm"), &x, eps);
            let part = |part: &str| self.linear(&name(part), &y);
            let (mut q, mut k, v) = (
                part("self_attn.q_proj"),
                part("self_attn.k_proj"),
                part("self_attn.v_proj"),
            );
            for (position, row) in q.iter_mut().enumerate().chain(k.iter_mut().enumerate()) {
                row.chunks_mut(d)
                    .for_each(|head| self.rotate(head, position));
            }
            let window = count("sliding_window").unwrap_or(usize::MAX);
            let y = attend(
                &q,
                &k,
                &v,
                heads / kv_heads,
                d,
                window,
                1.0 / (d as f64).sqrt(),
                &vec![0.0; heads],
            );
            add(&mut x, &self.linear(&name("self_attn.o_proj"), &y));
            let y = self.rms_norm(&name("post_attention_layernorm"), &x, eps);
            let (gate, up) = (
                self.linear(&name("mlp.gate_proj"), &y),
                self.linear(&name("mlp.up_proj"), &y),
            );
            let silu = |z: f64| z / (1.0 + (-z).exp());
            let middle = gate
                .iter()
                .zip(&up)
                .map(|(gate, up)| gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect())
                .collect();
            add(&mut x, &self.linear(&name("mlp.down_proj"), &middle));
        }
        let head = if self.tensors.contains_key("lm_head.weight") {
            "lm_head"
        } else {
            "embed_tokens"
        };
        self.linear(head, &self.rms_norm("norm", &x, eps))
    }

    fn mpt(&self, tokens: &[u32]) -> Rows {
        let count = |key: &str| self.config[key].as_u64().unwrap() as usize;
        let (hidden, heads) = (count("d_model"), count("n_heads"));
        let (d, attention) = (hidden / heads, &self.config["attn_config"]);
        let bias_max = attention["alibi_bias_max"].as_f64().unwrap_or(8.0);
        let n = heads.next_power_of_two();
        let all: Vec<f64> = (1..=n)
            .map(|i| 1.0 / 2f64.powf(i as f64 * bias_max / n as f64))
            .collect();
        let odd_first = all
            .iter()
            .skip(1)
            .step_by(2)
            .chain(all.iter().step_by(2))
            .copied()
            .take(heads)
            .collect();
        let slopes: Vec<f64> = if n == heads { all } else { odd_first };
        let scale = attention["softmax_scale"]
            .as_f64()
            .unwrap_or(1.0 / (d as f64).sqrt());
        let mut x = self.embed("wte", tokens, hidden);
        for layer in 0..count("n_layers") {
            let name = |part: &str| format!("blocks.{layer}.{part}");
            let mut qkv = self.linear(&name("attn.Wqkv"), &self.layer_norm(&name("norm_1"), &x));
            if let Some(clip) = attention["clip_qkv"].as_f64() {
                qkv.iter_mut()
                    .flatten()
                    .for_each(|x| *x = x.clamp(-clip, clip));
            }
            let third = |i: usize| {
                qkv.iter()
                    .map(|row| row[i * hidden..(i + 1) * hidden].to_vec())
                    .collect::<Rows>()
            };
            let (mut q, mut k, v) = (third(0), third(1), third(2));
            if attention["qk_ln"].as_bool() == Some(true) {
                (q, k) = (
                    self.layer_norm(&name("attn.q_ln"), &q),
                    self.layer_norm(&name("attn.k_ln"), &k),
                );
            }
            let y = attend(&q, &k, &v, 1, d, usize::MAX, scale, &slopes);
            add(&mut x, &self.linear(&name("attn.out_proj"), &y));
            let mut y = self.linear(&name("ffn.up_proj"), &self.layer_norm(&name("norm_2"), &x));
            y.iter_mut()
                .flatten()
                .for_each(|x| *x = *x / 2.0 * (1.0 + erf(*x / 2f64.sqrt())));
            add(&mut x, &self.linear(&name("ffn.down_proj"), &y));
        }
        let head = if self.tensors.contains_key("lm_head.weight") {
            "lm_head"
        } else {
            "wte"
        };
        let mut logits = self.linear(head, &self.layer_norm("norm_f", &x));
        if let Some(scale) = self.config["logit_scale"].as_f64() {
            logits.iter_mut().flatten().for_each(|x| *x *= scale);
        }
        logits
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let (half, scaling) = (head.len() / 2, &self.config["rope_scaling"]);
        for i in 0..half {
            let plain = self.config["rope_theta"]
                .as_f64()
                .unwrap()
                .powf(-2.0 * i as f64 / head.len() as f64);
            let number = |key: &str| scaling[key].as_f64().unwrap();
            let frequency = match scaling["rope_type"].as_str() {
                Some("linear") => plain / number("factor"),
                Some("llama3") => {
                    // As in transformers' `_compute_llama3_parameters`.
                    let old = number("original_max_position_embeddings");
                    let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
                    let wavelength = 2.0 * std::f64::consts::PI / plain;
                    let smooth = (old / wavelength - low) / (high - low);
                    if wavelength < old / high {
                        plain
                    } else if wavelength > old / low {
                        plain / number("factor")
                    } else {
                        (1.0 - smooth) * plain / number("factor") + smooth * plain
                    }
                }
                _ => plain,
            };
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (head[i], head[i + half]) = (
                head[i] * cos - head[i + half] * sin,
                head[i + half] * cos + head[i] * sin,
            );
        }
    }

    fn embed(&self, name: &str, tokens: &[u32], hidden: usize) -> Rows {
        let table = &self.tensors[&format!("{name}.weight")];
        tokens
            .iter()
            .map(|token| table[*token as usize * hidden..][..hidden].to_vec())
            .collect()
    }

    fn linear(&self, name: &str, x: &Rows) -> Rows {
        let (weight, bias) = (
            &self.tensors[&format!("{name}.weight")],
            self.tensors.get(&format!("{name}.bias")),
        );
        let row = |x: &Vec<f64>| {
            let sums = weight
                .chunks(x.len())
                .map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>());
            sums.enumerate()
                .map(|(i, sum)| sum + bias.map_or(0.0, |bias| bias[i]))
                .collect()
        };
        x.iter().map(row).collect()
    }

    fn rms_norm(&self, name: &str, x: &Rows, eps: f64) -> Rows {
        let weight = &self.tensors[&format!("{name}.weight")];
        let row = |x: &Vec<f64>| {
            let root = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
            x.iter().zip(weight).map(|(x, w)| x / root * w).collect()
        };
        x.iter().map(row).collect()
    }

    fn layer_norm(&self, name: &str, x: &Rows) -> Rows {
        let (weight, bias) = (
            &self.tensors[&format!("{name}.weight")],
            self.tensors.get(&format!("{name}.bias")),
        );
        let row = |x: &Vec<f64>| {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let root =
                (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64 + 1e-5).sqrt();
            x.iter()
                .enumerate()
                .map(|(i, x)| (x - mean) / root * weight[i] + bias.map_or(0.0, |bias| bias[i]))
                .collect()
        };
        x.iter().map(row).collect()
    }
}

#[allow(clippy::too_many_arguments, reason = "a formula, called twice")]
fn attend(
    q: &Rows,
    k: &Rows,
    v: &Rows,
    group: usize,
    d: usize,
    window: usize,
    scale: f64,
    slopes: &[f64],
) -> Rows {
    let head = |row: &Vec<f64>, head: usize| row[head * d..(head + 1) * d].to_vec();
    let mut out = vec![vec![0.0; q[0].len()]; q.len()];
    for (i, out) in out.iter_mut().enumerate() {
        for (h, slope) in slopes.iter().enumerate() {
            let keys = (i + 1).saturating_sub(window)..i + 1;
            let query = head(&q[i], h);
            let score = |j: usize| {
                let dot: f64 = query
                    .iter()
                    .zip(head(&k[j], h / group))
                    .map(|(q, k)| q * k)
                    .sum();
                (dot * scale - slope * (i - j) as f64).exp()
            };
            let scores: Vec<f64> = keys.clone().map(score).collect();
            let sum: f64 = scores.iter().sum();
            for (j, score) in keys.zip(scores) {
                for (out, v) in out[h * d..].iter_mut().zip(head(&v[j], h / group)) {
                    *out += score / sum * v;
                }
            }
        }
    }
    out
}

fn add(x: &mut Rows, y: &Rows) {
    x.iter_mut()
        .flatten()
        .zip(y.iter().flatten())
        .for_each(|(x, y)| *x += y);
}

/// By the trapezium rule over its integral: slow, and right to 1e-9.
fn erf(x: f64) -> f64 {
    const STEPS: usize = 2000;
    let step = x / STEPS as f64;
    let value = |i: usize| (-(i as f64 * step).powi(2)).exp();
    let inner: f64 = (1..STEPS).map(value).sum();
    (inner + (value(0) + value(STEPS)) / 2.0) * step * 2.0 / std::f64::consts::PI.sqrt()
}
