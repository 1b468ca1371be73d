//! Where models come from: a name and a version -> a folder, and the facts of it that the memory plan needs.
//!
//! * [`local`]: the registry in cluster.toml.
//! * [`mlmodel`]: the layout of a folder, plain Hugging Face or MLflow.
//! * [`shape`]: `config.json`, the numbers that decide memory.
//! * [`tensors`]: safetensors headers; no weight is ever read here.
//!
//! Everything in a model folder is a stranger's: sizes are bounded, and a hostile file is an error that names it.

pub mod local;
pub mod mlmodel;
pub mod shape;
pub mod tensors;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use common::model_ref::ModelRef;
use common::wire::message::KvDtype;

pub use local::LocalRegistry;
pub use shape::Shape;
pub use tensors::WeightTensor;

/// Why a model cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No such model, or no such version of it.
    #[error("{0}")]
    Unknown(String),
    /// Its files are broken or of a kind that is not supported. Names the file.
    #[error("{0}")]
    Broken(String),
}

/// What is known of a model without reading its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    /// Which.
    pub model: ModelRef,
    /// The folder that workers are told.
    pub folder: PathBuf,
    /// The task in its metadata, `llm/v1/completions` for example.
    pub task: Option<String>,
    /// Its sizes.
    pub shape: Shape,
    /// Its tensors, all that `shape` asks for.
    pub tensors: Vec<WeightTensor>,
    /// Type of K and V in the cache.
    pub kv_dtype: KvDtype,
    /// Longest sequence served: the model's own, or less where cluster.toml says so.
    pub context_max: u32,
}

/// Reads the facts of the model in `folder`.
///
/// # Errors
/// [`RegistryError::Broken`] names the file and what is wrong with it.
pub fn read_facts(
    model: &ModelRef,
    folder: &Path,
    kv_dtype: KvDtype,
    context_max: Option<u32>,
) -> Result<ModelFacts, RegistryError> {
    let layout = mlmodel::layout(folder)?;
    let shape = Shape::read(&layout.weights.join("config.json"))?;
    let tensors = tensors::read(&layout.weights, &shape)?;
    let own = shape.context_max;
    let context_max = match context_max {
        Some(asked) if asked > own => {
            return Err(RegistryError::Broken(format!(
                "{model}: context_max = {asked} in cluster.toml is beyond the model's own {own}"
            )));
        }
        asked => asked.unwrap_or(own),
    };
    Ok(ModelFacts {
        model: model.clone(),
        folder: folder.to_owned(),
        task: layout.task,
        shape,
        tensors,
        kv_dtype,
        context_max,
    })
}

/// The facts that a `config.json` alone tells: the tensors are those that its family has.
///
/// # Errors
/// [`RegistryError::Broken`] names the file and what is wrong with it.
pub fn read_config_facts(
    model: &ModelRef,
    file: &Path,
    kv_dtype: KvDtype,
) -> Result<ModelFacts, RegistryError> {
    let shape = Shape::read(file)?;
    Ok(ModelFacts {
        model: model.clone(),
        folder: file.parent().unwrap_or(Path::new(".")).to_owned(),
        task: None,
        tensors: tensors::of_shape(&shape),
        kv_dtype,
        context_max: shape.context_max,
        shape,
    })
}

/// A small file's bytes.
fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>, RegistryError> {
    let broken = |reason: String| RegistryError::Broken(format!("{}: {reason}", path.display()));
    let file = File::open(path).map_err(|e| broken(e.to_string()))?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| broken(e.to_string()))?;
    if bytes.len() as u64 > bytes_max {
        return Err(broken(format!("is longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}
