//! Groups of devices on the rig: the CUDA backend, NCCL and the host groups between ranks, as threads and as processes.
#![cfg(feature = "cuda")]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use engine::backend::cuda::{CudaBackend, CudaBuf, CudaDevice, CudaOptions};
use engine::backend::{Backend, DecodeOps};
use engine::collective::host::{
    GroupBuilder, GroupId, GroupKey, GroupListener, HostGroup, Membership, Transport, host_id, join,
};
use engine::collective::nccl::NcclGroup;
use engine::collective::{Collective, CollectiveError};
use nccl_rs::Library;

const SOON: Duration = Duration::from_secs(60);

/// How a process that is a rank is told which: rank, number of ranks and rank 0's address.
const RANK: &str = "NCCL_TEST_RANK";

fn member(rank: u32, ranks: u32, wait_max: Duration) -> Membership {
    Membership {
        id: GroupId {
            group: 1,
            generation: 1,
        },
        rank,
        ranks,
        key: GroupKey::new(&[5; 32]).unwrap(),
        host: host_id(),
        transport: Transport::Tcp,
        wait_max,
    }
}

fn listener() -> GroupListener {
    GroupListener::start(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap()
}

fn backend(ordinal: u32) -> CudaBackend {
    let options = CudaOptions {
        graphs: true,
        batch_invariant: false,
    };
    CudaBackend::new(CudaDevice::open(ordinal).unwrap(), options).unwrap()
}

/// A rank's device, and its end of a group.
struct Rank {
    // Dropped in this order: the group's work is on the backend's stream.
    group: NcclGroup,
    backend: CudaBackend,
}

impl Rank {
    /// On device `ordinal`.
    fn form(host: HostGroup, ordinal: u32, within: Duration) -> Result<Rank, CollectiveError> {
        let mut backend = backend(ordinal);
        let library = Library::load().unwrap();
        let group = NcclGroup::form(host, &mut backend, &library, within)?;
        Ok(Rank { group, backend })
    }

    fn buffer(&mut self, values: &[f32]) -> CudaBuf {
        let mut buffer = self.backend.alloc(values.len()).unwrap();
        self.backend.write(values, &mut buffer);
        buffer
    }

    /// What a buffer holds, once the group says that it counts.
    fn read(&mut self, buffer: &CudaBuf, len: usize) -> Result<Vec<f32>, CollectiveError> {
        let mut values = vec![0.0; len];
        self.backend.read(buffer, &mut values).unwrap();
        self.group.check()?;
        Ok(values)
    }

    fn sum(&mut self, values: &[f32]) -> Result<Vec<f32>, CollectiveError> {
        let mut buffer = self.buffer(values);
        self.group.all_reduce_sum(&mut buffer, values.len())?;
        self.read(&buffer, values.len())
    }
}

/// One rank's end of a host group of two, whose leader listens.
fn host(listener: &GroupListener, rank: u32, wait_max: Duration) -> HostGroup {
    let member = member(rank, 2, wait_max);
    if rank == 0 {
        GroupBuilder::new(listener, member)
            .unwrap()
            .lead(SOON)
            .unwrap()
    } else {
        join(listener.address(), &member, SOON).unwrap()
    }
}

/// Runs `body` for ranks 0 and 1, each on a thread of its own; gives their results.
fn on_threads<T: Send>(body: impl Fn(u32) -> T + Sync) -> Vec<T> {
    cuda_rig::preload();
    std::thread::scope(|scope| {
        let body = &body;
        let threads = [0, 1].map(|rank| scope.spawn(move || body(rank)));
        threads
            .map(|thread| thread.join().unwrap())
            .into_iter()
            .collect()
    })
}

/// Two ranks as threads, on two devices. Their ends outlive `body` on both.
fn on_both<T: Send>(
    wait_max: Duration,
    body: impl Fn(&mut Rank) -> T + Sync,
) -> (Vec<T>, Vec<Rank>) {
    let listener = listener();
    let outcomes = on_threads(|rank| {
        let host = host(&listener, rank, wait_max);
        let mut rank = Rank::form(host, rank, SOON).unwrap();
        (body(&mut rank), rank)
    });
    outcomes.into_iter().unzip()
}

/// Numbers of very different sizes.
fn numbers(rank: u32, len: usize) -> Vec<f32> {
    let mut state = rank.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state as f32 / u32::MAX as f32 - 0.5) * 10f32.powi((state % 9) as i32 - 4)
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn lost<T: std::fmt::Debug>(result: Result<T, CollectiveError>) -> (u32, String) {
    match result {
        Err(CollectiveError::RankLost { rank, reason, .. }) => (rank, reason),
        other => panic!("expected a lost rank, got {other:?}"),
    }
}

#[test]
fn two_devices_add_up_to_the_same_bits() {
    for len in [1, 7, 4096, 65_537] {
        let (sums, _ranks) = on_both(SOON, |rank| {
            rank.sum(&numbers(rank.group.rank(), len)).unwrap()
        });
        let both = numbers(0, len).into_iter().zip(numbers(1, len));
        let expected: Vec<f32> = both.map(|(x, y)| x + y).collect();
        assert!(
            sums.iter().all(|sum| bits(sum) == bits(&expected)),
            "{len} numbers"
        );
    }
}

#[test]
fn gathered_columns_stand_side_by_side_whatever_their_widths() {
    let shapes = [
        (1, [5, 4]),
        (3, [4, 0]),
        (0, [3, 3]),
        (2, [0, 9]),
        (7, [8, 4]),
        (64, [500, 503]),
    ];
    on_both(SOON, |rank| {
        for (rows, widths) in shapes {
            let r = rank.group.rank() as usize;
            let whole = widths[0] + widths[1];
            let part = rank.buffer(&numbers(r as u32, (rows * widths[r]).max(1)));
            let mut out = rank.buffer(&vec![-1.0; (rows * whole).max(1)]);
            rank.group
                .gather_columns(&part, rows, &widths, &mut out)
                .unwrap();
            let out = rank.read(&out, rows * whole).unwrap();
            if r != 0 {
                assert!(out.iter().all(|value| *value == -1.0));
                continue;
            }
            let parts = [0, 1].map(|r| numbers(r, rows * widths[r as usize]));
            let expected: Vec<f32> = (0..rows)
                .flat_map(|row| {
                    let columns = |r: usize| &parts[r][row * widths[r]..][..widths[r]];
                    [columns(0), columns(1)].concat()
                })
                .collect();
            assert!(out == expected, "{rows} rows of {widths:?}");
        }
    });
}

#[test]
fn a_recorded_sum_is_replayed_with_new_numbers_and_destroyed_before_the_group_ends() {
    let (_, ranks) = on_both(SOON, |rank| {
        let mut buffer = rank.buffer(&[0.0; 64]);
        let mut replays = 0;
        for step in 0..6u8 {
            if rank.group.rank() == 0 {
                rank.group.send_plan(&[step]).unwrap();
            } else {
                rank.group.recv_plan(&mut Vec::new()).unwrap();
            }
            let of = |rank: u32| numbers(rank + u32::from(step), 64);
            let (replayed, sum) = decode(rank, &mut buffer, &of(rank.group.rank()));
            replays += u32::from(replayed);
            let expected: Vec<f32> = of(0).into_iter().zip(of(1)).map(|(x, y)| x + y).collect();
            assert_eq!(bits(&sum.unwrap()), bits(&expected), "step {step}");
        }
        assert_eq!(replays, 4, "all but the first and the second");
    });
    for rank in ranks {
        let graphs = rank.backend.graphs();
        assert_eq!(graphs.recorded(), 1);
        drop(rank.group);
        assert_eq!(graphs.recorded(), 0);
    }
}

#[test]
fn a_rank_that_stops_answering_is_lost_to_the_other_which_gets_its_device_back() {
    let wait_max = Duration::from_millis(300);
    let (outcomes, _ranks) = on_both(wait_max, |rank| {
        if rank.group.rank() == 0 {
            // The other rank never comes to this sum; afterwards the device computes again.
            let error = lost(rank.sum(&[1.0; 100]));
            let buffer = rank.buffer(&[3.0; 5]);
            let mut values = [0.0; 5];
            rank.backend.read(&buffer, &mut values).unwrap();
            assert_eq!(values, [3.0; 5]);
            error
        } else {
            lost(rank.group.recv_plan(&mut Vec::new()))
        }
    });
    assert_eq!(
        outcomes[0],
        (1, "a step's collectives did not end within 0.3 s".into())
    );
    assert_eq!(outcomes[1].0, 0);
}

/// One step of decodes, whose ops are a sum over the ranks; whether it was replayed, and what it gives.
fn decode(
    rank: &mut Rank,
    buffer: &mut CudaBuf,
    values: &[f32],
) -> (bool, Result<Vec<f32>, CollectiveError>) {
    rank.backend.write(values, buffer);
    let begun = rank.backend.begin_decode(4);
    let mut ops = begun;
    while ops == DecodeOps::Wanted {
        if let Err(error) = rank.group.all_reduce_sum(buffer, values.len()) {
            return (false, Err(error));
        }
        ops = rank.backend.end_decode();
    }
    let sum = rank.read(buffer, values.len());
    (begun == DecodeOps::Enqueued, sum)
}

#[test]
fn a_device_that_is_stuck_in_a_recorded_step_is_freed() {
    let wait_max = Duration::from_millis(300);
    let (outcomes, _ranks) = on_both(wait_max, |rank| {
        let mut buffer = rank.buffer(&[0.0; 64]);
        for _ in 0..3 {
            assert_eq!(decode(rank, &mut buffer, &[1.0; 64]).1, Ok(vec![2.0; 64]));
        }
        let place = rank.group.rank();
        if place == 1 {
            rank.group.recv_plan(&mut Vec::new()).unwrap();
            return lost(rank.group.recv_plan(&mut Vec::new())).0;
        }
        // The other rank takes the plan, and does nothing.
        rank.group.send_plan(&[1]).unwrap();
        let (replayed, sum) = decode(rank, &mut buffer, &[1.0; 64]);
        assert!(replayed);
        assert_eq!(rank.backend.graphs().recorded(), 0);
        lost(sum).0
    });
    assert_eq!(outcomes, [1, 0]);
}

#[test]
fn an_abort_from_another_thread_frees_a_rank_that_waits_for_its_stream() {
    let (outcomes, _ranks) = on_both(SOON, |rank| {
        if rank.group.rank() == 1 {
            return lost(rank.group.recv_plan(&mut Vec::new())).0;
        }
        let handle = rank.group.abort_handle();
        let mut buffer = rank.buffer(&[1.0; 9]);
        // The other rank never comes to this sum.
        rank.group.all_reduce_sum(&mut buffer, 9).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| handle.abort());
            assert_eq!(rank.read(&buffer, 9), Err(CollectiveError::Aborted));
        });
        0
    });
    assert_eq!(outcomes, [0, 0]);
}

#[test]
fn a_group_forms_again_on_the_backends_of_one_that_is_over() {
    let (_, ranks) = on_both(SOON, |rank| rank.group.abort_handle().abort());
    let backends: Vec<_> = ranks
        .into_iter()
        .map(|Rank { group, mut backend }| {
            backend.renew();
            drop(group);
            Mutex::new(Some(backend))
        })
        .collect();
    let listener = listener();
    let sums = on_threads(|rank| {
        let mut backend = backends[rank as usize].lock().unwrap().take().unwrap();
        let library = Library::load().unwrap();
        let host = host(&listener, rank, SOON);
        let group = NcclGroup::form(host, &mut backend, &library, SOON).unwrap();
        let mut rank = Rank { group, backend };
        (rank.sum(&[1.5; 3]).unwrap(), rank)
    });
    assert!(sums.iter().all(|(sum, _)| *sum == [3.0; 3]));
}

#[test]
fn a_group_is_formed_on_its_backends_device_whichever_its_thread_used_last() {
    let listener = listener();
    let sums = on_threads(|rank| {
        let mut backend = backend(rank);
        CudaDevice::open(1 - rank).unwrap().bind().unwrap();
        let library = Library::load().unwrap();
        let host = host(&listener, rank, SOON);
        let group = NcclGroup::form(host, &mut backend, &library, SOON).unwrap();
        let mut rank = Rank { group, backend };
        (rank.sum(&[1.5; 3]).unwrap(), rank)
    });
    assert!(sums.iter().all(|(sum, _)| *sum == [3.0; 3]));
}

#[test]
fn two_ranks_on_one_device_are_refused_with_nccls_words() {
    let listener = listener();
    let errors = on_threads(|rank| {
        let formed = Rank::form(host(&listener, rank, SOON), 0, SOON);
        formed.map(drop).unwrap_err().to_string()
    });
    assert!(
        errors
            .iter()
            .any(|error| error.contains("ncclInvalidUsage")),
        "{errors:?}"
    );
}

#[test]
fn a_rank_that_does_not_come_to_the_forming_is_lost_at_the_deadline() {
    cuda_rig::preload();
    let listener = listener();
    let address = listener.address();
    let absent = std::thread::spawn(move || join(address, &member(1, 2, SOON), SOON).unwrap());
    let host = GroupBuilder::new(&listener, member(0, 2, SOON))
        .unwrap()
        .lead(SOON)
        .unwrap();
    let absent = absent.join().unwrap();
    let (rank, reason) = lost(Rank::form(host, 0, Duration::from_millis(400)).map(drop));
    assert_eq!(rank, 1);
    assert!(reason.contains("still in progress after 0.4 s"), "{reason}");
    drop(absent);
}

/// Rank 1 as a process of its own: adds up until it is killed. Not a test by itself.
#[test]
#[ignore = "a rank of the tests below"]
fn a_rank_as_a_process() {
    let Ok(what) = std::env::var(RANK) else {
        return;
    };
    let address: SocketAddr = what.parse().unwrap();
    let host = join(address, &member(1, 2, SOON), SOON).unwrap();
    let mut rank = Rank::form(host, 1, SOON).unwrap();
    loop {
        let sum = rank.sum(&numbers(1, 3000)).unwrap();
        println!("sum {}", sum[0].to_bits());
        std::io::stdout().flush().unwrap();
    }
}

/// One of the ignored tests above as a process, which finds the rig by its loader.
fn rank_process(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--ignored", "--exact", "--nocapture", test])
        .envs(cuda_rig::env());
    command
}

struct Process(Child);

impl Process {
    fn start(leader: SocketAddr) -> Process {
        let child = rank_process("a_rank_as_a_process")
            .env(RANK, leader.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Process(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_that_is_killed_in_a_sum_is_lost_within_seconds_and_the_device_goes_on() {
    cuda_rig::preload();
    let listener = listener();
    let builder = GroupBuilder::new(&listener, member(0, 2, SOON)).unwrap();
    let mut process = Process::start(listener.address());
    let mut rank = Rank::form(builder.lead(SOON).unwrap(), 0, SOON).unwrap();
    let expected = numbers(0, 1)[0] + numbers(1, 1)[0];
    let mut lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
    for _ in 0..5 {
        let sum = rank.sum(&numbers(0, 3000)).unwrap();
        assert_eq!(sum[0].to_bits(), expected.to_bits());
        let said = format!("sum {}", expected.to_bits());
        assert!(
            lines
                .by_ref()
                .map(Result::unwrap)
                .any(|line| line.ends_with(&said))
        );
    }
    // It waits in its sixth sum for this rank, or is on its way there.
    process.0.kill().unwrap();
    let start = Instant::now();
    let (lost_rank, reason) = lost((0..3).try_for_each(|_| rank.sum(&numbers(0, 3000)).map(drop)));
    assert_eq!(
        (lost_rank, reason.as_str()),
        (1, "it closed its connection")
    );
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    let buffer = rank.buffer(&[3.0; 5]);
    let mut values = [0.0; 5];
    rank.backend.read(&buffer, &mut values).unwrap();
    assert_eq!(values, [3.0; 5]);
}
