//! Checkpoints of GPTQ and AWQ: what `quantization_config` says, and which tensors then stand for a matrix.
//!
//! Reads sizes alone. A matrix `[n, k]` lies in 32-bit words: `qweight`, `qzeros` and `scales` instead of `weight`.

use serde_json::{Map, Value};

use super::super::form::{Form, GROUP, Grouped, Offset};
use super::safetensors::Headers;

/// Most columns of a group that are believed.
const GROUP_SIZE_MAX: i64 = 1 << 20;

/// Who packed a checkpoint's matrices, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    method: Method,
    bits: u64,
    /// Columns of a group; none for the whole row.
    group: Option<u64>,
    /// Zero points are the middle.
    symmetric: bool,
    /// Columns are out of order.
    shuffled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    /// Words go down the columns.
    Gptq,
    /// Words go along the rows of the transposed matrix.
    Awq,
}

impl Packing {
    /// Reads the value of `quantization_config`.
    ///
    /// # Errors
    /// Names the key, its value and what is supported.
    pub(in super::super) fn parse(value: &Value) -> Result<Packing, String> {
        const KEY: &str = "quantization_config";
        let Some(config) = value.as_object() else {
            return Err(format!("{KEY} must be an object"));
        };
        let method = match text(config, "quant_method") {
            "gptq" => Method::Gptq,
            "awq" => Method::Awq,
            other => {
                return Err(format!(
                    "{KEY}.quant_method '{other}' is not supported; supported are gptq and awq, GGUF files, and bf16, f16 \
                     or f32 weights"
                ));
            }
        };
        let bits = match (method, config.get("bits").and_then(Value::as_u64)) {
            (_, Some(4)) => 4,
            (Method::Gptq, Some(8)) => 8,
            (_, bits) => {
                let supported = match method {
                    Method::Gptq => "4 and 8",
                    Method::Awq => "4",
                };
                let bits = bits.map_or("missing".to_owned(), |bits| bits.to_string());
                return Err(format!(
                    "{KEY}.bits is {bits}; supported for {} are {supported}",
                    text(config, "quant_method")
                ));
            }
        };
        if method == Method::Awq && !matches!(text(config, "version"), "" | "gemm" | "GEMM") {
            return Err(format!(
                "{KEY}.version '{}' is not supported; supported is gemm",
                text(config, "version")
            ));
        }
        let group = match config.get("group_size").and_then(Value::as_i64) {
            Some(-1) => None,
            Some(group @ 1..=GROUP_SIZE_MAX) => Some(group as u64),
            _ => {
                return Err(format!(
                    "{KEY}.group_size must be -1 or a number of columns"
                ));
            }
        };
        let flag = |key: &str, default| {
            let found = config.get(key).and_then(Value::as_bool);
            found.unwrap_or(default)
        };
        if method == Method::Gptq {
            let format = text(config, "checkpoint_format");
            if !matches!(format, "" | "gptq" | "gptq_v2") {
                return Err(format!(
                    "{KEY}.checkpoint_format '{format}' is not supported; supported are gptq and gptq_v2"
                ));
            }
            let dynamic = config.get("dynamic");
            if dynamic.is_some_and(|all| all.as_object().is_none_or(|all| !all.is_empty())) {
                return Err(format!(
                    "{KEY}.dynamic is not supported; supported is one form for all matrices"
                ));
            }
        } else if !flag("zero_point", true) {
            return Err(format!("{KEY}.zero_point must be true"));
        }
        Ok(Packing {
            method,
            bits,
            group,
            symmetric: flag("sym", true),
            shuffled: method == Method::Gptq && flag("desc_act", false),
        })
    }

    /// The form in which workers keep its matrices.
    pub(super) fn form(&self) -> Form {
        let group = match self.group {
            None => GROUP,
            Some(group @ (32 | 64 | GROUP)) => group,
            Some(group) if group.is_multiple_of(GROUP) => GROUP,
            Some(_) => return Form::Unpacked,
        };
        let offset = match (self.bits, self.symmetric) {
            _ if self.shuffled => return Form::Unpacked,
            (4, _) => Offset::Zeros,
            (_, true) => Offset::Middle,
            (_, false) => return Form::Unpacked,
        };
        Form::Grouped(Grouped {
            bits: self.bits,
            group,
            offset,
        })
    }

    /// The form of the matrix `NAME.weight [n, k]`, if it is packed; checks the tensors that stand for it.
    ///
    /// # Errors
    /// Names the tensor.
    pub(super) fn find(
        &self,
        name: &str,
        dims: &[u64],
        found: &Headers,
    ) -> Result<Option<Form>, String> {
        let (Some(base), &[n, k]) = (name.strip_suffix(".weight"), dims) else {
            return Ok(None);
        };
        if !found.contains_key(&format!("{base}.qweight")) {
            return Ok(None);
        }
        let per_word = 32 / self.bits;
        // Words hold rows of zero points, and columns of GPTQ's numbers.
        let columns = self.method == Method::Gptq && !k.is_multiple_of(per_word);
        if !n.is_multiple_of(per_word) || columns {
            return Err(format!(
                "{base}.qweight stands for [{n}, {k}] numbers, of which {per_word} make a word: none may be broken"
            ));
        }
        let groups = self.group.map_or(1, |group| k.div_ceil(group));
        let words = match self.method {
            Method::Gptq => [k.div_ceil(per_word), n],
            Method::Awq => [k, n.div_ceil(per_word)],
        };
        let parts = [
            ("qweight", words, &["I32", "U32"][..]),
            ("qzeros", [groups, n.div_ceil(per_word)], &["I32", "U32"]),
            ("scales", [groups, n], &["F16"]),
        ];
        for (part, dims, dtypes) in parts {
            let name = format!("{base}.{part}");
            let Some(header) = found.get(&name) else {
                return Err(format!("the checkpoint has no tensor {name} {dims:?}"));
            };
            if header.shape != dims || !dtypes.contains(&header.dtype.as_str()) {
                return Err(format!(
                    "tensor {name} is {} {:?}; config.json asks for {} {dims:?}",
                    header.dtype,
                    header.shape,
                    dtypes.join(" or ")
                ));
            }
        }
        Ok(Some(self.form()))
    }
}

fn text<'a>(config: &'a Map<String, Value>, key: &str) -> &'a str {
    config.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn form(config: Value) -> Form {
        Packing::parse(&config).unwrap().form()
    }

    fn grouped(bits: u64, group: u64, offset: Offset) -> Form {
        Form::Grouped(Grouped {
            bits,
            group,
            offset,
        })
    }

    #[test]
    fn forms_of_published_settings_are_kept_and_others_become_floats() {
        let gptq = |bits: u64, group: i64, sym: bool, desc_act: bool| {
            form(
                json!({"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act}),
            )
        };
        assert_eq!(gptq(4, 128, true, false), grouped(4, 128, Offset::Zeros));
        assert_eq!(gptq(4, 32, false, false), grouped(4, 32, Offset::Zeros));
        assert_eq!(gptq(4, -1, false, false), grouped(4, 128, Offset::Zeros));
        assert_eq!(gptq(4, 1024, false, false), grouped(4, 128, Offset::Zeros));
        assert_eq!(gptq(8, 64, true, false), grouped(8, 64, Offset::Middle));
        for float in [
            gptq(8, 128, false, false),
            gptq(4, 128, true, true),
            gptq(4, 48, true, false),
        ] {
            assert_eq!(float, Form::Unpacked);
        }
        let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": true});
        assert_eq!(form(awq), grouped(4, 64, Offset::Zeros));
    }

    #[test]
    fn what_is_not_supported_is_named_with_what_is() {
        let message = |config: Value| Packing::parse(&config).unwrap_err();
        assert!(message(json!(4)).contains("must be an object"));
        assert!(
            message(json!({"quant_method": "bitsandbytes"}))
                .contains("'bitsandbytes' is not supported; supported are gptq and awq")
        );
        let bits = |method: &str, bits: u64| {
            message(json!({"quant_method": method, "bits": bits, "group_size": 128}))
        };
        assert!(bits("gptq", 3).contains("bits is 3; supported for gptq are 4 and 8"));
        assert!(bits("awq", 8).contains("bits is 8; supported for awq are 4"));
        assert!(
            message(
                json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"})
            )
            .contains("'gemv' is not supported; supported is gemm")
        );
        for group in [json!(0), json!(-2), json!("x"), Value::Null] {
            let config = json!({"quant_method": "gptq", "bits": 4, "group_size": group});
            assert!(message(config).contains("group_size must be"));
        }
    }
}
