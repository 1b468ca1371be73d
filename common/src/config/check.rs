//! From what cluster.toml says to what the program uses: defaults, paths, and everything that can be wrong in a value.
//!
//! Endpoints are judged in `endpoints`, callers in `auth`. Whether files, models and memory are there is not asked here.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

use super::auth::tokens;
use super::cluster::{
    AuthConfig, Cluster, CoordinatorConfig, CudaSwitches, DeviceEntry, Limits, Node, TlsFiles,
    WorkloadType,
};
use super::endpoints::{Known, endpoint};
use super::models::{cache, hub_registry, model, packed};
use super::raw::{Raw, RawDevice, RawNode, RawWorkloadType};
use super::reader::Reader;
use super::registries::registry;
use crate::ids::WorkerId;
use crate::model_ref::ModelRef;
use crate::wire::message::DeviceKind;

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

/// Checks everything. Mistakes are noted and the check goes on, so that one does not hide the next; what it gives when
/// there were any is of no use.
pub(super) fn check(raw: Raw, root: &Path, r: &mut Reader<'_>) -> Cluster {
    let Raw {
        coordinator,
        auth,
        tls,
        limits,
        tables,
        nodes,
        workload_types,
        models,
        registries,
        worker,
        endpoints,
    } = raw;
    let has_worker_listen = coordinator.worker_listen.is_some();
    let listen = address(coordinator.listen, LISTEN_DEFAULT, "coordinator.listen", r);
    let worker_listen = address(
        coordinator.worker_listen,
        WORKER_LISTEN_DEFAULT,
        "coordinator.worker_listen",
        r,
    );
    if let (Some(http), Some(links)) = (listen, worker_listen)
        && overlap(http, links)
    {
        let key = if has_worker_listen {
            "coordinator.worker_listen"
        } else {
            "coordinator.listen"
        };
        r.mistake(
            key,
            format!(
                "the HTTP API (coordinator.listen {http}) and workers (coordinator.worker_listen {links}) cannot share a \
                 port: give each its own"
            ),
        );
    }
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
    if auth.tokens.is_empty() && !r.noted("auth") && !r.noted("auth.tokens") {
        r.mistake("auth", "needs at least one [[auth.tokens]] with user and file: no request is answered without a token");
    }
    let auth = AuthConfig {
        worker_secret_file: root.join(
            auth.worker_secret_file
                .as_deref()
                .unwrap_or("var/worker.secret"),
        ),
        tokens: tokens(auth.tokens, root, r),
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
    let mut seen = Vec::new();
    let nodes = each(nodes, |n| node(n, &mut seen, r));
    let mut type_names = Vec::new();
    let workload_types = each(workload_types, |w| workload_type(w, &mut type_names, r));
    let mut seen = Vec::new();
    let mut registries = each(registries, |entry| registry(entry, root, &mut seen, r));
    registries.extend(hub_registry(&models, &registries));
    let mut registered = Vec::new();
    let models = each(models, |m| model(m, root, &registries, &mut registered, r));
    let known = Known {
        workload_types: &type_names,
        models: &registered,
        registries: &registries,
    };
    let mut seen = Vec::new();
    let endpoints = each(endpoints, |e| endpoint(e, known, &mut seen, r));
    Cluster {
        coordinator,
        auth,
        tls,
        limits,
        tables,
        nodes,
        workload_types,
        models,
        registries,
        cache: cache(&worker, root, r),
        packed: packed(&worker, root),
        endpoints,
    }
}

fn each<R, T>(raw: Vec<R>, check: impl FnMut(R) -> Option<T>) -> Vec<T> {
    raw.into_iter().filter_map(check).collect()
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

/// Whether one socket would take what the other listens on. Port 0 is never the same one twice.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let (one, other) = (a.ip().to_canonical(), b.ip().to_canonical());
    // Systems let "::" take connections of IPv4 as well.
    let all = |all: IpAddr, ip: IpAddr| all.is_unspecified() && (all.is_ipv6() || ip.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (one == other || all(one, other) || all(other, one))
}

/// Memory that can hold something, if it is told at all.
fn memory(bytes: Option<u64>, key: &str, r: &mut Reader<'_>) -> Option<u64> {
    if bytes == Some(0) {
        r.mistake(key, "must be above 0; leave it out to take what there is");
    }
    bytes
}

/// The name of a node, device, workload type or registry. Gives also a wrong one, so that the check can go on with it.
pub(super) fn identifier(
    text: Option<String>,
    seen: &mut Vec<String>,
    key: &str,
    what: &str,
    r: &mut Reader<'_>,
) -> Option<String> {
    const CHARS_MAX: usize = 63;
    let text = text?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    if text.is_empty() || text.len() > CHARS_MAX || !text.chars().all(allowed) {
        r.mistake(
            key,
            format!(
                "must be 1 to {CHARS_MAX} letters, digits, '-', '_', '.' or ':', got \"{text}\""
            ),
        );
    }
    unique(seen, &text, key, what, r);
    Some(text)
}

pub(super) fn unique(
    seen: &mut Vec<String>,
    name: &str,
    key: &str,
    what: &str,
    r: &mut Reader<'_>,
) {
    if seen.iter().any(|other| other == name) {
        r.mistake(key, format!("another {what} is already called \"{name}\""));
    }
    seen.push(name.to_owned());
}

/// A model by its name and version, each judged by itself.
pub(super) fn model_ref(
    name: Option<String>,
    version: Option<String>,
    [name_key, version_key]: [&str; 2],
    r: &mut Reader<'_>,
) -> Option<ModelRef> {
    let name = name.and_then(|name| match ModelRef::check_name(&name) {
        Ok(()) => Some(name),
        Err(e) => {
            r.mistake(name_key, e.to_string());
            None
        }
    });
    let version = version.and_then(|version| match ModelRef::check_version(&version) {
        Ok(version) => Some(version),
        Err(e) => {
            r.mistake(version_key, e.to_string());
            None
        }
    });
    Some(ModelRef {
        name: name?,
        version: version?,
    })
}

fn node(raw: RawNode, seen: &mut Vec<String>, r: &mut Reader<'_>) -> Option<Node> {
    let name = identifier(raw.name, seen, &format!("{}.name", raw.path), "node", r);
    let node = name.as_deref().unwrap_or_default();
    let mut device_names = Vec::new();
    let devices = each(raw.devices, |d| device(d, node, &mut device_names, r));
    Some(Node {
        name: name?,
        address: raw.address.unwrap_or_else(|| "127.0.0.1".into()),
        devices,
    })
}

fn device(
    raw: RawDevice,
    node: &str,
    seen: &mut Vec<String>,
    r: &mut Reader<'_>,
) -> Option<DeviceEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let name = identifier(raw.name, seen, &at("name"), "device of this node", r);
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
    let memory_bytes = memory(raw.memory, &at("memory"), r);
    let (kind, ordinal) = kind?;
    let switches = [
        ("graphs", raw.graphs),
        ("batch_invariant", raw.batch_invariant),
    ];
    for (key, _) in switches.iter().filter(|(_, said)| said.is_some()) {
        if kind == DeviceKind::Cpu {
            r.mistake(
                &at(key),
                "is a switch of GPUs; leave it out for kind = \"cpu\"",
            );
        }
    }
    let default = CudaSwitches::default();
    let worker = WorkerId(format!("{node}/{}", name?));
    Some(DeviceEntry {
        worker,
        kind,
        ordinal,
        memory_bytes,
        threads,
        cores,
        group_port,
        cuda: CudaSwitches {
            graphs: raw.graphs.unwrap_or(default.graphs),
            batch_invariant: raw.batch_invariant.unwrap_or(default.batch_invariant),
        },
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
    seen: &mut Vec<String>,
    r: &mut Reader<'_>,
) -> Option<WorkloadType> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let name = identifier(raw.name, seen, &at("name"), "workload type", r);
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
        n @ 1..=64 => Some(n as u32),
        n => {
            r.mistake(&at("shards"), format!("must be between 1 and 64, got {n}"));
            None
        }
    };
    let memory_bytes = memory(raw.memory, &at("memory"), r);
    Some(WorkloadType {
        name: name?,
        device: device?,
        shards: shards?,
        memory_bytes,
        stands_in_for: raw.stands_in_for,
    })
}
