//! The layout of a model: a plain Hugging Face folder, MLflow's transformers flavour with its `MLmodel` file, or a GGUF file
//! in place of the weights of either.
//!
//! Owns where the weights and the tokenizer are and which task is named. What is in them is read elsewhere.

use serde::Deserialize;

use super::RegistryError;
use super::files::{Files, GGUF, within};
use super::tensors::has_weights;

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
    /// The folder with `config.json` and the safetensors, or with the GGUF file.
    pub weights: String,
    /// The GGUF file's name, where the model is one.
    pub gguf: Option<String>,
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
        return match is_model(files, "") {
            true => Ok(Layout {
                weights: String::new(),
                gguf: gguf(files, "").map_err(broken)?,
                tokenizer: String::new(),
                task: None,
            }),
            false => Err(broken(
                "has neither a config.json (Hugging Face) nor an MLmodel (MLflow) nor a .gguf file"
                    .into(),
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
        gguf: gguf(files, &weights).map_err(broken)?,
        weights,
        tokenizer,
        task: Some(task),
    })
}

/// Whether a folder holds a model's weights, by what they are described with.
fn is_model(files: &dyn Files, folder: &str) -> bool {
    files.has(&within(folder, "config.json")) || !ggufs(files, folder).is_empty()
}

/// The GGUF file that the model in a folder consists of. Safetensors beside one come first.
fn gguf(files: &dyn Files, folder: &str) -> Result<Option<String>, String> {
    if has_weights(files, folder) {
        return Ok(None);
    }
    let mut found = ggufs(files, folder);
    if found.len() < 2 {
        return Ok(found.pop());
    }
    let (count, first) = (found.len(), &found[0]);
    Err(match first.contains("-00001-of-") {
        true => format!(
            "holds a model in parts ({first} and on); join them with llama-gguf-split --merge {first} OUT{GGUF}"
        ),
        false => format!(
            "holds {count} {GGUF} files ({}); a model is one: leave one in the folder, or name it in path",
            shown(&found)
        ),
    })
}

fn ggufs(files: &dyn Files, folder: &str) -> Vec<String> {
    let mut names = files.names(folder);
    names.retain(|name| name.ends_with(GGUF));
    names
}

/// The first few of some names.
fn shown(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
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

/// `model_binary`; else `pipeline/`, where MLflow before 2.4.1 put them; else wherever a config.json or a GGUF file is.
fn weights(files: &dyn Files, flavor: &Transformers) -> Result<String, String> {
    let has_config = |folder: &str| is_model(files, folder);
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
            false => Err(format!(
                "model_binary '{inside}' has neither a config.json nor a {GGUF} file"
            )),
        };
    }
    let found = ["pipeline", "model", ""]
        .into_iter()
        .find(|folder| has_config(folder));
    found.map(str::to_owned).ok_or_else(|| match &flavor.source_model_name {
        Some(name) => format!(
            "holds a reference to {name} instead of weights (save_pretrained=False); log the model with its weights"
        ),
        None => format!(
            "has no config.json and no {GGUF} file in model/, pipeline/ or the folder itself"
        ),
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
            gguf: None,
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
    fn a_gguf_file_takes_the_place_of_config_and_safetensors() {
        let gguf = |layout: Result<Layout, String>| layout.map(|layout| layout.gguf);
        let name = Some("m-Q4_0.gguf".to_owned());
        let plain = Folder::with(&[
            ("m-Q4_0.gguf", ""),
            ("config.json", "{}"),
            ("README.md", ""),
        ]);
        assert_eq!(gguf(plain.layout()), Ok(name.clone()));
        let logged = format!("{OLD}    model_binary: model\n{TASK}");
        let logged = Folder::with(&[("MLmodel", &logged), ("model/m-Q4_0.gguf", "")]);
        assert_eq!(gguf(logged.layout()), Ok(name));
        let both = Folder::with(&[
            ("m.gguf", ""),
            ("config.json", "{}"),
            ("model.safetensors", ""),
        ]);
        assert_eq!(gguf(both.layout()), Ok(None));
    }

    #[test]
    fn several_gguf_files_are_refused_with_what_would_do() {
        let message = |names: &[&str]| {
            let files: Vec<(&str, &str)> = names.iter().map(|name| (*name, "")).collect();
            Folder::with(&files).layout().unwrap_err()
        };
        let several = message(&["a.gguf", "b.gguf"]);
        assert!(
            several.contains("holds 2 .gguf files (a.gguf, b.gguf)")
                && several.contains("name it in path"),
            "{several}"
        );
        let parts = message(&["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
        assert!(
            parts.contains("llama-gguf-split --merge m-00001-of-00002.gguf"),
            "{parts}"
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
