//! The serving engine: continuous batching over a paged KV cache, token ids in, token ids out.
//!
//! Knows no HTTP, actor, async runtime, wire format or text. A caller opens a model on a device, submits requests and
//! receives events; the engine has its own thread.
//!
//! Read in this order: [`request`] (what is asked), [`plan`] (what one step computes), [`runner`] (who computes it),
//! [`model_runner`] (how a rank does), [`layers`] (the forward pass), [`backend`] (what a device must know).
#![deny(unsafe_code)]

pub mod backend;
pub mod collective;
mod end;
pub mod engine;
pub mod follower;
pub mod kv;
pub mod layers;
pub mod mask;
pub mod model_runner;
pub mod models;
pub mod numerics;
pub mod plan;
pub mod rates;
pub mod request;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod stats;
pub mod weights;
