//! cluster.toml: what the file says (`raw`) and what the program uses (`cluster`).
//!
//! Layers, later ones win: the file, `cluster.local.toml` beside it, environment variables `TANDEM__SECTION__KEY`
//! (scalars only). Lists replace each other whole. Unknown keys are refused, and all mistakes come in one list, each
//! with its file and line.

mod auth;
mod check;
mod cluster;
mod endpoints;
mod models;
mod raw;
mod reader;
mod registries;
mod tables;
#[cfg(test)]
mod tests;

pub use cluster::*;
pub use reader::{ConfigError, Mistake};
pub use tables::TablesConfig;

use std::path::Path;

/// Reads, layers and checks a configuration.
///
/// # Errors
/// [`ConfigError`] lists every mistake.
pub fn load(path: &Path) -> Result<Cluster, ConfigError> {
    load_with(path, reader::environment())
}

/// The same with these environment variables.
fn load_with(path: &Path, variables: reader::Variables) -> Result<Cluster, ConfigError> {
    let layers = reader::Layers::read(path, variables)?;
    let mut reader = layers.reader();
    let raw = raw::Raw::read(&mut reader);
    let root = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let cluster = check::check(raw, root, &mut reader);
    reader.finish(cluster)
}
