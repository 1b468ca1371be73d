//! A GGUF file's header: a model's sizes and its tensors at once. No weight is read.

use std::io::BufReader;

use ::gguf::{Gguf, TensorType, gguf_name};

use super::RegistryError;
use super::files::{Files, Opened};
use super::form::{self, Form, Grouped, Offset};
use super::shape::Shape;
use super::tensors::{self, WeightTensor};

/// Columns of a group in GGUF's formats that workers keep.
const GROUP: u64 = 32;

/// The sizes and the tensors that a file's header tells.
///
/// # Errors
/// [`RegistryError::Broken`] names the file, and the key or the tensor in it.
pub(super) fn read(
    files: &dyn Files,
    path: &str,
) -> Result<(Shape, Vec<WeightTensor>), RegistryError> {
    let Opened { bytes, reader } = files.open(path)?;
    // A source that does not say the length is believed; the worker sees whether it holds.
    let file_bytes = bytes.unwrap_or(u64::MAX);
    let facts = || {
        let gguf = Gguf::read(BufReader::new(reader), file_bytes).map_err(|e| e.to_string())?;
        let config = gguf.config().map_err(|e| e.to_string())?;
        let values = config.as_object().ok_or("its metadata tell no sizes")?;
        let shape = Shape::of(values)?;
        let tensors = tensors(&gguf, &shape)?;
        Ok((shape, tensors))
    };
    facts().map_err(|reason: String| files.broken(path, &reason))
}

/// The tensors that `shape` needs, by the names that they have in Hugging Face's layout.
fn tensors(gguf: &Gguf, shape: &Shape) -> Result<Vec<WeightTensor>, String> {
    let architecture = gguf.architecture().map_err(|e| e.to_string())?;
    let mut tensors = tensors::of_shape(shape, None);
    for tensor in &mut tensors {
        let name = gguf_name(architecture, &tensor.name).unwrap_or_else(|| tensor.name.clone());
        let dims = &tensor.dims;
        let Some(info) = gguf.tensor(&name) else {
            return Err(format!("has no tensor {name} {dims:?}"));
        };
        info.check_supported().map_err(|e| e.to_string())?;
        // The innermost dimension comes first.
        if !info.dims.iter().rev().eq(dims) {
            return Err(format!(
                "tensor {name} has the dimensions {:?}; its metadata ask for {:?}",
                info.dims,
                dims.iter().rev().collect::<Vec<_>>()
            ));
        }
        tensor.form = form_of(info.tensor_type);
    }
    form::settle(&mut tensors);
    Ok(tensors)
}

fn form_of(tensor_type: TensorType) -> Form {
    let grouped = |bits, offset| {
        Form::Grouped(Grouped {
            bits,
            group: GROUP,
            offset,
        })
    };
    match tensor_type {
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 => Form::Float,
        TensorType::Q8_0 => grouped(8, Offset::Middle),
        TensorType::Q4_0 => grouped(4, Offset::Middle),
        TensorType::Q4_1 => grouped(4, Offset::Mins),
        TensorType::Q4_K | TensorType::Q6_K | TensorType::Other(_) => Form::Unpacked,
    }
}

#[cfg(test)]
mod tests;
