//! safetensors headers: which tensors a folder has, held against what the model needs. No weight is read.
//!
//! Owns the bounded reader, the tensors' names by family and how ranks cut each. A file shorter than its header says,
//! a missing tensor and an odd shape are found here, before a worker is asked to load anything.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::Value;

use super::RegistryError;
use super::files::{Files, Opened, within};
use super::shape::{Family, Shape};

/// Greatest header that is read: that of safetensors itself.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Greatest index that is read.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Most shards of one checkpoint.
const SHARDS_MAX: usize = 4096;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What torch writes without safetensors.
const PICKLED: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// How the ranks of a group share a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slice {
    /// Every rank has all of it.
    Whole,
    /// Each rank has its query heads' part.
    Heads,
    /// Each rank has its KV heads' part; KV heads are repeated when there are fewer than ranks.
    KvHeads,
    /// Queries, keys and values in one.
    Fused,
    /// Each rank has its part of the MLP's middle.
    Middle,
    /// Each rank has its part of the vocabulary.
    Vocabulary,
}

/// A tensor that the model needs, as found in the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightTensor {
    /// Its name.
    pub name: String,
    /// Its dimensions: `[rows, columns]` of a matrix, `[width]` of a vector.
    pub dims: Vec<u64>,
    /// How ranks share it.
    pub slice: Slice,
    /// Ranks share the columns, not the rows: products whose results are summed over ranks. Their biases have it too.
    pub by_columns: bool,
}

/// The tensors that `shape` needs, from the headers of the files in a folder of the model, and the names of these files.
///
/// # Errors
/// [`RegistryError::Broken`] names the file or the tensor.
pub fn read(
    files: &dyn Files,
    folder: &str,
    shape: &Shape,
) -> Result<(Vec<String>, Vec<WeightTensor>), RegistryError> {
    let (names, found) = headers(files, folder)?;
    let broken = |reason: String| files.broken(folder, &reason);
    let (roots, embedding) = roots(shape.family);
    let Some(root) = roots
        .iter()
        .find(|root| found.contains_key(&format!("{root}{embedding}.weight")))
    else {
        return Err(broken(format!(
            "no tensor {}{embedding}.weight, which {} needs",
            roots[0], shape.architecture
        )));
    };
    let mut tensors = Vec::new();
    for (name, dims, slice) in expected(shape, root) {
        let Some(header) = found.get(&name) else {
            return Err(broken(format!(
                "the checkpoint has no tensor {name} {dims:?}"
            )));
        };
        if header.shape != dims {
            return Err(broken(format!(
                "tensor {name} has the shape {:?}; config.json asks for {dims:?}",
                header.shape
            )));
        }
        if !matches!(header.dtype.as_str(), "BF16" | "F16" | "F32") {
            let dtype = &header.dtype;
            return Err(broken(format!(
                "tensor {name} has the dtype {dtype}; supported are BF16, F16 and F32"
            )));
        }
        tensors.push(weight_tensor((name, dims, slice)));
    }
    Ok((names, tensors))
}

/// The tensors that `shape` needs, where no file can be looked at.
pub fn of_shape(shape: &Shape) -> Vec<WeightTensor> {
    let root = roots(shape.family).0[0];
    expected(shape, root)
        .into_iter()
        .map(weight_tensor)
        .collect()
}

fn weight_tensor((name, dims, slice): Expected) -> WeightTensor {
    let by_columns = ["o_proj.", "out_proj.", "down_proj."]
        .iter()
        .any(|part| name.contains(part));
    WeightTensor {
        name,
        dims,
        slice,
        by_columns,
    }
}

/// Whether there are weights in a folder of the model, right or wrong.
pub fn has_weights(files: &dyn Files, folder: &str) -> bool {
    [SINGLE, INDEX]
        .iter()
        .any(|name| files.has(&within(folder, name)))
}

#[derive(Debug, Deserialize)]
struct Header {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

type Headers = BTreeMap<String, Header>;

/// The headers of a checkpoint, and the files that it consists of.
fn headers(files: &dyn Files, folder: &str) -> Result<(Vec<String>, Headers), RegistryError> {
    let single = within(folder, SINGLE);
    if files.has(&single) {
        return Ok((vec![SINGLE.to_owned()], header(files, &single)?));
    }
    let index = within(folder, INDEX);
    if !files.has(&index) {
        let pickled = PICKLED.iter().any(|name| files.has(&within(folder, name)));
        let reason = if pickled {
            format!(
                "has its weights as pytorch_model.bin and not as {SINGLE}: pickled weights are programs and are not \
                 loaded; log the model again with safetensors (save_pretrained(..., safe_serialization=True), what \
                 transformers does by itself since 4.35)"
            )
        } else {
            format!(
                "has neither {SINGLE} nor {INDEX}; other formats must be converted to safetensors first"
            )
        };
        return Err(files.broken(folder, &reason));
    }
    let mut all = BTreeMap::new();
    let mut names = vec![INDEX.to_owned()];
    for (file, tensors) in shards(files, &index)? {
        let mut found = header(files, &within(folder, &file))?;
        for name in tensors {
            match found.remove(&name) {
                Some(tensor) => all.insert(name, tensor),
                None => {
                    return Err(RegistryError::Broken(format!(
                        "{file}: has no tensor {name}, which {INDEX} promises"
                    )));
                }
            };
        }
        names.push(file);
    }
    Ok((names, all))
}

/// The index: file -> the tensors in it.
fn shards(files: &dyn Files, path: &str) -> Result<BTreeMap<String, Vec<String>>, RegistryError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let broken = |reason: String| files.broken(path, &reason);
    let bytes = files.read(path, INDEX_BYTES_MAX)?;
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|e| broken(format!("is not an index: {e}")))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        // A stranger's text: a file beside the index, and nothing else.
        let mut parts = Path::new(&file).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(broken(format!(
                "names the file '{file}', which is not beside it"
            )));
        }
        shards.entry(file).or_default().push(tensor);
    }
    if shards.len() > SHARDS_MAX {
        return Err(broken(format!(
            "names {} files; at most {SHARDS_MAX} are read",
            shards.len()
        )));
    }
    Ok(shards)
}

/// One file's header, believed only when it agrees with the file's length.
fn header(files: &dyn Files, path: &str) -> Result<Headers, RegistryError> {
    let corrupt =
        |reason: String| files.broken(path, &format!("is corrupt or cut short: {reason}"));
    let Opened { bytes, mut reader } = files.open(path)?;
    // A source that does not say the length is believed; the worker sees whether it holds.
    let file_bytes = bytes.unwrap_or(u64::MAX);
    let mut length = [0; 8];
    reader
        .read_exact(&mut length)
        .map_err(|e| cut(files, path, file_bytes, &e))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > file_bytes.saturating_sub(8) {
        return Err(corrupt(format!(
            "its header claims {length} bytes and the file has {file_bytes}"
        )));
    }
    let mut text = Vec::new();
    reader
        .take(length)
        .read_to_end(&mut text)
        .map_err(|e| corrupt(e.to_string()))?;
    let mut values: BTreeMap<String, Value> = serde_json::from_slice(&text)
        .map_err(|e| corrupt(format!("its header is not JSON: {e}")))?;
    values.remove("__metadata__");
    let data_bytes = file_bytes - 8 - length;
    let mut tensors = BTreeMap::new();
    for (name, value) in values {
        let tensor: Header =
            serde_json::from_value(value).map_err(|e| corrupt(format!("tensor {name}: {e}")))?;
        let [start, end] = tensor.data_offsets;
        if end > data_bytes {
            return Err(corrupt(format!(
                "tensor {name} ends at byte {end} of {data_bytes}"
            )));
        }
        let width = match tensor.dtype.as_str() {
            "F64" | "I64" | "U64" => 8,
            "F32" | "I32" | "U32" => 4,
            "BF16" | "F16" | "I16" | "U16" => 2,
            _ => 1,
        };
        let bytes = tensor
            .shape
            .iter()
            .try_fold(width, |product: u64, dim| product.checked_mul(*dim));
        if end.checked_sub(start) != bytes {
            return Err(corrupt(format!(
                "tensor {name} {:?} does not fill bytes {start} to {end}",
                tensor.shape
            )));
        }
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// A file that ends, or breaks off, before its header.
fn cut(files: &dyn Files, path: &str, file_bytes: u64, error: &std::io::Error) -> RegistryError {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => files.broken(
            path,
            &format!("is corrupt or cut short: {file_bytes} bytes cannot hold a header"),
        ),
        _ => files.broken(path, &error.to_string()),
    }
}

/// The prefixes in use, and the embedding's name behind them.
fn roots(family: Family) -> (&'static [&'static str], &'static str) {
    match family {
        Family::Llama => (&["model.", ""], "embed_tokens"),
        Family::Mpt => (&["transformer.", "", "model.transformer.", "model."], "wte"),
    }
}

type Expected = (String, Vec<u64>, Slice);

fn expected(shape: &Shape, root: &str) -> Vec<Expected> {
    let mut all: Vec<Expected> = Vec::new();
    let embedding = roots(shape.family).1;
    let mut matrix = |name: String, dims: [u64; 2], slice: Slice, bias: bool| {
        if bias {
            // A row-parallel product is summed over ranks, so that its bias is added once: whole on each rank.
            all.push((format!("{name}.bias"), vec![dims[0]], slice));
        }
        all.push((format!("{name}.weight"), dims.to_vec(), slice));
    };
    let (hidden, middle, vocab) = (shape.hidden, shape.intermediate, shape.vocab);
    let (q, kv) = (
        shape.heads * shape.head_width,
        shape.kv_heads * shape.head_width,
    );
    matrix(
        format!("{root}{embedding}"),
        [vocab, hidden],
        Slice::Vocabulary,
        false,
    );
    for layer in 0..shape.layers {
        match shape.family {
            Family::Llama => {
                let mut part = |name: &str, dims, slice, bias| {
                    matrix(format!("{root}layers.{layer}.{name}"), dims, slice, bias)
                };
                part(
                    "self_attn.q_proj",
                    [q, hidden],
                    Slice::Heads,
                    shape.attention_bias,
                );
                part(
                    "self_attn.k_proj",
                    [kv, hidden],
                    Slice::KvHeads,
                    shape.attention_bias,
                );
                part(
                    "self_attn.v_proj",
                    [kv, hidden],
                    Slice::KvHeads,
                    shape.attention_bias,
                );
                part(
                    "self_attn.o_proj",
                    [hidden, q],
                    Slice::Heads,
                    shape.attention_bias,
                );
                part(
                    "mlp.gate_proj",
                    [middle, hidden],
                    Slice::Middle,
                    shape.mlp_bias,
                );
                part(
                    "mlp.up_proj",
                    [middle, hidden],
                    Slice::Middle,
                    shape.mlp_bias,
                );
                part(
                    "mlp.down_proj",
                    [hidden, middle],
                    Slice::Middle,
                    shape.mlp_bias,
                );
            }
            Family::Mpt => {
                let mut part = |name: &str, dims, slice, bias| {
                    matrix(format!("{root}blocks.{layer}.{name}"), dims, slice, bias)
                };
                part(
                    "attn.Wqkv",
                    [3 * hidden, hidden],
                    Slice::Fused,
                    shape.attention_bias,
                );
                part(
                    "attn.out_proj",
                    [hidden, hidden],
                    Slice::Heads,
                    shape.attention_bias,
                );
                part(
                    "ffn.up_proj",
                    [middle, hidden],
                    Slice::Middle,
                    shape.mlp_bias,
                );
                part(
                    "ffn.down_proj",
                    [hidden, middle],
                    Slice::Middle,
                    shape.mlp_bias,
                );
            }
        }
    }
    if !shape.tied {
        matrix(
            "lm_head".to_owned(),
            [vocab, hidden],
            Slice::Vocabulary,
            false,
        );
    }
    let mut norm = |name: String| {
        if shape.norm_bias {
            all.push((format!("{name}.bias"), vec![hidden], Slice::Whole));
        }
        all.push((format!("{name}.weight"), vec![hidden], Slice::Whole));
    };
    for layer in 0..shape.layers {
        match shape.family {
            Family::Llama => {
                norm(format!("{root}layers.{layer}.input_layernorm"));
                norm(format!("{root}layers.{layer}.post_attention_layernorm"));
            }
            Family::Mpt => {
                norm(format!("{root}blocks.{layer}.norm_1"));
                norm(format!("{root}blocks.{layer}.norm_2"));
                if shape.qk_norm {
                    norm(format!("{root}blocks.{layer}.attn.q_ln"));
                    norm(format!("{root}blocks.{layer}.attn.k_ln"));
                }
            }
        }
    }
    norm(format!(
        "{root}{}",
        if shape.family == Family::Llama {
            "norm"
        } else {
            "norm_f"
        }
    ));
    all
}

#[cfg(test)]
mod tests;
