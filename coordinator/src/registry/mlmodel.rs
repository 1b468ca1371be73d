//! The layout of a model: a plain Hugging Face folder, or MLflow's transformers flavour with its `MLmodel` file.
//!
//! Owns where the weights and the tokenizer are and which task is named. What is in them is read elsewhere.

use serde::Deserialize;

use super::RegistryError;
use super::files::{Files, within};

/// The file that makes a folder a model of MLflow.
pub const MLMODEL: &str = "MLmodel";
/// Greatest `MLmodel` file that is read: real ones hold a few kilobytes, with large signatures some hundred.
const MLMODEL_BYTES_MAX: u64 = 4 << 20;
/// Where MLflow keeps the tokenizer.
const TOKENIZER: &str = "components/tokenizer";
/// Tasks that can be served.
pub const TASKS: [&str; 3] = ["llm/v1/completions", "llm/v1/chat", "llm/v1/embeddings"];

/// Where a model's parts are: paths in the model, empty for the model itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The folder with `config.json` and the safetensors.
    pub weights: String,
    /// The folder with the tokenizer's files.
    pub tokenizer: String,
    /// `metadata.task`, else the flavour's `inference_task`. A plain folder names none.
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
    inference_task: Option<String>,
    peft_adaptor: Option<String>,
}

/// Finds the parts of a model.
///
/// # Errors
/// [`RegistryError::Broken`]: not a model, or a layout that cannot be served; says why.
pub fn layout(files: &dyn Files) -> Result<Layout, RegistryError> {
    let broken = |reason: String| files.broken("", &reason);
    if !files.has(MLMODEL) {
        return match files.has("config.json") {
            true => Ok(Layout {
                weights: String::new(),
                tokenizer: String::new(),
                task: None,
            }),
            false => Err(broken(
                "has neither a config.json (Hugging Face) nor an MLmodel (MLflow)".into(),
            )),
        };
    }
    let text = files.read(MLMODEL, MLMODEL_BYTES_MAX)?;
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
    let weights = weights(files, &flavor).map_err(broken)?;
    let named = parsed.metadata.and_then(|metadata| metadata.task);
    let task = task(named.or(flavor.inference_task)).map_err(broken)?;
    let tokenizer = match ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
        .iter()
        .any(|file| files.has(&within(TOKENIZER, file)))
    {
        true => TOKENIZER.to_owned(),
        false => weights.clone(),
    };
    Ok(Layout {
        weights,
        tokenizer,
        task: Some(task),
    })
}

/// The task that a model was logged for, if it can be served.
fn task(named: Option<String>) -> Result<String, String> {
    let help = format!(
        "log it with mlflow.transformers.log_model(..., task=\"{0}\", metadata={{\"task\": \"{0}\"}}), or another of {1}",
        TASKS[0],
        TASKS.join(", ")
    );
    match named {
        Some(task) if TASKS.contains(&task.as_str()) => Ok(task),
        Some(task) => Err(format!(
            "was logged for the task '{task}', which is not served; {help}"
        )),
        None => Err(format!("was logged without a task; {help}")),
    }
}

/// `model_binary`; else `pipeline/`, where MLflow before 2.4.1 put them; else wherever a config.json is.
fn weights(files: &dyn Files, flavor: &Transformers) -> Result<String, String> {
    let has_config = |folder: &str| files.has(&within(folder, "config.json"));
    if let Some(inside) = &flavor.model_binary {
        // A stranger's text: it must not lead out of the folder.
        let folder = inside.trim_start_matches("./").trim_end_matches('/');
        let folder = if folder == "." { "" } else { folder };
        if !folder.is_empty() && registry::check_path(folder).is_err() {
            return Err(format!(
                "model_binary '{inside}' leads out of the model's folder"
            ));
        }
        return match has_config(folder) {
            true => Ok(folder.to_owned()),
            false => Err(format!("model_binary '{inside}' has no config.json")),
        };
    }
    let found = ["pipeline", "model", ""]
        .into_iter()
        .find(|folder| has_config(folder));
    found.map(str::to_owned).ok_or_else(|| match &flavor.source_model_name {
        Some(name) => format!(
            "holds a reference to {name} instead of weights (save_pretrained=False); log the model with its weights"
        ),
        None => "has no config.json in model/, pipeline/ or the folder itself".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::registry::files;

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

        fn layout(&self) -> Result<Layout, String> {
            let files = files::Folder::open(self.0.path()).unwrap();
            layout(&files).map_err(|e| e.to_string())
        }
    }

    fn found(weights: &str, tokenizer: &str, task: Option<&str>) -> Result<Layout, String> {
        Ok(Layout {
            weights: weights.into(),
            tokenizer: tokenizer.into(),
            task: task.map(str::to_owned),
        })
    }

    const OLD: &str =
        "flavors:\n  transformers:\n    task: text-generation\n    torch_dtype: torch.bfloat16\n";
    const TASK: &str = "metadata:\n  task: llm/v1/completions\n";
    const COMPLETIONS: Option<&str> = Some(TASKS[0]);

    #[test]
    fn a_plain_folder_is_its_own_weights() {
        let folder = Folder::with(&[("config.json", "{}")]);
        assert_eq!(folder.layout(), found("", "", None));
    }

    #[test]
    fn mlflow_names_the_weights_and_the_task() {
        let new = format!("{OLD}    model_binary: model\n{TASK}signature: {{inputs: x}}\n");
        let folder = Folder::with(&[
            ("MLmodel", &new),
            ("model/config.json", "{}"),
            ("components/tokenizer/tokenizer.json", "{}"),
        ]);
        assert_eq!(
            folder.layout(),
            found("model", "components/tokenizer", COMPLETIONS)
        );
        let inferred =
            format!("{OLD}    model_binary: ./model/\n    inference_task: llm/v1/chat\n");
        let folder = Folder::with(&[("MLmodel", &inferred), ("model/config.json", "{}")]);
        assert_eq!(
            folder.layout(),
            found("model", "model", Some("llm/v1/chat"))
        );
    }

    #[test]
    fn logs_from_before_mlflow_2_4_1_have_them_in_pipeline() {
        let folder = Folder::with(&[
            ("MLmodel", &format!("{OLD}{TASK}")),
            ("pipeline/config.json", "{}"),
            ("model/config.json", "{}"),
        ]);
        assert_eq!(folder.layout(), found("pipeline", "pipeline", COMPLETIONS));
    }

    #[test]
    fn a_log_without_a_task_or_with_another_says_what_to_log() {
        let message = |text: &str| {
            let text = format!("{OLD}    model_binary: model\n{text}");
            let folder = Folder::with(&[("MLmodel", &text), ("model/config.json", "{}")]);
            folder.layout().unwrap_err()
        };
        let says = "metadata={\"task\": \"llm/v1/completions\"}";
        let none = message("");
        assert!(
            none.contains("without a task") && none.contains(says),
            "{none}"
        );
        let other = message("metadata: {task: text-classification}\n");
        assert!(
            other.contains("'text-classification', which is not served") && other.contains(says),
            "{other}"
        );
    }

    #[test]
    fn what_cannot_be_served_says_why() {
        let message = |files: &[(&str, &str)]| Folder::with(files).layout().unwrap_err();
        assert!(message(&[]).contains("neither a config.json"));
        assert!(
            message(&[("MLmodel", "flavors: {sklearn: {}}")]).contains("no transformers flavour")
        );
        assert!(message(&[("MLmodel", "{{{")]).contains("MLmodel is not readable"));
        for outside in ["../../etc", "/etc", "model/../../etc"] {
            let escape = format!("{OLD}    model_binary: {outside}\n");
            let message = message(&[("MLmodel", &escape)]);
            assert!(
                message.contains("leads out of the model's folder"),
                "{message}"
            );
        }
        let adapter = format!("{OLD}    model_binary: model\n    peft_adaptor: peft\n");
        assert!(message(&[("MLmodel", &adapter)]).contains("adapter"));
        let reference = format!(
            "{OLD}    source_model_name: mosaicml/mpt-7b\n    source_model_revision: abc\n"
        );
        assert!(message(&[("MLmodel", &reference)]).contains("instead of weights"));
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = files::Folder::open(std::path::Path::new("/no/such/model")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/no/such/model: is not a folder")
        );
    }
}
