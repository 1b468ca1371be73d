//! The worker: one process that owns one device and runs shards of models on it for the coordinator.
//!
//! [`session`] keeps the link, [`actors`] hold the shards' lives, [`open`] makes a model's folder into a running engine,
//! [`translate`] and [`answer`] stand between text and token ids.
#![forbid(unsafe_code)]

pub mod actors;
pub mod answer;
pub mod answering;
pub mod artifacts;
pub mod device;
pub mod doctor;
pub mod group;
pub mod health;
pub mod logs;
pub mod masks;
pub mod memory;
pub mod open;
pub mod outbox;
pub mod platform;
pub mod session;
pub mod text;
pub mod translate;
