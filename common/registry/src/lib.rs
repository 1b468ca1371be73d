//! Where models come from: a name and a version become a listing of files, and files become bytes.
//!
//! Knows the REST of MLflow's registry and of the Hugging Face hub, shared folders, and (behind a feature) cloud object
//! stores. Knows no tensors, decides nothing: the coordinator asks it for listings and headers, workers for whole files.
//!
//! Everything a registry answers is a stranger's: sizes are bounded, and a path that leads out of the model is an error.
#![forbid(unsafe_code)]

mod auth;
mod body;
mod folder;
mod http;
mod hub;
mod listing;
mod mlflow;
mod objects;
mod registry;
mod unity;
mod uri;

pub use body::Body;
pub use listing::{Listing, check_path};
pub use registry::{Found, Registry};

/// Looks up an environment variable: the process's own, or a test's.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The process's environment. A variable that is empty counts as not there.
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Why a registry did not give what was asked for. Messages name the registry, the URL and what it answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It knows no such model.
    #[error("Registered model '{0}' does not exist")]
    NoModel(String),
    /// It knows the model, and no such version.
    #[error(
        "Model version '{version}' of registered model '{name}' does not exist. Known versions: {}",
        list(known)
    )]
    NoVersion {
        /// The model.
        name: String,
        /// What was asked for.
        version: String,
        /// What there is, as far as the registry told.
        known: Vec<String>,
    },
    /// It cannot be asked now: not reachable, or failing. The same question may be answered later.
    #[error("{0}")]
    Unavailable(String),
    /// Asking again will not help: refused, not there, not supported, or an answer that makes no sense.
    #[error("{0}")]
    Unusable(String),
}

fn list(known: &[String]) -> String {
    if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    }
}
