//! Hostile and broken checkpoints: each is an error that names the file or the tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::safetensors::{INDEX, SINGLE};
use super::*;
use crate::registry::files::Folder;

/// A copy of a tiny model's folder that tests may break.
struct Checkpoint(tempfile::TempDir);

impl Checkpoint {
    fn tiny_llama() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-llama");
        for name in ["config.json", SINGLE] {
            fs::copy(model.join(name), folder.path().join(name)).unwrap();
        }
        Checkpoint(folder)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join(SINGLE)
    }

    fn change(&self, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> &Self {
        let bytes = change(fs::read(self.file()).unwrap());
        fs::write(self.file(), bytes).unwrap();
        self
    }

    /// Replaces words in the header by others of the same length.
    fn header(&self, from: &str, to: &str) -> &Self {
        assert_eq!(from.len(), to.len());
        self.change(|mut bytes| {
            let at = bytes
                .windows(from.len())
                .position(|window| window == from.as_bytes())
                .expect("the words are there");
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            bytes
        })
    }

    fn read(&self) -> Result<Vec<WeightTensor>, String> {
        let files = Folder::open(self.0.path()).unwrap();
        let (shape, packing) = Shape::read(&files, "config.json").map_err(|e| e.to_string())?;
        let read = read(&files, "", &shape, packing.as_ref()).map_err(|e| e.to_string())?;
        Ok(read.1)
    }

    fn message(&self) -> String {
        self.read().unwrap_err()
    }
}

#[test]
fn a_truncated_file_is_noticed_from_its_header() {
    let checkpoint = Checkpoint::tiny_llama();
    let message = checkpoint
        .change(|bytes| bytes[..bytes.len() - 1].to_vec())
        .message();
    assert!(
        message.contains("model.safetensors: is corrupt or cut short: tensor"),
        "{message}"
    );
    let message = checkpoint.change(|bytes| bytes[..500].to_vec()).message();
    assert!(message.contains("its header claims"), "{message}");
    let message = checkpoint.change(|bytes| bytes[..5].to_vec()).message();
    assert!(
        message.contains("5 bytes cannot hold a header"),
        "{message}"
    );
}

#[test]
fn a_lying_header_length_allocates_nothing() {
    let message = Checkpoint::tiny_llama()
        .change(|mut bytes| {
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            bytes
        })
        .message();
    assert!(
        message.contains("its header claims 18446744073709551615 bytes"),
        "{message}"
    );
}

#[test]
fn garbage_in_the_header_is_corrupt() {
    let message = Checkpoint::tiny_llama()
        .change(|mut bytes| {
            bytes[8..20].fill(b'x');
            bytes
        })
        .message();
    assert!(message.contains("its header is not JSON"), "{message}");
}

#[test]
fn a_renamed_tensor_is_missing_and_an_odd_shape_is_shown() {
    let message = Checkpoint::tiny_llama()
        .header("layers.2.self_attn.k_proj", "layers.2.self_attn.x_proj")
        .message();
    assert!(
        message.contains("no tensor model.layers.2.self_attn.k_proj.weight [64, 128]"),
        "{message}"
    );
    let message = Checkpoint::tiny_llama()
        .header("[64,128]", "[128,64]")
        .message();
    assert!(
        message.contains("has the shape [128, 64]; config.json asks for [64, 128]"),
        "{message}"
    );
    let message = Checkpoint::tiny_llama()
        .header("[64,128]", "[64,129]")
        .message();
    assert!(message.contains("does not fill bytes"), "{message}");
}

#[test]
fn a_dtype_that_cannot_be_served_is_named() {
    let message = Checkpoint::tiny_llama()
        .header("\"BF16\"", "\"I16\" ")
        .message();
    assert!(
        message.contains("has the dtype I16; supported are BF16, F16 and F32"),
        "{message}"
    );
}

#[test]
fn pickled_weights_must_be_logged_as_safetensors() {
    let checkpoint = Checkpoint::tiny_llama();
    fs::rename(
        checkpoint.file(),
        checkpoint.0.path().join("pytorch_model.bin"),
    )
    .unwrap();
    let message = checkpoint.message();
    assert!(
        message.contains("log the model again with safetensors"),
        "{message}"
    );
    fs::remove_file(checkpoint.0.path().join("pytorch_model.bin")).unwrap();
    assert!(
        checkpoint
            .message()
            .contains("neither model.safetensors nor model.safetensors.index.json")
    );
}

/// The tiny llama as two files with an index.
fn sharded() -> Checkpoint {
    let checkpoint = Checkpoint::tiny_llama();
    let whole = checkpoint.read().unwrap();
    let map: BTreeMap<String, &str> = whole
        .iter()
        .map(|tensor| {
            (
                tensor.name.clone(),
                if tensor.name.contains("layers.3") {
                    "b.safetensors"
                } else {
                    "a.safetensors"
                },
            )
        })
        .collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(checkpoint.0.path().join(INDEX), index.to_string()).unwrap();
    // Both files hold everything: the index decides.
    fs::copy(checkpoint.file(), checkpoint.0.path().join("a.safetensors")).unwrap();
    fs::rename(checkpoint.file(), checkpoint.0.path().join("b.safetensors")).unwrap();
    checkpoint
}

#[test]
fn shards_are_read_through_their_index() {
    assert_eq!(
        sharded().read().unwrap(),
        Checkpoint::tiny_llama().read().unwrap()
    );
}

#[test]
fn a_truncated_or_missing_shard_is_named() {
    let checkpoint = sharded();
    let shard = checkpoint.0.path().join("b.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let message = checkpoint.message();
    assert!(
        message.contains("b.safetensors: is corrupt or cut short"),
        "{message}"
    );
    fs::remove_file(&shard).unwrap();
    assert!(checkpoint.message().contains("b.safetensors: No such file"));
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() {
    let checkpoint = sharded();
    for path in ["../b.safetensors", "/etc/passwd", "", "x/y"] {
        let index = serde_json::json!({ "weight_map": { "t": path } });
        fs::write(checkpoint.0.path().join(INDEX), index.to_string()).unwrap();
        assert!(
            checkpoint.message().contains("which is not beside it"),
            "{path}"
        );
    }
    fs::write(checkpoint.0.path().join(INDEX), "{\"weight_map\": 7}").unwrap();
    assert!(checkpoint.message().contains("is not an index"));
}

/// A checkpoint of the tiny llama's sizes whose layers' matrices are packed as GPTQ does, in groups of `group`.
struct Packed {
    config: serde_json::Value,
    tensors: BTreeMap<String, (&'static str, Vec<u64>)>,
}

impl Packed {
    fn gptq(bits: u64, group: u64) -> Packed {
        let checkpoint = Checkpoint::tiny_llama();
        let mut tensors = BTreeMap::new();
        for tensor in checkpoint.read().unwrap() {
            let (name, dims) = (tensor.name, tensor.dims);
            let packed = dims.len() == 2 && tensor.slice != Slice::Vocabulary;
            let Some(base) = name.strip_suffix(".weight").filter(|_| packed) else {
                tensors.insert(name, ("F16", dims));
                continue;
            };
            let [n, k] = dims[..] else { panic!("a matrix") };
            let groups = k.div_ceil(group);
            for (part, dtype, dims) in [
                ("qweight", "I32", vec![k * bits / 32, n]),
                ("qzeros", "I32", vec![groups, n * bits / 32]),
                ("scales", "F16", vec![groups, n]),
                ("g_idx", "I32", vec![k]),
            ] {
                tensors.insert(format!("{base}.{part}"), (dtype, dims));
            }
        }
        let config = fs::read(checkpoint.0.path().join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config["quantization_config"] = serde_json::json!(
            {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": true, "desc_act": false}
        );
        Packed { config, tensors }
    }

    fn write(&self) -> Checkpoint {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, (dtype, dims)) in &self.tensors {
            let width = if *dtype == "I32" { 4 } else { 2 };
            let next = end + width * dims.iter().product::<u64>();
            let value =
                serde_json::json!({"dtype": dtype, "shape": dims, "data_offsets": [end, next]});
            header.insert(name.clone(), value);
            end = next;
        }
        let header = serde_json::Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + end as usize, 0);
        let checkpoint = Checkpoint::tiny_llama();
        fs::write(checkpoint.file(), bytes).unwrap();
        let config = self.config.to_string();
        fs::write(checkpoint.0.path().join("config.json"), config).unwrap();
        checkpoint
    }
}

#[test]
fn packed_matrices_have_the_form_of_their_config_and_the_ends_are_floats() {
    for bits in [4, 8] {
        let packed = Packed::gptq(bits, 64);
        let tensors = packed.write().read().unwrap();
        for tensor in &tensors {
            let kept = match tensor.form {
                Form::Grouped(form) => Some((form.bits, form.group)),
                _ => None,
            };
            let layers = tensor.dims.len() == 2 && !tensor.is_end();
            assert_eq!(kept, layers.then_some((bits, 64)), "{}", tensor.name);
        }
        // A config alone tells the same.
        let checkpoint = packed.write();
        let files = Folder::open(checkpoint.0.path()).unwrap();
        let (shape, packing) = Shape::read(&files, "config.json").unwrap();
        assert_eq!(of_shape(&shape, packing.as_ref()), tensors);
    }
}

#[test]
fn a_packed_matrix_whose_parts_do_not_fit_is_named() {
    let name = "model.layers.1.mlp.down_proj";
    let mut packed = Packed::gptq(4, 64);
    packed.tensors.remove(&format!("{name}.scales"));
    let message = packed.write().message();
    assert!(
        message.contains(&format!("has no tensor {name}.scales [")),
        "{message}"
    );
    let mut packed = Packed::gptq(4, 64);
    packed.config["quantization_config"]["group_size"] = 32.into();
    let message = packed.write().message();
    assert!(
        message.contains(".qzeros is I32 [") && message.contains("config.json asks for"),
        "{message}"
    );
    let mut packed = Packed::gptq(4, 64);
    packed.config["quantization_config"]["quant_method"] = "quip".into();
    let message = packed.write().message();
    assert!(message.contains("'quip' is not supported"), "{message}");
}

#[test]
fn matrices_that_were_left_out_of_packing_are_floats_with_what_they_are_stacked_with() {
    let mut packed = Packed::gptq(4, 64);
    let name = "model.layers.0.self_attn.v_proj";
    for part in ["qweight", "qzeros", "scales", "g_idx"] {
        packed.tensors.remove(&format!("{name}.{part}"));
    }
    packed
        .tensors
        .insert(format!("{name}.weight"), ("F16", vec![64, 128]));
    let tensors = packed.write().read().unwrap();
    let form = |end: &str| {
        let of = |tensor: &&WeightTensor| tensor.name.ends_with(end);
        tensors.iter().find(of).unwrap().form
    };
    for part in ["q", "k", "v"] {
        let end = format!("layers.0.self_attn.{part}_proj.weight");
        assert_eq!(form(&end), Form::Unpacked);
    }
    assert!(matches!(
        form("layers.1.self_attn.v_proj.weight"),
        Form::Grouped(_)
    ));
}
