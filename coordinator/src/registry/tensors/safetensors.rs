//! safetensors headers: the bounded reader. A file is believed only when its header agrees with its length.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::Value;

use super::super::RegistryError;
use super::super::files::{Files, Opened, within};

/// Greatest header that is read: that of safetensors itself.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Greatest index that is read.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Most shards of one checkpoint.
const SHARDS_MAX: usize = 4096;
/// The file of an unsharded checkpoint.
pub(super) const SINGLE: &str = "model.safetensors";
/// The file that says in which shard each tensor lies.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What torch writes without safetensors.
const PICKLED: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Whether there are weights in a folder of the model, right or wrong.
pub fn has_weights(files: &dyn Files, folder: &str) -> bool {
    [SINGLE, INDEX]
        .iter()
        .any(|name| files.has(&within(folder, name)))
}

/// A tensor as a header has it.
#[derive(Debug, Deserialize)]
pub(super) struct Header {
    pub(super) dtype: String,
    pub(super) shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Tensors by name.
pub(super) type Headers = BTreeMap<String, Header>;

/// The headers of a checkpoint, and the files that it consists of.
pub(super) fn headers(
    files: &dyn Files,
    folder: &str,
) -> Result<(Vec<String>, Headers), RegistryError> {
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
