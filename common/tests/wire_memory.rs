//! How much memory a lying message can make its receiver take. Alone in its process: it counts every allocation.

use std::alloc::System;

use common::ids::{BootId, Generation, ReplicaId, RequestId, Term, WorkerId};
use common::request::*;
use common::wire::codec::{decode, encode};
use common::wire::frame::BODY_BYTES_MAX;
use common::wire::link::Message;
use common::wire::message::*;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[path = "../src/wire/message/tests/samples.rs"]
mod samples;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// A text is made room for at once, up to the limit of a body; a list's room grows from at most 1 MiB.
const ALLOCATED_MAX: usize = BODY_BYTES_MAX + (4 << 20);

/// Bytes allocated in all while a body is taken for a message.
fn allocated<M: Message>(body: &[u8]) -> usize {
    let region = Region::new(ALLOCATOR);
    let _ = decode::<M>(body);
    region.change().bytes_allocated
}

#[test]
fn a_short_message_cannot_claim_more_memory_than_a_frame() {
    let commands = samples::commands().into_iter();
    let reports = samples::reports().into_iter();
    let bodies = commands
        .map(|(_, message)| encode(&message).unwrap())
        .chain(reports.map(|(_, message)| encode(&message).unwrap()));
    let lengths: [u64; 6] = [
        BODY_BYTES_MAX as u64 - 400,
        BODY_BYTES_MAX as u64,
        1 << 24,
        u64::from(u32::MAX),
        1 << 40,
        u64::MAX,
    ];
    let mut most = 0;
    for body in bodies {
        for at in 0..=body.len() {
            for length in lengths {
                let claim = [&[253], &length.to_le_bytes()[..]].concat();
                for skipped in [0, 1] {
                    let rest = body.get(at + skipped..).unwrap_or_default();
                    let lying = [&body[..at], &claim, rest].concat();
                    most = most
                        .max(allocated::<Command>(&lying))
                        .max(allocated::<Report>(&lying));
                }
            }
        }
    }
    assert!(most <= ALLOCATED_MAX, "{most} bytes for a few hundred");
    assert!(most >= 1 << 20, "the lies found no length: {most} bytes");
}
