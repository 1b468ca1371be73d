//! Which tensors a folder has, held against what the model needs. No weight is read.
//!
//! Owns what is known of a tensor, and the order of the checks. A file shorter than its header says, a missing tensor and an
//! odd shape are found here, before a worker is asked to load anything.

mod expected;
mod packed;
mod safetensors;

use super::RegistryError;
use super::files::Files;
use super::form::{self, Form};
use super::shape::Shape;
use expected::{Expected, HEAD, expected, roots};
pub use packed::Packing;
pub use safetensors::has_weights;

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
    /// How it lies in the files, and is kept if that is quantised and nothing else is asked for.
    pub form: Form,
}

impl WeightTensor {
    /// It is an end of the model: the embedding table or the head.
    pub fn is_end(&self) -> bool {
        self.slice == Slice::Vocabulary
    }

    /// It is the head, where that is not the embedding table.
    pub fn is_head(&self) -> bool {
        self.is_end() && self.name.starts_with(HEAD)
    }
}

/// The tensors that `shape` needs, from the headers of the files in a folder of the model, and the names of these files.
/// Matrices may be as `packing` says.
///
/// # Errors
/// [`RegistryError::Broken`] names the file or the tensor.
pub fn read(
    files: &dyn Files,
    folder: &str,
    shape: &Shape,
    packing: Option<&Packing>,
) -> Result<(Vec<String>, Vec<WeightTensor>), RegistryError> {
    let (names, found) = safetensors::headers(files, folder)?;
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
    for expected in expected(shape, root) {
        let (name, dims, _) = &expected;
        let packed = packing.map(|packing| packing.find(name, dims, &found));
        let packed = packed.transpose().map_err(broken)?.flatten();
        if packed.is_none() {
            check_float(name, dims, &found).map_err(broken)?;
        }
        tensors.push(weight_tensor(expected, packed.unwrap_or_default()));
    }
    form::settle(&mut tensors);
    Ok((names, tensors))
}

/// A tensor that is not packed.
fn check_float(name: &str, dims: &[u64], found: &safetensors::Headers) -> Result<(), String> {
    let Some(header) = found.get(name) else {
        return Err(format!("the checkpoint has no tensor {name} {dims:?}"));
    };
    if header.shape != dims {
        return Err(format!(
            "tensor {name} has the shape {:?}; config.json asks for {dims:?}",
            header.shape
        ));
    }
    if !matches!(header.dtype.as_str(), "BF16" | "F16" | "F32") {
        let dtype = &header.dtype;
        return Err(format!(
            "tensor {name} has the dtype {dtype}; supported are BF16, F16 and F32"
        ));
    }
    Ok(())
}

/// The tensors that `shape` needs, where no file can be looked at: the layers' matrices are packed, if any are.
pub fn of_shape(shape: &Shape, packing: Option<&Packing>) -> Vec<WeightTensor> {
    let root = roots(shape.family).0[0];
    let form = packing.map(Packing::form).unwrap_or_default();
    let tensor = |expected: Expected| {
        let (_, dims, slice) = &expected;
        let may_be_packed = dims.len() == 2 && *slice != Slice::Vocabulary;
        let form = if may_be_packed { form } else { Form::Float };
        weight_tensor(expected, form)
    };
    let mut tensors: Vec<WeightTensor> = expected(shape, root).into_iter().map(tensor).collect();
    form::settle(&mut tensors);
    tensors
}

fn weight_tensor((name, dims, slice): Expected, form: Form) -> WeightTensor {
    let by_columns = ["o_proj.", "out_proj.", "down_proj."]
        .iter()
        .any(|part| name.contains(part));
    WeightTensor {
        name,
        dims,
        slice,
        by_columns,
        form,
    }
}

#[cfg(test)]
mod tests;
