//! What the store keeps of the cluster, and under which keys.
//!
//! `term` counts the coordinator's starts; `endpoints/NAME` holds an endpoint's wish and its states;
//! `replicas/ID` holds where a replica was placed, so that a restarted coordinator finds its shards again.

use common::ids::{Generation, ReplicaId, Term, WorkerId};
use common::wire::message::{KvDtype, ShardOptions};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::WorkloadSize;
use crate::policy::lifecycle::Lifecycle;
use crate::policy::memory_plan::{BLOCK_TOKENS, MemoryPlan};
use crate::store::{Expect, Store, StoreError};

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
    /// Free labels.
    pub tags: Vec<(String, String)>,
    /// For people.
    pub description: Option<String>,
    /// Its configurations and how they stand.
    pub life: Lifecycle,
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
    /// The model's folder.
    pub folder: String,
    /// How its shards are run.
    pub options: StoredOptions,
}

/// [`ShardOptions`] in the store's own words: wire types never change their bytes, records may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredOptions {
    /// The cache is f32, not bf16.
    pub kv_f32: bool,
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
}

impl StoredOptions {
    /// What a plan asks of each rank.
    pub fn of(plan: &MemoryPlan, kv_dtype: KvDtype) -> Self {
        StoredOptions {
            kv_f32: kv_dtype == KvDtype::F32,
            kv_blocks: plan.kv_blocks,
            step_tokens_max: plan.need.step_tokens_max,
            sequences_max: plan.need.sequences_max,
            context_max: plan.need.context_max,
            memory_bytes: plan.bytes(),
        }
    }

    /// Sequences at the longest context that the cache has room for at a time. One block is nobody's.
    pub fn concurrency(&self) -> u32 {
        let sequence_blocks = self.context_max.div_ceil(BLOCK_TOKENS as u32).max(1);
        self.kv_blocks.saturating_sub(1) / sequence_blocks
    }

    /// Requests that a replica of this size runs at a time: as many as its cache has room for even when each becomes as
    /// long as it may. More would fit as long as they are short, and later put each other back, to be computed again.
    pub fn credits(&self, size: WorkloadSize) -> u32 {
        size.concurrency().min(self.concurrency()).max(1)
    }

    /// Says so when memory has room for fewer requests at a time than the size stands for.
    pub fn shortage(&self, size: WorkloadSize) -> Option<String> {
        let (credits, wanted) = (self.credits(size), size.concurrency());
        (credits < wanted).then(|| {
            format!(
                "memory has room for {credits} of {wanted} requests at a time with {} tokens each",
                self.context_max
            )
        })
    }

    /// As the wire says it.
    pub fn wire(self) -> ShardOptions {
        ShardOptions {
            kv_dtype: if self.kv_f32 {
                KvDtype::F32
            } else {
                KvDtype::Bf16
            },
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
