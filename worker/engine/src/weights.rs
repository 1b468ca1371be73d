//! The weights of a model folder: safetensors, in one file or in shards with an index, mapped and never copied whole.
//!
//! Owns opening, the check against what the model needs, and reading ranges of numbers as f32. A file is believed only
//! after its header agrees with its length. Knows no ranks and no backend.
//!
//! The files must not be cut short while they are mapped: reading past the new end would end the process, as with any
//! mapping. Model folders are written once, to a new name.

pub mod packed;
pub mod quant;

use crate::models::tensors::Expected;
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
/// Bytes of each tensor that go into a digest of the weights.
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
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor in a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
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

/// Why a checkpoint is refused. Every message names the file or the tensor.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file is missing or unreadable.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// The system's words.
        reason: String,
    },
    /// The folder has no safetensors.
    #[error(
        "{dir} has neither {SINGLE} nor {INDEX}; other formats must be converted to safetensors first"
    )]
    NoWeights {
        /// The folder.
        dir: String,
    },
    /// A safetensors file is cut short, or its header is not what it claims.
    #[error("{path} is corrupt or cut short: {reason}")]
    Corrupt {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The index of a sharded checkpoint is unusable.
    #[error("{path}: {reason}")]
    Index {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The model needs a tensor that is not there.
    #[error("the checkpoint has no tensor {name} {shape:?}")]
    Missing {
        /// Which.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor {name} has the shape {found:?}; config.json asks for {expected:?}")]
    Shape {
        /// Which.
        name: String,
        /// In the file.
        found: Vec<usize>,
        /// By the config.
        expected: Vec<usize>,
    },
    /// A tensor's number format is not supported.
    #[error("tensor {name} has the dtype {found}; supported are BF16, F16 and F32")]
    Dtype {
        /// Which.
        name: String,
        /// In the file.
        found: String,
    },
    /// A tensor that the model does not use: leaving it out would change what the model computes.
    #[error("the checkpoint has a tensor {name} that config.json does not account for")]
    Unexpected {
        /// Which.
        name: String,
    },
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
            if !matches!(entry.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) {
                return Err(WeightsError::Dtype {
                    name: name.clone(),
                    found: format!("{:?}", entry.dtype),
                });
            }
            unused.remove(name.as_str());
        }
        match unused
            .into_iter()
            .find(|name| !IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)))
        {
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
        let bytes = self
            .files
            .get(entry.file)
            .and_then(|(_, map)| map.get(entry.bytes.clone()))
            .ok_or_else(missing)?;
        match entry.dtype {
            Dtype::BF16 | Dtype::F16 | Dtype::F32 => Ok(Tensor {
                dtype: entry.dtype,
                bytes,
            }),
            other => Err(WeightsError::Dtype {
                name: name.to_owned(),
                found: format!("{other:?}"),
            }),
        }
    }

    /// Adds to a digest every tensor's name, form and a page from its middle: two models of one architecture differ there,
    /// whatever is said about their files.
    pub(crate) fn sample(&self, digest: &mut Sha256) {
        for (name, entry) in &self.tensors {
            let bytes = self.files[entry.file].1.get(entry.bytes.clone());
            let bytes = bytes.unwrap_or_default();
            let sample = &bytes[bytes.len() / 2..];
            digest.update(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape));
            digest.update(&sample[..sample.len().min(SAMPLE_BYTES)]);
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
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes,
            };
            self.tensors.insert(name, entry);
        }
        self.files.push((path.to_owned(), map));
        Ok(())
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

impl Tensor<'_> {
    /// Widens `out.len()` numbers from the flat index `start` on.
    ///
    /// # Panics
    /// Past the tensor's end; the shapes were checked by [`Weights::check`].
    pub fn read(&self, start: usize, out: &mut [f32]) {
        fn each<const N: usize>(
            bytes: &[u8],
            start: usize,
            out: &mut [f32],
            widen: impl Fn([u8; N]) -> f32,
        ) {
            let (numbers, _) = bytes.as_chunks::<N>();
            let numbers = &numbers[start..][..out.len()];
            for (out, number) in out.iter_mut().zip(numbers) {
                *out = widen(*number);
            }
        }
        match self.dtype {
            Dtype::BF16 => each(self.bytes, start, out, |number| {
                half::bf16::from_le_bytes(number).to_f32()
            }),
            Dtype::F16 => each(self.bytes, start, out, |number| {
                half::f16::from_le_bytes(number).to_f32()
            }),
            // `Weights::tensor` gives no other.
            _ => each(self.bytes, start, out, f32::from_le_bytes),
        }
    }

    /// The whole tensor, widened.
    #[must_use]
    pub fn to_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.bytes.len() * 8 / self.dtype.bitsize()];
        self.read(0, &mut out);
        out
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
