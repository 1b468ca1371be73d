//! What coordinator and worker both need: ids, requests, configuration and the wire between them.
//!
//! Decides nothing. A thing enters here only when both processes need it.
#![forbid(unsafe_code)]

pub mod config;
pub mod ids;
pub mod model_ref;
pub mod names;
pub mod request;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod wire;
