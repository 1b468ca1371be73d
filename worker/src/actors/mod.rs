//! Actors: one per shard, thin. They receive, ask, send; they never compute or block.

pub mod messages;
pub mod shard;
