//! What the store keeps of the cluster, and under which keys.
//!
//! `term` counts the coordinator's starts; `endpoints/NAME` holds an endpoint's wish and its states;
//! `replicas/ID` holds where a replica was placed, so that a restarted coordinator finds its shards again.

use common::ids::{Generation, ReplicaId, Term, WorkerId};
use common::wire::message::{
    KvDtype, ModelSource, Quantization, RemoteFile, RemoteModel, ShardOptions,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::{Access, Settings};
use crate::policy::bytes_text;
use crate::policy::lifecycle::Lifecycle;
use crate::policy::memory_plan::{BLOCK_TOKENS, MemoryPlan};
use crate::registry::ModelFacts;
use crate::store::{Expect, Store, StoreError};
use crate::tables::{Capture, Known};

/// Prefix of endpoints' keys.
pub const ENDPOINTS: &str = "endpoints/";
/// Prefix of replicas' keys.
pub const REPLICAS: &str = "replicas/";
/// The key of the term.
pub const TERM: &str = "term";

/// An endpoint as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// Its name.
    pub name: String,
    /// 32 hexadecimal digits.
    pub id: String,
    /// Who made it.
    pub creator: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
    /// When its configuration last changed.
    pub updated_ms: u64,
    /// Everything beside its configurations; flat, as tags and description once were.
    #[serde(flatten)]
    pub settings: Settings,
    /// Its configurations and how they stand.
    pub life: Lifecycle,
}

impl EndpointRecord {
    /// What must be known before anything is done with it.
    pub fn access(&self) -> Access {
        let gateway = self.settings.ai_gateway.as_ref();
        let table = gateway.and_then(|gateway| gateway.inference_table.as_ref());
        let older = || {
            let newest = self.life.active.as_ref().or(self.life.pending.as_ref());
            newest.and_then(|deployment| deployment.auto_capture.as_ref())
        };
        Access {
            name: self.name.clone(),
            id: self.id.clone(),
            creator: self.creator.clone(),
            settings: self.settings.clone(),
            inference_table: table.or_else(older).filter(|table| table.enabled).cloned(),
        }
    }

    /// What rows say of it, and whether there are any.
    pub fn known(&self) -> Known {
        let gateway = self.settings.ai_gateway.as_ref();
        let deployments = self.life.active.iter().chain(&self.life.pending);
        let entities = deployments.flat_map(|deployment| &deployment.entities);
        Known {
            id: self.id.clone(),
            // Calls are accounted for unless somebody does not want it.
            usage: gateway.and_then(|gateway| gateway.usage_tracking) != Some(false),
            inference: self.access().inference_table.map(|table| Capture {
                redact: table.redact,
            }),
            models: entities
                .map(|entity| (entity.spec.name.clone(), entity.spec.model.clone()))
                .collect(),
        }
    }
}

/// Where a replica's shards are, as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The replica.
    pub replica: ReplicaId,
    /// Counts its formations.
    pub generation: Generation,
    /// Its endpoint's name.
    pub endpoint: String,
    /// The workers of ranks 0, 1, ...
    pub members: Vec<WorkerId>,
    /// The model's files.
    pub source: StoredSource,
    /// How its shards are run.
    pub options: StoredOptions,
}

/// [`ModelSource`] in the store's own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredSource {
    /// A folder that every worker sees.
    Folder(String),
    /// Files that workers fetch.
    Remote {
        /// The registry's name.
        registry: String,
        /// Where in it.
        uri: String,
        /// Tells this version from any other.
        identity: String,
        /// Path, length and SHA-256 of each file.
        files: Vec<(String, Option<u64>, Option<String>)>,
    },
}

impl StoredSource {
    /// What workers are told.
    pub fn of(source: &ModelSource) -> Self {
        match source {
            ModelSource::Folder(folder) => StoredSource::Folder(folder.clone()),
            ModelSource::Remote(remote) => StoredSource::Remote {
                registry: remote.registry.clone(),
                uri: remote.uri.clone(),
                identity: remote.identity.clone(),
                files: remote
                    .files
                    .iter()
                    .map(|file| (file.path.clone(), file.bytes, file.sha256.clone()))
                    .collect(),
            },
        }
    }

    /// As the wire says it.
    pub fn wire(&self) -> ModelSource {
        match self {
            StoredSource::Folder(folder) => ModelSource::Folder(folder.clone()),
            StoredSource::Remote {
                registry,
                uri,
                identity,
                files,
            } => ModelSource::Remote(RemoteModel {
                registry: registry.clone(),
                uri: uri.clone(),
                identity: identity.clone(),
                files: files
                    .iter()
                    .map(|(path, bytes, sha256)| RemoteFile {
                        path: path.clone(),
                        bytes: *bytes,
                        sha256: sha256.clone(),
                    })
                    .collect(),
            }),
        }
    }
}

/// [`ShardOptions`] in the store's own words: wire types never change their bytes, records may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredOptions {
    /// Type of K and V in the cache.
    #[serde(default)]
    pub kv_dtype: KvDtype,
    /// How weights are kept.
    #[serde(default)]
    pub quantization: Quantization,
    /// KV blocks of 16 tokens.
    pub kv_blocks: u32,
    /// Most tokens in one step.
    pub step_tokens_max: u32,
    /// Most sequences in one step.
    pub sequences_max: u32,
    /// Longest sequence served.
    pub context_max: u32,
    /// Bytes per rank.
    pub memory_bytes: u64,
    /// Bytes of them that are K and V; 0 in records of before this was kept.
    #[serde(default)]
    pub kv_bytes: u64,
}

impl StoredOptions {
    /// What a plan asks of each rank.
    pub fn of(plan: &MemoryPlan, facts: &ModelFacts) -> Self {
        StoredOptions {
            kv_dtype: facts.kv_dtype,
            quantization: facts.quantization,
            kv_blocks: plan.kv_blocks,
            step_tokens_max: plan.need.step_tokens_max,
            sequences_max: plan.need.sequences_max,
            context_max: plan.need.context_max,
            memory_bytes: plan.bytes(),
            kv_bytes: plan.kv_bytes(),
        }
    }

    /// Sequences at the longest context that the cache has room for at a time. One block is nobody's.
    pub fn concurrency(&self) -> u32 {
        let sequence_blocks = self.context_max.div_ceil(BLOCK_TOKENS as u32).max(1);
        self.kv_blocks.saturating_sub(1) / sequence_blocks
    }

    /// Requests that a replica runs at a time of those that are admitted: as many as its cache has room for even when
    /// each becomes as long as it may. More would fit as long as they are short, and later put each other back, to be
    /// computed again.
    pub fn credits(&self, admitted: u32) -> u32 {
        admitted.min(self.concurrency()).max(1)
    }

    /// Says so when memory has room for fewer requests at a time than are admitted.
    pub fn shortage(&self, wanted: u32) -> Option<String> {
        let credits = self.credits(wanted);
        (credits < wanted).then(|| {
            format!(
                "memory has room for {credits} of {wanted} requests at a time with {} tokens each: {} of it are left for \
                 their keys and values",
                self.context_max,
                bytes_text(self.kv_bytes)
            )
        })
    }

    /// As the wire says it.
    pub fn wire(self) -> ShardOptions {
        ShardOptions {
            kv_dtype: self.kv_dtype,
            quantization: self.quantization,
            kv_blocks: self.kv_blocks,
            step_tokens_max: self.step_tokens_max,
            sequences_max: self.sequences_max,
            context_max: self.context_max,
            memory_bytes: self.memory_bytes,
        }
    }
}

/// The key of an endpoint.
pub fn endpoint_key(name: &str) -> String {
    format!("{ENDPOINTS}{name}")
}

/// The key of a replica.
pub fn replica_key(replica: ReplicaId) -> String {
    format!("{REPLICAS}{replica}")
}

/// A record's bytes.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record)
        .map_err(|e| StoreError::Failed(format!("a record cannot be encoded: {e}")))
}

/// A record from its bytes.
///
/// # Errors
/// Names the key of a record that this version cannot read.
pub fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value)
        .map_err(|e| StoreError::Failed(format!("store: record {key} is not readable: {e}")))
}

/// The next term: one more than at the last start.
///
/// # Errors
/// [`StoreError`], also when another coordinator starts at the same moment.
pub async fn next_term(store: &dyn Store) -> Result<Term, StoreError> {
    let found = store.get(TERM.into()).await?;
    let (term, expect) = match &found {
        Some(entry) => (
            decode::<u64>(TERM, &entry.value)?,
            Expect::Revision(entry.revision),
        ),
        None => (0, Expect::Absent),
    };
    store.put(TERM.into(), encode(&(term + 1))?, expect).await?;
    Ok(Term(term + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{AiGateway, InferenceTable};

    /// As the first version wrote it.
    const OLDEST: &str = r#"{"name":"e","id":"08f9","creator":"ann","created_ms":1,"updated_ms":2,
        "tags":[["team","x"]],"description":"d","life":{"version":1,"update":"InProgress","active":null,
        "pending":{"version":1,"started_ms":1,"routes":[{"entity":"a","percentage":100}],"entities":[{
            "spec":{"name":"a","model":{"name":"m","version":"1"},"workload_type":"CPU","workload_size":"Small",
                    "scale_to_zero":false,"environment_vars":[]},
            "creator":"ann","created_ms":1,"replicas":[],"state":"Creating","message":""}]}}}"#;

    #[test]
    fn the_oldest_records_are_read_and_written_back() {
        let record: EndpointRecord = decode("k", OLDEST.as_bytes()).unwrap();
        assert_eq!(record.settings.tags, [("team".into(), "x".into())]);
        assert_eq!(record.settings.description.as_deref(), Some("d"));
        let again: EndpointRecord = decode("k", &encode(&record).unwrap()).unwrap();
        assert_eq!(again, record);
    }

    #[test]
    fn the_gateways_inference_table_wins_over_the_older_switch() {
        let mut record: EndpointRecord = decode("k", OLDEST.as_bytes()).unwrap();
        let table = |enabled, name: &str| InferenceTable {
            enabled,
            table_name_prefix: Some(name.into()),
            ..InferenceTable::default()
        };
        let pending = record.life.pending.as_mut().unwrap();
        pending.auto_capture = Some(table(true, "older"));
        let older = record.access().inference_table;
        assert_eq!(older, Some(table(true, "older")));
        let gateway = |table| {
            Some(AiGateway {
                inference_table: Some(table),
                ..AiGateway::default()
            })
        };
        record.settings.ai_gateway = gateway(table(true, "newer"));
        let newer = record.access().inference_table;
        assert_eq!(newer, Some(table(true, "newer")));
        record.settings.ai_gateway = gateway(table(false, "newer"));
        assert_eq!(record.access().inference_table, None);
    }
}
