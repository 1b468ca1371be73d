//! The crate against a stand-in for NCCL in C (`stand_in.c`), compiled for each test with the faults it asks for: ranks
//! are threads, device memory is memory.

use std::ffi::{c_int, c_void};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;

mod communicators;
mod ends;
mod loading;

/// Longer than anything that works takes.
const SOON: Duration = Duration::from_secs(20);

/// Compiles C into a shared library.
fn shared_library(folder: &tempfile::TempDir, c: &str, defines: &[&str]) -> PathBuf {
    let (source, library) = (
        folder.path().join("stand_in.c"),
        folder.path().join("libstand_in.so"),
    );
    fs::write(&source, c).unwrap();
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let status = Command::new(cc)
        .args(["-shared", "-fPIC", "-pthread", "-o"])
        .arg(&library)
        .args(defines.iter().map(|define| format!("-D{define}")))
        .arg(&source)
        .status();
    assert!(status.expect("a C compiler runs").success());
    library
}

/// The stand-in, loaded.
struct StandIn {
    library: Arc<Library>,
    controls: libloading::Library,
    _folder: tempfile::TempDir,
}

impl StandIn {
    fn new(defines: &[&str]) -> StandIn {
        let folder = tempfile::tempdir().unwrap();
        let path = shared_library(&folder, include_str!("stand_in.c"), defines);
        let library = Library::load_first(&[path.to_str().unwrap()]).unwrap();
        // SAFETY: the stand-in has no initialisers.
        let controls = unsafe { libloading::Library::new(&path) }.unwrap();
        StandIn {
            library,
            controls,
            _folder: folder,
        }
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

    fn stream(&self) -> TestStream<'_> {
        // SAFETY: takes nothing and gives a pointer that is never freed.
        let raw = unsafe {
            self.controls
                .get::<unsafe extern "C" fn() -> Stream>(b"stand_in_stream")
                .unwrap()()
        };
        TestStream {
            raw,
            stand_in: self,
        }
    }

    /// A communicator of every rank, in rank order.
    fn communicators(&self, ranks: u32) -> Vec<Communicator> {
        let id = self.library.unique_id().unwrap();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..ranks)
                .map(|rank| {
                    let member = Member { id, rank, ranks };
                    scope.spawn(move || {
                        Communicator::init(&self.library, &member, Config::default(), SOON)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap().unwrap())
                .collect()
        })
    }

    /// Fails if NCCL's rules were broken.
    fn assert_rules_kept(&self) {
        assert_eq!(
            self.count("stand_in_breaches"),
            0,
            "breaches of NCCL's rules"
        );
    }
}

#[derive(Clone, Copy)]
struct TestStream<'a> {
    raw: Stream,
    stand_in: &'a StandIn,
}

impl TestStream<'_> {
    /// Whether its work is done within some milliseconds.
    fn synchronize(&self, ms: c_int) -> bool {
        // SAFETY: the stream is the stand-in's and is never freed.
        unsafe {
            self.stand_in
                .controls
                .get::<unsafe extern "C" fn(Stream, c_int) -> c_int>(b"stand_in_synchronize")
                .unwrap()(self.raw, ms)
                == 1
        }
    }
}

/// Runs `body` for all ranks at once; gives their results in rank order.
fn on_all<T: Send>(
    communicators: &mut [Communicator],
    body: impl Fn(&mut Communicator) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = communicators
            .iter_mut()
            .map(|communicator| scope.spawn(move || body(communicator)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Sums `values` over the ranks, in place, without waiting for the stream.
fn enqueue_sum(
    communicator: &mut Communicator,
    values: &mut [f32],
    stream: TestStream<'_>,
) -> Result<(), Error> {
    let numbers: *mut c_void = values.as_mut_ptr().cast();
    // SAFETY: the callers keep `values` until the stream has passed the sum, and leave them alone meanwhile.
    unsafe {
        communicator.all_reduce(
            numbers,
            numbers,
            values.len(),
            DataType::F32,
            ReduceOp::Sum,
            stream.raw,
        )
    }
}

/// Waits until `condition` holds.
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::yield_now();
    }
}
