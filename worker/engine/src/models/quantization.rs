//! What a `config.json` says about weights that are quantised already: GPTQ and AWQ, in the forms that are read.

use super::config::Config;
use super::spec::SpecError;
use crate::weights::words::{Method, WordsFormat};

/// Greatest group that is believed.
const GROUP_MAX: i64 = 1 << 20;

/// Reads `quantization_config`; none where the weights are floats.
///
/// # Errors
/// [`SpecError`]: another quantiser, or a form of these two that is not read.
pub fn format(config: &Config) -> Result<Option<WordsFormat>, SpecError> {
    let Some(config) = config.object("quantization_config")? else {
        return Ok(None);
    };
    let format = match config.text("quant_method")? {
        Some("gptq") => gptq(&config),
        Some("awq") => awq(&config),
        Some(other) => Err(config.odd("quant_method", &other.into(), "gptq and awq")),
        None => Err(config.missing("quant_method")),
    };
    format.map(Some)
}

fn gptq(config: &Config) -> Result<WordsFormat, SpecError> {
    let bits = config.count("bits", 1..=32)?;
    if !matches!(bits, 4 | 8) {
        return Err(config.odd("bits", &bits.into(), "4 or 8"));
    }
    config.one_of("checkpoint_format", &["gptq", "gptq_v2"])?;
    if let Some(value) = config.get("dynamic")
        && value.as_object().is_none_or(|modules| !modules.is_empty())
    {
        return Err(config.odd("dynamic", value, "one form for all matrices"));
    }
    Ok(WordsFormat {
        method: Method::Gptq {
            zero_add: u8::from(config.text("checkpoint_format")? != Some("gptq_v2")),
        },
        bits: bits as u32,
        group: group(config)?,
        symmetric: config.flag("sym", true)?,
        by_index: config.flag("desc_act", false)?,
    })
}

fn awq(config: &Config) -> Result<WordsFormat, SpecError> {
    config.count("bits", 4..=4)?;
    config.one_of("version", &["gemm", "GEMM"])?;
    if !config.flag("zero_point", true)? {
        return Err(config.odd("zero_point", &false.into(), "true"));
    }
    Ok(WordsFormat {
        method: Method::Awq,
        bits: 4,
        group: group(config)?,
        symmetric: false,
        by_index: false,
    })
}

/// Columns of a group; none where -1 says that a row is one.
fn group(config: &Config) -> Result<Option<usize>, SpecError> {
    const KEY: &str = "group_size";
    let value = config.get(KEY).ok_or_else(|| config.missing(KEY))?;
    match value.as_i64() {
        Some(-1) => Ok(None),
        Some(group @ 1..=GROUP_MAX) => Ok(Some(group as usize)),
        _ => Err(config.odd(KEY, value, "-1, or a number of columns")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(quantization: Value) -> Result<Option<WordsFormat>, String> {
        let config = json!({"quantization_config": quantization}).to_string();
        let config = Config::parse(&config).expect("an object");
        format(&config).map_err(|error| error.to_string())
    }

    #[test]
    fn gptq_and_awq_are_read_and_floats_are_none() {
        assert_eq!(read(Value::Null), Ok(None));
        let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": true, "sym": false});
        let expected = WordsFormat {
            method: Method::Gptq { zero_add: 1 },
            bits: 4,
            group: Some(128),
            symmetric: false,
            by_index: true,
        };
        assert_eq!(read(gptq), Ok(Some(expected)));
        let second = json!({"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"});
        let second = read(second).expect("read").expect("quantised");
        assert_eq!(
            (second.method, second.group, second.symmetric),
            (Method::Gptq { zero_add: 0 }, None, true)
        );
        let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": true});
        let awq = read(awq).expect("read").expect("quantised");
        assert_eq!((awq.method, awq.group), (Method::Awq, Some(64)));
    }

    #[test]
    fn what_is_not_read_is_named_with_what_would_do() {
        for (config, message) in [
            (
                json!({"quant_method": "bitsandbytes"}),
                "quantization_config.quant_method is \"bitsandbytes\"; supported: gptq and awq",
            ),
            (
                json!({"quant_method": "gptq", "bits": 3, "group_size": 128}),
                "quantization_config.bits is 3; supported: 4 or 8",
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 0}),
                "quantization_config.group_size is 0; supported: -1, or a number of columns",
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}),
                "quantization_config.checkpoint_format is \"marlin\"; supported: gptq or gptq_v2",
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*": {}}}),
                "quantization_config.dynamic is {\"-:.*\":{}}; supported: one form for all matrices",
            ),
            (
                json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}),
                "quantization_config.version is \"gemv\"; supported: gemm or GEMM",
            ),
            (
                json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": false}),
                "quantization_config.zero_point is false; supported: true",
            ),
        ] {
            assert_eq!(read(config), Err(format!("config.json: {message}")));
        }
    }
}
