//! What handing work to the pool's threads costs: an empty region, one that both threads must enter, one after the helper
//! has parked, and one beside a busy neighbour on the helper's core.
//!
//! Run by `cargo bench -p engine --bench pool`. Beside criterion's report it prints the median and the 90th percentile.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use criterion::Criterion;
use engine::backend::cpu::{Pool, allowed_cores, bind_thread};

/// Regions timed for the percentiles.
const REGIONS: usize = 20_000;

fn main() {
    let cores = allowed_cores();
    let pool = Pool::new(2, &cores).expect("threads start");
    pool.pin_caller();
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .without_plots()
        .configure_from_args();
    criterion.bench_function("empty region", |bencher| {
        bencher.iter(|| empty(&pool));
    });
    criterion.final_summary();
    report("empty region", REGIONS, || empty(&pool));
    report("two threads meet", REGIONS, || meet(&pool));
    report("two threads meet, the helper parked", 200, || {
        // Longer than a helper spins.
        spin(Duration::from_micros(500));
        meet(&pool)
    });
    report("empty region, the helper parked", 200, || {
        spin(Duration::from_micros(500));
        empty(&pool)
    });
    report("40 us of work in 8 items", REGIONS / 10, || work(&pool));
    let neighbour = Neighbour::on(cores.last().copied());
    report(
        "40 us of work in 8 items, a busy neighbour",
        REGIONS / 10,
        || work(&pool),
    );
    drop(neighbour);
}

fn empty(pool: &Pool) -> Duration {
    let start = Instant::now();
    pool.run(2, &|item, _| {
        black_box(item);
    });
    start.elapsed()
}

/// Ends when both threads are in the region.
fn meet(pool: &Pool) -> Duration {
    let inside = AtomicUsize::new(0);
    let start = Instant::now();
    pool.run(2, &|_, _| {
        inside.fetch_add(1, Ordering::Relaxed);
        while inside.load(Ordering::Relaxed) < 2 {
            std::hint::spin_loop();
        }
    });
    start.elapsed()
}

/// As long as 20 us of two threads.
fn work(pool: &Pool) -> Duration {
    let start = Instant::now();
    pool.run(8, &|_, _| spin(Duration::from_micros(5)));
    start.elapsed()
}

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn report(name: &str, regions: usize, mut region: impl FnMut() -> Duration) {
    let mut times: Vec<Duration> = (0..regions).map(|_| region()).collect();
    times.sort();
    let us = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!(
        "{name}: p50 {:.2} us, p90 {:.2} us, p99 {:.2} us, longest {:.0} us",
        us(0.5),
        us(0.9),
        us(0.99),
        us(1.0)
    );
}

/// A thread that computes for itself all the time.
struct Neighbour {
    stopping: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Neighbour {
    fn on(core: Option<usize>) -> Neighbour {
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let thread = std::thread::spawn(move || {
            if let Some(core) = core {
                bind_thread(&[core]).expect("the core is allowed");
            }
            while !stop.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        Neighbour {
            stopping,
            thread: Some(thread),
        }
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
