//! A header's words as the `config.json` that the model has in Hugging Face's layout.
//!
//! Whoever knows how to read a `config.json` so knows a GGUF file's sizes too, and both processes see one model. Owns the
//! refusal of what a header can ask for and a `config.json` of the supported families cannot.

use crate::error::Error;
use crate::header::Gguf;
use crate::value::{Array, Value};
use serde_json::{Map, json};

/// The architectures that are known, for errors.
const ARCHITECTURES: &str = "supported are llama (Mistral included) and mpt";
/// Sizes of anything, far above what any model has.
const COUNT_MAX: u64 = 1 << 40;
/// Keys of `llama` that change what the model computes in ways its `config.json` does not know.
const REFUSED: [&str; 6] = [
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
];

impl Gguf {
    /// The model's `config.json`: of class `LlamaForCausalLM`, `MistralForCausalLM` (with a sliding window) or
    /// `MPTForCausalLM`. Sizes are those that the metadata and the tensors name; whether they are possible is for the
    /// reader of a `config.json` to say.
    ///
    /// # Errors
    /// [`Error::Key`] and [`Error::Tensor`]: another architecture, a key that is missing, or a feature that is not served.
    pub fn config(&self) -> Result<serde_json::Value, Error> {
        let architecture = self.architecture()?;
        let keys = Keys {
            gguf: self,
            architecture,
        };
        match architecture {
            "llama" => keys.llama(),
            "mpt" => keys.mpt(),
            other => Err(Error::key(
                "general.architecture",
                format!("{other:?}"),
                ARCHITECTURES,
            )),
        }
        .map(serde_json::Value::Object)
    }

    /// Whether the head is the embedding.
    #[must_use]
    pub fn tied(&self) -> bool {
        self.tensor("output.weight").is_none()
    }
}

/// The keys of an architecture: `llama.block_count` and its like.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn llama(&self) -> Result<Map<String, serde_json::Value>, Error> {
        self.refuse_extras()?;
        let (hidden, heads) = (
            self.count("embedding_length")?,
            self.per_layer("attention.head_count")?,
        );
        let Some(heads) = heads else {
            return Err(self.missing("attention.head_count"));
        };
        let head_width = self.head_width(hidden, heads)?;
        let mut config = Map::new();
        let mut set = |key: &str, value: serde_json::Value| config.insert(key.to_owned(), value);
        let window = self
            .optional("attention.sliding_window")?
            .filter(|window| *window > 0);
        let class = match window {
            Some(_) => "MistralForCausalLM",
            None => "LlamaForCausalLM",
        };
        set("architectures", json!([class]));
        set("hidden_act", json!("silu"));
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(self.middle()?));
        set("num_hidden_layers", json!(self.count("block_count")?));
        set("num_attention_heads", json!(heads));
        let kv_heads = self.per_layer("attention.head_count_kv")?.unwrap_or(heads);
        set("num_key_value_heads", json!(kv_heads));
        set("head_dim", json!(head_width));
        set("vocab_size", json!(self.vocab()?));
        let context = self.count("context_length")?;
        set("max_position_embeddings", json!(context));
        let eps = self.real("attention.layer_norm_rms_epsilon")?;
        let eps = eps.ok_or_else(|| self.missing("attention.layer_norm_rms_epsilon"))?;
        set("rms_norm_eps", json!(eps));
        let theta = self.real("rope.freq_base")?.unwrap_or(10_000.0);
        set("rope_theta", json!(theta));
        set("rope_scaling", self.rope_scaling()?);
        if let Some(window) = window {
            set("sliding_window", json!(window));
        }
        set("attention_bias", json!(self.has("blk.0.attn_q.bias")));
        set("mlp_bias", json!(self.has("blk.0.ffn_down.bias")));
        set("tie_word_embeddings", json!(self.gguf.tied()));
        Ok(config)
    }

    fn mpt(&self) -> Result<Map<String, serde_json::Value>, Error> {
        if self.has("position_embd.weight") {
            return Err(Error::tensor(
                "position_embd.weight",
                "holds learned positions; an mpt model is served with ALiBi alone",
            ));
        }
        let hidden = self.count("embedding_length")?;
        let heads = self.count("attention.head_count")?;
        let bias_max = self.real("attention.max_alibi_bias")?.unwrap_or(0.0);
        let attention = json!({
            "alibi": bias_max > 0.0,
            "alibi_bias_max": (bias_max > 0.0).then_some(bias_max),
            "clip_qkv": self.real("attention.clamp_kqv")?.filter(|limit| *limit > 0.0),
            "qk_ln": self.has("blk.0.attn_q_norm.weight"),
        });
        let mut config = Map::new();
        let mut set = |key: &str, value: serde_json::Value| config.insert(key.to_owned(), value);
        set("architectures", json!(["MPTForCausalLM"]));
        set("d_model", json!(hidden));
        set("n_heads", json!(heads));
        set("n_layers", json!(self.count("block_count")?));
        let ratio = self.middle()? as f64 / hidden as f64;
        set("expansion_ratio", json!(ratio));
        set("max_seq_len", json!(self.count("context_length")?));
        set("vocab_size", json!(self.vocab()?));
        let eps = self.real("attention.layer_norm_epsilon")?;
        set("layer_norm_epsilon", json!(eps.unwrap_or(1e-5)));
        set("no_bias", json!(!self.has("blk.0.attn_qkv.bias")));
        set("tie_word_embeddings", json!(self.gguf.tied()));
        set("attn_config", attention);
        Ok(config)
    }

    /// Features of llama.cpp's `llama` that the family's config does not know.
    fn refuse_extras(&self) -> Result<(), Error> {
        let experts = self.optional("expert_count")?;
        if let Some(experts) = experts.filter(|experts| *experts > 0) {
            return Err(self.odd(
                "expert_count",
                experts,
                "mixtures of experts are not served",
            ));
        }
        for key in REFUSED {
            if let Some(number) = self.real(key)?.filter(|number| *number != 0.0) {
                return Err(self.odd(key, number, "it is not served"));
            }
        }
        Ok(())
    }

    fn head_width(&self, hidden: u64, heads: u64) -> Result<u64, Error> {
        let width = match self.optional("attention.key_length")? {
            Some(width) => width,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let wanted = format!("it should divide the embedding_length {hidden}");
                return Err(self.odd("attention.head_count", heads, &wanted));
            }
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            let found = self.optional(key)?.unwrap_or(width);
            if found != width {
                let wanted = format!("it should be the width of a head, {width}");
                return Err(self.odd(key, found, &wanted));
            }
        }
        Ok(width)
    }

    fn rope_scaling(&self) -> Result<serde_json::Value, Error> {
        const KEY: &str = "rope.scaling.type";
        // Old files have the factor alone.
        let old = self.real("rope.scale_linear")?;
        let factor = self.real("rope.scaling.factor")?.or(old);
        match self.gguf.text(&self.key(KEY))? {
            None if factor.is_none_or(|factor| factor == 0.0 || factor == 1.0) => {
                Ok(serde_json::Value::Null)
            }
            Some("none") => Ok(serde_json::Value::Null),
            None | Some("linear") => {
                let factor = factor.ok_or_else(|| self.missing("rope.scaling.factor"))?;
                Ok(json!({"rope_type": "linear", "factor": factor}))
            }
            Some(other) => {
                Err(self.odd(KEY, format!("{other:?}"), "supported are none and linear"))
            }
        }
    }

    /// Rows of the embedding. Its header says more than the vocabulary in the metadata: it may be filled up.
    fn vocab(&self) -> Result<u64, Error> {
        const NAME: &str = "token_embd.weight";
        match self.gguf.tensor(NAME).map(|tensor| &tensor.dims[..]) {
            Some([_, vocab]) => Ok(*vocab),
            Some(dims) => Err(Error::tensor(
                NAME,
                format!("has the dimensions {dims:?}; it should have two"),
            )),
            None => Err(Error::tensor(NAME, "is missing")),
        }
    }

    fn middle(&self) -> Result<u64, Error> {
        let middle = self.per_layer("feed_forward_length")?;
        middle.ok_or_else(|| self.missing("feed_forward_length"))
    }

    fn has(&self, tensor: &str) -> bool {
        self.gguf.tensor(tensor).is_some()
    }

    fn count(&self, key: &str) -> Result<u64, Error> {
        self.optional(key)?.ok_or_else(|| self.missing(key))
    }

    fn optional(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.gguf.count(&self.key(key))? {
            Some(count) if count > COUNT_MAX => Err(self.odd(key, count, "no model is so large")),
            count => Ok(count),
        }
    }

    /// A number that may differ by layer in some models, and in the supported ones does not.
    fn per_layer(&self, key: &str) -> Result<Option<u64>, Error> {
        let Some(Value::Array(array)) = self.gguf.get(&self.key(key)) else {
            return self.optional(key);
        };
        let odd = || self.odd(key, "an array", "it should be one number for all layers");
        let Array::Numbers(numbers) = array else {
            return Err(odd());
        };
        let mut all = numbers.iter().map(|number| number.as_u64());
        match all.next() {
            Some(Some(first)) if all.all(|other| other == Some(first)) => Ok(Some(first)),
            _ => Err(odd()),
        }
    }

    fn real(&self, key: &str) -> Result<Option<f64>, Error> {
        let key = self.key(key);
        match self.gguf.real(&key)? {
            Some(number) if !number.is_finite() => Err(Error::key(
                &key,
                number.to_string(),
                "it should be a finite number",
            )),
            number => Ok(number),
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn missing(&self, key: &str) -> Error {
        let wanted = format!("a {} model needs it", self.architecture);
        Error::key(&self.key(key), "missing", wanted)
    }

    fn odd(&self, key: &str, found: impl ToString, wanted: &str) -> Error {
        Error::key(&self.key(key), found.to_string(), wanted)
    }
}
