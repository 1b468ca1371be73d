//! Opening a shard: from a model's folder to an engine that runs.
//!
//! Owns the order of things (files are checked before memory is taken, memory before the group forms, the group before
//! weights are read) and what a running shard consists of. Weights that were kept of the shard's earlier life are not read
//! again. Runs on a thread of its own and blocks; who asked for it, and what becomes of it, is the shard actor's part.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::request::{Failure, FailureKind};
use common::wire::message::{
    KvDtype, ModelSource, Quantization, ReadyShard, ShardOptions, ShardSpec,
};
use engine::backend::{self, Backend, DeviceError, WeightDtype};
use engine::collective::solo::Solo;
use engine::collective::{AbortHandle, Collective};
use engine::engine::{Engine, EngineConfig, EngineEnd, EngineHandle, OnEnd};
use engine::follower::{self, FollowerHandle};
use engine::model_runner::{Footprint, Keeper, ModelRunner, Parts, RunnerOptions};
use engine::models::checkpoint::{Checkpoint, LoadError};
use engine::scheduler::Backlog;
use engine::weights::packed::PackedCache;
use tokio::sync::mpsc;

use crate::answering::{self, Work};
use crate::artifacts::ModelFolder;
use crate::artifacts::library::Library;
use crate::device::{Compute, Device};
use crate::group;
use crate::logs::ShardLog;
use crate::memory::{Lease, show};
use crate::outbox::Outbox;
use crate::platform::Platform;
use crate::text::TextModel;
use crate::text::sandbox::Sandbox;
use crate::text::trial::Trial;
use crate::translate::Limits;

mod packed;

/// How long a load waits for memory that an earlier shard is giving back.
const MEMORY_WAIT_MAX: Duration = Duration::from_secs(60);
/// Work that may wait in an engine. The coordinator admits by its own, smaller limits; this one only keeps a coordinator
/// gone wrong from filling memory.
const BACKLOG: Backlog = Backlog {
    tokens: 4 << 20,
    sequences: 4096,
};

/// The task of models that give embeddings, and nothing else.
const EMBEDDINGS_TASK: &str = "llm/v1/embeddings";

/// Told what is being done, and how many bytes of how many are.
pub type Progress = Box<dyn Fn(&str, u64, u64) + Send>;
/// Progress within a stage is told so often.
const PROGRESS_PERIOD: Duration = Duration::from_millis(250);

/// Everything that opening needs.
pub struct Opening {
    /// What to open.
    pub spec: ShardSpec,
    /// On which device.
    pub device: Arc<Device>,
    /// Where its files come from.
    pub library: Arc<Library>,
    /// The shard's part of the device's memory.
    pub lease: Arc<Lease>,
    /// Where a leader's answers go.
    pub outbox: Arc<Outbox>,
    /// The shard's log.
    pub log: ShardLog,
    /// Hears of each stage.
    pub progress: Progress,
    /// Told when the engine is over, after its memory is given back or put aside.
    pub on_end: OnEnd,
}

/// A running shard.
pub struct Opened {
    /// Facts for the coordinator.
    pub ready: ReadyShard,
    /// What runs.
    pub running: Running,
}

/// What a shard runs. Stops when dropped.
pub enum Running {
    /// Rank 0: an engine.
    Leader(Leader),
    /// Another rank.
    Follower(Follower),
}

/// The engine of rank 0.
pub struct Leader {
    /// The engine.
    pub engine: EngineHandle,
    /// Its text.
    pub text: Arc<TextModel>,
    /// What it takes.
    pub limits: Limits,
    /// Its answering thread's queue.
    pub work: mpsc::Sender<Work>,
    abort: AbortHandle,
}

/// A rank that executes the leader's plans.
pub struct Follower {
    _handle: FollowerHandle,
    abort: AbortHandle,
}

impl Running {
    /// Ends the shard after its current step; its end is told by `on_end`.
    pub fn stop(&self) {
        match self {
            Running::Leader(leader) => leader.engine.stop(),
            Running::Follower(follower) => follower.abort.abort(),
        }
    }

    /// Ends the shard's group, also inside a step.
    pub fn abort(&self) {
        let (Running::Leader(Leader { abort, .. }) | Running::Follower(Follower { abort, .. })) =
            self;
        abort.abort();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Opens a shard.
///
/// # Errors
/// [`Failure`]: of kind `BadRequest` for the model's files, `TooLarge` for memory, `Unavailable` for the group.
pub fn open(opening: Opening) -> Result<Opened, Failure> {
    match &opening.device.clone().compute {
        Compute::Cpu(cores) => open_checked(cores, opening),
        #[cfg(feature = "cuda")]
        Compute::Cuda(gpu) => open_checked(gpu, opening),
    }
}

/// Opens a shard, and asks the device whether it still answers where that fails.
fn open_checked<P: Platform>(platform: &P, opening: Opening) -> Result<Opened, Failure>
where
    Solo: Collective<<P::Backend as Backend>::Buf>,
{
    platform.check(&opening.spec.options)?;
    let device = opening.device.clone();
    open_on(platform, opening).inspect_err(|_| device.check_alive())
}

fn open_on<P: Platform>(platform: &P, opening: Opening) -> Result<Opened, Failure>
where
    Solo: Collective<<P::Backend as Backend>::Buf>,
{
    let started = Instant::now();
    let Opening {
        spec,
        device,
        library,
        lease,
        outbox,
        log,
        progress,
        on_end,
    } = opening;
    progress("looking for the model's files", 0, 0);
    let wanted = || !lease.is_leaving();
    let held = library.folder(&spec.source, &*progress, &wanted)?;
    if let ModelSource::Remote(remote) = &spec.source {
        log.build(format!(
            "{} files of {} in registry {} are in {} after {}",
            remote.files.len(),
            remote.uri,
            remote.registry,
            held.folder.display(),
            ms(started)
        ));
    }
    progress("reading the model's files", 0, 0);
    let folder = ModelFolder::find(&held.folder).map_err(|e| bad(e.to_string()))?;
    let text = (spec.rank == 0).then(|| open_text(&folder)).transpose()?;
    let checkpoint = Checkpoint::open(&folder.weights).map_err(|e| bad(e.to_string()))?;
    let model = &checkpoint.spec;
    log.build(format!(
        "files checked in {}: {:?}, {} layers of width {}, {} query and {} KV heads, vocabulary {}, context {}, task {}",
        ms(started),
        model.family,
        model.layers,
        model.hidden,
        model.heads,
        model.kv_heads,
        model.vocab,
        model.context_max,
        folder.task.as_deref().unwrap_or("not said")
    ));
    let options = runner_options(&spec);
    let (rank, ranks) = (spec.rank as usize, spec.members.len());
    let footprint = Footprint::of_checkpoint::<P::Backend>(&checkpoint, rank, ranks, &options)
        .map_err(|e| bad(e.to_string()))?;
    for note in checkpoint
        .notes::<P::Backend>(rank, ranks, options.weight_dtype)
        .map_err(|e| bad(e.to_string()))?
    {
        log.build(note);
    }
    let bytes = check_memory(&footprint, &spec.options)?;
    let asked = Instant::now();
    let kept = take_memory::<P::Backend>(&lease, bytes, |parts| {
        let ranks = spec.members.len() as u32;
        parts.fits(&checkpoint, &options, spec.rank, ranks)
    })?;
    log.build(format!(
        "memory {} in {}: {} of {} allowed: weights {}, {} KV blocks {} ({:?}), workspace {}",
        if kept.is_some() {
            "found again"
        } else {
            "taken"
        },
        ms(asked),
        show(bytes),
        show(spec.options.memory_bytes),
        show(footprint.weights),
        spec.options.kv_blocks,
        show(
            footprint
                .kv_block
                .saturating_mul(u64::from(spec.options.kv_blocks))
        ),
        spec.options.kv_dtype,
        show(footprint.workspace)
    ));
    let mut place = match kept {
        Some(parts) => Place::Kept(parts),
        None => Place::New(platform.backend().map_err(device_failure)?),
    };
    let limits = Limits {
        context_max: spec
            .options
            .context_max
            .min(checkpoint.spec.context_max as u32),
        vocab: checkpoint.spec.vocab as u32,
        embeds: folder.task.as_deref() == Some(EMBEDDINGS_TASK),
    };
    let group = if spec.members.len() == 1 {
        None
    } else {
        progress("joining the shard group", 0, 0);
        match join(platform, &spec, &device, place.backend(), &log) {
            Ok(group) => Some(group),
            Err(failure) => {
                place.keep(&lease);
                return Err(failure);
            }
        }
    };
    let keeper = keeper(lease.clone(), log.clone());
    let on_end: OnEnd = {
        let device = device.clone();
        Box::new(move |end| {
            drop((lease, held));
            if !matches!(end, EngineEnd::Stopped) {
                device.check_alive();
            }
            on_end(end);
        })
    };
    let loading = Loading {
        spec: &spec,
        packed: library.packed(),
        checkpoint: &checkpoint,
        options,
        place,
        text,
        limits,
        outbox,
        log: &log,
        keeper,
        on_end,
        progress: &progress,
        weight_bytes: footprint.weights,
    };
    let (numerics_id, running, chat) = match group {
        Some(group) => loading.load(group),
        None => loading.load(Solo::new()),
    }?;
    let ready = ReadyShard {
        numerics_id,
        task: folder.task,
        chat,
        context_max: limits.context_max,
        // Block 0 stands for "no block".
        kv_blocks: spec.options.kv_blocks.saturating_sub(1),
        weight_bytes: footprint.weights,
        load_ms: started.elapsed().as_millis() as u64,
    };
    log.build(format!(
        "ready in {} ms: numerics id {numerics_id:016x}, context {} tokens, {} KV blocks, chat template {}",
        ready.load_ms,
        ready.context_max,
        ready.kv_blocks,
        if chat { "found" } else { "none" }
    ));
    Ok(Opened { ready, running })
}

/// Forms the shard's group: of its processes first, then of their devices.
fn join<P: Platform>(
    platform: &P,
    spec: &ShardSpec,
    device: &Device,
    backend: &mut P::Backend,
    log: &ShardLog,
) -> Result<P::Group, Failure> {
    let begun = Instant::now();
    let ranks = group::form(spec, &device.groups)?;
    let group = platform.join(ranks, backend)?;
    log.build(format!(
        "shard group of {} ranks formed in {}",
        spec.members.len(),
        ms(begun)
    ));
    Ok(group)
}

/// Takes the shard's memory, with what was kept there of its earlier life.
fn take_memory<B: Backend>(
    lease: &Lease,
    bytes: u64,
    fits: impl Fn(&Parts<B>) -> bool,
) -> Result<Option<Box<Parts<B>>>, Failure> {
    let Some(kept) = lease.take(bytes, MEMORY_WAIT_MAX)? else {
        return Ok(None);
    };
    match kept.downcast::<Parts<B>>() {
        Ok(parts) if fits(&parts) => Ok(Some(parts)),
        // The model's files are not what they were.
        other => {
            drop(other);
            lease.give_back();
            lease.take(bytes, MEMORY_WAIT_MAX)?;
            Ok(None)
        }
    }
}

/// Puts the model aside when its engine is over, for the shard's next life.
fn keeper<B: Backend>(lease: Arc<Lease>, log: ShardLog) -> Keeper<B> {
    Box::new(move |_, parts| {
        if lease.keep(Box::new(parts)) {
            log.run("weights kept on the device for the shard's next life");
        }
    })
}

/// Where the shard's weights come to be.
enum Place<B: Backend> {
    /// On a device that has none of it.
    New(B),
    /// Where they were left.
    Kept(Box<Parts<B>>),
}

impl<B: Backend> Place<B> {
    fn backend(&mut self) -> &mut B {
        match self {
            Place::New(backend) => backend,
            Place::Kept(parts) => parts.backend(),
        }
    }

    /// The group did not form: what was kept stays for another try.
    fn keep(self, lease: &Lease) {
        if let Place::Kept(mut parts) = self {
            // A group that was begun has closed what the device records.
            parts.backend().renew();
            lease.keep(parts);
        }
    }
}

fn open_text(folder: &ModelFolder) -> Result<Arc<TextModel>, Failure> {
    let sandbox = |template| Box::new(Sandbox::of_this_program(template)) as _;
    TextModel::open(&folder.tokenizer, &folder.weights, sandbox)
        .map(|text| Arc::new(text.with_trial(Trial::of_this_program())))
        .map_err(|e| bad(format!("{e:#}")))
}

fn runner_options(spec: &ShardSpec) -> RunnerOptions {
    RunnerOptions {
        weight_dtype: match spec.options.quantization {
            Quantization::None => WeightDtype::Bf16,
            Quantization::Int8 => WeightDtype::Int8,
            Quantization::Int4 => WeightDtype::Int4,
        },
        kv_dtype: match spec.options.kv_dtype {
            KvDtype::Bf16 => backend::KvDtype::Bf16,
            KvDtype::F32 => backend::KvDtype::F32,
            KvDtype::Int8 => backend::KvDtype::Int8,
        },
        blocks: spec.options.kv_blocks,
        step_tokens_max: spec.options.step_tokens_max,
        spans_max: spec.options.sequences_max,
        generation: spec.generation.0,
    }
}

/// What the shard takes, if that is not more than it may.
fn check_memory(footprint: &Footprint, options: &ShardOptions) -> Result<u64, Failure> {
    let kv = footprint
        .kv_block
        .saturating_mul(u64::from(options.kv_blocks));
    let bytes = footprint
        .weights
        .saturating_add(kv)
        .saturating_add(footprint.workspace);
    if bytes > options.memory_bytes {
        return Err(Failure::new(
            FailureKind::TooLarge,
            format!(
                "the shard needs {} (weights {}, {} KV blocks {}, workspace {}) and may use {}",
                show(bytes),
                show(footprint.weights),
                options.kv_blocks,
                show(kv),
                show(footprint.workspace),
                show(options.memory_bytes)
            ),
        ));
    }
    Ok(bytes)
}

/// A shard whose rank has found its group.
struct Loading<'a, B: Backend> {
    spec: &'a ShardSpec,
    packed: Option<&'a PackedCache>,
    checkpoint: &'a Checkpoint,
    options: RunnerOptions,
    place: Place<B>,
    /// On rank 0.
    text: Option<Arc<TextModel>>,
    limits: Limits,
    outbox: Arc<Outbox>,
    log: &'a ShardLog,
    keeper: Keeper<B>,
    on_end: OnEnd,
    progress: &'a Progress,
    /// Bytes of weights there are to read.
    weight_bytes: u64,
}

impl<B: Backend> Loading<'_, B> {
    fn load<C: Collective<B::Buf> + 'static>(
        self,
        collective: C,
    ) -> Result<(u64, Running, bool), Failure> {
        let Loading {
            spec,
            packed,
            checkpoint,
            options,
            place,
            text,
            limits,
            outbox,
            log,
            keeper,
            on_end,
            progress,
            weight_bytes,
        } = self;
        let abort = collective.abort_handle();
        let mut told: Option<Instant> = None;
        let mut progress = |done: u64| {
            if told.is_none_or(|at| at.elapsed() >= PROGRESS_PERIOD) {
                told = Some(Instant::now());
                progress("reading weights", done, weight_bytes);
            }
        };
        let begun = Instant::now();
        let (mut runner, how) = match place {
            Place::New(backend) => {
                progress(0);
                ModelRunner::load_through(
                    packed,
                    checkpoint,
                    &options,
                    backend,
                    collective,
                    &mut progress,
                )
                .map(|(runner, origin)| (runner, packed::settle(origin, log)))
            }
            Place::Kept(parts) => ModelRunner::from_parts(*parts, &options, collective)
                .map(|runner| (runner, "kept, taken over")),
        }
        .map_err(load_failure)?;
        runner.keep(keeper);
        log.build(format!(
            "weights {how} in {}: {}",
            ms(begun),
            show(weight_bytes)
        ));
        tracing::info!(replica = %spec.replica, generation = %spec.generation, rank = spec.rank, bytes = weight_bytes,
            "weights {how}");
        let numerics_id = u64::from_str_radix(runner.numerics_id(), 16).map_err(|_| {
            internal(format!(
                "numerics id {} is not 16 hexadecimal digits",
                runner.numerics_id()
            ))
        })?;
        let name = format!("shard-{}", spec.replica);
        let no_thread = |e: std::io::Error| internal(format!("cannot start a thread: {e}"));
        let Some(text) = text else {
            let handle = follower::spawn(&name, Box::new(runner), spec.generation.0, on_end)
                .map_err(no_thread)?;
            return Ok((
                numerics_id,
                Running::Follower(Follower {
                    _handle: handle,
                    abort,
                }),
                false,
            ));
        };
        let (work, queue) = mpsc::channel(answering::QUEUE_MAX);
        let events = work.clone();
        let sink = Box::new(move |step| {
            // Fails when the answering thread is gone, and with it everybody who waits for answers.
            let _ = events.blocking_send(Work::Events(step));
        });
        let config = EngineConfig {
            name,
            generation: spec.generation.0,
            prefix_salt: spec.group_key.to_vec(),
            chunk_tokens_max: spec.options.step_tokens_max,
            backlog: BACKLOG,
        };
        let engine = Engine::spawn(Box::new(runner), config, sink, on_end).map_err(no_thread)?;
        answering::spawn(spec.replica, spec.generation, engine.clone(), outbox, queue)
            .map_err(no_thread)?;
        let chat = text.chat;
        Ok((
            numerics_id,
            Running::Leader(Leader {
                engine,
                text,
                limits,
                work,
                abort,
            }),
            chat,
        ))
    }
}

/// The time since a moment, for people.
fn ms(since: Instant) -> String {
    format!("{} ms", since.elapsed().as_millis())
}

fn load_failure(error: LoadError) -> Failure {
    match error {
        LoadError::Device(error) => device_failure(error),
        error => bad(error.to_string()),
    }
}

/// What a device cannot do it never can; what has failed, or memory that the plan granted and is not there yet, may be had
/// another time.
fn device_failure(error: DeviceError) -> Failure {
    let kind = match error {
        DeviceError::Unsupported(_) => FailureKind::BadRequest,
        DeviceError::OutOfMemory { .. } | DeviceError::Failed(_) => FailureKind::Unavailable,
    };
    Failure::new(kind, error.to_string())
}

fn bad(message: String) -> Failure {
    Failure::new(FailureKind::BadRequest, message)
}

fn internal(message: String) -> Failure {
    Failure::new(FailureKind::Internal, message)
}

#[cfg(test)]
mod tests;
