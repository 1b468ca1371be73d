use std::fs;
use std::path::PathBuf;

use super::*;

struct Folder(tempfile::TempDir);

impl Folder {
    fn with(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cluster.toml"), text).unwrap();
        Folder(folder)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("cluster.toml")
    }

    fn mistakes(&self) -> Vec<String> {
        let ConfigError(mistakes) = load(&self.file()).unwrap_err();
        mistakes
            .iter()
            .map(|m| {
                m.to_string()
                    .replace(&format!("{}/", self.0.path().display()), "")
            })
            .collect()
    }
}

const SMALL: &str = r#"
[[auth.tokens]]
user = "admin"
file = "var/admin.token"
[[nodes]]
name = "local"
[[nodes.devices]]
name = "cpu0"
kind = "cpu"
memory = "2GiB"
[[workload_types]]
name = "GPU_LARGE"
device = "cpu"
[[models]]
name = "ml.demo.tiny-llama"
version = 1
path = "models/tiny"
"#;

#[test]
fn defaults_are_loopback_and_paths_are_beside_the_file() {
    let folder = Folder::with(SMALL);
    let cluster = load(&folder.file()).unwrap();
    assert!(cluster.coordinator.listen.ip().is_loopback());
    assert_eq!(cluster.coordinator.addresses, ["127.0.0.1:8471"]);
    assert_eq!(cluster.models[0].path, folder.0.path().join("models/tiny"));
    assert_eq!(
        cluster.device("local/cpu0").unwrap().1.memory_bytes,
        Some(2 << 30)
    );
    assert_eq!(cluster.workload_types[0].name, "GPU_LARGE");
}

#[test]
fn the_local_override_wins_and_mistakes_in_it_name_it() {
    let folder = Folder::with(SMALL);
    let local = folder.0.path().join("cluster.local.toml");
    fs::write(&local, "[coordinator]\nlisten = \"127.0.0.1:9\"\n").unwrap();
    assert_eq!(load(&folder.file()).unwrap().coordinator.listen.port(), 9);
    fs::write(&local, "[coordinator]\n\nlisten = \"here\"\n").unwrap();
    let mistakes = folder.mistakes();
    assert_eq!(mistakes.len(), 1);
    assert!(
        mistakes[0].starts_with("cluster.local.toml:3: coordinator.listen: must be an IP address"),
        "{}",
        mistakes[0]
    );
}

#[test]
fn all_mistakes_come_at_once_each_with_its_line() {
    let text = SMALL
        .replace("kind = \"cpu\"", "kind = \"gpu\"\nthreds = 2")
        .replace("version = 1", "version = \"latest\"")
        .replace("device = \"cpu\"", "shards = 0\ndevice = \"cpu\"")
        .replace("memory = \"2GiB\"", "memory = \"lots\"");
    let mistakes = Folder::with(&text).mistakes();
    let expected = [
        "cluster.toml:11: nodes[0].devices[0].memory: must be a size",
        "cluster.toml:10: nodes[0].devices[0].threds: unknown key; known here: cores,",
        "cluster.toml:9: nodes[0].devices[0].kind: must be \"cpu\" or \"cuda:N\", got \"gpu\"",
        "cluster.toml:14: workload_types[0].shards: must be between 1 and 64, got 0",
        "cluster.toml:16: models[0]: model version 'latest' must be a positive whole number",
    ];
    assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
    for (mistake, expected) in mistakes.iter().zip(expected) {
        assert!(
            mistake.starts_with(expected),
            "{mistake}\ndoes not start with\n{expected}"
        );
    }
}

#[test]
fn a_missing_key_names_its_table_and_a_syntax_error_its_line() {
    let missing = Folder::with(&SMALL.replace("path = \"models/tiny\"", "")).mistakes();
    assert_eq!(missing, ["cluster.toml:14: models[0].path: is missing"]);
    let broken = Folder::with("[coordinator\nlisten = 1").mistakes();
    assert!(
        broken[0].starts_with("cluster.toml:1: not TOML"),
        "{broken:?}"
    );
}

#[test]
fn addresses_off_loopback_need_certificates_or_consent() {
    let text = format!(
        "[coordinator]\nlisten = \"0.0.0.0:8470\"\nworker_listen = \"0.0.0.0:8471\"\n{SMALL}"
    );
    let mistakes = Folder::with(&text).mistakes();
    assert_eq!(mistakes.len(), 2, "{mistakes:#?}");
    assert!(mistakes[0].contains("plain_http") && mistakes[1].contains("[tls]"));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let folder = Folder::with("");
    fs::remove_file(folder.file()).unwrap();
    assert!(folder.mistakes()[0].starts_with("cluster.toml: cannot be read"));
}
