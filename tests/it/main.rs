//! Tests of the whole cluster: real processes, real models, real sockets. One file per subject.

mod bad_input;
mod bad_models;
mod bench;
mod billion;
mod cancellation;
mod control;
mod cuda;
mod cuda_faults;
mod determinism;
mod embeddings;
mod engine_alone;
mod fake_replica;
mod footprint;
mod gguf;
mod golden_text;
mod hostile;
mod lifecycle;
mod load;
mod logs;
mod memory;
mod openai;
mod openapi;
mod packed;
mod provisioned;
mod quantised;
#[path = "../../worker/engine/tests/support/quantiser.rs"]
mod quantiser;
mod quota;
mod ready_made;
mod recovery;
mod registry;
mod startup;
mod structured;
mod tables;
mod tls;
mod traffic;
mod walls;
mod worker_alone;

use std::time::Duration;

/// Whether the long versions of soaks run (`scripts/check --long`).
fn long() -> bool {
    std::env::var_os("TANDEM_LONG").is_some_and(|value| value != "0")
}

/// `long_s` in a long run, else `short_s`.
fn soak_time(short_s: u64, long_s: u64) -> Duration {
    Duration::from_secs(if long() { long_s } else { short_s })
}
