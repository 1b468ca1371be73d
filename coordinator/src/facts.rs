//! `coordinator facts`: what scripts need to know of a configuration with its layers, one tab-separated line each.
//!
//! ```text
//! http    127.0.0.1:8470
//! links   127.0.0.1:8471
//! token   admin          /srv/tandem/var/admin.token
//! worker  local/cpu0     127.0.0.1
//! ```

use common::config::{Cluster, TokenSource};

/// The lines. Tokens known by their digest alone have none.
pub fn lines(cluster: &Cluster) -> String {
    let coordinator = &cluster.coordinator;
    let mut lines = format!(
        "http\t{}\nlinks\t{}\n",
        coordinator.listen, coordinator.worker_listen
    );
    for token in &cluster.auth.tokens {
        if let TokenSource::File(file) = &token.source {
            lines += &format!("token\t{}\t{}\n", token.user, file.display());
        }
    }
    for node in &cluster.nodes {
        for device in &node.devices {
            lines += &format!("worker\t{}\t{}\n", device.worker, node.address);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_committed_configuration_is_told_line_by_line() {
        let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster.toml");
        // Beside the committed one may be somebody's cluster.local.toml.
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cluster.toml");
        std::fs::copy(committed, &file).unwrap();
        let lines = lines(&common::config::load(&file).unwrap());
        let kinds: Vec<&str> = lines
            .lines()
            .map(|line| line.split('\t').next().unwrap())
            .collect();
        assert_eq!(kinds, ["http", "links", "token", "worker", "worker"]);
        assert!(
            lines.contains("\nworker\tlocal/cpu1\t127.0.0.1\n"),
            "{lines}"
        );
        assert!(
            lines.contains("\ntoken\tadmin\t") && lines.contains("var/admin.token\n"),
            "{lines}"
        );
    }
}
