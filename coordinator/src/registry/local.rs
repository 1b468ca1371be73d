//! The registry in cluster.toml: `[[models]]` with a name, a version and a folder.

use common::config::ModelEntry;
use common::model_ref::ModelRef;

use super::{ModelFacts, RegistryError, read_facts};

/// The models that cluster.toml registers.
#[derive(Debug, Clone)]
pub struct LocalRegistry {
    models: Vec<ModelEntry>,
}

impl LocalRegistry {
    /// A registry of these models.
    pub fn new(models: Vec<ModelEntry>) -> Self {
        LocalRegistry { models }
    }

    /// The models, in the order of the file.
    pub fn models(&self) -> impl Iterator<Item = &ModelRef> {
        self.models.iter().map(|entry| &entry.model)
    }

    /// Reads the facts of a model's files. Blocks: headers are read from disk.
    ///
    /// # Errors
    /// [`RegistryError`]: not registered (with what is), or broken files.
    pub fn facts(&self, model: &ModelRef) -> Result<ModelFacts, RegistryError> {
        let Some(entry) = self.models.iter().find(|entry| entry.model == *model) else {
            return Err(RegistryError::Unknown(self.unknown(model)));
        };
        read_facts(model, &entry.path, entry.kv_dtype, entry.context_max)
    }

    fn unknown(&self, model: &ModelRef) -> String {
        let versions: Vec<&str> = self
            .models()
            .filter(|known| known.name == model.name)
            .map(|known| known.version.as_str())
            .collect();
        if versions.is_empty() {
            let mut names: Vec<&str> = self.models().map(|known| known.name.as_str()).collect();
            names.dedup();
            let known = if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            };
            return format!(
                "Registered model '{}' does not exist. Registered models: {known}",
                model.name
            );
        }
        format!(
            "Model version '{}' of registered model '{}' does not exist. Known versions: {}",
            model.version,
            model.name,
            versions.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use common::wire::message::KvDtype;

    use super::*;

    fn registry() -> LocalRegistry {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models");
        let entry = |name: &str, folder: &str, context_max| ModelEntry {
            model: ModelRef::new(name, "1").unwrap(),
            path: models.join(folder),
            kv_dtype: KvDtype::Bf16,
            context_max,
        };
        LocalRegistry::new(vec![
            entry("ml.demo.tiny-llama", "tiny-llama", None),
            entry("ml.demo.tiny-mistral", "tiny-mistral", Some(512)),
            entry("ml.demo.tiny-mpt", "tiny-mpt", None),
            entry("greedy", "tiny-llama", Some(4096)),
            entry("gone", "no-such-model", None),
        ])
    }

    fn facts(name: &str, version: &str) -> Result<ModelFacts, RegistryError> {
        registry().facts(&ModelRef::new(name, version).unwrap())
    }

    #[test]
    fn the_tiny_models_are_read() {
        let llama = facts("ml.demo.tiny-llama", "1").unwrap();
        assert_eq!(
            (llama.shape.layers, llama.shape.kv_heads, llama.context_max),
            (4, 4, 1024)
        );
        assert_eq!(facts("ml.demo.tiny-mistral", "1").unwrap().context_max, 512);
        let mpt = facts("ml.demo.tiny-mpt", "1").unwrap();
        assert!(
            mpt.shape.tied
                && mpt
                    .tensors
                    .iter()
                    .any(|tensor| tensor.name.ends_with("attn.Wqkv.weight"))
        );
    }

    #[test]
    fn unknown_models_and_versions_name_the_known_ones() {
        let version = facts("ml.demo.tiny-llama", "7").unwrap_err();
        assert_eq!(
            version.to_string(),
            "Model version '7' of registered model 'ml.demo.tiny-llama' does not exist. Known versions: 1"
        );
        let model = facts("other", "1").unwrap_err();
        assert!(
            matches!(model, RegistryError::Unknown(_))
                && model.to_string().contains("ml.demo.tiny-llama, "),
            "{model}"
        );
    }

    #[test]
    fn a_context_beyond_the_models_own_and_a_missing_folder_are_errors() {
        let message = |name| facts(name, "1").unwrap_err().to_string();
        assert!(
            message("greedy")
                .contains("context_max = 4096 in cluster.toml is beyond the model's own 1024")
        );
        assert!(message("gone").contains("is not a folder"));
    }
}
