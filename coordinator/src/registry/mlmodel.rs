//! The layout of a model folder: a plain Hugging Face folder, or MLflow's transformers flavour with its `MLmodel` file.
//!
//! Owns where the weights are and which task is named. The tokenizer is the worker's business.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::{RegistryError, read_bounded};

/// Greatest `MLmodel` file that is read: real ones hold a few kilobytes, with large signatures some hundred.
const MLMODEL_BYTES_MAX: u64 = 4 << 20;

/// Where a model's parts are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The folder with `config.json` and the safetensors.
    pub weights: PathBuf,
    /// `metadata.task`, else the flavour's `inference_task`.
    pub task: Option<String>,
}

#[derive(Debug, Deserialize)]
struct MlModel {
    #[serde(default)]
    flavors: Flavors,
    #[serde(default)]
    metadata: Option<Metadata>,
}

#[derive(Debug, Default, Deserialize)]
struct Flavors {
    transformers: Option<Transformers>,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    task: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Transformers {
    model_binary: Option<String>,
    source_model_name: Option<String>,
    source_model_revision: Option<String>,
    inference_task: Option<String>,
    peft_adaptor: Option<String>,
}

/// Finds the parts of the model in `folder`.
///
/// # Errors
/// [`RegistryError::Broken`]: not a model folder, or a layout that cannot be served; says why.
pub fn layout(folder: &Path) -> Result<Layout, RegistryError> {
    let broken = |reason: String| RegistryError::Broken(format!("{}: {reason}", folder.display()));
    if !folder.is_dir() {
        return Err(broken("is not a folder".into()));
    }
    let file = folder.join("MLmodel");
    if !file.is_file() {
        return match folder.join("config.json").is_file() {
            true => Ok(Layout {
                weights: folder.to_owned(),
                task: None,
            }),
            false => Err(broken(
                "has neither a config.json (Hugging Face) nor an MLmodel (MLflow)".into(),
            )),
        };
    }
    let text = read_bounded(&file, MLMODEL_BYTES_MAX)?;
    let parsed: MlModel = serde_yaml_ng::from_slice(&text)
        .map_err(|e| broken(format!("MLmodel is not readable: {e}")))?;
    let Some(flavor) = parsed.flavors.transformers else {
        return Err(broken(
            "MLmodel has no transformers flavour; log the model with mlflow.transformers.log_model"
                .into(),
        ));
    };
    if flavor.peft_adaptor.is_some() {
        return Err(broken(
            "is an adapter (peft_adaptor); merge it into its base model and log that".into(),
        ));
    }
    let weights = weights(folder, &flavor).map_err(broken)?;
    let task = parsed
        .metadata
        .and_then(|metadata| metadata.task)
        .or(flavor.inference_task);
    Ok(Layout { weights, task })
}

/// `model_binary`; else `pipeline/`, where MLflow before 2.4.1 put them; else wherever a config.json is.
fn weights(folder: &Path, flavor: &Transformers) -> Result<PathBuf, String> {
    if let Some(inside) = &flavor.model_binary {
        // A stranger's text: it must not lead out of the folder.
        if !Path::new(inside)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        {
            return Err(format!(
                "model_binary '{inside}' leads out of the model's folder"
            ));
        }
        let weights = folder.join(inside);
        return match weights.join("config.json").is_file() {
            true => Ok(weights),
            false => Err(format!("model_binary '{inside}' has no config.json")),
        };
    }
    let found = ["pipeline", "model", "."]
        .map(|name| folder.join(name))
        .into_iter()
        .find(|at| at.join("config.json").is_file());
    found.ok_or_else(|| match (&flavor.source_model_name, &flavor.source_model_revision) {
        (Some(name), Some(_)) => format!(
            "holds a reference to {name} instead of weights (save_pretrained=False); log the model with its weights"
        ),
        _ => "has no config.json in model/, pipeline/ or the folder itself".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn with(files: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let path = folder.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Folder(folder)
        }

        fn layout(&self) -> Result<(String, Option<String>), String> {
            match layout(self.0.path()) {
                Ok(found) => {
                    let weights = found
                        .weights
                        .strip_prefix(self.0.path())
                        .unwrap()
                        .display()
                        .to_string();
                    Ok((weights, found.task))
                }
                Err(e) => Err(e.to_string()),
            }
        }
    }

    const OLD: &str =
        "flavors:\n  transformers:\n    task: text-generation\n    torch_dtype: torch.bfloat16\n";

    #[test]
    fn a_plain_folder_is_its_own_weights() {
        assert_eq!(
            Folder::with(&[("config.json", "{}")]).layout(),
            Ok((String::new(), None))
        );
    }

    #[test]
    fn mlflow_names_the_weights_and_the_task() {
        let new = format!(
            "{OLD}    model_binary: model\nmetadata:\n  task: llm/v1/completions\nsignature: {{inputs: x}}\n"
        );
        let folder = Folder::with(&[("MLmodel", &new), ("model/config.json", "{}")]);
        assert_eq!(
            folder.layout(),
            Ok(("model".into(), Some("llm/v1/completions".into())))
        );
        let inferred = format!("{OLD}    model_binary: model\n    inference_task: llm/v1/chat\n");
        let folder = Folder::with(&[("MLmodel", &inferred), ("model/config.json", "{}")]);
        assert_eq!(
            folder.layout(),
            Ok(("model".into(), Some("llm/v1/chat".into())))
        );
    }

    #[test]
    fn logs_from_before_mlflow_2_4_1_have_them_in_pipeline() {
        let folder = Folder::with(&[
            ("MLmodel", OLD),
            ("pipeline/config.json", "{}"),
            ("model/config.json", "{}"),
        ]);
        assert_eq!(folder.layout(), Ok(("pipeline".into(), None)));
    }

    #[test]
    fn what_cannot_be_served_says_why() {
        let message = |files: &[(&str, &str)]| Folder::with(files).layout().unwrap_err();
        assert!(message(&[]).contains("neither a config.json"));
        assert!(
            message(&[("MLmodel", "flavors: {sklearn: {}}")]).contains("no transformers flavour")
        );
        assert!(message(&[("MLmodel", "{{{")]).contains("MLmodel is not readable"));
        let escape = format!("{OLD}    model_binary: ../../etc\n");
        assert!(message(&[("MLmodel", &escape)]).contains("leads out of the model's folder"));
        let absolute = format!("{OLD}    model_binary: /etc\n");
        assert!(message(&[("MLmodel", &absolute)]).contains("leads out of the model's folder"));
        let adapter = format!("{OLD}    model_binary: model\n    peft_adaptor: peft\n");
        assert!(message(&[("MLmodel", &adapter)]).contains("adapter"));
        let reference = format!(
            "{OLD}    source_model_name: mosaicml/mpt-7b\n    source_model_revision: abc\n"
        );
        assert!(message(&[("MLmodel", &reference)]).contains("instead of weights"));
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        assert!(
            layout(Path::new("/no/such/model"))
                .unwrap_err()
                .to_string()
                .starts_with("/no/such/model: is not a folder")
        );
    }
}
