//! Headers: what is read of good ones, in which words odd ones are refused, and that none can do harm.

use gguf::write::{Writer, encode};
use gguf::{Error, Gguf, TensorType, Texts};
use proptest::prelude::*;

fn read(writer: &Writer) -> Result<Gguf, Error> {
    read_bytes(&writer.to_bytes())
}

fn read_bytes(bytes: &[u8]) -> Result<Gguf, Error> {
    Gguf::read(bytes, bytes.len() as u64)
}

fn refused(writer: &Writer) -> String {
    read(writer).unwrap_err().to_string()
}

/// A small model with a value of each kind in its metadata.
fn small() -> Writer {
    let mut writer = Writer::default();
    for (key, number) in [
        ("block_count", 1u32),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        writer.set(&format!("llama.{key}"), number);
    }
    writer.set("general.architecture", "llama");
    writer.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let tokens = ["<s>", "", "\u{2581}a"].into_iter().collect::<Texts>();
    writer.set("tokenizer.ggml.tokens", tokens);
    writer.set("tokenizer.ggml.scores", &[0.0f32, -1.0, -2.5][..]);
    writer.set("tokenizer.ggml.token_type", &[3, 1, -1][..]);
    writer.set("tokenizer.ggml.add_bos_token", true);
    writer.set("large", 1u64 << 40);
    let numbers: Vec<f32> = (0..64 * 32).map(|i| i as f32).collect();
    let q8_0 = encode(TensorType::Q8_0, &numbers);
    writer.tensor("token_embd.weight", &[32, 64], TensorType::Q8_0, q8_0);
    let f32s = encode(TensorType::F32, &numbers[..7]);
    writer.tensor("output_norm.weight", &[7], TensorType::F32, f32s);
    writer.tensor("rest", &[32, 2], TensorType::Q4_0, vec![0; 36]);
    writer
}

#[test]
fn a_header_is_read_in_both_versions_and_says_where_each_tensor_lies() {
    for version in [2, 3] {
        let mut writer = small();
        writer.version = version;
        let bytes = writer.to_bytes();
        let gguf = read_bytes(&bytes).unwrap();
        assert_eq!(gguf.architecture().unwrap(), "llama");
        assert_eq!(gguf.count("llama.block_count").unwrap(), Some(1));
        assert_eq!(gguf.count("large").unwrap(), Some(1 << 40));
        assert_eq!(
            gguf.flag("tokenizer.ggml.add_bos_token").unwrap(),
            Some(true)
        );
        assert_eq!(gguf.real("absent").unwrap(), None);
        let tokens = gguf
            .get("tokenizer.ggml.tokens")
            .unwrap()
            .as_texts()
            .unwrap();
        assert_eq!(tokens.iter().collect::<Vec<_>>(), ["<s>", "", "\u{2581}a"]);
        let numbers = |key| gguf.get(key).unwrap().as_numbers().unwrap();
        let scores = numbers("tokenizer.ggml.scores").iter();
        assert_eq!(scores.map(|x| x.as_f64().unwrap()).sum::<f64>(), -3.5);
        let kinds = numbers("tokenizer.ggml.token_type").iter();
        assert_eq!(
            kinds.map(|x| x.as_u64()).collect::<Vec<_>>(),
            [Some(3), Some(1), None]
        );

        let matrix = gguf.tensor("token_embd.weight").unwrap();
        assert_eq!(
            (matrix.shape(), matrix.bytes()),
            (vec![64, 32], Some(64 * 34))
        );
        let norm = gguf.tensor("output_norm.weight").unwrap();
        let start = (gguf.data_start() + norm.offset) as usize;
        let expected: Vec<u8> = (0..7).flat_map(|i| (i as f32).to_le_bytes()).collect();
        assert_eq!(bytes[start..start + 28], expected);
        assert!(gguf.data_start().is_multiple_of(32));
        assert_eq!(gguf.tensors().count(), 3);
        // Nothing behind the header is asked for.
        Gguf::read(&bytes[..gguf.data_start() as usize], bytes.len() as u64).unwrap();
    }
}

#[test]
fn a_header_that_has_not_arrived_whole_is_told_from_a_bad_one() {
    let bytes = small().to_bytes();
    let header = Gguf::read(&bytes[..], bytes.len() as u64)
        .unwrap()
        .data_start() as usize;
    for len in 0..header - 32 {
        let error = Gguf::read(&bytes[..len], bytes.len() as u64).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{len}: {error}");
    }
}

#[test]
fn the_alignment_of_the_metadata_counts() {
    let mut writer = small();
    writer.set("general.alignment", 256u32);
    let gguf = read(&writer).unwrap();
    assert!(gguf.data_start().is_multiple_of(256));
    assert!(
        gguf.tensors()
            .all(|tensor| tensor.offset.is_multiple_of(256))
    );
    writer.set("general.alignment", 48u32);
    assert_eq!(
        refused(&writer),
        "its metadata: general.alignment is 48; it should be a power of two, at most 1048576"
    );
}

#[test]
fn what_is_not_read_is_refused_in_words() {
    let refused_bytes = |bytes: &[u8]| read_bytes(bytes).unwrap_err().to_string();
    assert_eq!(refused_bytes(b"GGML1234"), "it is not a GGUF file");
    let mut bytes = small().to_bytes();
    bytes[4] = 1;
    assert_eq!(
        refused_bytes(&bytes),
        "it is a GGUF file of version 1; supported are 2 and 3"
    );
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(refused_bytes(&bytes).contains("big-endian"));

    let mut writer = small();
    writer.set("split.count", 3u32);
    assert!(refused(&writer).contains("join its parts with llama-gguf-split --merge"));

    let mut writer = small();
    writer.tensor("rest", &[1], TensorType::F32, vec![0; 4]);
    assert_eq!(refused(&writer), "tensor rest is there twice");

    let mut writer = small();
    writer.tensor("odd", &[31, 2], TensorType::Q4_0, vec![0; 36]);
    assert_eq!(
        refused(&writer),
        "tensor odd is Q4_0 with rows of 31, which do not fill whole blocks"
    );

    let mut writer = small();
    writer.tensor("short", &[4096], TensorType::F32, vec![0; 8]);
    assert!(refused(&writer).starts_with("tensor short has 16384 bytes at "));

    let mut writer = small();
    writer.tensor("vast", &[1 << 40, 1 << 40], TensorType::F32, vec![]);
    assert!(refused(&writer).starts_with("tensor vast has impossible dimensions"));

    let mut writer = small();
    writer.tensor("five", &[1; 5], TensorType::F32, vec![0; 4]);
    assert_eq!(
        refused(&writer),
        "tensor five has 5 dimensions; there may be 1 to 4"
    );
}

#[test]
fn a_type_that_is_not_supported_is_named() {
    let mut writer = small();
    writer.tensor("x", &[256], TensorType::Other(13), vec![0; 176]);
    writer.tensor("y", &[256], TensorType::Other(77), vec![0; 1]);
    let gguf = read(&writer).unwrap();
    let message = |name| {
        gguf.tensor(name)
            .unwrap()
            .check_supported()
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        message("x"),
        "tensor x is Q5_K; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K"
    );
    assert!(message("y").starts_with("tensor y is of ggml's type 77; "));
    gguf.tensor("rest").unwrap().check_supported().unwrap();
}

#[test]
fn a_kind_of_value_that_was_not_expected_is_shown() {
    let mut writer = small();
    writer.set("llama.block_count", "many");
    let gguf = read(&writer).unwrap();
    assert_eq!(
        gguf.count("llama.block_count").unwrap_err().to_string(),
        "its metadata: llama.block_count is \"many\"; it should be a whole number, not negative"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Lengths, counts, types and offsets are what changes hit most: headers are made of little else.
    #[test]
    fn a_header_with_changed_bytes_is_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = small().to_bytes();
        let header = read_bytes(&bytes).unwrap().data_start() as usize;
        for (place, value) in changes {
            bytes[place.index(header)] = value;
        }
        if let Ok(gguf) = read_bytes(&bytes) {
            for tensor in gguf.tensors() {
                let end = gguf.data_start() + tensor.offset + tensor.bytes().unwrap_or(0);
                prop_assert!(end <= bytes.len() as u64);
            }
            let _ = gguf.config();
        }
        let _ = read_bytes(&bytes[..cut.index(bytes.len())]);
    }

    #[test]
    fn any_bytes_behind_the_magic_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_bytes(&[b"GGUF\x03\0\0\0", &bytes[..]].concat());
    }
}
