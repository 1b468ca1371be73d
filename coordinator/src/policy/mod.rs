//! The coordinator's decisions: functions over values, `now` is an argument. No clock, no I/O, no actors.
//!
//! * [`workload`]: a workload type's name -> devices and memory.
//! * [`memory_plan`]: a model's headers -> bytes per rank and the largest concurrency.
//! * [`placement`]: a roster with free memory -> the devices of a shard group.
//! * [`fallback`]: whether another served entity may take what one could not.
//! * [`fit`]: both of these together, and what would help when a model does not fit.
//! * [`throughput`]: how many tokens per second a replica will give, and how an endpoint keeps to a rate.
//! * [`admission`]: what an entity takes now, what waits, what is refused and when to come again.
//! * [`rate_limit`]: whether a call may come in now, and when else.
//! * [`routing`]: which entity gets a call, which replica a request.
//! * [`progress`]: whether a replica still gets on, in loading and in stepping.
//! * [`lifecycle`]: an endpoint's states, event by event.
//! * [`permissions`]: who may do what with an endpoint.
//! * [`settings`]: changes of what an endpoint has beside its configuration.

pub mod admission;
pub mod fallback;
pub mod fit;
pub mod lifecycle;
pub mod memory_plan;
pub mod permissions;
pub mod placement;
pub mod progress;
pub mod rate_limit;
pub mod routing;
pub mod settings;
pub mod throughput;
pub mod workload;

/// Bytes for people: `1.5 GiB`, `12 MiB`, `512 B`.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [
        ("TiB", 1 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    for (name, unit) in UNITS {
        if bytes >= unit {
            let value = bytes as f64 / unit as f64;
            return if value < 10.0 {
                format!("{value:.1} {name}")
            } else {
                format!("{value:.0} {name}")
            };
        }
    }
    format!("{bytes} B")
}
