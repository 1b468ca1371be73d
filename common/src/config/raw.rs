//! What cluster.toml says, key by key, before anything is judged beyond its type.

use super::reader::{Reader, Table};
use super::tables::{TablesConfig, tables};

/// The whole file. Lists carry the path of each entry for later mistakes.
pub(super) struct Raw {
    pub coordinator: RawCoordinator,
    pub auth: RawAuth,
    pub tls: Option<RawTls>,
    pub limits: RawLimits,
    pub tables: TablesConfig,
    pub nodes: Vec<RawNode>,
    pub workload_types: Vec<RawWorkloadType>,
    pub models: Vec<RawModel>,
    pub registries: Vec<RawRegistry>,
    pub worker: RawWorker,
    pub endpoints: Vec<RawEndpoint>,
}

#[derive(Default)]
pub(super) struct RawCoordinator {
    pub listen: Option<String>,
    pub worker_listen: Option<String>,
    pub addresses: Vec<String>,
    pub data_dir: Option<String>,
    pub plain_http: Option<bool>,
}

#[derive(Default)]
pub(super) struct RawAuth {
    pub worker_secret_file: Option<String>,
    pub tokens: Vec<RawToken>,
}

pub(super) struct RawToken {
    pub path: String,
    pub user: Option<String>,
    pub file: Option<String>,
    pub sha256: Option<String>,
    pub admin: Option<bool>,
    pub groups: Vec<String>,
}

pub(super) struct RawTls {
    pub ca: Option<String>,
    pub cert: Option<String>,
    pub key: Option<String>,
}

#[derive(Default)]
pub(super) struct RawLimits {
    pub body_bytes_max: Option<u64>,
    pub deadline_ms: Option<u64>,
    pub queue_tokens_max: Option<u64>,
    pub queue_requests_max: Option<u64>,
    pub idle_stream_ms: Option<u64>,
}

pub(super) struct RawNode {
    pub path: String,
    pub name: Option<String>,
    pub address: Option<String>,
    pub devices: Vec<RawDevice>,
}

pub(super) struct RawDevice {
    pub path: String,
    pub name: Option<String>,
    pub kind: Option<String>,
    pub memory: Option<u64>,
    pub threads: Option<u64>,
    pub cores: Option<String>,
    pub group_port: Option<u64>,
    pub graphs: Option<bool>,
    pub batch_invariant: Option<bool>,
}

pub(super) struct RawWorkloadType {
    pub path: String,
    pub name: Option<String>,
    pub device: Option<String>,
    pub shards: Option<u64>,
    pub memory: Option<u64>,
    pub stands_in_for: Option<String>,
}

pub(super) struct RawModel {
    pub path: String,
    pub name: Option<String>,
    pub version: Option<String>,
    pub folder: Option<String>,
    pub hub: Option<String>,
    pub revision: Option<String>,
    pub uri: Option<String>,
    pub registry: Option<String>,
    pub kv_dtype: Option<String>,
    pub quantization: Option<String>,
    pub context_max: Option<u64>,
}

pub(super) struct RawRegistry {
    pub path: String,
    pub name: Option<String>,
    pub kind: Option<String>,
    pub url: Option<String>,
    pub folder: Option<String>,
    pub token_file: Option<String>,
    pub token_env: Option<String>,
    pub username: Option<String>,
    pub password_file: Option<String>,
    pub password_env: Option<String>,
    pub ca_file: Option<String>,
    pub insecure_tls: Option<bool>,
    pub kv_dtype: Option<String>,
    pub quantization: Option<String>,
    pub context_max: Option<u64>,
}

#[derive(Default)]
pub(super) struct RawWorker {
    pub cache_dir: Option<String>,
    pub cache_bytes_max: Option<u64>,
    pub packed_dir: Option<String>,
    pub packed_bytes_max: Option<u64>,
}

pub(super) struct RawEndpoint {
    pub path: String,
    pub name: Option<String>,
    pub served_entities: Vec<RawServedEntity>,
}

pub(super) struct RawServedEntity {
    pub path: String,
    pub name: Option<String>,
    pub entity_name: Option<String>,
    pub entity_version: Option<String>,
    pub workload_type: Option<String>,
    pub workload_size: Option<String>,
    pub quantization: Option<String>,
    pub traffic_percentage: Option<u64>,
}

impl Raw {
    pub(super) fn read<'a>(r: &mut Reader<'a>) -> Raw {
        let mut root = r.root();
        let raw = Raw {
            coordinator: root
                .table(r, "coordinator")
                .map(|t| coordinator(t, r))
                .unwrap_or_default(),
            auth: root
                .table(r, "auth")
                .map(|t| auth(t, r))
                .unwrap_or_default(),
            tls: root.table(r, "tls").map(|t| tls(t, r)),
            limits: root
                .table(r, "limits")
                .map(|t| limits(t, r))
                .unwrap_or_default(),
            tables: root
                .table(r, "tables")
                .map(|t| tables(t, r))
                .unwrap_or_default(),
            nodes: each(root.tables(r, "nodes"), r, node),
            workload_types: each(root.tables(r, "workload_types"), r, workload_type),
            models: each(root.tables(r, "models"), r, model),
            registries: each(root.tables(r, "registries"), r, registry),
            worker: root
                .table(r, "worker")
                .map(|t| worker(t, r))
                .unwrap_or_default(),
            endpoints: each(root.tables(r, "endpoints"), r, endpoint),
        };
        root.close(r);
        raw
    }
}

fn each<'a, T>(
    tables: Vec<Table<'a>>,
    r: &mut Reader<'a>,
    read: fn(Table<'a>, &mut Reader<'a>) -> T,
) -> Vec<T> {
    tables.into_iter().map(|table| read(table, r)).collect()
}

fn coordinator<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawCoordinator {
    let raw = RawCoordinator {
        listen: t.text(r, "listen"),
        worker_listen: t.text(r, "worker_listen"),
        addresses: t.texts(r, "addresses"),
        data_dir: t.text(r, "data_dir"),
        plain_http: t.flag(r, "plain_http"),
    };
    t.close(r);
    raw
}

fn auth<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawAuth {
    let raw = RawAuth {
        worker_secret_file: t.text(r, "worker_secret_file"),
        tokens: each(t.tables(r, "tokens"), r, token),
    };
    t.close(r);
    raw
}

fn token<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawToken {
    let raw = RawToken {
        path: t.path.clone(),
        user: t.need(r, "user"),
        file: t.text(r, "file"),
        sha256: t.text(r, "sha256"),
        admin: t.flag(r, "admin"),
        groups: t.texts(r, "groups"),
    };
    t.close(r);
    raw
}

fn tls<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawTls {
    let raw = RawTls {
        ca: t.need(r, "ca"),
        cert: t.need(r, "cert"),
        key: t.need(r, "key"),
    };
    t.close(r);
    raw
}

fn limits<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawLimits {
    let raw = RawLimits {
        body_bytes_max: t.bytes(r, "body_bytes_max"),
        deadline_ms: t.number(r, "deadline_ms"),
        queue_tokens_max: t.number(r, "queue_tokens_max"),
        queue_requests_max: t.number(r, "queue_requests_max"),
        idle_stream_ms: t.number(r, "idle_stream_ms"),
    };
    t.close(r);
    raw
}

fn node<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawNode {
    let raw = RawNode {
        path: t.path.clone(),
        name: t.need(r, "name"),
        address: t.text(r, "address"),
        devices: each(t.tables(r, "devices"), r, device),
    };
    t.close(r);
    raw
}

fn device<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawDevice {
    let raw = RawDevice {
        path: t.path.clone(),
        name: t.need(r, "name"),
        kind: t.need(r, "kind"),
        memory: t.bytes(r, "memory"),
        threads: t.number(r, "threads"),
        cores: t.text(r, "cores"),
        group_port: t.number(r, "group_port"),
        graphs: t.flag(r, "graphs"),
        batch_invariant: t.flag(r, "batch_invariant"),
    };
    t.close(r);
    raw
}

fn workload_type<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawWorkloadType {
    let raw = RawWorkloadType {
        path: t.path.clone(),
        name: t.need(r, "name"),
        device: t.need(r, "device"),
        shards: t.number(r, "shards"),
        memory: t.bytes(r, "memory"),
        stands_in_for: t.text(r, "stands_in_for"),
    };
    t.close(r);
    raw
}

fn model<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawModel {
    let raw = RawModel {
        path: t.path.clone(),
        name: t.need(r, "name"),
        version: t.need(r, "version"),
        folder: t.text(r, "path"),
        hub: t.text(r, "hub"),
        revision: t.text(r, "revision"),
        uri: t.text(r, "uri"),
        registry: t.text(r, "registry"),
        kv_dtype: t.text(r, "kv_dtype"),
        quantization: t.text(r, "quantization"),
        context_max: t.number(r, "context_max"),
    };
    t.close(r);
    raw
}

fn registry<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawRegistry {
    let raw = RawRegistry {
        path: t.path.clone(),
        name: t.need(r, "name"),
        kind: t.need(r, "kind"),
        url: t.text(r, "url"),
        folder: t.text(r, "path"),
        token_file: t.text(r, "token_file"),
        token_env: t.text(r, "token_env"),
        username: t.text(r, "username"),
        password_file: t.text(r, "password_file"),
        password_env: t.text(r, "password_env"),
        ca_file: t.text(r, "ca_file"),
        insecure_tls: t.flag(r, "insecure_tls"),
        kv_dtype: t.text(r, "kv_dtype"),
        quantization: t.text(r, "quantization"),
        context_max: t.number(r, "context_max"),
    };
    t.close(r);
    raw
}

fn worker<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawWorker {
    let raw = RawWorker {
        cache_dir: t.text(r, "cache_dir"),
        cache_bytes_max: t.bytes(r, "cache_bytes_max"),
        packed_dir: t.text(r, "packed_dir"),
        packed_bytes_max: t.bytes(r, "packed_bytes_max"),
    };
    t.close(r);
    raw
}

fn endpoint<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawEndpoint {
    let raw = RawEndpoint {
        path: t.path.clone(),
        name: t.need(r, "name"),
        served_entities: each(t.tables(r, "served_entities"), r, served_entity),
    };
    t.close(r);
    raw
}

fn served_entity<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> RawServedEntity {
    let raw = RawServedEntity {
        path: t.path.clone(),
        name: t.text(r, "name"),
        entity_name: t.need(r, "entity_name"),
        entity_version: t.need(r, "entity_version"),
        workload_type: t.text(r, "workload_type"),
        workload_size: t.text(r, "workload_size"),
        quantization: t.text(r, "quantization"),
        traffic_percentage: t.number(r, "traffic_percentage"),
    };
    t.close(r);
    raw
}
