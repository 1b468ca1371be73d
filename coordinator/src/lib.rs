//! The coordinator: the HTTP API, the endpoints' desired state, placement and request scheduling.
//!
//! Knows no tensors, tokenizers or weights; text and token ids pass through it unopened.
#![forbid(unsafe_code)]

pub mod api;
