//! Groups whose devices are the stand-in for NCCL that the crate `nccl-rs` is tested against: ranks are threads with host
//! groups between them, device memory is memory, a stream is a queue.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use nccl_rs::{Library, Stream};

use super::guard::Kill;
use super::{Group, LANDING, Lane, Options, Placement};
use crate::collective::host::{
    GroupBuilder, GroupId, GroupKey, GroupListener, HostGroup, Membership, Transport, host_id, join,
};
use crate::collective::tests::on_all;
use crate::collective::{Collective, CollectiveError};

const SOON: Duration = Duration::from_secs(20);

/// The stand-in, loaded.
struct StandIn {
    library: Arc<Library>,
    controls: libloading::Library,
    _folder: tempfile::TempDir,
}

impl StandIn {
    fn new(defines: &[&str]) -> Arc<StandIn> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libstand_in.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nccl-rs/src/tests/stand_in.c");
        let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let status = Command::new(cc)
            .args(["-shared", "-fPIC", "-pthread", "-o"])
            .arg(&path)
            .args(defines.iter().map(|define| format!("-D{define}")))
            .arg(source)
            .status();
        assert!(status.expect("a C compiler runs").success());
        Arc::new(StandIn {
            library: Library::load_first(&[path.to_str().unwrap()]).unwrap(),
            // SAFETY: the stand-in has no initialisers.
            controls: unsafe { libloading::Library::new(&path) }.unwrap(),
            _folder: folder,
        })
    }

    fn count(&self, name: &str) -> c_int {
        // SAFETY: the functions that are asked for so take nothing and give an int.
        unsafe {
            self.controls
                .get::<unsafe extern "C" fn() -> c_int>(name.as_bytes())
                .unwrap()()
        }
    }

    fn set(&self, name: &str, value: c_int) {
        // SAFETY: the functions that are set so take an int and give nothing.
        unsafe {
            self.controls
                .get::<unsafe extern "C" fn(c_int)>(name.as_bytes())
                .unwrap()(value)
        }
    }

    fn assert_rules_kept(&self) {
        assert_eq!(
            self.count("stand_in_breaches"),
            0,
            "breaches of NCCL's rules"
        );
    }
}

/// A device whose memory is memory.
struct HostLane {
    stand_in: Arc<StandIn>,
    stream: Stream,
    landing: Vec<f32>,
    destroyed: Arc<AtomicUsize>,
    bound: Result<(), String>,
}

// SAFETY: the stream is the stand-in's, which locks it.
unsafe impl Send for HostLane {}

impl HostLane {
    fn new(stand_in: &Arc<StandIn>) -> HostLane {
        // SAFETY: takes nothing and gives a pointer that is never freed.
        let stream = unsafe {
            stand_in
                .controls
                .get::<unsafe extern "C" fn() -> Stream>(b"stand_in_stream")
                .unwrap()()
        };
        HostLane {
            stand_in: Arc::clone(stand_in),
            stream,
            landing: vec![-7.0; LANDING],
            destroyed: Arc::default(),
            bound: Ok(()),
        }
    }
}

/// Waits for a stream, as the thread does that reads a step's output; says whether it got there.
fn wait(stand_in: &StandIn, stream: Stream, within: Duration) -> bool {
    let ms = c_int::try_from(within.as_millis()).unwrap();
    // SAFETY: the stream is the stand-in's and is never freed.
    unsafe {
        stand_in
            .controls
            .get::<unsafe extern "C" fn(Stream, c_int) -> c_int>(b"stand_in_synchronize")
            .unwrap()(stream, ms)
            == 1
    }
}

// SAFETY: buffers are vectors, whose numbers stay where they are; the tests keep them until their stream is idle.
unsafe impl Lane for HostLane {
    type Buf = Vec<f32>;

    fn bind(&self) -> Result<(), String> {
        self.bound.clone()
    }

    fn stream(&self) -> Stream {
        self.stream
    }

    fn len(&self, buf: &Vec<f32>) -> usize {
        buf.len()
    }

    fn address(&self, buf: &Vec<f32>) -> *mut c_void {
        buf.as_ptr().cast_mut().cast()
    }

    fn landing(&self) -> *mut c_void {
        self.landing.as_ptr().cast_mut().cast()
    }

    unsafe fn place(&mut self, placement: Placement) -> Result<(), String> {
        // A kernel would take 16 bytes at a time.
        if [placement.width, placement.whole, placement.column]
            .iter()
            .all(|n| n % 4 == 0)
        {
            let offset = (placement.from as usize).wrapping_sub(self.landing.as_ptr() as usize);
            let lands = offset < LANDING * size_of::<f32>();
            assert!(!lands || offset.is_multiple_of(16), "{placement:?}");
        }
        // A stream that is stuck gets to no copy.
        if !wait(&self.stand_in, self.stream, Duration::from_secs(2)) {
            return Err("the stream is stuck".into());
        }
        let Placement {
            from,
            to,
            rows,
            width,
            whole,
            column,
        } = placement;
        for row in 0..rows {
            // SAFETY: the caller's promise.
            unsafe {
                let from = from.cast::<f32>().add(row * width);
                let to = to.cast::<f32>().add(row * whole + column);
                std::ptr::copy_nonoverlapping(from, to, width);
            }
        }
        Ok(())
    }

    fn recordings(&self) -> Arc<dyn Fn() + Send + Sync> {
        let destroyed = Arc::clone(&self.destroyed);
        Arc::new(move || {
            destroyed.fetch_add(1, Ordering::SeqCst);
        })
    }
}

/// One rank: its group, and what its thread needs beside it.
struct Rank {
    group: Group<HostLane>,
    stand_in: Arc<StandIn>,
    stream: Stream,
    destroyed: Arc<AtomicUsize>,
}

// SAFETY: the stream is the stand-in's, which locks it.
unsafe impl Send for Rank {}

impl Rank {
    /// What a step does after its ops: waits for the stream and asks whether that counts. Fails if the stream is not freed.
    fn finish(&mut self) -> Result<(), CollectiveError> {
        assert!(
            wait(&self.stand_in, self.stream, SOON),
            "the stream is stuck"
        );
        self.group.check()
    }

    /// One sum, read. Also after an error the stream is waited for, since the numbers are its until then.
    fn sum(&mut self, values: &mut Vec<f32>) -> Result<(), CollectiveError> {
        let len = values.len();
        let enqueued = self.group.all_reduce_sum(values, len);
        let read = self.finish();
        enqueued.and(read)
    }
}

fn member(rank: u32, ranks: u32, wait_max: Duration) -> Membership {
    Membership {
        id: GroupId {
            group: 7,
            generation: 3,
        },
        rank,
        ranks,
        key: GroupKey::new(&[9; 32]).unwrap(),
        host: host_id(),
        transport: Transport::Tcp,
        wait_max,
    }
}

/// The host groups of some ranks, in rank order.
fn hosts(ranks: u32, wait_max: Duration) -> Vec<HostGroup> {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = GroupListener::start(socket).unwrap();
    std::thread::scope(|scope| {
        let listener = &listener;
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                scope.spawn(move || {
                    let member = member(rank, ranks, wait_max);
                    if rank == 0 {
                        GroupBuilder::new(listener, member)
                            .unwrap()
                            .lead(SOON)
                            .unwrap()
                    } else {
                        join(listener.address(), &member, SOON).unwrap()
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Fails the test of a process that would be killed.
fn never() -> Kill {
    Arc::new(|why| panic!("the process would end: {why}"))
}

fn form_rank(
    stand_in: &Arc<StandIn>,
    host: HostGroup,
    options: Options,
    kill: Kill,
) -> Result<Rank, CollectiveError> {
    let lane = HostLane::new(stand_in);
    let (stream, destroyed) = (lane.stream, Arc::clone(&lane.destroyed));
    let group = Group::form_or_kill(host, lane, &stand_in.library, options, kill)?;
    Ok(Rank {
        group,
        stand_in: Arc::clone(stand_in),
        stream,
        destroyed,
    })
}

/// Forms a group, in rank order.
fn form(stand_in: &Arc<StandIn>, ranks: u32, wait_max: Duration) -> Vec<Rank> {
    form_with(
        stand_in,
        hosts(ranks, wait_max),
        Options::new(SOON),
        never(),
    )
    .into_iter()
    .map(Result::unwrap)
    .collect()
}

fn form_with(
    stand_in: &Arc<StandIn>,
    hosts: Vec<HostGroup>,
    options: Options,
    kill: Kill,
) -> Vec<Result<Rank, CollectiveError>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = hosts
            .into_iter()
            .map(|host| {
                let kill = Arc::clone(&kill);
                scope.spawn(move || form_rank(stand_in, host, options, kill))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

fn lost<T: std::fmt::Debug>(result: Result<T, CollectiveError>) -> (u32, String) {
    match result {
        Err(CollectiveError::RankLost { rank, reason, .. }) => (rank, reason),
        other => panic!("expected a lost rank, got {other:?}"),
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn sums_are_the_same_on_every_rank() {
    let stand_in = StandIn::new(&[]);
    for ranks in [2, 4] {
        let mut group = form(&stand_in, ranks, SOON);
        for len in [0, 1, 7, 65_537] {
            let sums = on_all(&mut group, |rank| {
                let start = rank.group.rank() as usize + 1;
                let mut values: Vec<f32> = (0..len).map(|i| (start * (i % 100)) as f32).collect();
                rank.sum(&mut values).unwrap();
                values
            });
            let of_all = (ranks * (ranks + 1) / 2) as usize;
            let expected: Vec<f32> = (0..len).map(|i| (of_all * (i % 100)) as f32).collect();
            assert!(
                sums.iter().all(|sum| *sum == expected),
                "{ranks} ranks, {len}"
            );
        }
    }
    stand_in.assert_rules_kept();
}

#[test]
fn gathered_columns_stand_side_by_side_whatever_their_widths() {
    let shapes: [(usize, [usize; 4]); 8] = [
        (1, [5, 5, 5, 4]),
        (3, [4, 0, 2, 1]),
        (0, [3, 3, 3, 3]),
        (2, [0, 0, 0, 9]),
        (3, [1, 3, 4, 4]),
        (7, [30_000, 30_000, 11, 0]),
        // More than the landing holds, in one row and in several pieces.
        (1, [1, 0, LANDING + 5, 3]),
        (5, [2, 0, LANDING / 2, 3]),
    ];
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 4, SOON);
    let number =
        |rank: usize, row: usize, column: usize| (rank * 7 + row * 5 + column % 1000) as f32;
    for (rows, widths) in shapes {
        let whole = widths.iter().sum::<usize>();
        let gathered = on_all(&mut group, |rank| {
            let r = rank.group.rank() as usize;
            let part: Vec<f32> = (0..rows)
                .flat_map(|row| (0..widths[r]).map(move |column| number(r, row, column)))
                .collect();
            let mut out = vec![-1.0; if r == 0 { rows * whole } else { 1 }];
            rank.group
                .gather_columns(&part, rows, &widths, &mut out)
                .unwrap();
            rank.finish().unwrap();
            out
        });
        let expected: Vec<f32> = (0..rows)
            .flat_map(|row| {
                (0..4).flat_map(move |r| (0..widths[r]).map(move |column| number(r, row, column)))
            })
            .collect();
        assert!(gathered[0] == expected, "{rows} rows of {widths:?}");
        assert!(gathered[1..].iter().flatten().all(|value| *value == -1.0));
    }
    stand_in.assert_rules_kept();
}

#[test]
fn arguments_that_cannot_be_are_refused() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 2, SOON);
    let refused = |result| matches!(result, Err(CollectiveError::OutOfStep(_)));
    let (mut small, other) = (vec![0.0; 3], vec![0.0; 3]);
    assert!(refused(group[0].group.all_reduce_sum(&mut small, 4)));
    assert!(refused(group[0].group.gather_columns(
        &other,
        1,
        &[3],
        &mut small
    )));
    assert!(refused(group[0].group.gather_columns(
        &other,
        2,
        &[1, 1],
        &mut small
    )));
}

#[test]
fn plans_reach_all_followers_in_order_between_sums() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 3, SOON);
    let plans: Vec<Vec<u8>> = [0, 1, 100, 70_000].map(|len| vec![7; len]).to_vec();
    let received = on_all(&mut group, |rank| {
        let mut received = Vec::new();
        for plan in &plans {
            let mut buffer = Vec::new();
            if rank.group.rank() == 0 {
                rank.group.send_plan(plan).unwrap();
                buffer.clone_from(plan);
            } else {
                rank.group.recv_plan(&mut buffer).unwrap();
            }
            received.push(buffer);
            rank.sum(&mut vec![1.0; 3]).unwrap();
        }
        received
    });
    assert!(received.iter().all(|received| *received == plans));
    stand_in.assert_rules_kept();
}

#[test]
fn a_follower_that_goes_in_the_middle_of_a_sum_is_named_by_every_survivor() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 4, SOON);
    // A process that dies takes its connections with it, and NCCL says nothing.
    let gone = group.remove(2);
    let death = gone.group.abort_handle();
    let errors = std::thread::scope(|scope| {
        scope.spawn(|| death.abort());
        on_all(&mut group, |rank| lost(rank.sum(&mut vec![1.0; 3000])))
    });
    for (rank, reason) in errors {
        assert_eq!(rank, 2, "{reason}");
    }
    for rank in &mut group {
        // The group stays over, and its recordings went before its communicator.
        assert_eq!(lost(rank.sum(&mut vec![1.0])).0, 2);
        assert!(rank.destroyed.load(Ordering::SeqCst) > 0);
    }
    until("all have aborted", || {
        stand_in.count("stand_in_aborts") == 4
    });
    stand_in.assert_rules_kept();
}

#[test]
fn a_leader_that_goes_is_named_by_followers_in_a_sum_and_by_idle_ones() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 3, SOON);
    group.remove(0).group.abort_handle().abort();
    let errors = on_all(&mut group, |rank| {
        lost(if rank.group.rank() == 1 {
            rank.sum(&mut vec![0.0; 8])
        } else {
            rank.group.recv_plan(&mut Vec::new())
        })
    });
    assert!(errors.iter().all(|(rank, _)| *rank == 0), "{errors:?}");
}

#[test]
fn a_rank_that_lives_but_stays_silent_is_lost_after_the_longest_wait() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 2, Duration::from_millis(150));
    let (rank, reason) = lost(group[0].sum(&mut vec![1.0]));
    assert_eq!(
        (rank, reason.as_str()),
        (1, "a step's collectives did not end within 0.15 s")
    );
    // Its connection was closed: it learns when it waits for the next plan.
    assert_eq!(lost(group[1].group.recv_plan(&mut Vec::new())).0, 0);
    stand_in.assert_rules_kept();
}

#[test]
fn an_abort_from_another_thread_frees_a_rank_wherever_it_waits() {
    for in_sum in [false, true] {
        let stand_in = StandIn::new(&[]);
        let mut group = form(&stand_in, 2, SOON);
        let mut blocked = group.pop().unwrap();
        let handle = blocked.group.abort_handle();
        let (entered, enter) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            entered.send(()).unwrap();
            if in_sum {
                blocked.sum(&mut vec![1.0; 9])
            } else {
                blocked.group.recv_plan(&mut Vec::new())
            }
        });
        enter.recv().unwrap();
        handle.abort();
        assert_eq!(thread.join().unwrap(), Err(CollectiveError::Aborted));
        assert_eq!(lost(group[0].sum(&mut vec![1.0; 9])).0, 1);
        handle.abort();
        stand_in.assert_rules_kept();
    }
}

#[test]
fn an_error_of_nccls_ends_the_group_with_its_words() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 2, SOON);
    stand_in.set("stand_in_async_error", 3);
    let errors = on_all(&mut group, |rank| rank.sum(&mut vec![1.0; 9]).unwrap_err());
    assert!(
        errors.iter().any(|error| matches!(
            error,
            CollectiveError::Failed(what) if what.contains("ncclInternalError")
        )),
        "{errors:?}"
    );
}

#[test]
fn a_clean_end_closes_the_communicators_and_loses_nobody() {
    let stand_in = StandIn::new(&[]);
    let hosts = hosts(3, SOON);
    let links = hosts[2].link_watch();
    let mut group: Vec<Rank> = form_with(&stand_in, hosts, Options::new(SOON), never())
        .into_iter()
        .map(Result::unwrap)
        .collect();
    on_all(&mut group, |rank| rank.sum(&mut vec![1.0; 3]).unwrap());
    let follower = group.pop().unwrap();
    drop(group);
    // Whoever is last still finds everybody connected, for as long as NCCL needs it.
    assert_eq!(links.lost(Duration::from_millis(50)), None);
    drop(follower);
    until("all are destroyed", || {
        stand_in.count("stand_in_destroys") == 3
    });
    assert_eq!(stand_in.count("stand_in_aborts"), 0);
    stand_in.assert_rules_kept();
}

#[test]
fn a_device_that_cannot_be_freed_ends_the_process_with_one_line() {
    let stand_in = StandIn::new(&[]);
    let (said, says) = mpsc::channel();
    let said = Mutex::new(said);
    let kill: Kill = Arc::new(move |why: &str| said.lock().unwrap().send(why.to_owned()).unwrap());
    let options = Options {
        within: SOON,
        abort_within: Duration::from_millis(30),
    };
    let mut group: Vec<Rank> = form_with(&stand_in, hosts(2, SOON), options, kill)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    stand_in.set("stand_in_hold_aborts", 1);
    drop(group.remove(1));
    group[0].group.abort_handle().abort();
    assert_eq!(
        says.recv_timeout(SOON).unwrap(),
        "rank 0 cannot free its device from a group that is over: ncclCommAbort did not return within 0.03 s; the process ends"
    );
    stand_in.set("stand_in_hold_aborts", 0);
}

#[test]
fn a_rank_that_does_not_come_to_the_forming_is_an_error_at_the_deadline() {
    let stand_in = StandIn::new(&[]);
    let mut hosts = hosts(2, SOON);
    let absent = hosts.remove(1);
    let options = Options::new(Duration::from_millis(100));
    let error = form_rank(&stand_in, hosts.remove(0), options, never()).map(drop);
    let (rank, reason) = lost(error);
    assert_eq!(
        (rank, reason.as_str()),
        (
            1,
            "ncclCommInitRankConfig was still in progress after 0.1 s"
        )
    );
    drop(absent);
    stand_in.assert_rules_kept();
}

#[test]
fn a_leader_that_sends_no_id_is_lost_at_the_deadline() {
    let stand_in = StandIn::new(&[]);
    let mut hosts = hosts(2, SOON);
    let follower = hosts.remove(1);
    let options = Options::new(Duration::from_millis(100));
    assert_eq!(
        lost(form_rank(&stand_in, follower, options, never()).map(drop)).0,
        0
    );
}

#[test]
fn a_rank_that_dies_while_the_group_forms_is_seen_at_once() {
    let stand_in = StandIn::new(&[]);
    let mut hosts = hosts(3, SOON);
    drop(hosts.remove(1));
    let start = Instant::now();
    for result in form_with(&stand_in, hosts, Options::new(SOON * 10), never()) {
        assert_eq!(lost(result.map(drop)).0, 1);
    }
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    stand_in.assert_rules_kept();
}

#[test]
fn a_rank_on_a_wrong_device_is_told_so_on_all_ranks() {
    // What NCCL says when two ranks come with one device.
    let stand_in = StandIn::new(&["INIT_RESULT=5"]);
    for result in form_with(&stand_in, hosts(2, SOON), Options::new(SOON), never()) {
        let error = result.map(drop).unwrap_err().to_string();
        assert!(
            error.contains("Duplicate GPU detected") || error.contains("is lost"),
            "{error}"
        );
    }
}

#[test]
fn a_device_that_cannot_be_bound_fails_on_its_rank_and_is_a_loss_to_the_others() {
    let stand_in = StandIn::new(&[]);
    let mut hosts = hosts(2, SOON);
    let other = hosts.remove(1);
    let mut lane = HostLane::new(&stand_in);
    lane.bound = Err("no context".into());
    let thread = std::thread::spawn({
        let stand_in = Arc::clone(&stand_in);
        move || form_rank(&stand_in, other, Options::new(SOON), never()).map(drop)
    });
    let failed = Group::form_or_kill(
        hosts.remove(0),
        lane,
        &stand_in.library,
        Options::new(SOON),
        never(),
    );
    assert_eq!(
        failed.map(drop),
        Err(CollectiveError::Failed("no context".into()))
    );
    assert_eq!(lost(thread.join().unwrap()).0, 0);
}

#[test]
fn a_copy_that_the_device_refuses_ends_the_group_with_its_words() {
    let stand_in = StandIn::new(&[]);
    let mut group = form(&stand_in, 2, SOON);
    // Rank 1 sends nothing, so that the copies behind it never come to their turn.
    let (part, mut out) = (vec![0.0; 4], vec![0.0; 8]);
    let error = group[0].group.gather_columns(&part, 2, &[2, 2], &mut out);
    assert_eq!(
        error,
        Err(CollectiveError::Failed("the stream is stuck".into()))
    );
    assert!(wait(&stand_in, group[0].stream, SOON), "it is freed");
    assert_eq!(lost(group[1].sum(&mut vec![1.0])).0, 0);
}

#[test]
fn the_engine_may_wait_longer_between_steps_than_in_one() {
    let stand_in = StandIn::new(&[]);
    let wait_max = Duration::from_millis(100);
    let mut group = form(&stand_in, 2, wait_max);
    on_all(&mut group, |rank| rank.sum(&mut vec![1.0; 3]).unwrap());
    let begun = Instant::now();
    until("the time of a step is over", || {
        begun.elapsed() > wait_max * 3
    });
    on_all(&mut group, |rank| rank.sum(&mut vec![1.0; 3]).unwrap());
    stand_in.assert_rules_kept();
}
