//! Promises, waiting, and what is kept for whom.

use std::sync::mpsc;

use common::ids::WorkerId;
use common::wire::message::{GroupMember, KvDtype, Quantization};

use super::*;

const MIB: u64 = 1 << 20;
const NO_TIME: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(60);

fn spec(replica: u64, generation: u64, rank: u32) -> ShardSpec {
    let member = GroupMember {
        worker: WorkerId("n/d".into()),
        group_address: "127.0.0.1:1".into(),
    };
    ShardSpec {
        replica: ReplicaId(replica),
        generation: Generation(generation),
        rank,
        members: vec![member; 2],
        group_key: [generation as u8; 32],
        source: ModelSource::Folder("/m".into()),
        options: ShardOptions {
            kv_dtype: KvDtype::Bf16,
            quantization: Quantization::None,
            kv_blocks: 2,
            step_tokens_max: 1,
            sequences_max: 1,
            context_max: 16,
            memory_bytes: 60 * MIB,
        },
    }
}

/// A model, and what tells when it is dropped.
fn loaded() -> (Model, Arc<()>) {
    let mark = Arc::new(());
    (Box::new(mark.clone()), mark)
}

fn is_dropped(mark: &Arc<()>) -> bool {
    Arc::strong_count(mark) == 1
}

/// A memory of 100 MiB where 60 are kept of replica 1, generation 1, rank 0.
fn with_kept() -> (Arc<Memory>, Arc<()>) {
    let memory = Memory::new(100 * MIB);
    let lease = memory.lease(&spec(1, 1, 0));
    assert!(lease.take(60 * MIB, NO_TIME).unwrap().is_none());
    lease.leave(true);
    let (model, mark) = loaded();
    assert!(lease.keep(model));
    (memory, mark)
}

#[test]
fn what_does_not_fit_is_refused_at_once_with_numbers() {
    let memory = Memory::new(100 * MIB);
    let first = memory.lease(&spec(1, 1, 0));
    first.take(60 * MIB, LONG).unwrap();
    let second = memory.lease(&spec(2, 1, 0));
    let refused = second.take(50 * MIB, LONG).err().unwrap();
    assert_eq!(refused.kind, FailureKind::TooLarge);
    assert_eq!(
        refused.message,
        "the shard needs 50.0 MiB and the device has 40.0 MiB free of 100.0 MiB"
    );
    drop(first);
    second.take(50 * MIB, NO_TIME).unwrap();
}

#[test]
fn what_is_being_given_back_is_waited_for() {
    let memory = Memory::new(100 * MIB);
    let first = memory.lease(&spec(1, 1, 0));
    first.take(60 * MIB, NO_TIME).unwrap();
    first.leave(true);
    let second = memory.lease(&spec(2, 1, 0));
    let late = second.take(50 * MIB, NO_TIME).err().unwrap();
    assert_eq!(late.kind, FailureKind::Unavailable, "it may be there soon");
    let never = second.take(101 * MIB, NO_TIME).err().unwrap();
    assert_eq!(never.kind, FailureKind::TooLarge);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| second.take(50 * MIB, LONG).map(drop));
        drop(first);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn what_was_kept_is_for_the_next_life_of_the_same_shard_alone() {
    let (memory, mark) = with_kept();
    for other in [spec(2, 2, 0), spec(1, 2, 1)] {
        let lease = memory.lease(&other);
        assert!(lease.take(10 * MIB, NO_TIME).unwrap().is_none());
    }
    let mut shorter = spec(1, 2, 0);
    shorter.options.kv_blocks = 1;
    let lease = memory.lease(&shorter);
    assert!(lease.take(10 * MIB, NO_TIME).unwrap().is_none());
    drop(lease);
    let again = memory.lease(&spec(1, 2, 0));
    let model = again.take(60 * MIB, NO_TIME).unwrap().expect("it was kept");
    assert!(model.is::<Arc<()>>() && !is_dropped(&mark));
    // The bytes are the new lease's: there are 40 left.
    let other = memory.lease(&spec(2, 1, 0));
    assert!(other.take(41 * MIB, NO_TIME).is_err());
    other.take(40 * MIB, NO_TIME).unwrap();
}

#[test]
fn what_was_kept_makes_room_for_whoever_needs_it() {
    let (memory, mark) = with_kept();
    let small = memory.lease(&spec(2, 1, 0));
    small.take(40 * MIB, NO_TIME).unwrap();
    assert!(!is_dropped(&mark), "there was room beside it");
    let other = memory.lease(&spec(3, 1, 0));
    assert!(other.take(61 * MIB, NO_TIME).is_err());
    assert!(!is_dropped(&mark), "its room would not have been enough");
    other.take(MIB, NO_TIME).unwrap();
    assert!(is_dropped(&mark));
}

#[test]
fn what_was_kept_goes_with_its_replica() {
    let (memory, mark) = with_kept();
    memory.forget(ReplicaId(2), Generation(9));
    memory.forget(ReplicaId(1), Generation(0));
    assert!(!is_dropped(&mark));
    memory.forget(ReplicaId(1), Generation(1));
    assert!(is_dropped(&mark));
}

#[test]
fn a_shard_waits_for_the_end_of_its_earlier_life() {
    let memory = Memory::new(200 * MIB);
    let before = memory.lease(&spec(1, 1, 0));
    before.take(60 * MIB, NO_TIME).unwrap();
    before.leave(true);
    let after = memory.lease(&spec(1, 2, 0));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| after.take(60 * MIB, LONG));
        let (model, _mark) = loaded();
        assert!(before.keep(model));
        assert!(waiting.join().unwrap().unwrap().is_some());
    });
}

#[test]
fn a_shard_that_has_no_next_life_keeps_nothing() {
    let memory = Memory::new(100 * MIB);
    let lease = memory.lease(&spec(1, 1, 0));
    lease.take(60 * MIB, NO_TIME).unwrap();
    lease.leave(false);
    lease.leave(true);
    let (model, mark) = loaded();
    assert!(!lease.keep(model));
    assert!(is_dropped(&mark));
}

#[test]
fn what_nobody_wants_any_more_is_not_kept_when_it_ends_later() {
    let memory = Memory::new(200 * MIB);
    let [opening, leaving, newer, other] =
        [spec(1, 1, 0), spec(1, 2, 1), spec(1, 3, 0), spec(2, 1, 0)]
            .map(|spec| memory.lease(&spec));
    leaving.leave(true);
    memory.forget(ReplicaId(1), Generation(2));
    for (lease, is_kept) in [
        (opening, false),
        (leaving, false),
        (newer, true),
        (other, true),
    ] {
        lease.take(MIB, NO_TIME).unwrap();
        let (model, mark) = loaded();
        assert_eq!(lease.keep(model), is_kept);
        assert_eq!(is_dropped(&mark), !is_kept);
    }
}

#[test]
fn what_is_kept_too_long_is_freed() {
    let before = Instant::now();
    let (memory, mark) = with_kept();
    let after = Instant::now();
    memory.forget_old(before + KEPT_MAX - Duration::from_nanos(1));
    assert!(!is_dropped(&mark));
    memory.forget_old(after + KEPT_MAX);
    assert!(is_dropped(&mark));
}

#[test]
fn age_is_counted_from_when_it_was_kept() {
    let since = Instant::now();
    let minute = Duration::from_secs(60);
    assert!(!is_old(since + minute, since), "a clock may be read late");
    assert!(!is_old(since, since + 9 * minute));
    assert!(is_old(since, since + 10 * minute));
}

/// A model that tells when its freeing begins, and ends it when told.
struct Slow {
    begun: mpsc::Sender<()>,
    end: mpsc::Receiver<()>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.begun.send(()).unwrap();
        self.end.recv().unwrap();
    }
}

#[test]
fn bytes_are_free_when_they_are_freed_and_not_before() {
    let frees: [fn(&Arc<Memory>); 2] = [
        |memory| memory.forget(ReplicaId(1), Generation(1)),
        |memory| drop(memory.lease(&spec(9, 1, 0)).take(90 * MIB, LONG)),
    ];
    for free in frees {
        let memory = Memory::new(100 * MIB);
        let lease = memory.lease(&spec(1, 1, 0));
        lease.take(60 * MIB, NO_TIME).unwrap();
        let (begun, begins) = mpsc::channel();
        let (ends, end) = mpsc::channel();
        assert!(lease.keep(Box::new(Slow { begun, end })));
        let other = memory.lease(&spec(2, 1, 0));
        std::thread::scope(|scope| {
            let freeing = scope.spawn(|| free(&memory));
            begins.recv().unwrap();
            let early = other.take(41 * MIB, NO_TIME).err().unwrap();
            assert_eq!(early.kind, FailureKind::Unavailable, "{early}");
            ends.send(()).unwrap();
            freeing.join().unwrap();
        });
        assert!(other.take(100 * MIB, LONG).unwrap().is_none());
    }
}
