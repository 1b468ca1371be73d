use super::*;
use serde_json::{Value, json};

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "hidden_act": "silu"
    })
}

fn mpt() -> Value {
    json!({
        "architectures": ["MPTForCausalLM"], "d_model": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 100,
        "max_seq_len": 128, "no_bias": true, "attn_config": {"alibi": true}
    })
}

/// The config with one key replaced; `a.b` means `b` inside `a`.
fn with(mut config: Value, key: &str, value: Value) -> Value {
    let place = key
        .split('.')
        .fold(&mut config, |place, key| &mut place[key]);
    *place = value;
    config
}

fn read(config: &Value) -> Result<ModelSpec, SpecError> {
    ModelSpec::from_config(&config.to_string())
}

#[test]
fn a_llama_3_config_gives_its_scaled_frequencies() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    let config = with(
        with(llama(), "rope_scaling", scaling),
        "rope_theta",
        json!(500_000.0),
    );
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original_context: 8192.0,
    };
    let spec = read(&config).unwrap();
    assert_eq!(
        spec.positions,
        Positions::Rope {
            theta: 500_000.0,
            scaling: expected
        }
    );
    assert_eq!(
        (spec.head_width, spec.kv_heads, spec.tied, spec.window),
        (8, 4, false, None)
    );
}

#[test]
fn newer_files_name_rope_parameters_in_one_object() {
    let config = with(
        llama(),
        "rope_parameters",
        json!({"rope_theta": 5e5, "rope_type": "linear", "factor": 2}),
    );
    let expected = Positions::Rope {
        theta: 5e5,
        scaling: RopeScaling::Linear { factor: 2.0 },
    };
    assert_eq!(read(&config).unwrap().positions, expected);
}

#[test]
fn mistral_takes_its_window_and_null_means_none() {
    let mistral = with(llama(), "architectures", json!(["MistralForCausalLM"]));
    let window = |value: Value| {
        read(&with(mistral.clone(), "sliding_window", value))
            .unwrap()
            .window
    };
    assert_eq!(window(json!(64)), Some(64));
    assert_eq!(window(Value::Null), None);
    assert_eq!(read(&mistral).unwrap().window, Some(4096));
}

#[test]
fn mpt_reads_its_attention_config() {
    let config = with(
        mpt(),
        "attn_config",
        json!({"alibi": true, "alibi_bias_max": 16, "clip_qkv": 6, "qk_ln": true, "softmax_scale": 0.5}),
    );
    let config = with(
        with(config, "no_bias", json!(false)),
        "logit_scale",
        json!("inv_sqrt_d_model"),
    );
    let spec = read(&config).unwrap();
    assert_eq!(spec.positions, Positions::Alibi { bias_max: 16.0 });
    assert_eq!(
        (spec.clip_qkv, spec.qk_norm, spec.softmax_scale),
        (Some(6.0), true, 0.5)
    );
    assert_eq!(
        (spec.intermediate, spec.tied, spec.logit_scale),
        (256, true, Some(0.125))
    );
    assert_eq!(
        spec.bias,
        Biases {
            attention: true,
            mlp: true,
            norm: true
        }
    );
}

#[test]
fn transformers_class_of_mpt_has_no_biases_and_always_alibi() {
    let config = json!({"architectures": ["MptForCausalLM"], "d_model": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 100, "max_seq_len": 128});
    let spec = read(&config).unwrap();
    assert_eq!(
        (spec.bias, spec.positions),
        (Biases::default(), Positions::Alibi { bias_max: 8.0 })
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let refusals = [
        (
            with(llama(), "architectures", json!(["GPT2LMHeadModel"])),
            "architecture GPT2LMHeadModel is not supported",
        ),
        (
            with(llama(), "architectures", json!([])),
            "architectures is []; supported: a list of one name",
        ),
        (
            with(llama(), "architectures", Value::Null),
            "config.json has no architectures",
        ),
        (
            with(llama(), "hidden_size", Value::Null),
            "config.json has no hidden_size",
        ),
        (
            with(llama(), "hidden_act", json!("relu")),
            "hidden_act is \"relu\"; supported: silu",
        ),
        (
            with(
                llama(),
                "rope_scaling",
                json!({"type": "yarn", "factor": 2}),
            ),
            "rope_scaling.type is \"yarn\"; supported: default, linear or llama3",
        ),
        (
            with(llama(), "rope_scaling", json!({"rope_type": "linear"})),
            "config.json has no rope_scaling.factor",
        ),
        (
            with(
                llama(),
                "quantization_config",
                json!({"quant_method": "gptq"}),
            ),
            "config.json has no quantization_config.bits",
        ),
        (
            with(mpt(), "attn_config.alibi", json!(false)),
            "attn_config.alibi is false; supported: true",
        ),
        (
            with(
                mpt(),
                "attn_config.attn_type",
                json!("multiquery_attention"),
            ),
            "supported: multihead_attention",
        ),
        (
            with(mpt(), "attn_config.prefix_lm", json!(true)),
            "attn_config.prefix_lm is true; supported: false",
        ),
        (
            with(mpt(), "norm_type", json!("rmsnorm")),
            "norm_type is \"rmsnorm\"",
        ),
        (
            with(mpt(), "expansion_ratio", json!(1.01)),
            "expansion_ratio 1.01 of d_model 64 is not a usable width",
        ),
    ];
    for (config, expected) in refusals {
        let error = read(&config).expect_err(expected).to_string();
        assert!(
            error.contains(expected),
            "{error:?} does not contain {expected:?}"
        );
    }
}

#[test]
fn hostile_numbers_are_errors_and_never_panics() {
    let hostile = [
        json!(0),
        json!(-1),
        json!(1.5),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
        json!(-1e300),
        json!("8"),
        json!([]),
        json!({}),
        json!(true),
    ];
    for base in [
        llama(),
        with(llama(), "architectures", json!(["MistralForCausalLM"])),
        mpt(),
    ] {
        let keys: Vec<String> = base.as_object().unwrap().keys().cloned().collect();
        for key in &keys {
            for value in &hostile {
                let config = with(base.clone(), key, value.clone());
                let refused = read(&config).is_err();
                let may_pass = key == "rms_norm_eps" && value == &json!(0)
                    || key == "no_bias" && value == &json!(true);
                assert!(refused || may_pass, "{key} = {value} was taken");
            }
        }
    }
    for text in [
        "",
        "[]",
        "{",
        "null",
        "{\"architectures\": [\"LlamaForCausalLM\"]}",
        &"[".repeat(100_000),
    ] {
        assert!(ModelSpec::from_config(text).is_err());
    }
    assert!(
        read(&with(llama(), "num_key_value_heads", json!(3))).is_err(),
        "8 heads over 3 KV heads"
    );
    assert!(
        read(&with(llama(), "head_dim", json!(7))).is_err(),
        "an odd head width cannot rotate"
    );
}
