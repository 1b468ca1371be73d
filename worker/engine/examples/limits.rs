//! What this machine can do at best: arithmetic of each instruction path, and reading of memory.
//!
//!     cargo run --release -p engine --example limits
//!
//! Prints lines of `name value unit`. One thread is pinned to each core that this process may use, or
//! `TANDEM_BENCH_THREADS` to the first of them.

use engine::backend::cpu::limits::{self, Arithmetic, Limits};
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
    show("", limits.arithmetic);
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        show(
            &format!(".{}", isa.path().name()),
            limits::arithmetic(isa, &pool),
        );
    }
}

fn show(path: &str, arithmetic: Arithmetic) {
    println!("f32{path} {:.1} GFLOP/s", arithmetic.f32);
    println!("bf16{path} {:.1} GFLOP/s", arithmetic.bf16);
    println!("int8{path} {:.1} GOP/s", arithmetic.int8);
}
