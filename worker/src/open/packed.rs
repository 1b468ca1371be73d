//! What a load leaves for the next one: packed weights, written to the cache while the shard already serves.
//!
//! Owns the thread that writes, and what the build log says of the cache. Nothing here ends a shard.

use std::thread;
use std::time::Instant;

use engine::weights::packed::{Draft, NotWritten, Origin};

use super::ms;
use crate::logs::ShardLog;
use crate::memory::show;

/// How willingly the writing thread leaves the cores to everybody else: as much as can be.
const NICE: i32 = 19;

/// Says how the weights came to be, and has them written where the cache has not got them.
pub(super) fn settle(origin: Origin, log: &ShardLog) -> &'static str {
    match origin {
        Origin::Checkpoint => "read",
        Origin::Mapped(_) => "found packed in the cache, mapped",
        Origin::Packed { draft, unusable } => {
            if let Some(reason) = unusable {
                tracing::warn!(reason, "packed weights in the cache were not used");
                log.build(format!(
                    "packed weights in the cache were not used: {reason}"
                ));
            }
            begin(draft, log.clone());
            "read and packed"
        }
    }
}

/// Begins to write. The thread ends by itself, at the latest when the shard is over.
fn begin(draft: Draft, log: ShardLog) {
    let write = move || {
        // Without it writing takes its share of the cores, no more.
        let _ = rustix::process::setpriority_process(None, NICE);
        let begun = Instant::now();
        match draft.write() {
            Ok(bytes) => log.build(format!(
                "packed weights written to the cache in {}: {}",
                ms(begun),
                show(bytes)
            )),
            Err(reason @ (NotWritten::Elsewhere | NotWritten::Unloaded)) => {
                log.build(format!("packed weights not written to the cache: {reason}"));
            }
            Err(reason) => {
                tracing::warn!(%reason, "packed weights were not written to the cache");
                log.build(format!("packed weights not written to the cache: {reason}"));
            }
        }
    };
    let spawned = thread::Builder::new()
        .name("packed-cache".into())
        .spawn(write);
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread writes packed weights to the cache");
    }
}
