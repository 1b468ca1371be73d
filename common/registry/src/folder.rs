//! Folders that every machine sees: `NAME/VERSION/`, and artifacts that an MLflow server keeps in a shared directory.

use std::fs;
use std::path::Path;

use common::model_ref::ModelRef;

use crate::{Error, Found};

/// Most names of a folder that are read for a message.
const NAMES_MAX: usize = 50;

/// A model's version in a folder of `NAME/VERSION/`.
pub(crate) fn find(root: &Path, model: &ModelRef) -> Result<Found, Error> {
    // Names have no slashes, and no dots at either end: they cannot lead out.
    let versions = root.join(&model.name);
    let folder = versions.join(&model.version);
    if folder.is_dir() {
        return Ok(Found::Folder(folder));
    }
    if !root.is_dir() {
        return Err(Error::Unavailable(format!(
            "{} is not a folder that can be read here",
            root.display()
        )));
    }
    if !versions.is_dir() {
        return Err(Error::NoModel(model.name.clone()));
    }
    Err(Error::NoVersion {
        name: model.name.clone(),
        version: model.version.clone(),
        known: numbers(&versions),
    })
}

/// A folder that a registry names.
pub(crate) fn model_at(path: &Path) -> Result<Found, Error> {
    if path.is_dir() {
        return Ok(Found::Folder(path.to_owned()));
    }
    Err(Error::Unusable(format!(
        "the registry keeps the model in the folder {}, which is not there on this machine: mount it at the same path \
         here and on the workers, or let the tracking server proxy artifacts (mlflow server --artifacts-destination)",
        path.display()
    )))
}

/// The versions in a model's folder.
fn numbers(folder: &Path) -> Vec<String> {
    let mut found: Vec<u64> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(NAMES_MAX)
        .collect();
    found.sort_unstable();
    found.iter().map(u64::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_folders_and_what_is_missing_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        for version in ["10", "2", "notes"] {
            fs::create_dir_all(root.path().join("ml.demo.a").join(version)).unwrap();
        }
        let find = |name: &str, version: &str| {
            super::find(root.path(), &ModelRef::new(name, version).unwrap())
        };
        let folder = root.path().join("ml.demo.a/2");
        assert_eq!(find("ml.demo.a", "2"), Ok(Found::Folder(folder)));
        assert_eq!(
            find("ml.demo.a", "3").unwrap_err().to_string(),
            "Model version '3' of registered model 'ml.demo.a' does not exist. Known versions: 2, 10"
        );
        assert_eq!(find("b", "1"), Err(Error::NoModel("b".into())));
        let gone = super::find(Path::new("/no/such"), &ModelRef::new("b", "1").unwrap());
        assert!(matches!(gone, Err(Error::Unavailable(_))), "{gone:?}");
    }

    #[test]
    fn a_shared_folder_that_is_not_mounted_says_what_would_help() {
        let message = model_at(Path::new("/no/such/model")).unwrap_err();
        assert!(message.to_string().contains("--artifacts-destination"));
    }
}
