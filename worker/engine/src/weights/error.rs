//! Why a checkpoint's files are refused.

use super::{INDEX, SINGLE};

/// Why a checkpoint is refused. Every message names the file or the tensor.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file is missing or unreadable.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// The system's words.
        reason: String,
    },
    /// The folder has no weights.
    #[error(
        "{dir} has neither {SINGLE} nor {INDEX}, and no .gguf file; other formats must be converted to safetensors first"
    )]
    NoWeights {
        /// The folder.
        dir: String,
    },
    /// A safetensors file is cut short, or its header is not what it claims.
    #[error("{path} is corrupt or cut short: {reason}")]
    Corrupt {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The index of a sharded checkpoint is unusable.
    #[error("{path}: {reason}")]
    Index {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A GGUF file is not what it should be, or asks for something that is not served.
    #[error("{path}: {reason}")]
    Gguf {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A folder has more than one GGUF file.
    #[error("{dir} has {count} .gguf files; name the one to be served as the model's path")]
    ManyGguf {
        /// The folder.
        dir: String,
        /// How many.
        count: usize,
    },
    /// The tensors of a matrix that is quantised do not fit together, or not to what `quantization_config` says.
    #[error("tensor {name}: {reason}")]
    Quantised {
        /// Which.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The model needs a tensor that is not there.
    #[error("the checkpoint has no tensor {name} {shape:?}")]
    Missing {
        /// Which.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor {name} has the shape {found:?}; config.json asks for {expected:?}")]
    Shape {
        /// Which.
        name: String,
        /// In the file.
        found: Vec<usize>,
        /// By the config.
        expected: Vec<usize>,
    },
    /// A tensor's number format is not supported.
    #[error("tensor {name} has the dtype {found}; supported are BF16, F16 and F32")]
    Dtype {
        /// Which.
        name: String,
        /// In the file.
        found: String,
    },
    /// A tensor that the model does not use: leaving it out would change what the model computes.
    #[error("the checkpoint has a tensor {name} that config.json does not account for")]
    Unexpected {
        /// Which.
        name: String,
    },
}
