//! Where a shard's files are on this machine: in a folder that is there, or fetched from a registry into the cache; and
//! where its packed weights may be.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::config::{CacheConfig, PackedConfig, RegistryEntry};
use common::request::{Failure, FailureKind};
use common::wire::message::{ModelSource, RemoteModel};
use engine::weights::packed::PackedCache;
use registry::{Environment, Error, Registry};

use super::cache::Cache;
use super::fetch;

/// Told what is being done, and how many bytes of how many are.
pub type Told<'a> = &'a dyn Fn(&str, u64, u64);

/// The models within this process's reach.
pub struct Library {
    registries: HashMap<String, Result<Arc<Registry>, Error>>,
    cache: Cache,
    packed: Option<PackedCache>,
}

/// A model's folder. While it is held, nobody takes it out of the cache.
#[derive(Debug)]
pub struct Held {
    /// Where its files are.
    pub folder: PathBuf,
    /// Shared with all who use the version.
    _lock: Option<File>,
}

impl Held {
    pub(super) fn cached(folder: PathBuf, lock: File) -> Held {
        Held {
            folder,
            _lock: Some(lock),
        }
    }
}

impl Library {
    /// The registries and the caches of cluster.toml.
    pub fn new(
        registries: &[RegistryEntry],
        cache: &CacheConfig,
        packed: Option<&PackedConfig>,
        environment: Environment<'_>,
    ) -> Library {
        let open = |entry: &RegistryEntry| {
            let opened = Registry::open(entry, environment).map(Arc::new);
            (entry.name.clone(), opened)
        };
        Library {
            registries: registries.iter().map(open).collect(),
            cache: Cache::new(cache),
            packed: packed.map(|config| PackedCache::new(config.folder.clone(), config.bytes_max)),
        }
    }

    /// The cache of packed weights.
    pub fn packed(&self) -> Option<&PackedCache> {
        self.packed.as_ref()
    }

    /// The folder of a model, fetched first if need be. Blocks; gives up when it is not `wanted` any more.
    ///
    /// # Errors
    /// [`Failure`] names the file: of kind `Unavailable` where trying again may help, `TooLarge` for want of disk.
    pub fn folder(
        &self,
        source: &ModelSource,
        told: Told<'_>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Held, Failure> {
        match source {
            ModelSource::Folder(folder) => Ok(Held {
                folder: PathBuf::from(folder),
                _lock: None,
            }),
            ModelSource::Remote(remote) => self.fetched(remote, told, wanted),
        }
    }

    fn fetched(
        &self,
        remote: &RemoteModel,
        told: Told<'_>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Held, Failure> {
        for file in &remote.files {
            registry::check_path(&file.path)
                .map_err(|reason| bad(format!("the coordinator {reason}")))?;
        }
        let fetch = |partial: &Path| {
            let registry = self.registry(&remote.registry)?;
            fetch::all(registry, remote, partial, told, wanted)
        };
        self.cache.hold(remote, &fetch, told, wanted)
    }

    fn registry(&self, name: &str) -> Result<&Arc<Registry>, Failure> {
        let Some(opened) = self.registries.get(name) else {
            return Err(bad(format!(
                "this worker's cluster.toml has no registry '{name}'; put the coordinator's cluster.toml on each machine"
            )));
        };
        opened.as_ref().map_err(|e| bad(e.to_string()))
    }
}

fn bad(message: String) -> Failure {
    Failure::new(FailureKind::BadRequest, message)
}
