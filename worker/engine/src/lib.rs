//! The serving engine: continuous batching over a paged KV cache, token ids in, token ids out.
//!
//! Knows no HTTP, actor, async runtime, wire format or text. A caller opens a model on a device, submits requests and
//! receives events; the engine has its own thread.
//!
//! Read in this order: [`request`] (what is asked), [`plan`] (what one step computes), [`runner`] (who computes it).
#![deny(unsafe_code)]

pub mod backend;
pub mod collective;
pub mod models;
pub mod plan;
pub mod request;
pub mod runner;
pub mod weights;
