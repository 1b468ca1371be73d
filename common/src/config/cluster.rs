//! What the program uses of cluster.toml: checked, with defaults filled in and paths resolved.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::tables::TablesConfig;
use crate::ids::WorkerId;
use crate::model_ref::ModelRef;
use crate::wire::message::{DeviceKind, KvDtype, Quantization};

/// Most served entities of an endpoint, in cluster.toml and over the API.
pub const ENTITIES_MAX: usize = 10;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The coordinator's addresses and folders.
    pub coordinator: CoordinatorConfig,
    /// Who may call and who may join.
    pub auth: AuthConfig,
    /// Certificates; needed as soon as workers are not on loopback.
    pub tls: Option<TlsFiles>,
    /// Sizes and times.
    pub limits: Limits,
    /// What is kept of calls.
    pub tables: TablesConfig,
    /// Machines and their devices.
    pub nodes: Vec<Node>,
    /// What an endpoint may ask for.
    pub workload_types: Vec<WorkloadType>,
    /// Models that are registered here, by name and version.
    pub models: Vec<ModelEntry>,
    /// Where all other models are looked for, in this order.
    pub registries: Vec<RegistryEntry>,
    /// The workers' cache of fetched models.
    pub cache: CacheConfig,
    /// The workers' cache of packed weights; none where nothing is kept.
    pub packed: Option<PackedConfig>,
    /// Endpoints that shall exist from the first start that names them.
    pub endpoints: Vec<EndpointEntry>,
}

/// The coordinator's part.
#[derive(Debug, Clone)]
pub struct CoordinatorConfig {
    /// HTTP API.
    pub listen: SocketAddr,
    /// Workers' links.
    pub worker_listen: SocketAddr,
    /// Where workers dial, in the order they try: `host:port`.
    pub addresses: Vec<String>,
    /// The store's folder.
    pub data_dir: PathBuf,
}

/// Tokens and secrets.
#[derive(Debug, Clone)]
pub struct AuthConfig {
    /// The cluster's shared secret; made by the coordinator when missing.
    pub worker_secret_file: PathBuf,
    /// Who may call.
    pub tokens: Vec<TokenEntry>,
}

/// A caller.
#[derive(Debug, Clone)]
pub struct TokenEntry {
    /// The user the token stands for.
    pub user: String,
    /// May do everything with every endpoint.
    pub admin: bool,
    /// Groups the user belongs to, as endpoints' permissions name them.
    pub groups: Vec<String>,
    /// Where the token comes from.
    pub source: TokenSource,
}

/// A token itself is never in cluster.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// A file with the token; made by the coordinator, readable by its owner alone, when missing.
    File(PathBuf),
    /// The token's SHA-256.
    Sha256([u8; 32]),
}

/// Certificates of a process, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The cluster's authority.
    pub ca: PathBuf,
    /// This process's chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Sizes and times.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Longest HTTP body.
    pub body_bytes_max: u64,
    /// Longest time for a request, from its arrival.
    pub deadline_ms: u64,
    /// Prompt tokens that may wait per replica.
    pub queue_tokens_max: u64,
    /// Requests that may wait per served entity.
    pub queue_requests_max: u64,
    /// A client that reads nothing for this long is cancelled.
    pub idle_stream_ms: u64,
}

/// A machine.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// The address other machines reach it by; ranks of a group meet there.
    pub address: String,
    /// Its devices; each has one worker process.
    pub devices: Vec<DeviceEntry>,
}

/// A device, run by one worker process.
#[derive(Debug, Clone)]
pub struct DeviceEntry {
    /// The worker's name, `node/device`.
    pub worker: WorkerId,
    /// What it is.
    pub kind: DeviceKind,
    /// Which GPU, for `cuda:N`.
    pub ordinal: u32,
    /// Memory shards may use; `None` asks the device.
    pub memory_bytes: Option<u64>,
    /// Compute threads (CPU); `None` is one for each of `cores`, or an equal part of the machine's.
    pub threads: Option<u32>,
    /// Cores the compute threads are pinned to; empty leaves it to the worker.
    pub cores: Vec<u32>,
    /// The port for other ranks; 0 lets the system choose.
    pub group_port: u16,
    /// What a GPU does in other ways than by default.
    pub cuda: CudaSwitches,
}

/// Switches of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaSwitches {
    /// Steps of decodes are recorded once per batch size and replayed.
    pub graphs: bool,
    /// A prompt's answer depends on that prompt alone, never on what else is in the batch; slower.
    pub batch_invariant: bool,
}

impl Default for CudaSwitches {
    fn default() -> Self {
        CudaSwitches {
            graphs: true,
            batch_invariant: false,
        }
    }
}

/// Something an endpoint may ask for by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadType {
    /// `CPU`, `GPU_LARGE`, ...
    pub name: String,
    /// Devices it takes.
    pub device: DeviceKind,
    /// How many of them: the tensor-parallel degree.
    pub shards: u32,
    /// Memory on each; `None` is what the device has.
    pub memory_bytes: Option<u64>,
    /// What this type stands for when it is not the real thing ("1 x A100 80 GB"), shown in the state message.
    pub stands_in_for: Option<String>,
}

/// A model registered in cluster.toml.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    /// Its name and version.
    pub model: ModelRef,
    /// Where its files are.
    pub origin: ModelOrigin,
    /// How it is served.
    pub serving: ServingDefaults,
}

/// Where the files of a [`ModelEntry`] are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelOrigin {
    /// A folder: Hugging Face or MLflow.
    Folder(PathBuf),
    /// In a registry, under its own kind of name.
    Registry {
        /// The registry's name.
        registry: String,
        /// `hf://org/name@revision`, `runs:/RUN/model`, `models:/NAME@ALIAS` and so on.
        uri: String,
    },
}

/// How a model is served unless it is asked for otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServingDefaults {
    /// Type of K and V in the cache.
    pub kv_dtype: KvDtype,
    /// How weights are kept.
    pub quantization: Quantization,
    /// Longest sequence served; `None` is the model's own.
    pub context_max: Option<u32>,
}

/// A registry that models come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryEntry {
    /// Its name, which workers know it by as well.
    pub name: String,
    /// What it is.
    pub kind: RegistryKind,
    /// Its address; `None` takes the one that its own clients take from the environment.
    pub url: Option<String>,
    /// How to sign in.
    pub credentials: Credentials,
    /// An authority's certificates (PEM) beside those of the system.
    pub ca_file: Option<PathBuf>,
    /// Take any certificate: for tests on a private network.
    pub insecure_tls: bool,
    /// How its models are served. A `context_max` beyond a model's own is that model's own.
    pub serving: ServingDefaults,
}

impl RegistryEntry {
    /// One of which nothing is said but its name and what it is.
    pub fn new(name: impl Into<String>, kind: RegistryKind) -> Self {
        RegistryEntry {
            name: name.into(),
            kind,
            url: None,
            credentials: Credentials::default(),
            ca_file: None,
            insecure_tls: false,
            serving: ServingDefaults::default(),
        }
    }
}

/// Kinds of registries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistryKind {
    /// An MLflow tracking server.
    Mlflow,
    /// Databricks' Unity Catalog.
    UnityCatalog,
    /// The Hugging Face hub; finds only what `[[models]]` names by `hub`.
    HuggingFace,
    /// A folder that holds `NAME/VERSION/`.
    Folder(PathBuf),
}

/// How to sign in at a registry. With nothing given, the environment variables of the registry's own clients count.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// A bearer token.
    pub token: Option<SecretSource>,
    /// A user and a password; they win over a token, as MLflow has it.
    pub basic: Option<(String, SecretSource)>,
}

/// A secret itself is never in cluster.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A file that holds it; read anew for each connection, so that it may be changed.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
}

/// The workers' cache of fetched models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Its folder; workers of one machine share it.
    pub folder: PathBuf,
    /// Versions not in use go, the longest unused first, when it would become larger. `None` keeps all.
    pub bytes_max: Option<u64>,
}

/// The workers' cache of packed weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedConfig {
    /// Its folder; workers of one machine share it.
    pub folder: PathBuf,
    /// Weights not in use go, the longest unused first, when it would become larger.
    pub bytes_max: u64,
}

/// An endpoint that shall exist.
#[derive(Debug, Clone)]
pub struct EndpointEntry {
    /// Its name.
    pub name: String,
    /// What it serves.
    pub served_entities: Vec<ServedEntityEntry>,
}

/// A served entity of an [`EndpointEntry`].
#[derive(Debug, Clone)]
pub struct ServedEntityEntry {
    /// Its name: no other entity of the endpoint has it.
    pub name: String,
    /// The model.
    pub model: ModelRef,
    /// The workload type's name.
    pub workload_type: String,
    /// `Small`, `Medium` or `Large`.
    pub workload_size: String,
    /// How weights are kept; `None` is as the model's entry says.
    pub quantization: Option<Quantization>,
    /// Its share of the traffic; those of an endpoint sum to 100.
    pub traffic_percentage: u32,
}

impl Cluster {
    /// A device by its worker's name.
    pub fn device(&self, worker: &str) -> Option<(&Node, &DeviceEntry)> {
        self.nodes
            .iter()
            .flat_map(|node| node.devices.iter().map(move |device| (node, device)))
            .find(|(_, device)| device.worker.0 == worker)
    }

    /// All workers' names, in the order of the file.
    pub fn workers(&self) -> impl Iterator<Item = &WorkerId> {
        self.nodes
            .iter()
            .flat_map(|node| node.devices.iter().map(|device| &device.worker))
    }
}
