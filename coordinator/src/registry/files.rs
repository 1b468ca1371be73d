//! A model's files, wherever they are: what layout, shape and headers are read from.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::RegistryError;

/// Most names of a folder that are looked at.
const NAMES_MAX: usize = 10_000;

/// Files by their paths in the model. Calls block.
pub trait Files {
    /// A file's full name, for messages; that of the model for the empty path.
    fn name(&self, path: &str) -> String;

    /// Whether there is a file.
    fn has(&self, path: &str) -> bool;

    /// The names of the files in a folder of the model, sorted; none of those in folders below it.
    fn names(&self, folder: &str) -> Vec<String>;

    /// Opens a file.
    ///
    /// # Errors
    /// [`RegistryError`] names the file.
    fn open(&self, path: &str) -> Result<Opened, RegistryError>;

    /// A small file's bytes.
    ///
    /// # Errors
    /// [`RegistryError`] names the file.
    fn read(&self, path: &str, bytes_max: u64) -> Result<Vec<u8>, RegistryError> {
        let mut bytes = Vec::new();
        let opened = self.open(path)?;
        opened
            .reader
            .take(bytes_max + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| self.broken(path, &e.to_string()))?;
        if bytes.len() as u64 > bytes_max {
            return Err(self.broken(path, &format!("is longer than {bytes_max} bytes")));
        }
        Ok(bytes)
    }

    /// An error about a file.
    fn broken(&self, path: &str, reason: &str) -> RegistryError {
        RegistryError::Broken(format!("{}: {reason}", self.name(path)))
    }
}

/// An open file.
pub struct Opened {
    /// Its length, when that is known.
    pub bytes: Option<u64>,
    /// Its bytes, from the start.
    pub reader: Box<dyn Read>,
}

/// The path of a file in a folder of the model; the folder may be the model itself.
pub fn within(folder: &str, file: &str) -> String {
    match folder {
        "" => file.to_owned(),
        folder => format!("{folder}/{file}"),
    }
}

/// What the name of a GGUF file ends with.
pub const GGUF: &str = ".gguf";

/// The files of a folder, or of all that are in it the one that is the model.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
    only: Option<String>,
}

impl Folder {
    /// The files of the model in a folder, or of the model that is a GGUF file.
    ///
    /// # Errors
    /// [`RegistryError::Broken`] when it is neither.
    pub fn open(path: &Path) -> Result<Folder, RegistryError> {
        if path.is_dir() {
            return Ok(Folder {
                path: path.to_owned(),
                only: None,
            });
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match path.parent() {
            Some(parent) if path.is_file() && name.ends_with(GGUF) => Ok(Folder {
                path: parent.to_owned(),
                only: Some(name.into_owned()),
            }),
            _ => Err(RegistryError::Broken(format!(
                "{}: is not a folder, nor a {GGUF} file",
                path.display()
            ))),
        }
    }

    fn is_hidden(&self, path: &str) -> bool {
        self.only.as_ref().is_some_and(|only| only != path)
    }
}

impl Files for Folder {
    fn name(&self, path: &str) -> String {
        match (path, &self.only) {
            ("", None) => self.path.display().to_string(),
            ("", Some(only)) => self.path.join(only).display().to_string(),
            (path, _) => self.path.join(path).display().to_string(),
        }
    }

    fn has(&self, path: &str) -> bool {
        !self.is_hidden(path) && self.path.join(path).is_file()
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path.join(folder));
        let mut names: Vec<String> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| self.has(&within(folder, name)))
            .take(NAMES_MAX)
            .collect();
        names.sort_unstable();
        names
    }

    fn open(&self, path: &str) -> Result<Opened, RegistryError> {
        let open = || {
            let file = File::open(self.path.join(path))?;
            let bytes = file.metadata()?.len();
            Ok(Opened {
                bytes: Some(bytes),
                reader: Box::new(file),
            })
        };
        open().map_err(|e: std::io::Error| self.broken(path, &e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gguf_file_is_a_model_of_its_own_whatever_lies_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.gguf", "b.gguf", "config.json"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let whole = Folder::open(folder.path()).unwrap();
        assert_eq!(whole.names(""), ["a.gguf", "b.gguf", "config.json"]);
        let one = Folder::open(&folder.path().join("b.gguf")).unwrap();
        assert_eq!(one.names(""), ["b.gguf"]);
        assert!(one.has("b.gguf") && !one.has("config.json"));
        assert!(one.name("").ends_with("/b.gguf"));
        let other = Folder::open(&folder.path().join("config.json"));
        let message = other.unwrap_err().to_string();
        assert!(
            message.ends_with("is not a folder, nor a .gguf file"),
            "{message}"
        );
    }
}
