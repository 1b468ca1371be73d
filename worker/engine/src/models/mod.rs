//! Model families: what differs between them, and how any of them is divided among ranks.
//!
//! Owns [`spec`] (what a `config.json` asks for), one file per family (its config keys and weight names), [`tensors`]
//! (the weights a spec needs) and [`partition`] (one rank's part). The forward pass is in [`crate::layers`].

pub mod checkpoint;
pub mod config;
pub mod forms;
pub mod llama;
pub mod mistral;
pub mod mpt;
pub mod partition;
pub mod quantization;
pub mod spec;
pub mod tensors;

use spec::{Family, ModelSpec, SpecError};
use tensors::TensorNames;

impl Family {
    /// The tensors that a model of this family is made of. `root` is the prefix that the checkpoint uses.
    #[must_use]
    pub fn tensor_names(self, spec: &ModelSpec, root: &str) -> TensorNames {
        match self {
            Family::Llama | Family::Mistral => llama::tensor_names(spec, root),
            Family::Mpt => mpt::tensor_names(spec, root),
        }
    }

    /// The prefixes in use for this family, each followed by the name of the embedding: one of the resulting names is in
    /// the checkpoint.
    #[must_use]
    pub fn roots(self) -> (&'static [&'static str], &'static str) {
        match self {
            Family::Llama | Family::Mistral => (&["model.", ""], llama::EMBEDDING),
            Family::Mpt => (
                &["transformer.", "", "model.transformer.", "model."],
                mpt::EMBEDDING,
            ),
        }
    }
}

impl ModelSpec {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`SpecError`]: what was found and what is supported. Nothing is allocated for the model before this succeeds.
    pub fn from_config(json: &str) -> Result<ModelSpec, SpecError> {
        let config = config::Config::parse(json)?;
        quantization::format(&config)?;
        let spec = match config.architecture()? {
            "LlamaForCausalLM" => llama::spec(&config),
            "MistralForCausalLM" => mistral::spec(&config),
            name @ ("MPTForCausalLM" | "MptForCausalLM") => mpt::spec(&config, name),
            found => Err(SpecError::Architecture {
                found: found.to_owned(),
            }),
        }?;
        spec.check()
    }
}
