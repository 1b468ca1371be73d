//! Checkpoints that are quantised already, made of the tiny models: GGUF files, and folders of [`super::quantiser`]'s. And
//! the twin of any of them: a folder of the very numbers that it stands for, as floats.

use super::models;
use super::quantiser::{self, Quantiser, tensors_of};
use engine::weights::Weights;
use gguf::TensorType;
use half::bf16;
use safetensors::Dtype;
use serde_json::Value;
use std::path::PathBuf;
use tempfile::TempDir;

/// A folder with one GGUF file, whose matrices have the types chosen by their names there.
pub fn gguf(model: &str, choose: impl Fn(&str) -> TensorType) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let file = gguf::write::from_folder(&models().join(model), choose);
    std::fs::write(file_in(&dir), file.to_bytes()).expect("written");
    dir
}

/// The GGUF file of such a folder.
pub fn file_in(dir: &TempDir) -> PathBuf {
    dir.path().join("model.gguf")
}

/// A folder whose tensors are those of the model, as floats with the numbers of `weights`; as f32, and rounded to bf16 where
/// `rounded` says so of a name.
pub fn twin(model: &str, weights: &Weights, rounded: impl Fn(&str) -> bool) -> TempDir {
    let model = models().join(model);
    let tensors = tensors_of(&model).into_iter().map(|(name, (shape, _))| {
        let mut numbers = weights.tensor(&name).expect("there").to_vec();
        if rounded(&name) {
            for number in &mut numbers {
                *number = bf16::from_f32(*number).to_f32();
            }
        }
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        (name, (Dtype::F32, shape, bytes))
    });
    quantiser::folder(&model, Value::Null, tensors.collect())
}

/// A folder of the model with the layers' matrices quantised.
pub fn quantised(model: &str, quantiser: Quantiser) -> TempDir {
    quantiser::quantised(&models().join(model), quantiser)
}
