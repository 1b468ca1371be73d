//! From a name and a version to facts: the models of cluster.toml first, then each registry in turn.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::config::{Cluster, ModelEntry, ModelOrigin, RegistryKind, ServingDefaults};
use common::model_ref::ModelRef;
use registry::{Environment, Error, Found};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::remote::Remote;
use super::{Context, ModelFacts, RegistryError, error, read_facts, read_from};

/// Most versions whose facts are kept.
const FACTS_MAX: usize = 256;

/// Where models are looked up.
pub struct Registry {
    models: Vec<ModelEntry>,
    registries: Vec<Source>,
    known: Mutex<Known>,
}

/// A registry of cluster.toml, or why it cannot be used.
struct Source {
    name: String,
    opened: Result<Arc<registry::Registry>, Error>,
    serving: ServingDefaults,
    /// The hub finds only what `[[models]]` names.
    searched: bool,
}

/// Facts of versions in registries: they do not change.
#[derive(Default)]
struct Known {
    /// By what tells the version from any other.
    facts: HashMap<(ModelRef, String), Arc<ModelFacts>>,
    /// The last ones of a model, for when its registry does not answer.
    last: HashMap<ModelRef, Arc<ModelFacts>>,
}

impl Registry {
    /// The registries of cluster.toml. One that cannot be used says so when it is asked; the others serve.
    pub fn new(cluster: &Cluster, environment: Environment<'_>) -> Registry {
        let source = |entry: &common::config::RegistryEntry| Source {
            name: entry.name.clone(),
            opened: registry::Registry::open(entry, environment).map(Arc::new),
            serving: entry.serving,
            searched: entry.kind != RegistryKind::HuggingFace,
        };
        Registry {
            models: cluster.models.clone(),
            registries: cluster.registries.iter().map(source).collect(),
            known: Mutex::default(),
        }
    }

    /// The models that cluster.toml registers, in the order of the file.
    pub fn models(&self) -> impl Iterator<Item = &ModelRef> {
        self.models.iter().map(|entry| &entry.model)
    }

    /// The registries' names, each with its address or why it cannot be used.
    pub fn registries(&self) -> impl Iterator<Item = (&str, Result<String, &Error>)> {
        self.registries.iter().map(|source| {
            let address = source.opened.as_ref().map(|registry| registry.address());
            (source.name.as_str(), address)
        })
    }

    /// Reads what is known of a model without its weights: from its files where they are, or from what was read before.
    ///
    /// # Errors
    /// [`RegistryError`]: nobody knows it (with what is known), a registry does not answer, or broken files.
    pub async fn facts(&self, model: &ModelRef) -> Result<Arc<ModelFacts>, RegistryError> {
        let found = self.look_up(model).await;
        let mut known = self.known();
        match found {
            Ok(facts) => {
                if known.last.len() < FACTS_MAX || known.last.contains_key(model) {
                    known.last.insert(model.clone(), facts.clone());
                }
                Ok(facts)
            }
            Err(RegistryError::Unavailable(message)) => match known.last.get(model) {
                // What was deployed once can be brought back: workers have its files in their caches.
                Some(facts) => {
                    tracing::warn!(%model, message, "a registry does not answer; what it said before is used");
                    Ok(facts.clone())
                }
                None => Err(RegistryError::Unavailable(message)),
            },
            Err(error) => Err(error),
        }
    }

    async fn look_up(&self, model: &ModelRef) -> Result<Arc<ModelFacts>, RegistryError> {
        if let Some(entry) = self.models.iter().find(|entry| entry.model == *model) {
            let context = Context::exact(model, entry.serving);
            return match &entry.origin {
                ModelOrigin::Folder(path) => in_folder(context, path.clone()).await,
                ModelOrigin::Registry { registry, uri } => {
                    let (name, registry) = self.registry(registry)?;
                    let found = registry.locate(uri).await.map_err(error)?;
                    self.read(context, name, registry, found).await
                }
            };
        }
        let mut versions: Option<Vec<String>> = None;
        for source in self.registries.iter().filter(|source| source.searched) {
            let (name, registry) = self.registry(&source.name)?;
            match registry.find(model).await {
                Ok(found) => {
                    let context = Context::at_most(model, source.serving);
                    return self.read(context, name, registry, found).await;
                }
                Err(Error::NoModel(_)) => {}
                Err(Error::NoVersion { known, .. }) => {
                    versions.get_or_insert_default().extend(known);
                }
                Err(other) => return Err(error(other)),
            }
        }
        Err(RegistryError::Unknown(self.unknown(model, versions)))
    }

    fn registry(&self, name: &str) -> Result<(&str, &Arc<registry::Registry>), RegistryError> {
        let source = self.registries.iter().find(|source| source.name == name);
        let source = source.ok_or_else(|| {
            RegistryError::Broken(format!("there is no registry '{name}' in cluster.toml"))
        })?;
        let opened = source.opened.as_ref().map_err(|e| error(e.clone()))?;
        Ok((&source.name, opened))
    }

    async fn read(
        &self,
        context: Context,
        name: &str,
        registry: &Arc<registry::Registry>,
        found: Found,
    ) -> Result<Arc<ModelFacts>, RegistryError> {
        let listing = match found {
            Found::Folder(path) => return in_folder(context, path).await,
            Found::Remote(listing) => Arc::new(listing),
        };
        let key = (context.model.clone(), listing.identity.clone());
        if let Some(facts) = self.known().facts.get(&key) {
            return Ok(facts.clone());
        }
        let files = Remote::new(registry.clone(), listing.clone(), Handle::current());
        let name = name.to_owned();
        let read = move || {
            let source = |needed: &[String]| super::remote::source(&name, &listing, needed);
            read_from(&files, &context, &source).map(Arc::new)
        };
        let facts = blocking(read).await?;
        let mut known = self.known();
        if known.facts.len() >= FACTS_MAX {
            known.facts.clear();
        }
        known.facts.insert(key, facts.clone());
        Ok(facts)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that nobody knows a model, with what is known. `versions` are those of registries that know its name.
    fn unknown(&self, model: &ModelRef, versions: Option<Vec<String>>) -> String {
        let here = self.models().filter(|known| known.name == model.name);
        let mut known: Vec<String> = here.map(|known| known.version.clone()).collect();
        if versions.is_some() || !known.is_empty() {
            known.extend(versions.unwrap_or_default());
            let (name, version) = (model.name.clone(), model.version.clone());
            return Error::NoVersion {
                name,
                version,
                known,
            }
            .to_string();
        }
        let mut names: Vec<&str> = self.models().map(|known| known.name.as_str()).collect();
        names.dedup();
        let names = if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        };
        let searched: Vec<String> = self
            .registries()
            .filter_map(|(name, address)| Some(format!("{name} ({})", address.ok()?)))
            .collect();
        let elsewhere = match searched.as_slice() {
            [] => String::new(),
            searched => format!("; it is not in the registries {}", searched.join(", ")),
        };
        format!(
            "Registered model '{}' does not exist. Registered models: {names}{elsewhere}",
            model.name
        )
    }
}

async fn in_folder(
    context: Context,
    path: std::path::PathBuf,
) -> Result<Arc<ModelFacts>, RegistryError> {
    blocking(move || read_facts(&context, &path).map(Arc::new)).await
}

async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    let failed = |e| RegistryError::Broken(format!("reading the model failed: {e}"));
    spawn_blocking(read).await.map_err(failed)?
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const MODELS: [(&str, &str, &str); 5] = [
        ("ml.demo.tiny-llama", "tiny-llama", ""),
        ("ml.demo.tiny-mistral", "tiny-mistral", "context_max = 512"),
        ("ml.demo.tiny-mpt", "tiny-mpt", ""),
        ("greedy", "tiny-llama", "context_max = 4096"),
        ("gone", "no-such-model", ""),
    ];

    fn registry(extra: &str) -> Registry {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models");
        let mut text = "[[auth.tokens]]\nuser = \"a\"\nfile = \"t\"\n".to_owned();
        for (name, folder, key) in MODELS {
            let path = models.join(folder);
            text += &format!(
                "[[models]]\nname = \"{name}\"\nversion = 1\npath = \"{}\"\n{key}\n",
                path.display()
            );
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cluster.toml");
        std::fs::write(&file, text + extra).unwrap();
        Registry::new(&common::config::load(&file).unwrap(), &|_| None)
    }

    async fn facts(name: &str, version: &str) -> Result<Arc<ModelFacts>, RegistryError> {
        let model = ModelRef::new(name, version).unwrap();
        registry("").facts(&model).await
    }

    #[tokio::test]
    async fn the_tiny_models_are_read() {
        let llama = facts("ml.demo.tiny-llama", "1").await.unwrap();
        assert_eq!(
            (llama.shape.layers, llama.shape.kv_heads, llama.context_max),
            (4, 4, 1024)
        );
        let mistral = facts("ml.demo.tiny-mistral", "1").await.unwrap();
        assert_eq!(mistral.context_max, 512);
        let mpt = facts("ml.demo.tiny-mpt", "1").await.unwrap();
        assert!(
            mpt.shape.tied
                && mpt
                    .tensors
                    .iter()
                    .any(|tensor| tensor.name.ends_with("attn.Wqkv.weight"))
        );
    }

    #[tokio::test]
    async fn unknown_models_and_versions_name_the_known_ones() {
        let version = facts("ml.demo.tiny-llama", "7").await.unwrap_err();
        assert_eq!(
            version.to_string(),
            "Model version '7' of registered model 'ml.demo.tiny-llama' does not exist. Known versions: 1"
        );
        let model = facts("other", "1").await.unwrap_err();
        assert!(
            matches!(model, RegistryError::Unknown(_))
                && model.to_string().contains("ml.demo.tiny-llama, "),
            "{model}"
        );
    }

    #[tokio::test]
    async fn a_context_beyond_the_models_own_and_a_missing_folder_are_errors() {
        let message = async |name| facts(name, "1").await.unwrap_err().to_string();
        assert!(
            message("greedy")
                .await
                .contains("context_max = 4096 in cluster.toml is beyond the model's own 1024")
        );
        assert!(message("gone").await.contains("is not a folder"));
    }

    #[tokio::test]
    async fn a_folder_of_versions_is_looked_through_after_the_models_of_cluster_toml() {
        let root = tempfile::tempdir().unwrap();
        let version = root.path().join("ml.demo.tiny-llama/2");
        std::fs::create_dir_all(&version).unwrap();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-llama");
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny.join(file), version.join(file)).unwrap();
        }
        let extra = format!(
            "[[registries]]\nname = \"shelf\"\nkind = \"folder\"\npath = \"{}\"\ncontext_max = 4096\n",
            root.path().display()
        );
        let registry = registry(&extra);
        let facts = async |name, version| {
            let model = ModelRef::new(name, version).unwrap();
            registry.facts(&model).await
        };
        // A registry's context_max is a bound, not a wish: models are of many sizes.
        let found = facts("ml.demo.tiny-llama", "2").await.unwrap();
        assert_eq!(found.context_max, 1024);
        let error = facts("ml.demo.tiny-llama", "3").await.unwrap_err();
        assert!(
            error.to_string().ends_with("Known versions: 1, 2"),
            "{error}"
        );
        let error = facts("other", "1").await.unwrap_err();
        assert!(
            error.to_string().contains("not in the registries shelf ("),
            "{error}"
        );
    }
}
