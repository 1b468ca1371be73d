//! GGUF files, versions 2 and 3, little endian: what a header says, and where each tensor's bytes lie.
//!
//! Owns reading a header from any stream up to where the data start (so that one can be read where it is, a few
//! megabytes of a file of many gigabytes), the checks of it against the file's length, and the way from a header's words
//! to those of Hugging Face: a `config.json` and tensors' names. Knows no numbers inside tensors.
//!
//! A file is a stranger's: nothing is allocated by a count that it claims, and every length has a limit.
#![forbid(unsafe_code)]

mod config;
mod error;
mod header;
mod names;
mod reader;
mod tensor;
mod value;
#[cfg(feature = "write")]
pub mod write;

pub use error::Error;
pub use header::{Gguf, HEADER_BYTES_MAX};
pub use names::{gguf_name, hugging_face_name};
pub use tensor::{SUPPORTED, TensorInfo, TensorType};
pub use value::{Array, NumberType, Numbers, Texts, Value};
