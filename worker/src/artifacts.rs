//! A model's folder: where its weights and its tokenizer are, and its task.
//!
//! Reads two layouts: a plain Hugging Face folder, and MLflow's transformers flavour; in both a GGUF file may stand for
//! config, weights and tokenizer. Looks at names and at `MLmodel` alone; runs no code of the artifact and never leaves the
//! folder. How the folder came to this machine is the
//! [`library`]'s business.

mod cache;
mod fetch;
pub mod library;

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_yaml_ng::Value;

/// Longest `MLmodel` read; real ones have a few kilobytes, or some hundred with an input example inside.
const MLMODEL_BYTES_MAX: u64 = 4 << 20;
/// Where MLflow has put weights over time, the newest first.
const WEIGHTS_FOLDERS: [&str; 3] = ["model", "pipeline", "."];

/// What the name of a GGUF file ends with.
const GGUF: &str = "gguf";
/// What makes a folder one of safetensors, whatever else is in it.
const SAFETENSORS: [&str; 2] = ["model.safetensors", "model.safetensors.index.json"];

/// The parts of a model's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFolder {
    /// The folder of `config.json` and weights, or a GGUF file.
    pub weights: PathBuf,
    /// The folder of the tokenizer's files, or the GGUF file that has it.
    pub tokenizer: PathBuf,
    /// The task the model was logged for (`llm/v1/completions`, ...).
    pub task: Option<String>,
}

/// Why a folder is not a model.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// Nothing there, or not readable.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// What was asked for.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// No layout that is known.
    #[error(
        "{}: neither MLmodel nor config.json nor a .gguf file is there; give a Hugging Face folder, an MLflow model or a \
         GGUF file",
        .0.display()
    )]
    NoModel(PathBuf),
    /// `MLmodel` is not what it should be.
    #[error("{}/MLmodel: {reason}", folder.display())]
    Malformed {
        /// The model's folder.
        folder: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An MLflow model without what serving needs.
    #[error("{}: {reason}", folder.display())]
    Unsupported {
        /// The model's folder.
        folder: PathBuf,
        /// What is missing and what would help.
        reason: String,
    },
}

impl ModelFolder {
    /// Finds the parts of a model's folder.
    ///
    /// # Errors
    /// [`ArtifactError`] says what was looked for.
    pub fn find(folder: &Path) -> Result<ModelFolder, ArtifactError> {
        let unreadable = |source| ArtifactError::Unreadable {
            path: folder.to_owned(),
            source,
        };
        let folder = folder.canonicalize().map_err(unreadable)?;
        let mlmodel = folder.join("MLmodel");
        if mlmodel.is_file() {
            return MlModel::read(&folder, &mlmodel)?.find();
        }
        let Some(weights) = weights_in(&folder)? else {
            return Err(ArtifactError::NoModel(folder));
        };
        Ok(ModelFolder {
            tokenizer: weights.clone(),
            weights,
            task: None,
        })
    }
}

/// A model's weights in a folder: the folder itself, or the GGUF file in it; a file stands for itself.
fn weights_in(folder: &Path) -> Result<Option<PathBuf>, ArtifactError> {
    if is_gguf(folder) {
        return Ok(Some(folder.to_owned()));
    }
    if SAFETENSORS.iter().any(|name| folder.join(name).is_file()) {
        return Ok(Some(folder.to_owned()));
    }
    let entries = fs::read_dir(folder).into_iter().flatten();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = paths.filter(|path| is_gguf(path)).collect();
    if found.len() > 1 {
        return Err(ArtifactError::Unsupported {
            folder: folder.to_owned(),
            reason: format!(
                "it holds {} .gguf files; leave one in the folder, or name it in the model's path",
                found.len()
            ),
        });
    }
    Ok(found.pop().or_else(|| {
        folder
            .join("config.json")
            .is_file()
            .then(|| folder.to_owned())
    }))
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == GGUF) && path.is_file()
}

/// A model logged by MLflow.
struct MlModel<'a> {
    folder: &'a Path,
    /// The flavour's entry.
    flavour: Value,
    metadata_task: Option<String>,
}

impl<'a> MlModel<'a> {
    fn read(folder: &'a Path, file: &Path) -> Result<MlModel<'a>, ArtifactError> {
        let unreadable = |source| ArtifactError::Unreadable {
            path: file.to_owned(),
            source,
        };
        let malformed = |reason: String| ArtifactError::Malformed {
            folder: folder.to_owned(),
            reason,
        };
        let bytes = fs::metadata(file).map_err(unreadable)?.len();
        if bytes > MLMODEL_BYTES_MAX {
            return Err(malformed(format!(
                "{bytes} bytes exceed the limit of {MLMODEL_BYTES_MAX}"
            )));
        }
        let text = fs::read_to_string(file).map_err(unreadable)?;
        let yaml: Value = serde_yaml_ng::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        let flavours = yaml.get("flavors").and_then(Value::as_mapping);
        let Some(flavour) = flavours.and_then(|all| all.get("transformers")) else {
            let names: Vec<&str> = flavours
                .into_iter()
                .flat_map(|all| all.keys())
                .filter_map(Value::as_str)
                .collect();
            let names = if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            };
            return Err(malformed(format!(
                "it has no transformers flavour (flavours: {names}); log it with mlflow.transformers"
            )));
        };
        let metadata_task = yaml
            .get("metadata")
            .and_then(|m| m.get("task"))
            .and_then(Value::as_str)
            .map(str::to_owned);
        Ok(MlModel {
            folder,
            flavour: flavour.clone(),
            metadata_task,
        })
    }

    fn find(&self) -> Result<ModelFolder, ArtifactError> {
        if self.text("peft_adaptor").is_some() {
            return Err(self.unsupported(
                "it holds a PEFT adapter only; merge it into its base model and log that",
            ));
        }
        let weights = self.weights()?;
        let tokenizer = self
            .inside("components/tokenizer")?
            .unwrap_or_else(|| weights.clone());
        let task = self
            .metadata_task
            .clone()
            .or_else(|| self.text("inference_task").map(str::to_owned));
        Ok(ModelFolder {
            weights,
            tokenizer,
            task,
        })
    }

    fn weights(&self) -> Result<PathBuf, ArtifactError> {
        let named = self.text("model_binary");
        let candidates = named.into_iter().chain(WEIGHTS_FOLDERS);
        for candidate in candidates {
            let Some(folder) = self.inside(candidate)? else {
                continue;
            };
            if let Some(found) = weights_in(&folder)? {
                return Ok(found);
            }
        }
        match (named, self.text("source_model_name")) {
            (None, Some(source)) => Err(self.unsupported(&format!(
                "its weights are not in the artifact (it was logged with save_pretrained=False and names {source}); \
                 log it with its weights"
            ))),
            _ => Err(self.unsupported(&format!(
                "no config.json and no .gguf file in {}",
                WEIGHTS_FOLDERS.join(", ")
            ))),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.flavour.get(key).and_then(Value::as_str)
    }

    /// A folder of the artifact, if it is there. Refuses names that lead out of it, also by links.
    fn inside(&self, name: &str) -> Result<Option<PathBuf>, ArtifactError> {
        let outside = || ArtifactError::Malformed {
            folder: self.folder.to_owned(),
            reason: format!("the folder \"{name}\" leads out of the model"),
        };
        if !Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        {
            return Err(outside());
        }
        match self.folder.join(name).canonicalize() {
            Ok(found) if !found.starts_with(self.folder) => Err(outside()),
            Ok(found) if found.is_dir() => Ok(Some(found)),
            _ => Ok(None),
        }
    }

    fn unsupported(&self, reason: &str) -> ArtifactError {
        ArtifactError::Unsupported {
            folder: self.folder.to_owned(),
            reason: reason.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAVOUR: &str = "flavors:\n  transformers:\n    task: text-generation\n";

    /// A folder with these files; `MLmodel` gets the given text.
    fn folder(mlmodel: Option<&str>, files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "{}").unwrap();
        }
        if let Some(text) = mlmodel {
            fs::write(folder.path().join("MLmodel"), text).unwrap();
        }
        folder
    }

    fn found(folder: &tempfile::TempDir) -> (String, String, Option<String>) {
        let found = ModelFolder::find(folder.path()).unwrap();
        let root = folder.path().canonicalize().unwrap();
        let part = |path: &Path| {
            path.strip_prefix(&root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        };
        (part(&found.weights), part(&found.tokenizer), found.task)
    }

    fn refused(folder: &tempfile::TempDir) -> String {
        ModelFolder::find(folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn a_plain_folder_is_weights_and_tokenizer_in_one() {
        assert_eq!(
            found(&folder(None, &["config.json"])),
            (String::new(), String::new(), None)
        );
    }

    #[test]
    fn an_mlflow_model_names_its_weights_and_keeps_its_tokenizer_apart() {
        let text = format!(
            "{FLAVOUR}    model_binary: model\n    inference_task: llm/v1/chat\nmetadata:\n  task: llm/v1/completions\n"
        );
        let model = folder(
            Some(&text),
            &["model/config.json", "components/tokenizer/tokenizer.json"],
        );
        let task = Some("llm/v1/completions".to_owned());
        assert_eq!(
            found(&model),
            ("model".into(), "components/tokenizer".into(), task)
        );
    }

    #[test]
    fn a_gguf_file_is_weights_and_tokenizer_unless_the_log_has_one_of_its_own() {
        let plain = folder(None, &["m.gguf", "config.json"]);
        let file = || "m.gguf".to_owned();
        assert_eq!(found(&plain), (file(), file(), None));
        let alone = ModelFolder::find(&plain.path().join("m.gguf")).unwrap();
        assert_eq!(alone, ModelFolder::find(plain.path()).unwrap());
        let text = format!("{FLAVOUR}    model_binary: model\n    inference_task: llm/v1/chat\n");
        let logged = folder(Some(&text), &["model/m.gguf"]);
        let task = Some("llm/v1/chat".to_owned());
        let inside = || "model/m.gguf".to_owned();
        assert_eq!(found(&logged), (inside(), inside(), task.clone()));
        let tokenizer = "components/tokenizer/tokenizer.json";
        let logged = folder(Some(&text), &["model/m.gguf", tokenizer]);
        let components = "components/tokenizer".to_owned();
        assert_eq!(found(&logged), (inside(), components, task));
    }

    #[test]
    fn safetensors_come_before_a_gguf_file_and_two_such_files_are_refused() {
        let both = folder(None, &["config.json", "model.safetensors", "m.gguf"]);
        assert_eq!(found(&both), (String::new(), String::new(), None));
        let two = folder(None, &["a.gguf", "b.gguf"]);
        assert!(refused(&two).contains("it holds 2 .gguf files"));
    }

    #[test]
    fn a_log_of_before_model_binary_has_its_weights_in_pipeline() {
        let text = format!("{FLAVOUR}    inference_task: llm/v1/chat\n");
        let model = folder(Some(&text), &["pipeline/config.json"]);
        assert_eq!(
            found(&model),
            (
                "pipeline".into(),
                "pipeline".into(),
                Some("llm/v1/chat".into())
            )
        );
    }

    #[test]
    fn what_cannot_be_served_says_why_and_what_would_help() {
        let no_weights =
            format!("{FLAVOUR}    source_model_name: org/model\n    source_model_revision: abc\n");
        assert!(refused(&folder(Some(&no_weights), &[])).contains("names org/model"));
        let adapter = format!("{FLAVOUR}    peft_adaptor: peft\n");
        assert!(refused(&folder(Some(&adapter), &[])).contains("merge it"));
        let sklearn = "flavors:\n  python_function: {}\n  sklearn: {}\n";
        assert!(
            refused(&folder(Some(sklearn), &[])).contains("(flavours: python_function, sklearn)")
        );
        assert!(refused(&folder(Some("flavors: ["), &[])).contains("MLmodel: "));
        assert!(
            refused(&folder(Some(FLAVOUR), &[])).contains("no .gguf file in model, pipeline, .")
        );
        assert!(refused(&folder(None, &["other.txt"])).contains("neither MLmodel nor config.json"));
        assert!(
            ModelFolder::find(Path::new("/nowhere/at all"))
                .unwrap_err()
                .to_string()
                .starts_with("cannot read /nowhere")
        );
    }

    #[test]
    fn names_and_links_that_lead_out_of_the_folder_are_refused() {
        for name in ["../other", "/etc", "model/../../other"] {
            let text = format!("{FLAVOUR}    model_binary: \"{name}\"\n");
            assert!(
                refused(&folder(Some(&text), &[])).contains("leads out"),
                "{name}"
            );
        }
        let elsewhere = folder(None, &["config.json"]);
        let model = folder(Some(&format!("{FLAVOUR}    model_binary: model\n")), &[]);
        std::os::unix::fs::symlink(elsewhere.path(), model.path().join("model")).unwrap();
        assert!(refused(&model).contains("leads out"));
    }
}
