//! When a rank is lost the others keep their weights, and the group that forms next gives the same text with them.

mod support;

use engine::backend::cpu::{CpuBackend, CpuBuf};
use engine::backend::{KvDtype, WeightDtype};
use engine::collective::host::Transport;
use engine::collective::solo::Solo;
use engine::collective::{AbortHandle, Collective, CollectiveError};
use engine::engine::{Engine, EngineConfig, EngineEnd, EngineHandle};
use engine::follower::{self, FollowerHandle};
use engine::model_runner::{ModelRunner, Parts, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::request::{Candidate, EndReason, Event, Request, Sampling, SequenceError};
use engine::runner::StepError;
use engine::scheduler::Backlog;
use std::fs::{self, FileTimes};
use std::sync::mpsc;
use std::time::{Duration, SystemTime};
use support::groups::host_pair;
use support::{cpu, models};

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// The end of a runner, and what was left.
type Kept = (EngineEnd, Parts<CpuBackend>);

/// Weights, or whence to read them.
enum From<'a> {
    File(&'a Checkpoint),
    Kept(Box<Parts<CpuBackend>>),
}

/// One rank, with what it leaves when it ends.
struct Rank<H> {
    handle: H,
    abort: AbortHandle,
    kept: mpsc::Receiver<Kept>,
}

struct Leader {
    engine: EngineHandle,
    events: mpsc::Receiver<Vec<Event>>,
}

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&models().join("tiny-llama")).expect("the tiny model")
}

fn options(generation: u64) -> RunnerOptions {
    RunnerOptions {
        weight_dtype: WeightDtype::Bf16,
        kv_dtype: KvDtype::Bf16,
        blocks: 40,
        step_tokens_max: 64,
        spans_max: 4,
        generation,
    }
}

/// A runner that tells what it leaves.
fn runner<C: Collective<CpuBuf>>(
    from: From<'_>,
    generation: u64,
    collective: C,
) -> (ModelRunner<CpuBackend, C>, mpsc::Receiver<Kept>) {
    let options = options(generation);
    let mut runner = match from {
        From::File(file) => ModelRunner::load(file, &options, cpu(), collective, &mut |_| {}),
        From::Kept(parts) => ModelRunner::from_parts(*parts, &options, collective),
    }
    .expect("loads");
    let (keep, kept) = mpsc::channel();
    // Not every test looks.
    runner.keep(Box::new(move |end, parts| {
        drop(keep.send((end.clone(), parts)));
    }));
    (runner, kept)
}

fn lead<C: Collective<CpuBuf> + 'static>(
    from: From<'_>,
    generation: u64,
    collective: C,
) -> Rank<Leader> {
    let abort = collective.abort_handle();
    let (runner, kept) = runner(from, generation, collective);
    let config = EngineConfig {
        name: "engine".into(),
        generation,
        prefix_salt: Vec::new(),
        chunk_tokens_max: 64,
        backlog: Backlog {
            tokens: 1 << 20,
            sequences: 1 << 10,
        },
    };
    let (events_in, events) = mpsc::channel();
    let sink = Box::new(move |step| drop(events_in.send(step)));
    let engine = Engine::spawn(Box::new(runner), config, sink, Box::new(drop));
    let engine = engine.expect("a thread");
    Rank {
        handle: Leader { engine, events },
        abort,
        kept,
    }
}

fn follow<C: Collective<CpuBuf> + 'static>(
    from: From<'_>,
    generation: u64,
    collective: C,
) -> Rank<FollowerHandle> {
    let abort = collective.abort_handle();
    let (runner, kept) = runner(from, generation, collective);
    let handle = follower::spawn("follower", Box::new(runner), generation, Box::new(drop));
    Rank {
        handle: handle.expect("a thread"),
        abort,
        kept,
    }
}

impl Leader {
    /// The texts of some prompts, and how each ended. What an engine that has ended does not take is an error too.
    fn answer(&self) -> Vec<(Vec<u32>, EndReason)> {
        const PROMPTS: u64 = 6;
        let mut texts = vec![Vec::new(); PROMPTS as usize];
        let mut ends = vec![None; PROMPTS as usize];
        for key in 0..PROMPTS {
            let request = Request {
                key,
                prompt: (0..20 + key as u32).map(|i| 3 + i * 31 % 2000).collect(),
                candidates: vec![Candidate::default()],
                sampling: Sampling {
                    temperature: 0.8,
                    seed: key,
                    ..Sampling::default()
                },
                tokens_max: 20,
                stop_ids: Vec::new(),
                prompt_logprobs: None,
                embedding: false,
                deadline: None,
            };
            if let Err(refusal) = self.engine.submit(request) {
                let refusal = SequenceError::Engine(refusal.to_string());
                ends[key as usize] = Some(EndReason::Error(refusal));
            }
        }
        while ends.iter().any(Option::is_none) {
            for event in self.events.recv_timeout(PATIENCE).expect("all end") {
                match event {
                    Event::Token { key, id, .. } => texts[key as usize].push(id),
                    Event::Ended { key, reason, .. } => ends[key as usize] = Some(reason),
                    other => panic!("{other:?}"),
                }
            }
        }
        texts.into_iter().zip(ends.into_iter().flatten()).collect()
    }
}

fn is_lost(end: &EngineEnd, lost: u32) -> bool {
    match end {
        EngineEnd::Failed(error) => {
            matches!(**error, StepError::RankLost { rank, ranks: 2, .. } if rank == lost)
        }
        _ => false,
    }
}

fn kept<H>(rank: &Rank<H>) -> Kept {
    rank.kept.recv_timeout(PATIENCE).expect("handed over")
}

fn check(transport: Transport) {
    let file = checkpoint();
    let [first, second] = host_pair(1, transport);
    let leader = lead(From::File(&file), 1, first);
    let follower = follow(From::File(&file), 1, second);
    let expected = leader.handle.answer();
    let whole = |(text, end): &(Vec<u32>, EndReason)| text.len() == 20 && *end == EndReason::Length;
    assert!(expected.iter().all(whole), "{expected:?}");

    // Rank 1 goes; rank 0 notices in its next step, and goes on in the next generation.
    follower.abort.abort();
    let after = leader.handle.answer();
    let failed = |(_, end): &(Vec<u32>, EndReason)| {
        matches!(end, EndReason::Error(SequenceError::Engine(_)))
    };
    assert!(after.iter().all(failed), "{after:?}");
    let (end, parts) = kept(&leader);
    assert!(is_lost(&end, 1), "{end}");
    let [first, second] = host_pair(2, transport);
    assert!(parts.fits(&file, &options(2), 0, 2));
    let leader = lead(From::Kept(Box::new(parts)), 2, first);
    let follower = follow(From::File(&file), 2, second);
    assert_eq!(leader.handle.answer(), expected);

    // Rank 0 goes; rank 1 goes on.
    leader.abort.abort();
    let (end, parts) = kept(&follower);
    assert!(is_lost(&end, 0), "{end}");
    assert!(is_lost(&follower.handle.wait(), 0));
    let [first, second] = host_pair(3, transport);
    let leader = lead(From::File(&file), 3, first);
    let follower = follow(From::Kept(Box::new(parts)), 3, second);
    assert_eq!(leader.handle.answer(), expected);

    // Both are told to end, and form once more with what both have.
    leader.handle.engine.stop();
    let [(leader_end, first_parts), (follower_end, second_parts)] =
        [kept(&leader), kept(&follower)];
    assert!(matches!(leader_end, EngineEnd::Stopped), "{leader_end}");
    assert!(matches!(follower_end, EngineEnd::Stopped), "{follower_end}");
    let [first, second] = host_pair(4, transport);
    let leader = lead(From::Kept(Box::new(first_parts)), 4, first);
    let _follower = follow(From::Kept(Box::new(second_parts)), 4, second);
    assert_eq!(leader.handle.answer(), expected);
}

#[test]
fn a_rank_that_is_left_goes_on_with_its_weights_over_shared_memory() {
    check(Transport::Shm);
}

#[test]
fn a_rank_that_is_left_goes_on_with_its_weights_over_tcp() {
    check(Transport::Tcp);
}

#[test]
fn a_rank_whose_own_group_was_ended_leaves_its_weights() {
    let file = checkpoint();
    let [first, second] = host_pair(1, Transport::Shm);
    let _leader = lead(From::File(&file), 1, first);
    let follower = follow(From::File(&file), 1, second);
    follower.abort.abort();
    let (end, _) = kept(&follower);
    assert_eq!(end.to_string(), "the shard group was ended");
}

#[test]
fn weights_of_files_that_have_changed_since_do_not_fit() {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(models().join("tiny-llama")).expect("the tiny model") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    let open = || Checkpoint::open(folder.path()).expect("the copy");
    let load = |file: &Checkpoint| {
        let loaded = ModelRunner::load(file, &options(1), cpu(), Solo::new(), &mut |_| {});
        loaded.expect("loads").into_parts()
    };
    for name in ["config.json", "model.safetensors"] {
        let parts = load(&open());
        let fits = || parts.fits(&open(), &options(2), 0, 1);
        assert!(fits(), "nothing has changed");
        // Another file of the same length and age in its place.
        let (path, other) = (folder.path().join(name), folder.path().join("other"));
        let age = fs::metadata(&path)
            .and_then(|found| found.modified())
            .expect("a file");
        let set_age = |path, age| {
            let file = fs::File::options().write(true).open(path).expect("a file");
            file.set_times(FileTimes::new().set_modified(age))
                .expect("a file system with times");
        };
        fs::copy(&path, &other).expect("a copy");
        set_age(&other, age);
        fs::rename(&other, &path).expect("put in its place");
        assert!(!fits(), "{name} is another file");
        // The same file, written again.
        let parts = load(&open());
        let fits = || parts.fits(&open(), &options(2), 0, 1);
        set_age(&path, SystemTime::UNIX_EPOCH);
        assert!(!fits(), "{name} was written again");
    }
}

/// A group of one whose sums do something else.
struct Faulty(fn() -> CollectiveError);

impl Collective<CpuBuf> for Faulty {
    fn rank(&self) -> u32 {
        0
    }

    fn ranks(&self) -> u32 {
        1
    }

    fn all_reduce_sum(&mut self, _: &mut CpuBuf, _: usize) -> Result<(), CollectiveError> {
        Err((self.0)())
    }

    fn gather_columns(
        &mut self,
        _: &CpuBuf,
        _: usize,
        _: &[usize],
        _: &mut CpuBuf,
    ) -> Result<(), CollectiveError> {
        Err((self.0)())
    }

    fn send_plan(&mut self, _: &[u8]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn recv_plan(&mut self, _: &mut Vec<u8>) -> Result<(), CollectiveError> {
        Err((self.0)())
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(|| ())
    }
}

#[test]
fn after_a_defect_nothing_is_kept() {
    let file = checkpoint();
    let faults: [fn() -> CollectiveError; 2] = [
        || CollectiveError::OutOfStep("by a defect".into()),
        || panic!("by a defect"),
    ];
    for fault in faults {
        let leader = lead(From::File(&file), 1, Faulty(fault));
        leader.handle.answer();
        let end = leader.handle.engine.wait().to_string();
        assert!(end.contains("by a defect"), "{end}");
        // The keeper is gone without having been called.
        assert!(leader.kept.recv_timeout(PATIENCE).is_err());
    }
}
