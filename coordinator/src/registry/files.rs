//! A model's files, wherever they are: what layout, shape and headers are read from.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::RegistryError;

/// Files by their paths in the model. Calls block.
pub trait Files {
    /// A file's full name, for messages; that of the model for the empty path.
    fn name(&self, path: &str) -> String;

    /// Whether there is a file.
    fn has(&self, path: &str) -> bool;

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

/// The files of a folder.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// The files of the model in a folder.
    ///
    /// # Errors
    /// [`RegistryError::Broken`] when it is none.
    pub fn open(path: &Path) -> Result<Folder, RegistryError> {
        match path.is_dir() {
            true => Ok(Folder(path.to_owned())),
            false => Err(RegistryError::Broken(format!(
                "{}: is not a folder",
                path.display()
            ))),
        }
    }
}

impl Files for Folder {
    fn name(&self, path: &str) -> String {
        match path {
            "" => self.0.display().to_string(),
            path => self.0.join(path).display().to_string(),
        }
    }

    fn has(&self, path: &str) -> bool {
        self.0.join(path).is_file()
    }

    fn open(&self, path: &str) -> Result<Opened, RegistryError> {
        let open = || {
            let file = File::open(self.0.join(path))?;
            let bytes = file.metadata()?.len();
            Ok(Opened {
                bytes: Some(bytes),
                reader: Box::new(file),
            })
        };
        open().map_err(|e: std::io::Error| self.broken(path, &e.to_string()))
    }
}
