//! A model folder that has been looked at and found usable: `config.json` and all tensors agree.
//!
//! Opening maps files and reads headers; nothing of the weights is read or allocated yet.

use super::spec::{ModelSpec, SpecError};
use super::tensors::TensorNames;
use crate::backend::DeviceError;
use crate::weights::{FileMark, Weights, WeightsError, read_text};
use sha2::{Digest, Sha256};
use std::path::Path;

/// A model folder in Hugging Face's layout: `config.json` and safetensors.
#[derive(Debug)]
pub struct Checkpoint {
    /// What `config.json` says.
    pub spec: ModelSpec,
    pub(crate) names: TensorNames,
    pub(crate) weights: Weights,
    pub(crate) fingerprint: Fingerprint,
}

/// Which files a checkpoint was opened from, in which state: what was loaded from equal ones is the same model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(pub(crate) Vec<FileMark>);

/// Why a model cannot be loaded. Every message says what was found and what would do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The config, or the model's division among the ranks.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The files.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The caller's numbers.
    #[error("{0}")]
    Options(String),
}

impl Checkpoint {
    /// Opens a model folder and checks that every tensor is there, in shape and dtype, and none is left over.
    ///
    /// # Errors
    /// [`LoadError::Spec`] and [`LoadError::Weights`], naming key, file or tensor.
    pub fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
        let config = dir.join("config.json");
        let mut marks = vec![FileMark::of(&config)?];
        let spec = ModelSpec::from_config(&read_text(&config)?)?;
        let weights = Weights::open(dir)?;
        let (roots, embedding) = spec.family.roots();
        let root = roots
            .iter()
            .find(|root| weights.has(&format!("{root}{embedding}.weight")))
            .unwrap_or(&roots[0]);
        let names = spec.family.tensor_names(&spec, root);
        weights.check(&names.expected())?;
        marks.extend_from_slice(&weights.marks);
        Ok(Checkpoint {
            spec,
            names,
            weights,
            fingerprint: Fingerprint(marks),
        })
    }

    /// Hex digits that no other model has, and not this one once its files were changed. Reads a page of each tensor: a
    /// digest of all bytes would cost what reading the whole model costs.
    pub(crate) fn digest(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(format!("{:?}\n", self.spec));
        for mark in &self.fingerprint.0 {
            mark.tell(&mut digest);
        }
        self.weights.sample(&mut digest);
        let digits = digest.finalize();
        digits[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl Fingerprint {
    /// Whether the files are still as they were.
    pub(crate) fn stands(&self) -> bool {
        self.0.iter().all(FileMark::stands)
    }
}
