//! Where models come from: a name and a version -> where the files are, and the facts that the memory plan needs.
//!
//! * [`lookup`]: the models of cluster.toml, then its registries.
//! * [`files`], [`remote`]: a model's files in a folder or in a registry.
//! * [`mlmodel`]: the layout of a model, plain Hugging Face or MLflow.
//! * [`shape`]: `config.json`, the numbers that decide memory.
//! * `gguf`: both at once, of a GGUF file.
//! * [`tensors`]: headers of weights' files; no weight is ever read here.
//! * [`form`]: how matrices lie in them, and which forms workers keep.
//! * [`needed`]: which files workers need.
//!
//! Everything in a model is a stranger's: sizes are bounded, and a hostile file is an error that names it.

pub mod files;
pub mod form;
mod gguf;
pub mod lookup;
pub mod mlmodel;
pub mod needed;
pub mod remote;
pub mod shape;
pub mod tensors;

use std::path::Path;
use std::sync::Arc;

use common::config::ServingDefaults;
use common::model_ref::ModelRef;
use common::wire::message::{KvDtype, ModelSource, Quantization};
use registry::Error;

pub use files::Files;
use form::{Form, Grouped};
pub use lookup::Registry;
pub use shape::Shape;
pub use tensors::WeightTensor;

/// Why a model cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No such model, or no such version of it.
    #[error("{0}")]
    Unknown(String),
    /// Its files are broken or of a kind that is not supported, or its registry refuses them. Names the file.
    #[error("{0}")]
    Broken(String),
    /// Its registry does not answer; it may later.
    #[error("{0}")]
    Unavailable(String),
}

/// A registry's error as one about a model.
fn error(error: Error) -> RegistryError {
    let message = error.to_string();
    match error {
        Error::NoModel(_) | Error::NoVersion { .. } => RegistryError::Unknown(message),
        Error::Unavailable(_) => RegistryError::Unavailable(message),
        Error::Unusable(_) => RegistryError::Broken(message),
    }
}

/// What is known of a model without reading its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    /// Which.
    pub model: ModelRef,
    /// Where workers find its files.
    pub source: ModelSource,
    /// The task in its metadata, `llm/v1/completions` for example.
    pub task: Option<String>,
    /// Its sizes.
    pub shape: Shape,
    /// Its tensors, all that `shape` asks for.
    pub tensors: Vec<WeightTensor>,
    /// Type of K and V in the cache.
    pub kv_dtype: KvDtype,
    /// How weights are kept.
    pub quantization: Quantization,
    /// Longest sequence served: the model's own, or less where cluster.toml says so.
    pub context_max: u32,
}

impl ModelFacts {
    /// The same with weights kept as a served entity asks for, if it does.
    pub fn kept_as(self: Arc<Self>, asked: Option<Quantization>) -> Arc<Self> {
        match asked {
            Some(quantization) if quantization != self.quantization => Arc::new(ModelFacts {
                quantization,
                ..Arc::unwrap_or_clone(self)
            }),
            _ => self,
        }
    }

    /// A matrix of the files whose numbers are of another size than `quantization` asks for.
    pub fn otherwise_quantised(&self) -> Option<(&str, Grouped)> {
        let other = |tensor: &WeightTensor| match tensor.form {
            Form::Grouped(form) if !tensor.is_end() && !form.is_of(self.quantization) => Some(form),
            _ => None,
        };
        self.tensors
            .iter()
            .find_map(|tensor| Some((tensor.name.as_str(), other(tensor)?)))
    }
}

/// Which model, and what cluster.toml says of it.
#[derive(Debug, Clone)]
pub struct Context {
    /// Which.
    pub model: ModelRef,
    serving: ServingDefaults,
    /// A `context_max` beyond the model's own is a mistake: it was written for this model.
    exact: bool,
}

impl Context {
    /// A model with an entry of its own.
    pub fn exact(model: &ModelRef, serving: ServingDefaults) -> Context {
        Context {
            model: model.clone(),
            serving,
            exact: true,
        }
    }

    /// A model of a registry, whose settings are for all its models.
    pub fn at_most(model: &ModelRef, serving: ServingDefaults) -> Context {
        Context {
            exact: false,
            ..Context::exact(model, serving)
        }
    }
}

/// Reads the facts of the model in `folder`, or of a GGUF file. Blocks.
///
/// # Errors
/// [`RegistryError::Broken`] names the file and what is wrong with it.
pub fn read_facts(context: &Context, folder: &Path) -> Result<ModelFacts, RegistryError> {
    let source = ModelSource::Folder(folder.display().to_string());
    read_from(&files::Folder::open(folder)?, context, &|_| source.clone())
}

/// Reads a model's facts from its files. `source` makes of the files that workers need what they are told. Blocks.
///
/// # Errors
/// [`RegistryError::Broken`] names the file and what is wrong with it.
pub fn read_from(
    files: &dyn Files,
    context: &Context,
    source: &dyn Fn(&[String]) -> ModelSource,
) -> Result<ModelFacts, RegistryError> {
    let Context {
        model,
        serving,
        exact,
    } = context;
    let layout = mlmodel::layout(files)?;
    let (shape, weights, tensors) = match &layout.gguf {
        Some(name) => {
            let (shape, tensors) = gguf::read(files, &files::within(&layout.weights, name))?;
            (shape, vec![name.clone()], tensors)
        }
        None => {
            let config = files::within(&layout.weights, "config.json");
            let (shape, packing) = Shape::read(files, &config)?;
            let (weights, tensors) =
                tensors::read(files, &layout.weights, &shape, packing.as_ref())?;
            (shape, weights, tensors)
        }
    };
    let own = shape.context_max;
    let context_max = match serving.context_max {
        Some(asked) if asked > own && *exact => {
            return Err(RegistryError::Broken(format!(
                "{model}: context_max = {asked} in cluster.toml is beyond the model's own {own}"
            )));
        }
        asked => asked.unwrap_or(own).min(own),
    };
    Ok(ModelFacts {
        model: model.clone(),
        source: source(&needed::files(files, &layout, &weights)),
        task: layout.task,
        shape,
        tensors,
        kv_dtype: serving.kv_dtype,
        quantization: serving.quantization,
        context_max,
    })
}

/// The facts that a `config.json` alone tells: the tensors are those that its family has. Blocks.
///
/// # Errors
/// [`RegistryError::Broken`] names the file and what is wrong with it.
pub fn read_config_facts(model: &ModelRef, file: &Path) -> Result<ModelFacts, RegistryError> {
    let folder = match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let (shape, packing) = Shape::read(&files::Folder::open(folder)?, &name)?;
    Ok(ModelFacts {
        model: model.clone(),
        source: ModelSource::Folder(folder.display().to_string()),
        task: None,
        tensors: tensors::of_shape(&shape, packing.as_ref()),
        kv_dtype: KvDtype::default(),
        quantization: Quantization::default(),
        context_max: shape.context_max,
        shape,
    })
}
