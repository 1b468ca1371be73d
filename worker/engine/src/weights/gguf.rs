//! GGUF files as weights: each tensor under Hugging Face's name, with the rows of queries and keys as it has them.

use super::{Entry, FileMark, Numbers, Place, Weights, WeightsError, map};
use gguf::{Gguf, TensorInfo, TensorType, hugging_face_name};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Factors of rotary frequencies, which Llama 3.1 and its kin have in place of the formula.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

impl Weights {
    /// Opens a GGUF file and checks its header; with the weights, the `config.json` that the header amounts to.
    ///
    /// # Errors
    /// [`WeightsError`] naming the file.
    pub fn open_gguf(path: &Path) -> Result<(Weights, Value), WeightsError> {
        let shown = path.display().to_string();
        let mark = FileMark::of(path)?;
        let map = map(path).map_err(|error| WeightsError::File {
            path: shown.clone(),
            reason: error.to_string(),
        })?;
        let refused = |error: gguf::Error| WeightsError::Gguf {
            path: shown.clone(),
            reason: error.to_string(),
        };
        let header = Gguf::read(&map[..], map.len() as u64).map_err(refused)?;
        let config = header.config().map_err(refused)?;
        let architecture = header.architecture().map_err(refused)?;
        let head_width = config["head_dim"].as_u64().map(|width| width as usize);
        let mut tensors = BTreeMap::new();
        for tensor in header.tensors() {
            tensor.check_supported().map_err(refused)?;
            let name = hugging_face_name(architecture, &tensor.name);
            let turned = ["attn_q.", "attn_k."].map(|part| tensor.name.contains(part));
            let entry = Entry {
                shape: tensor.shape(),
                numbers: numbers(tensor, header.data_start()),
                rotary: head_width.filter(|_| architecture == "llama" && turned.contains(&true)),
            };
            tensors.insert(name.unwrap_or_else(|| tensor.name.clone()), entry);
        }
        let weights = Weights {
            marks: vec![mark],
            files: vec![(path.to_owned(), map)],
            tensors,
        };
        Ok((weights, config))
    }

    /// Takes the factors of the rotary frequencies, `count` of them, out of the tensors, if the file has any.
    pub(crate) fn take_rope_factors(
        &mut self,
        count: usize,
    ) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some(entry) = self.tensors.get(ROPE_FACTORS) else {
            return Ok(None);
        };
        if entry.shape != [count] {
            return Err(WeightsError::Shape {
                name: ROPE_FACTORS.to_owned(),
                found: entry.shape.clone(),
                expected: vec![count],
            });
        }
        let factors = self.tensor(ROPE_FACTORS)?.to_vec();
        self.tensors.remove(ROPE_FACTORS);
        Ok(Some(factors))
    }
}

/// The one GGUF file of a folder; none where there is none.
///
/// # Errors
/// [`WeightsError::ManyGguf`], or the folder cannot be read.
pub(crate) fn find(dir: &Path) -> Result<Option<PathBuf>, WeightsError> {
    let unreadable = |error: std::io::Error| WeightsError::File {
        path: dir.display().to_string(),
        reason: error.to_string(),
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            found.push(path);
        }
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        count => Err(WeightsError::ManyGguf {
            dir: dir.display().to_string(),
            count,
        }),
    }
}

fn numbers(tensor: &TensorInfo, data_start: u64) -> Numbers<Place> {
    // The header's check has put both inside the file.
    let start = (data_start + tensor.offset) as usize;
    let place = Place {
        file: 0,
        bytes: start..start + tensor.bytes().unwrap_or(0) as usize,
    };
    match tensor.tensor_type {
        TensorType::F32 => Numbers::Plain(Dtype::F32, place),
        TensorType::F16 => Numbers::Plain(Dtype::F16, place),
        TensorType::Bf16 => Numbers::Plain(Dtype::BF16, place),
        blocks => Numbers::Blocks(blocks, place),
    }
}
