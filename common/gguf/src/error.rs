//! Why a file is refused.

/// Why a file is refused. Every message names the key or the tensor; whoever reports it names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream ended inside the header: the file is cut short, or more of it must be fetched.
    #[error("it ends inside its header, after {bytes} bytes")]
    Truncated {
        /// How many there were.
        bytes: u64,
    },
    /// The stream failed.
    #[error("it cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// Not GGUF, or a form of it that is not read.
    #[error("{0}")]
    Form(String),
    /// The header contradicts itself, or is larger than any real one.
    #[error("it is corrupt: {0}")]
    Corrupt(String),
    /// A key of the metadata is missing, of another kind, or has a value that is not supported.
    #[error("its metadata: {key} is {found}; {wanted}")]
    Key {
        /// Which.
        key: String,
        /// Its value, or that it is missing.
        found: String,
        /// What would do.
        wanted: String,
    },
    /// A tensor is missing, lies outside the file, or has a type that is not supported.
    #[error("tensor {name} {reason}")]
    Tensor {
        /// Which.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// An error about a key.
    pub(crate) fn key(key: &str, found: impl Into<String>, wanted: impl Into<String>) -> Error {
        Error::Key {
            key: key.to_owned(),
            found: found.into(),
            wanted: wanted.into(),
        }
    }

    /// An error about a tensor.
    pub(crate) fn tensor(name: &str, reason: impl Into<String>) -> Error {
        Error::Tensor {
            name: name.to_owned(),
            reason: reason.into(),
        }
    }
}
