//! The weights of a model: safetensors, in one file or in shards with an index, or a GGUF file; mapped and never copied
//! whole.
//!
//! Owns opening and the check against what the model needs; how numbers are read is the tensor's business. A file is
//! believed only after its header agrees with its length. Knows no ranks and no backend.
//!
//! The files must not be cut short while they are mapped: reading past the new end would end the process, as with any
//! mapping. Model folders are written once, to a new name.

mod blocks;
mod error;
pub mod form;
pub(crate) mod gguf;
pub mod packed;
pub mod quant;
mod tensor;
pub mod words;

pub use error::WeightsError;
pub use tensor::Tensor;

use crate::models::tensors::Expected;
use ::gguf::TensorType;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// The file of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";
/// The file that says in which shard each tensor lies.
const INDEX: &str = "model.safetensors.index.json";
/// Greatest `config.json` or index that is read: the largest published index is under 1 MB.
const JSON_BYTES_MAX: u64 = 64 << 20;
/// Bytes at the head of a file that go into a digest of the weights: the names and shapes of tensors stand there.
const HEAD_BYTES: usize = 64 << 10;
/// Samples of a file that do: a large model has some hundred matrices.
const SAMPLES: usize = 256;
/// Bytes of a sample.
const SAMPLE_BYTES: usize = 4096;
/// Tensors that old exporters wrote and no model needs: constants that can be computed, and the copy of a tied head.
const IGNORED_SUFFIXES: [&str; 3] = ["rotary_emb.inv_freq", ".masked_bias", "lm_head.weight"];

/// The open weights of a model folder.
#[derive(Debug)]
pub struct Weights {
    /// Of the index and of each file, looked at before it was opened.
    pub(crate) marks: Vec<FileMark>,
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    shape: Vec<usize>,
    numbers: Numbers<Place>,
    /// Width of the heads whose rows lie in the order of their rotary pairs, as GGUF files of Llamas have them.
    rotary: Option<usize>,
}

/// How a tensor's numbers lie, and where.
#[derive(Debug, Clone, Copy)]
enum Numbers<P> {
    /// One by one, in the order of the shape.
    Plain(Dtype, P),
    /// In ggml's blocks, row by row.
    Blocks(TensorType, P),
    /// Several in a word, with scales and zero points beside them.
    Words(words::Words<P>),
}

/// Bytes of a file.
#[derive(Debug, Clone)]
struct Place {
    file: usize,
    bytes: Range<usize>,
}

/// What tells whether a file is the one that it was: one that was written again, or another in its place, differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMark {
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    /// In nanoseconds.
    modified: i128,
    /// Likewise, and nobody sets it: of the last change of the file or of what is known about it.
    changed: i128,
}

impl Weights {
    /// Opens the safetensors of a model folder and checks every header.
    ///
    /// # Errors
    /// [`WeightsError`] naming the file.
    pub fn open(dir: &Path) -> Result<Weights, WeightsError> {
        let mut weights = Weights {
            marks: Vec::new(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if dir.join(SINGLE).exists() {
            weights.open_file(&dir.join(SINGLE), None)?;
        } else if dir.join(INDEX).exists() {
            weights.marks.push(FileMark::of(&dir.join(INDEX))?);
            for (file, names) in read_index(&dir.join(INDEX))? {
                weights.open_file(&dir.join(file), Some(&names))?;
            }
        } else {
            return Err(WeightsError::NoWeights {
                dir: dir.display().to_string(),
            });
        }
        Ok(weights)
    }

    /// Whether a folder has weights of this format.
    pub(crate) fn has_safetensors(dir: &Path) -> bool {
        dir.join(SINGLE).exists() || dir.join(INDEX).exists()
    }

    /// Holds the checkpoint against the tensors that the model needs, all of them, before anything is loaded.
    ///
    /// # Errors
    /// The first tensor that is missing, has another shape or dtype, or is not accounted for.
    pub fn check(&self, expected: &[Expected]) -> Result<(), WeightsError> {
        let mut unused: BTreeSet<&str> = self.tensors.keys().map(String::as_str).collect();
        for Expected { name, shape } in expected {
            let Some(entry) = self.tensors.get(name) else {
                return Err(WeightsError::Missing {
                    name: name.clone(),
                    shape: shape.clone(),
                });
            };
            if entry.shape != *shape {
                return Err(WeightsError::Shape {
                    name: name.clone(),
                    found: entry.shape.clone(),
                    expected: shape.clone(),
                });
            }
            entry.check_dtype(name)?;
            unused.remove(name.as_str());
        }
        let ignored = |name: &str| {
            let suffixes = IGNORED_SUFFIXES.iter();
            suffixes.clone().any(|suffix| name.ends_with(suffix)) || self.is_empty_bias(name)
        };
        match unused.into_iter().find(|name| !ignored(name)) {
            Some(name) => Err(WeightsError::Unexpected {
                name: name.to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor of one of the supported dtypes.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] or [`WeightsError::Dtype`]; neither after [`Weights::check`] has passed.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, WeightsError> {
        let missing = || WeightsError::Missing {
            name: name.to_owned(),
            shape: Vec::new(),
        };
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        entry.check_dtype(name)?;
        let bytes = |place: &Place| {
            let (_, map) = self.files.get(place.file)?;
            map.get(place.bytes.clone())
        };
        let numbers = entry.numbers.located(bytes).ok_or_else(missing)?;
        Ok(Tensor::new(&entry.shape, numbers, entry.rotary))
    }

    /// Some quantisers give every matrix a bias, of zeros where the model has none.
    fn is_empty_bias(&self, name: &str) -> bool {
        let Some(stem) = name.strip_suffix(".bias") else {
            return false;
        };
        let quantised = |entry: &Entry| matches!(entry.numbers, Numbers::Words(_));
        self.tensors
            .get(&format!("{stem}.weight"))
            .is_some_and(quantised)
            && self
                .tensor(name)
                .is_ok_and(|bias| bias.to_vec().iter().all(|x| *x == 0.0))
    }

    /// Adds to a digest the head of each file and some pages that are spread over it: two models of one shape differ there,
    /// whatever is said about their files.
    pub(crate) fn sample(&self, digest: &mut Sha256) {
        for (_, file) in &self.files {
            digest.update(&file[..file.len().min(HEAD_BYTES)]);
            for page in 0..SAMPLES {
                let start = file.len() / SAMPLES * page;
                let sample = &file[start..];
                digest.update(&sample[..sample.len().min(SAMPLE_BYTES)]);
            }
        }
    }

    /// Maps a file and takes the tensors named, or all.
    fn open_file(&mut self, path: &Path, names: Option<&[String]>) -> Result<(), WeightsError> {
        let shown = path.display().to_string();
        self.marks.push(FileMark::of(path)?);
        let map = map(path).map_err(|error| WeightsError::File {
            path: shown.clone(),
            reason: error.to_string(),
        })?;
        let corrupt = |reason: String| WeightsError::Corrupt {
            path: shown.clone(),
            reason,
        };
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| corrupt(error.to_string()))?;
        // The header follows 8 bytes of its length; offsets count from its end.
        let data_start = 8 + header_bytes;
        let mut tensors = metadata.tensors();
        let names: Vec<String> =
            names.map_or_else(|| tensors.keys().cloned().collect(), <[String]>::to_vec);
        for name in names {
            let info = tensors.remove(&name).ok_or_else(|| {
                corrupt(format!(
                    "{INDEX} places the tensor {name} here, the file has none"
                ))
            })?;
            let bytes = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let place = Place {
                file: self.files.len(),
                bytes,
            };
            let entry = Entry {
                shape: info.shape.clone(),
                numbers: Numbers::Plain(info.dtype, place),
                rotary: None,
            };
            self.tensors.insert(name, entry);
        }
        self.files.push((path.to_owned(), map));
        Ok(())
    }
}

impl Entry {
    fn check_dtype(&self, name: &str) -> Result<(), WeightsError> {
        match &self.numbers {
            Numbers::Plain(dtype, _) if !matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) => {
                Err(WeightsError::Dtype {
                    name: name.to_owned(),
                    found: format!("{dtype:?}"),
                })
            }
            _ => Ok(()),
        }
    }
}

impl<P> Numbers<P> {
    /// The same with other words for where they lie.
    fn located<'a, Q>(&'a self, at: impl Fn(&'a P) -> Option<Q>) -> Option<Numbers<Q>> {
        Some(match self {
            Numbers::Plain(dtype, place) => Numbers::Plain(*dtype, at(place)?),
            Numbers::Blocks(tensor_type, place) => Numbers::Blocks(*tensor_type, at(place)?),
            Numbers::Words(words) => Numbers::Words(words.located(at)?),
        })
    }
}

impl FileMark {
    /// Looks at a file. To be called before it is opened: a file that is put in its place between the two is then taken for
    /// a changed one later, and never for an unchanged one.
    ///
    /// # Errors
    /// [`WeightsError::File`].
    pub fn of(path: &Path) -> Result<FileMark, WeightsError> {
        let found = std::fs::metadata(path).map_err(|error| WeightsError::File {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        Ok(FileMark {
            path: path.to_owned(),
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec()),
            changed: i128::from(found.ctime()) * 1_000_000_000 + i128::from(found.ctime_nsec()),
        })
    }

    /// Adds to a digest what is the same for all who see the file, under whatever path and device number.
    pub(crate) fn tell(&self, digest: &mut Sha256) {
        let name = self.path.file_name().unwrap_or_default();
        digest.update(format!(
            "{name:?} {} {} {} {}\n",
            self.inode, self.bytes, self.modified, self.changed
        ));
    }

    /// Whether the file is still this one.
    pub(crate) fn stands(&self) -> bool {
        FileMark::of(&self.path).is_ok_and(|now| now == *self)
    }
}

/// Reads a text file of a model folder, refusing absurdly long ones.
///
/// # Errors
/// [`WeightsError::File`].
pub fn read_text(path: &Path) -> Result<String, WeightsError> {
    let failed = |reason: String| WeightsError::File {
        path: path.display().to_string(),
        reason,
    };
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let mut text = String::new();
    let read = file
        .take(JSON_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| failed(error.to_string()))?;
    if read as u64 > JSON_BYTES_MAX {
        return Err(failed(format!("longer than {JSON_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// The tensors of each shard, by file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let refused = |reason: String| WeightsError::Index {
        path: path.display().to_string(),
        reason,
    };
    let index: Index =
        serde_json::from_str(&read_text(path)?).map_err(|error| refused(error.to_string()))?;
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        let mut parts = Path::new(&file).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(refused(format!(
                "the tensor {tensor} lies in {file:?}, which is not the name of a file in this folder"
            )));
        }
        files.entry(file).or_default().push(tensor);
    }
    if files.is_empty() {
        return Err(refused("it names no tensor".to_owned()));
    }
    Ok(files)
}

#[allow(unsafe_code)]
fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is read-only and only ever read as bytes, so no content can break a type. Changing the file
    // while it is mapped is outside this process's power; model folders are written once (see the module's text).
    unsafe { Mmap::map(&file) }
}

#[cfg(test)]
mod tests;
