//! The wire between coordinator and worker: bytes <-> frame <-> meaning.
//!
//! * [`frame`]: a length-limited frame on a byte stream; knows no meaning.
//! * [`codec`]: a message in a frame's body; the only file that names bincode.
//! * [`message`]: what the two sides say to each other.
//! * [`link`]: a connection that carries messages, plain or over TLS.
//!
//! A bad frame closes its link, never the process.

pub mod codec;
pub mod frame;
pub mod link;
pub mod message;
