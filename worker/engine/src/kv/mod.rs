//! The paged KV cache's bookkeeping: which block belongs to whom, and which blocks hold a known prefix.
//!
//! Owns block ids, never memory: K and V themselves live in the backend's pool.

pub mod blocks;
pub mod prefix;
pub mod table;
