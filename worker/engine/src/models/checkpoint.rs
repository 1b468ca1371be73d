//! A model that has been looked at and found usable: `config.json`, or the header of a GGUF file, and all tensors agree.
//!
//! Opening maps files and reads headers; nothing of the weights is read or allocated yet.

use super::config::Config;
use super::forms::{self, Forms};
use super::partition::Partition;
use super::quantization;
use super::spec::{ModelSpec, Positions, SpecError};
use super::tensors::TensorNames;
use crate::backend::{Backend, DeviceError, WeightDtype};
use crate::layers::{linear, position};
use crate::weights::{FileMark, Weights, WeightsError, gguf, read_text};
use sha2::{Digest, Sha256};
use std::path::Path;

/// A model folder in Hugging Face's layout (`config.json` and safetensors, which may be quantised by GPTQ or AWQ), or a
/// GGUF file.
#[derive(Debug)]
pub struct Checkpoint {
    /// What `config.json` says.
    pub spec: ModelSpec,
    /// In which forms the matrices are there.
    pub forms: Forms,
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
    /// Opens a model folder or a GGUF file and checks that every tensor is there, in shape and dtype, and none is left over.
    /// A folder without safetensors may have one GGUF file in their place, and then needs nothing else.
    ///
    /// # Errors
    /// [`LoadError::Spec`] and [`LoadError::Weights`], naming key, file or tensor.
    pub fn open(path: &Path) -> Result<Checkpoint, LoadError> {
        if path.is_file() {
            return Checkpoint::open_gguf(path);
        }
        match gguf::find(path)? {
            Some(file) if !Weights::has_safetensors(path) => Checkpoint::open_gguf(&file),
            _ => Checkpoint::open_folder(path),
        }
    }

    fn open_folder(dir: &Path) -> Result<Checkpoint, LoadError> {
        let config = dir.join("config.json");
        let mut marks = vec![FileMark::of(&config)?];
        let config = read_text(&config)?;
        let spec = ModelSpec::from_config(&config)?;
        let mut weights = Weights::open(dir)?;
        if let Some(format) = quantization::format(&Config::parse(&config)?)? {
            weights.assemble(format)?;
        }
        marks.extend_from_slice(&weights.marks);
        Checkpoint::checked(spec, weights, marks)
    }

    fn open_gguf(file: &Path) -> Result<Checkpoint, LoadError> {
        let (mut weights, config) = Weights::open_gguf(file)?;
        let mut spec = ModelSpec::from_config(&config.to_string())?;
        if let Some(factors) = weights.take_rope_factors(spec.head_width / 2)?
            && let Positions::Rope { theta, scaling } = &mut spec.positions
        {
            *scaling = position::scaling_of(&factors, spec.head_width, *theta)
                .map_err(SpecError::Sizes)?;
        }
        let marks = weights.marks.clone();
        Checkpoint::checked(spec, weights, marks)
    }

    fn checked(
        spec: ModelSpec,
        weights: Weights,
        marks: Vec<FileMark>,
    ) -> Result<Checkpoint, LoadError> {
        let (roots, embedding) = spec.family.roots();
        let root = roots
            .iter()
            .find(|root| weights.has(&format!("{root}{embedding}.weight")))
            .unwrap_or(&roots[0]);
        let names = spec.family.tensor_names(&spec, root);
        weights.check(&names.expected())?;
        Ok(Checkpoint {
            spec,
            forms: Forms::of(&names, &weights),
            names,
            weights,
            fingerprint: Fingerprint(marks),
        })
    }

    /// Hex digits that no other model has, and not this one once its files were changed. Reads samples of the files: a digest
    /// of all bytes would cost what reading the whole model costs.
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

    /// Refuses an option that matrices which are quantised already cannot follow: numbers of four bits are not made eight, nor
    /// eight four, because each way loses what the checkpoint's maker has weighed.
    ///
    /// # Errors
    /// [`LoadError::Options`] naming the first such matrix.
    pub fn check_option<B: Backend>(
        &self,
        partition: &Partition,
        dtype: WeightDtype,
    ) -> Result<(), LoadError> {
        let Some(wanted) = dtype.quantised() else {
            return Ok(());
        };
        for (i, layer) in self.names.layers.iter().enumerate() {
            let kept = linear::kept::<B>(&self.spec, partition, self.forms.layer(i), dtype);
            for (matrix, kept) in layer.matrices().into_iter().zip(kept) {
                if let Some(form) = kept.filter(|form| form.bits != wanted) {
                    return Err(LoadError::Options(format!(
                        "{} is {} in the checkpoint and cannot be made {}; leave the quantization out",
                        matrix.parts[0].name,
                        form.bits.name(),
                        wanted.name()
                    )));
                }
            }
        }
        Ok(())
    }

    /// What a rank makes of matrices that are quantised already, for people; nothing where all are floats.
    ///
    /// # Errors
    /// [`SpecError::Ranks`].
    pub fn notes<B: Backend>(
        &self,
        rank: usize,
        ranks: usize,
        dtype: WeightDtype,
    ) -> Result<Vec<String>, SpecError> {
        let counts = forms::counts(&self.names, &self.weights);
        if counts.is_empty() {
            return Ok(Vec::new());
        }
        let partition = Partition::new(&self.spec, rank, ranks)?;
        let kept = |i| linear::kept::<B>(&self.spec, &partition, self.forms.layer(i), dtype);
        let kept = (0..self.spec.layers).flat_map(kept).flatten().count();
        let mut notes: Vec<String> = counts
            .into_iter()
            .map(|(form, count)| format!("{count} matrices of the layers are {form}"))
            .collect();
        notes.push(format!(
            "{kept} of {} are kept as they are, the others packed as {}",
            4 * self.spec.layers,
            dtype.name()
        ));
        Ok(notes)
    }
}

impl Fingerprint {
    /// Whether the files are still as they were.
    pub(crate) fn stands(&self) -> bool {
        self.0.iter().all(FileMark::stands)
    }
}
