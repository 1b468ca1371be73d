//! What the program uses of cluster.toml: checked, with defaults filled in and paths resolved.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::raw::{
    Raw, RawDevice, RawEndpoint, RawModel, RawServedEntity, RawToken, RawWorkloadType,
};
use super::reader::Reader;
use crate::ids::WorkerId;
use crate::model_ref::ModelRef;
use crate::wire::message::{DeviceKind, KvDtype};

/// Where the HTTP API listens unless told: loopback only.
const LISTEN_DEFAULT: &str = "127.0.0.1:8470";
/// Where workers dial unless told.
const WORKER_LISTEN_DEFAULT: &str = "127.0.0.1:8471";
/// Databricks' own limit for custom models' requests.
const BODY_BYTES_MAX_DEFAULT: u64 = 16 << 20;
/// The cloud's limit per request today.
const DEADLINE_MS_DEFAULT: u64 = 297_000;
/// Prompt tokens that may wait per replica: a minute of prefill at a thousand tokens a second.
const QUEUE_TOKENS_MAX_DEFAULT: u64 = 64 << 10;
/// Requests that may wait per served entity beyond its admitted concurrency.
const QUEUE_REQUESTS_MAX_DEFAULT: u64 = 256;
/// A client that reads nothing for this long is cancelled.
const IDLE_STREAM_MS_DEFAULT: u64 = 30_000;

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
    /// Machines and their devices.
    pub nodes: Vec<Node>,
    /// What an endpoint may ask for.
    pub workload_types: Vec<WorkloadType>,
    /// The local registry.
    pub models: Vec<ModelEntry>,
    /// Endpoints that shall exist from the first start on.
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
    /// Compute threads (CPU); `None` is all cores of `cores`, or of the machine.
    pub threads: Option<u32>,
    /// Cores the compute threads are pinned to; empty pins none.
    pub cores: Vec<u32>,
    /// The port for other ranks; 0 lets the system choose.
    pub group_port: u16,
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

/// A model of the local registry.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    /// Its name and version.
    pub model: ModelRef,
    /// Its folder: Hugging Face or MLflow.
    pub path: PathBuf,
    /// Type of K and V in the cache.
    pub kv_dtype: KvDtype,
    /// Longest sequence served; `None` is the model's own.
    pub context_max: Option<u32>,
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
    /// Its name; `None` takes the default.
    pub name: Option<String>,
    /// The model.
    pub model: ModelRef,
    /// The workload type's name.
    pub workload_type: String,
    /// `Small`, `Medium` or `Large`.
    pub workload_size: String,
    /// Its share of the traffic; `None` when it is the only one.
    pub traffic_percentage: Option<u32>,
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

/// Checks everything; `None` when something needed could not be made out (the reader then has the mistakes).
pub(super) fn check(raw: Raw, root: &Path, r: &mut Reader<'_>) -> Option<Cluster> {
    let Raw {
        coordinator,
        auth,
        tls,
        limits,
        nodes,
        workload_types,
        models,
        endpoints,
    } = raw;
    let listen = address(coordinator.listen, LISTEN_DEFAULT, "coordinator.listen", r);
    let worker_listen = address(
        coordinator.worker_listen,
        WORKER_LISTEN_DEFAULT,
        "coordinator.worker_listen",
        r,
    );
    if listen.is_some_and(|a| !a.ip().is_loopback()) && coordinator.plain_http != Some(true) {
        r.mistake(
            "coordinator.listen",
            "is not a loopback address, and the API speaks plain HTTP: put a TLS proxy in front and listen on loopback, \
             or set coordinator.plain_http = true on a private network",
        );
    }
    if worker_listen.is_some_and(|a| !a.ip().is_loopback()) && tls.is_none() {
        r.mistake(
            "coordinator.worker_listen",
            "is not a loopback address: links between machines need certificates, set [tls] ca, cert and key",
        );
    }
    let mut addresses = coordinator.addresses;
    if addresses.is_empty() {
        addresses.extend(worker_listen.map(|a| a.to_string()));
    }
    for (i, dial) in addresses.iter().enumerate() {
        if dial
            .rsplit_once(':')
            .is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
        {
            r.mistake(
                &format!("coordinator.addresses[{i}]"),
                format!("must be host:port, got \"{dial}\""),
            );
        }
    }
    let coordinator = CoordinatorConfig {
        listen: listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
        worker_listen: worker_listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
        addresses,
        data_dir: root.join(coordinator.data_dir.as_deref().unwrap_or("var/coordinator")),
    };
    if auth.tokens.is_empty() {
        r.mistake("auth", "needs at least one [[auth.tokens]] with user and file: no request is answered without a token");
    }
    let auth = AuthConfig {
        worker_secret_file: root.join(
            auth.worker_secret_file
                .as_deref()
                .unwrap_or("var/worker.secret"),
        ),
        tokens: auth
            .tokens
            .into_iter()
            .filter_map(|t| token(t, root, r))
            .collect(),
    };
    let tls = tls.and_then(|t| {
        Some(TlsFiles {
            ca: root.join(t.ca?),
            cert: root.join(t.cert?),
            key: root.join(t.key?),
        })
    });
    let positive = |value: Option<u64>, default, key: &str, r: &mut Reader<'_>| match value {
        Some(0) => {
            r.mistake(key, "must be above 0");
            default
        }
        value => value.unwrap_or(default),
    };
    let limits = Limits {
        body_bytes_max: positive(
            limits.body_bytes_max,
            BODY_BYTES_MAX_DEFAULT,
            "limits.body_bytes_max",
            r,
        ),
        deadline_ms: positive(
            limits.deadline_ms,
            DEADLINE_MS_DEFAULT,
            "limits.deadline_ms",
            r,
        ),
        queue_tokens_max: positive(
            limits.queue_tokens_max,
            QUEUE_TOKENS_MAX_DEFAULT,
            "limits.queue_tokens_max",
            r,
        ),
        queue_requests_max: limits
            .queue_requests_max
            .unwrap_or(QUEUE_REQUESTS_MAX_DEFAULT),
        idle_stream_ms: positive(
            limits.idle_stream_ms,
            IDLE_STREAM_MS_DEFAULT,
            "limits.idle_stream_ms",
            r,
        ),
    };
    let mut names = HashSet::new();
    let nodes: Vec<Node> = nodes
        .into_iter()
        .filter_map(|node| {
            let name = identifier(node.name, &format!("{}.name", node.path), r)?;
            unique(&mut names, &name, &format!("{}.name", node.path), "node", r);
            let mut device_names = HashSet::new();
            let read = |d| device(d, &name, &mut device_names, r);
            let devices = node.devices.into_iter().filter_map(read).collect();
            Some(Node {
                name,
                address: node.address.unwrap_or_else(|| "127.0.0.1".into()),
                devices,
            })
        })
        .collect();
    let mut names = HashSet::new();
    let workload_types: Vec<WorkloadType> = workload_types
        .into_iter()
        .filter_map(|w| workload_type(w, &mut names, r))
        .collect();
    let mut seen = HashSet::new();
    let models: Vec<ModelEntry> = models
        .into_iter()
        .filter_map(|m| model(m, root, &mut seen, r))
        .collect();
    let mut names = HashSet::new();
    let endpoints = endpoints
        .into_iter()
        .filter_map(|e| endpoint(e, &workload_types, &models, &mut names, r))
        .collect();
    Some(Cluster {
        coordinator,
        auth,
        tls,
        limits,
        nodes,
        workload_types,
        models,
        endpoints,
    })
}

fn address(
    text: Option<String>,
    default: &str,
    key: &str,
    r: &mut Reader<'_>,
) -> Option<SocketAddr> {
    let text = text.unwrap_or_else(|| default.to_owned());
    let parsed = SocketAddr::from_str(&text).ok();
    if parsed.is_none() {
        r.mistake(
            key,
            format!("must be an IP address and a port such as \"{default}\", got \"{text}\""),
        );
    }
    parsed
}

fn token(raw: RawToken, root: &Path, r: &mut Reader<'_>) -> Option<TokenEntry> {
    let source = match (raw.file, raw.sha256) {
        (Some(file), None) => TokenSource::File(root.join(file)),
        (None, Some(digest)) => {
            let mut bytes = [0; 32];
            if hex::decode_to_slice(&digest, &mut bytes).is_err() {
                r.mistake(
                    &format!("{}.sha256", raw.path),
                    "must be 64 hexadecimal digits: the token's SHA-256",
                );
                return None;
            }
            TokenSource::Sha256(bytes)
        }
        _ => {
            r.mistake(
                &raw.path,
                "needs either file (a file that holds the token) or sha256 (the token's digest)",
            );
            return None;
        }
    };
    Some(TokenEntry {
        user: raw.user?,
        source,
    })
}

fn identifier(text: Option<String>, key: &str, r: &mut Reader<'_>) -> Option<String> {
    let text = text?;
    let ok = !text.is_empty()
        && text.len() <= 63
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':'));
    if !ok {
        r.mistake(
            key,
            format!("must be 1 to 63 letters, digits, '-', '_', '.' or ':', got \"{text}\""),
        );
        return None;
    }
    Some(text)
}

fn unique(seen: &mut HashSet<String>, name: &str, key: &str, what: &str, r: &mut Reader<'_>) {
    if !seen.insert(name.to_owned()) {
        r.mistake(key, format!("another {what} is already called \"{name}\""));
    }
}

fn device(
    raw: RawDevice,
    node: &str,
    names: &mut HashSet<String>,
    r: &mut Reader<'_>,
) -> Option<DeviceEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let name = identifier(raw.name, &at("name"), r);
    if let Some(name) = &name {
        unique(names, name, &at("name"), "device of this node", r);
    }
    let kind = raw.kind.and_then(|text| device_kind(&text, &at("kind"), r));
    let mut cores = Vec::new();
    if let Some(text) = &raw.cores {
        match parse_cores(text) {
            Some(parsed) => cores = parsed,
            None => r.mistake(
                &at("cores"),
                format!("must be a list of cores such as \"0-3,8\", got \"{text}\""),
            ),
        }
    }
    let threads = raw.threads.and_then(|n| match u32::try_from(n) {
        Ok(n @ 1..=1024) => Some(n),
        _ => {
            r.mistake(
                &at("threads"),
                format!("must be between 1 and 1024, got {n}"),
            );
            None
        }
    });
    let group_port = raw.group_port.unwrap_or(0);
    let group_port = u16::try_from(group_port).unwrap_or_else(|_| {
        r.mistake(
            &at("group_port"),
            format!("must be a port, 0 to 65535, got {group_port}"),
        );
        0
    });
    let (kind, ordinal) = kind?;
    let worker = WorkerId(format!("{node}/{}", name?));
    Some(DeviceEntry {
        worker,
        kind,
        ordinal,
        memory_bytes: raw.memory,
        threads,
        cores,
        group_port,
    })
}

/// `cpu` or `cuda:N`.
fn device_kind(text: &str, key: &str, r: &mut Reader<'_>) -> Option<(DeviceKind, u32)> {
    let kind = match text.split_once(':') {
        None if text == "cpu" => Some((DeviceKind::Cpu, 0)),
        None if text == "cuda" => Some((DeviceKind::Cuda, 0)),
        Some(("cuda", ordinal)) => ordinal.parse().ok().map(|n| (DeviceKind::Cuda, n)),
        _ => None,
    };
    if kind.is_none() {
        r.mistake(
            key,
            format!("must be \"cpu\" or \"cuda:N\", got \"{text}\""),
        );
    }
    kind
}

/// `"0-3,8"` as 0, 1, 2, 3, 8.
fn parse_cores(text: &str) -> Option<Vec<u32>> {
    const CORE_MAX: u32 = 4095;
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part
            .trim()
            .split_once('-')
            .unwrap_or((part.trim(), part.trim()));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > CORE_MAX {
            return None;
        }
        cores.extend(first..=last);
    }
    Some(cores)
}

fn workload_type(
    raw: RawWorkloadType,
    names: &mut HashSet<String>,
    r: &mut Reader<'_>,
) -> Option<WorkloadType> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let name = identifier(raw.name, &at("name"), r);
    if let Some(name) = &name {
        unique(names, name, &at("name"), "workload type", r);
    }
    let device = raw.device.and_then(|text| match text.as_str() {
        "cpu" => Some(DeviceKind::Cpu),
        "cuda" => Some(DeviceKind::Cuda),
        _ => {
            r.mistake(
                &at("device"),
                format!("must be \"cpu\" or \"cuda\", got \"{text}\""),
            );
            None
        }
    });
    let shards = match raw.shards.unwrap_or(1) {
        n @ 1..=64 => n as u32,
        n => {
            r.mistake(&at("shards"), format!("must be between 1 and 64, got {n}"));
            return None;
        }
    };
    let memory_bytes = raw.memory;
    Some(WorkloadType {
        name: name?,
        device: device?,
        shards,
        memory_bytes,
        stands_in_for: raw.stands_in_for,
    })
}

fn model(
    raw: RawModel,
    root: &Path,
    seen: &mut HashSet<ModelRef>,
    r: &mut Reader<'_>,
) -> Option<ModelEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let model = match ModelRef::new(&raw.name?, &raw.version?) {
        Ok(model) => model,
        Err(e) => {
            r.mistake(&raw.path, e.to_string());
            return None;
        }
    };
    if !seen.insert(model.clone()) {
        r.mistake(&raw.path, format!("{model} is registered twice"));
    }
    let kv_dtype = match raw.kv_dtype.as_deref() {
        None | Some("bf16") => KvDtype::Bf16,
        Some("f32") => KvDtype::F32,
        Some(other) => {
            r.mistake(
                &at("kv_dtype"),
                format!("must be \"bf16\" or \"f32\", got \"{other}\""),
            );
            return None;
        }
    };
    let context_max = match raw.context_max {
        None => None,
        Some(n) => match u32::try_from(n) {
            Ok(n) if n > 0 => Some(n),
            _ => {
                r.mistake(
                    &at("context_max"),
                    format!("must be a number of tokens above 0, got {n}"),
                );
                None
            }
        },
    };
    Some(ModelEntry {
        model,
        path: root.join(raw.folder?),
        kv_dtype,
        context_max,
    })
}

fn endpoint(
    raw: RawEndpoint,
    types: &[WorkloadType],
    models: &[ModelEntry],
    names: &mut HashSet<String>,
    r: &mut Reader<'_>,
) -> Option<EndpointEntry> {
    let name = identifier(raw.name, &format!("{}.name", raw.path), r)?;
    unique(names, &name, &format!("{}.name", raw.path), "endpoint", r);
    if raw.served_entities.is_empty() {
        r.mistake(
            &raw.path,
            "needs at least one [[endpoints.served_entities]]",
        );
    }
    let served_entities: Vec<_> = raw
        .served_entities
        .into_iter()
        .filter_map(|s| served_entity(s, types, models, r))
        .collect();
    Some(EndpointEntry {
        name,
        served_entities,
    })
}

fn served_entity(
    raw: RawServedEntity,
    types: &[WorkloadType],
    models: &[ModelEntry],
    r: &mut Reader<'_>,
) -> Option<ServedEntityEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let model = match ModelRef::new(&raw.entity_name?, &raw.entity_version?) {
        Ok(model) => model,
        Err(e) => {
            r.mistake(&raw.path, e.to_string());
            return None;
        }
    };
    if !models.iter().any(|entry| entry.model == model) {
        r.mistake(
            &at("entity_name"),
            format!("{model} is not among [[models]]"),
        );
    }
    let workload_type = raw.workload_type.unwrap_or_else(|| "CPU".into());
    if !types.iter().any(|t| t.name == workload_type) {
        let known: Vec<&str> = types.iter().map(|t| t.name.as_str()).collect();
        r.mistake(
            &at("workload_type"),
            format!(
                "\"{workload_type}\" is not mapped; mapped: {}",
                known.join(", ")
            ),
        );
    }
    let workload_size = raw.workload_size.unwrap_or_else(|| "Small".into());
    if !matches!(workload_size.as_str(), "Small" | "Medium" | "Large") {
        r.mistake(
            &at("workload_size"),
            format!("must be Small, Medium or Large, got \"{workload_size}\""),
        );
    }
    let traffic_percentage = raw.traffic_percentage.and_then(|n| match u32::try_from(n) {
        Ok(n @ 0..=100) => Some(n),
        _ => {
            r.mistake(
                &at("traffic_percentage"),
                format!("must be between 0 and 100, got {n}"),
            );
            None
        }
    });
    Some(ServedEntityEntry {
        name: raw.name,
        model,
        workload_type,
        workload_size,
        traffic_percentage,
    })
}
