//! What this machine can do at best: arithmetic of each instruction path, and reading of memory.
//!
//!     cargo run --release -p engine --example limits
//!
//! Prints lines of `name value unit`. One thread is pinned to each core that this process may use, or
//! `TANDEM_BENCH_THREADS` to the first of them.

use engine::backend::cpu::limits::{self, Limits};
use engine::backend::cpu::{Isa, Path, Pool, allowed_cores};

fn main() {
    let cores = allowed_cores();
    let threads = std::env::var("TANDEM_BENCH_THREADS")
        .ok()
        .and_then(|threads| threads.parse().ok())
        .unwrap_or(cores.len());
    let pool = Pool::new(threads, &cores).expect("threads start");
    pool.pin_caller();
    let best = Isa::detect();
    let limits = Limits::measure(best, &pool).expect("memory");
    println!("path {} -", best.path().name());
    println!("threads {threads} -");
    println!("cache {} bytes", limits::cache_bytes().unwrap_or(0));
    println!("read {:.2} GB/s", limits.read_gb_per_s);
    println!("f32 {:.1} GFLOP/s", limits.gflops);
    println!("int8 {:.1} GOP/s", limits.int8_gops);
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        let (gflops, int8_gops) = limits::arithmetic(isa, &pool);
        let path = isa.path().name();
        println!("f32.{path} {gflops:.1} GFLOP/s");
        println!("int8.{path} {int8_gops:.1} GOP/s");
    }
}
