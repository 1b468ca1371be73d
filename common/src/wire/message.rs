//! What coordinator and worker say to each other.
//!
//! A worker dials, sends [`Report::Hello`] and waits for [`Command::Welcome`]. Then commands go one way and reports the
//! other; nothing is answered by position, everything names what it is about. What changes shards or starts requests
//! carries the coordinator's term, everything about a shard its group's generation, everything about a prompt its attempt.
//!
//! bincode numbers variants by their order: add new ones at the end, never change a released one.

use serde::{Deserialize, Serialize};

use crate::ids::{BootId, Generation, ReplicaId, RequestId, Term, WorkerId};
use crate::request::{Delta, End, Failure, Generate, Resume, TokenLogprob};

/// Oldest protocol this build speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest protocol this build speaks.
pub const PROTOCOL_MAX: u32 = 1;

/// Coordinator to worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The answer to Hello: the link is up.
    Welcome {
        /// The protocol both sides speak from here on.
        protocol: u32,
        /// The coordinator's term; the worker refuses commands of older ones.
        term: Term,
    },
    /// Hold this shard: fetch, open, join the group. Progress comes as [`Report::Shard`].
    Load {
        /// The sender's term.
        term: Term,
        /// What to hold.
        shard: Box<ShardSpec>,
    },
    /// Let go of the shard. Requests still running on it end as unavailable.
    Unload {
        /// The sender's term.
        term: Term,
        /// Which.
        replica: ReplicaId,
        /// Of this generation or an older one.
        generation: Generation,
        /// The replica will be formed again: its weights may stay on the device until they are wanted or in the way.
        keep: bool,
    },
    /// Answer a prompt. Only to rank 0 of a ready group.
    Start {
        /// The sender's term.
        term: Term,
        /// The request.
        start: Box<Start>,
    },
    /// The answer is not wanted any more. Unknown requests are ignored.
    Cancel {
        /// Which.
        request: RequestId,
    },
    /// Answer with [`Report::Pong`].
    Ping {
        /// To be repeated.
        nonce: u64,
    },
    /// The link is refused; the worker must not dial again without a change.
    Refused {
        /// Why, and what would help.
        reason: String,
    },
}

/// A prompt for a replica, with what resuming it elsewhere needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// The request's id; another attempt keeps it.
    pub request: RequestId,
    /// The replica meant.
    pub replica: ReplicaId,
    /// Its generation.
    pub generation: Generation,
    /// 0 for the first try.
    pub attempt: u32,
    /// What to do.
    pub generate: Generate,
    /// What earlier attempts emitted; empty on the first.
    pub resume: Vec<Resume>,
    /// Milliseconds left until the deadline, when there is one.
    pub deadline_ms: Option<u64>,
}

/// A shard to hold: one rank of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardSpec {
    /// The replica this is a part of.
    pub replica: ReplicaId,
    /// Of this generation.
    pub generation: Generation,
    /// This worker's rank.
    pub rank: u32,
    /// The group, rank by rank. Its length is the number of ranks.
    pub members: Vec<GroupMember>,
    /// Key by which the ranks know each other; made anew for each generation.
    pub group_key: [u8; 32],
    /// The model's files.
    pub source: ModelSource,
    /// How to run it.
    pub options: ShardOptions,
}

/// One rank's place in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    /// The worker.
    pub worker: WorkerId,
    /// Where it accepts other ranks, `address:port`.
    pub group_address: String,
}

/// Where a model's files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelSource {
    /// A folder every worker can read: a Hugging Face folder or an MLflow model.
    Folder(String),
    /// Files that the worker fetches, once, into its own cache.
    Remote(RemoteModel),
}

/// A model's files in a registry. The worker finds the registry and its credentials in its own cluster.toml.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteModel {
    /// The registry's name in cluster.toml.
    pub registry: String,
    /// Where the files are, in the registry's own words: `mlflow-artifacts:/0/<run>/artifacts/model` for example.
    pub uri: String,
    /// What tells this version from any other: part of the cache's key.
    pub identity: String,
    /// The files to fetch, relative to `uri`.
    pub files: Vec<RemoteFile>,
}

/// One file of a [`RemoteModel`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFile {
    /// Relative path, `/` between its parts.
    pub path: String,
    /// Its length, when the registry says it.
    pub bytes: Option<u64>,
    /// Its SHA-256 in hexadecimal, when the registry says it.
    pub sha256: Option<String>,
}

/// How a shard is run. Sizes come from the coordinator's memory plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardOptions {
    /// Type of K and V in the cache.
    pub kv_dtype: KvDtype,
    /// How weights are kept.
    pub quantization: Quantization,
    /// KV blocks of 16 tokens in this rank's pool.
    pub kv_blocks: u32,
    /// Most tokens in one step.
    pub step_tokens_max: u32,
    /// Most sequences in one step.
    pub sequences_max: u32,
    /// Longest sequence served, prompt and output; at most the model's own.
    pub context_max: u32,
    /// Bytes this shard may use; loading more fails.
    pub memory_bytes: u64,
}

/// Type of K and V in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// Two bytes; the default.
    #[default]
    Bf16,
    /// Four bytes; for comparisons with references.
    F32,
    /// One byte, and a scale for each key and each value of a head: twice the tokens of bf16, nearly.
    Int8,
}

impl KvDtype {
    /// Bytes per element.
    pub fn bytes(self) -> u64 {
        match self {
            KvDtype::Bf16 => 2,
            KvDtype::F32 => 4,
            KvDtype::Int8 => 1,
        }
    }

    /// Bytes of the scale that a head's key or value of one token has.
    pub fn scale_bytes(self) -> u64 {
        match self {
            KvDtype::Bf16 | KvDtype::F32 => 0,
            KvDtype::Int8 => 4,
        }
    }

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::Bf16 => "bf16",
            KvDtype::F32 => "f32",
            KvDtype::Int8 => "int8",
        }
    }
}

/// How the weights of a model's products are kept; tables of tokens stay bf16 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As bf16: the default.
    #[default]
    None,
    /// 8 bits, a scale for each group of columns.
    Int8,
    /// 4 bits, a scale and a zero point for each group of columns.
    Int4,
}

impl Quantization {
    /// All there are.
    pub const ALL: [Quantization; 3] = [Quantization::None, Quantization::Int8, Quantization::Int4];

    /// As configurations write it.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::None => "none",
            Quantization::Int8 => "int8",
            Quantization::Int4 => "int4",
        }
    }

    /// From a configuration's word; `None` for any other.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == text)
    }
}

/// Worker to coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// First words of a link.
    Hello(Box<Hello>),
    /// A shard's state has changed, or its load went on.
    Shard {
        /// Which.
        replica: ReplicaId,
        /// Of this generation.
        generation: Generation,
        /// This worker's rank.
        rank: u32,
        /// How it stands.
        state: ShardState,
    },
    /// The prompt is understood and queued: its answer follows in [`Report::Step`].
    Accepted {
        /// Which.
        request: RequestId,
        /// Which attempt of it, as its Start said.
        attempt: u32,
        /// Tokens of the prompt: settles the coordinator's estimate.
        prompt_tokens: u32,
    },
    /// The prompt will not be run; nothing else follows for it.
    Rejected {
        /// Which.
        request: RequestId,
        /// Which attempt of it, as its Start said.
        attempt: u32,
        /// Why.
        failure: Failure,
    },
    /// What one step gave, for all requests of a replica.
    Step {
        /// Which replica.
        replica: ReplicaId,
        /// Of this generation.
        generation: Generation,
        /// The answers' new parts.
        outputs: Vec<Output>,
    },
    /// A shard's counters, about once a second and at each change of readiness.
    Health {
        /// Which replica.
        replica: ReplicaId,
        /// Of this generation.
        generation: Generation,
        /// The counters.
        health: Health,
    },
    /// Answer to Ping.
    Pong {
        /// As given.
        nonce: u64,
    },
    /// Lines of a shard's log, in order.
    Log {
        /// Which replica.
        replica: ReplicaId,
        /// Of this generation.
        generation: Generation,
        /// This worker's rank.
        rank: u32,
        /// The lines.
        lines: Vec<LogLine>,
    },
}

/// A line of a shard's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Of the load (build logs) or of the run (logs).
    pub phase: LogPhase,
    /// What happened, in one line.
    pub text: String,
}

/// What a shard was doing when it wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogPhase {
    /// Being loaded.
    Build,
    /// Serving.
    Run,
}

/// What a worker is and holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest protocol it speaks.
    pub protocol_min: u32,
    /// Newest protocol it speaks.
    pub protocol_max: u32,
    /// The cluster's shared secret (links off loopback run under TLS).
    pub secret: String,
    /// Its name.
    pub worker: WorkerId,
    /// This life of it.
    pub boot: BootId,
    /// Its device.
    pub device: Device,
    /// Where it accepts other ranks of a group.
    pub group_address: String,
    /// Shards it holds from before the link was cut.
    pub shards: Vec<HeldShard>,
}

/// The device a worker owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// Its product name and instruction path, for people.
    pub name: String,
    /// Memory shards may use, in bytes.
    pub memory_bytes: u64,
    /// Compute threads (CPU).
    pub threads: u32,
    /// How fast it is, when it was measured.
    pub rates: Option<DeviceRates>,
}

/// How fast a device does what a model consists of, measured once when its worker started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRates {
    /// Bytes of weights that a step of one token reads per second.
    pub bytes_per_s: u64,
    /// Additions and multiplications per second in a step of many tokens.
    pub flops_per_s: u64,
}

/// Kinds of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Cores of the host.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// A shard a worker still holds when it says Hello.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeldShard {
    /// The replica.
    pub replica: ReplicaId,
    /// Of this generation.
    pub generation: Generation,
    /// Its rank.
    pub rank: u32,
    /// How it stands.
    pub state: ShardState,
}

/// How a shard stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ShardState {
    /// Being loaded.
    Loading {
        /// What is being done, for people: "reading weights", "joining the group".
        stage: String,
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Can take requests (rank 0) or plans (other ranks).
    Ready(Box<ReadyShard>),
    /// It is over; why.
    Failed(Failure),
    /// It was let go on command.
    Unloaded,
}

/// Facts of a loaded shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyShard {
    /// Replicas with the same id give the same text, byte for byte.
    pub numerics_id: u64,
    /// The task in the model's metadata, `llm/v1/completions` for example.
    pub task: Option<String>,
    /// Whether a chat template is there.
    pub chat: bool,
    /// Longest sequence served.
    pub context_max: u32,
    /// KV blocks of 16 tokens that sequences can use.
    pub kv_blocks: u32,
    /// Bytes of weights held.
    pub weight_bytes: u64,
    /// Milliseconds from Load to ready.
    pub load_ms: u64,
}

/// New parts of one request's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Output {
    /// The prompt's log-probabilities; before the first delta.
    Prompt {
        /// Which request.
        request: RequestId,
        /// The prompt's text, when echo was asked for.
        text: String,
        /// One per prompt token.
        tokens: Vec<TokenLogprob>,
    },
    /// New output.
    Delta {
        /// Which request.
        request: RequestId,
        /// The output.
        delta: Delta,
    },
    /// A candidate is over.
    End {
        /// Which request.
        request: RequestId,
        /// The candidate.
        candidate: u32,
        /// Output tokens it has in all.
        output_tokens: u32,
        /// Prompt tokens that came from the prefix cache.
        cached_tokens: u32,
        /// Why.
        end: End,
    },
    /// The prompt's embedding; before its candidate's end.
    Embedding {
        /// Which request.
        request: RequestId,
        /// One number per hidden unit.
        values: Vec<f32>,
    },
}

impl Output {
    /// The request this is about.
    pub fn request(&self) -> RequestId {
        match self {
            Output::Prompt { request, .. }
            | Output::Delta { request, .. }
            | Output::End { request, .. }
            | Output::Embedding { request, .. } => *request,
        }
    }
}

/// Counters of a shard's engine. Counters only grow within one generation; gauges say so.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Health {
    /// Steps done: health is progress.
    pub steps: u64,
    /// Gauge: sequences in the running batch.
    pub running: u32,
    /// Gauge: sequences waiting.
    pub waiting: u32,
    /// Gauge: prompt tokens waiting to be computed.
    pub waiting_tokens: u64,
    /// Gauge: KV blocks in use.
    pub kv_blocks_used: u32,
    /// Gauge: KV blocks in all.
    pub kv_blocks_total: u32,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Sequences preempted.
    pub preemptions: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Output tokens made.
    pub output_tokens: u64,
    /// Microseconds of the steps since the last report, one per step (bounded; the rest is dropped).
    pub step_us: Vec<u32>,
    /// Work is pending and the step counter is frozen beyond the limit.
    pub stalled: bool,
}

#[cfg(test)]
mod tests;
