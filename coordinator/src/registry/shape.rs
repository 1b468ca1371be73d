//! `config.json`: the numbers of a model that decide memory and how its tensors are named and cut.
//!
//! A small reader of its own, because the coordinator knows no tensors. What a config asks for beyond sizes (rope types,
//! activations) is checked by the worker's engine, which says no before it loads anything.

use serde_json::{Map, Value};

use super::RegistryError;
use super::files::Files;
use super::tensors::Packing;

/// Greatest `config.json` that is read.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Greatest size of any kind that is believed, so that products stay far inside 64 bits.
const SIZE_MAX: u64 = 1 << 24;
/// Greatest context that is believed.
const CONTEXT_MAX: u64 = 1 << 26;
/// Most layers that are believed.
const LAYERS_MAX: u64 = 4096;
/// What can be served.
pub const ARCHITECTURES: [&str; 4] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MPTForCausalLM",
    "MptForCausalLM",
];

/// Families of models, by how their tensors are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama and Mistral.
    Llama,
    /// MPT.
    Mpt,
}

/// A model in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// As the config names it.
    pub architecture: String,
    /// How its tensors are named.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Decoder layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// KV heads; divides `heads`.
    pub kv_heads: u64,
    /// Numbers per head.
    pub head_width: u64,
    /// Width of the MLP's middle.
    pub intermediate: u64,
    /// Rows of the embedding.
    pub vocab: u64,
    /// Longest sequence, prompt and output.
    pub context_max: u32,
    /// The head is the embedding.
    pub tied: bool,
    /// Attention's projections have biases.
    pub attention_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// Norms have biases.
    pub norm_bias: bool,
    /// Queries and keys are normed.
    pub qk_norm: bool,
}

impl Shape {
    /// The family as clients call it.
    pub fn model_type(&self) -> &'static str {
        match self.architecture.as_str() {
            "MistralForCausalLM" => "mistral",
            _ => match self.family {
                Family::Llama => "llama",
                Family::Mpt => "mpt",
            },
        }
    }

    /// Reads a `config.json`, by whatever name: the sizes, and how matrices are packed if they are.
    ///
    /// # Errors
    /// [`RegistryError::Broken`] names the file and the key; an unknown architecture comes with the known ones.
    pub fn read(files: &dyn Files, path: &str) -> Result<(Shape, Option<Packing>), RegistryError> {
        let bytes = files.read(path, CONFIG_BYTES_MAX)?;
        Self::parse(&bytes).map_err(|reason| files.broken(path, &reason))
    }

    fn parse(bytes: &[u8]) -> Result<(Shape, Option<Packing>), String> {
        let values: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|e| format!("is not a JSON object: {e}"))?;
        let packing = Config(&values)
            .get("quantization_config")
            .map(Packing::parse);
        let packing = packing.transpose()?;
        Ok((Shape::of(&values)?, packing))
    }

    /// The sizes that the values of a `config.json` tell.
    pub(super) fn of(values: &Map<String, Value>) -> Result<Shape, String> {
        Config(values).shape()
    }
}

struct Config<'a>(&'a Map<String, Value>);

impl Config<'_> {
    fn shape(&self) -> Result<Shape, String> {
        let architecture = match self
            .get("architectures")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
        {
            Some([Value::String(name)]) => name.clone(),
            _ => return Err("architectures must be a list of one name".into()),
        };
        let shape = match architecture.as_str() {
            "LlamaForCausalLM" => self.llama(architecture, false)?,
            "MistralForCausalLM" => self.llama(architecture, true)?,
            "MPTForCausalLM" | "MptForCausalLM" => self.mpt(architecture)?,
            other => {
                return Err(format!(
                    "architecture {other} is not supported; supported are {}",
                    ARCHITECTURES.join(", ")
                ));
            }
        };
        if shape.heads % shape.kv_heads != 0 {
            return Err(format!(
                "{} attention heads are not a multiple of {} KV heads",
                shape.heads, shape.kv_heads
            ));
        }
        Ok(shape)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn count_or(&self, key: &str, max: u64, default: Option<u64>) -> Result<u64, String> {
        match (self.get(key), default) {
            (Some(value), _) => value
                .as_u64()
                .filter(|count| (1..=max).contains(count))
                .ok_or_else(|| {
                    format!(
                        "{key} must be a whole number from 1 to {max}, got {}",
                        short(value)
                    )
                }),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(format!("{key} is missing")),
        }
    }

    fn count(&self, key: &str, max: u64) -> Result<u64, String> {
        self.count_or(key, max, None)
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, String> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| format!("{key} must be true or false, got {}", short(value)))
    }

    fn llama(&self, architecture: String, mistral: bool) -> Result<Shape, String> {
        let hidden = self.count("hidden_size", SIZE_MAX)?;
        let heads = self.count("num_attention_heads", SIZE_MAX)?;
        let head_width = match self.get("head_dim") {
            Some(_) => self.count("head_dim", SIZE_MAX)?,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(format!(
                    "hidden_size {hidden} is not a multiple of {heads} attention heads"
                ));
            }
        };
        // What transformers takes where the key is absent; null means as many as heads.
        let kv_default = if mistral && !self.0.contains_key("num_key_value_heads") {
            8
        } else {
            heads
        };
        Ok(Shape {
            architecture,
            family: Family::Llama,
            hidden,
            layers: self.count("num_hidden_layers", LAYERS_MAX)?,
            heads,
            kv_heads: self.count_or("num_key_value_heads", SIZE_MAX, Some(kv_default))?,
            head_width,
            intermediate: self.count("intermediate_size", SIZE_MAX)?,
            vocab: self.count("vocab_size", SIZE_MAX)?,
            context_max: self.count("max_position_embeddings", CONTEXT_MAX)? as u32,
            tied: self.flag("tie_word_embeddings", false)?,
            attention_bias: !mistral && self.flag("attention_bias", false)?,
            mlp_bias: !mistral && self.flag("mlp_bias", false)?,
            norm_bias: false,
            qk_norm: false,
        })
    }

    fn mpt(&self, architecture: String) -> Result<Shape, String> {
        let transformers = architecture == "MptForCausalLM";
        let hidden = self.count("d_model", SIZE_MAX)?;
        let heads = self.count("n_heads", SIZE_MAX)?;
        if hidden % heads != 0 {
            return Err(format!(
                "d_model {hidden} is not a multiple of n_heads {heads}"
            ));
        }
        let ratio = match self.get("expansion_ratio") {
            None => 4.0,
            Some(value) => value
                .as_f64()
                .filter(|ratio| (1e-3..=1e3).contains(ratio))
                .ok_or_else(|| {
                    format!(
                        "expansion_ratio must be a number from 0.001 to 1000, got {}",
                        short(value)
                    )
                })?,
        };
        let attention = self.get("attn_config").and_then(Value::as_object);
        let qk_norm = attention
            .and_then(|a| a.get("qk_ln"))
            .and_then(Value::as_bool)
            .unwrap_or(false);
        let bias = !transformers && !self.flag("no_bias", false)?;
        Ok(Shape {
            architecture,
            family: Family::Mpt,
            hidden,
            layers: self.count("n_layers", LAYERS_MAX)?,
            heads,
            kv_heads: heads,
            head_width: hidden / heads,
            intermediate: (ratio * hidden as f64) as u64,
            vocab: self.count("vocab_size", SIZE_MAX)?,
            context_max: self.count("max_seq_len", CONTEXT_MAX)? as u32,
            tied: self.flag("tie_word_embeddings", true)?,
            attention_bias: bias,
            mlp_bias: bias,
            norm_bias: bias,
            qk_norm,
        })
    }
}

/// A value's start, for a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(change: impl FnOnce(&mut Value)) -> Result<Shape, String> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96,
            "vocab_size": 100, "max_position_embeddings": 128
        });
        change(&mut config);
        Shape::parse(config.to_string().as_bytes()).map(|read| read.0)
    }

    #[test]
    fn a_llama_is_read_and_defaults_are_those_of_transformers() {
        let shape = parse(|_| ()).unwrap();
        assert_eq!(
            (
                shape.head_width,
                shape.kv_heads,
                shape.context_max,
                shape.tied
            ),
            (8, 4, 128, false)
        );
        assert_eq!(
            parse(|c| c["num_key_value_heads"] = Value::Null)
                .unwrap()
                .kv_heads,
            8
        );
        let mistral = parse(|c| {
            c["architectures"] = json!(["MistralForCausalLM"]);
            c["num_attention_heads"] = json!(16);
            c.as_object_mut().unwrap().remove("num_key_value_heads");
        });
        assert_eq!(mistral.unwrap().kv_heads, 8);
    }

    #[test]
    fn an_unknown_architecture_is_named_with_the_known_ones() {
        let message = parse(|c| c["architectures"] = json!(["GPT2LMHeadModel"])).unwrap_err();
        assert!(
            message.starts_with(
                "architecture GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"
            ),
            "{message}"
        );
    }

    #[test]
    fn hostile_numbers_are_named() {
        let message = |key: &str, value: Value| parse(|c| c[key] = value).unwrap_err();
        assert!(
            message("hidden_size", json!(-1)).starts_with("hidden_size must be a whole number")
        );
        assert!(
            message("vocab_size", json!(1u64 << 60))
                .starts_with("vocab_size must be a whole number")
        );
        assert!(message("num_hidden_layers", json!(0)).contains("got 0"));
        assert!(message("num_attention_heads", json!("eight")).contains("\"eight\""));
        assert!(message("num_attention_heads", json!(7)).contains("not a multiple of 7"));
        assert!(message("architectures", json!([])).contains("a list of one name"));
        assert!(message("quantization_config", json!({"bits": 4})).contains("quant_method"));
        assert!(
            Shape::parse(b"[1]")
                .unwrap_err()
                .contains("not a JSON object")
        );
        assert!(
            Shape::parse(b"{\"architectures\": [")
                .unwrap_err()
                .contains("not a JSON object")
        );
    }

    #[test]
    fn the_published_mpt_7b_config_is_read() {
        let config = json!({"architectures": ["MPTForCausalLM"], "d_model": 4096, "n_heads": 32, "n_layers": 32,
            "expansion_ratio": 4, "max_seq_len": 2048, "vocab_size": 50432, "no_bias": true,
            "attn_config": {"alibi": true, "qk_ln": false}});
        let (shape, _) = Shape::parse(config.to_string().as_bytes()).unwrap();
        assert_eq!(
            (
                shape.intermediate,
                shape.kv_heads,
                shape.tied,
                shape.mlp_bias
            ),
            (16384, 32, true, false)
        );
    }
}
