//! Starting: what is refused, what is created, and with which words and exit codes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use cluster_tests::binaries;
use cluster_tests::cluster::{Cluster, coordinator_command, run};
use cluster_tests::golden;
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};

/// Runs a command to its end: exit code, standard output, standard error.
async fn output(folder: &std::path::Path, command: Command) -> (Option<i32>, String, String) {
    let mut process = run(folder, "one-shot", command);
    let status = process.exit(PATIENCE).await;
    (status.code(), process.stdout(), process.stderr())
}

fn folder_with(toml: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("cluster.toml"), toml).unwrap();
    folder
}

#[tokio::test]
async fn an_unknown_key_in_cluster_toml_is_refused_with_its_line_and_the_known_keys() {
    let text = Settings::new()
        .toml()
        .replace("[auth]", "[auth]\nworker_secrets_file = \"x\"");
    let line = 1 + text
        .lines()
        .position(|line| line.starts_with("worker_secrets_file"))
        .unwrap();
    let folder = folder_with(&text);
    for program in [
        coordinator_command(folder.path()),
        worker_command(folder.path(), "local/cpu0"),
    ] {
        let (code, _, err) = output(folder.path(), program).await;
        assert_eq!(code, Some(2), "{err}");
        let expected =
            format!("cluster.toml:{line}: auth.worker_secrets_file: unknown key; known here:");
        assert!(err.contains(&expected), "{err}\ndoes not say\n{expected}");
    }
}

#[tokio::test]
async fn all_mistakes_of_cluster_toml_are_told_at_once() {
    let text = Settings::new()
        .toml()
        .replace("kind = \"cpu\"", "kind = \"gpu\"")
        .replace("version = 1", "version = \"x\"");
    let folder = folder_with(&text);
    let (code, _, err) = output(folder.path(), coordinator_command(folder.path())).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(
        err.contains("\"gpu\"") && err.contains("model version 'x'"),
        "{err}"
    );
}

#[tokio::test]
async fn a_missing_cluster_toml_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (code, _, err) = output(folder.path(), coordinator_command(folder.path())).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("cluster.toml: cannot be read"), "{err}");
}

#[tokio::test]
async fn a_port_in_use_is_named_with_its_setting() {
    for (key, setting) in [
        ("listen", "coordinator.listen"),
        ("worker_listen", "coordinator.worker_listen"),
    ] {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let free = format!("\n{key} = \"127.0.0.1:0\"");
        let text = Settings::new()
            .toml()
            .replace(&free, &format!("\n{key} = \"{address}\""));
        let folder = folder_with(&text);
        let (code, _, err) = output(folder.path(), coordinator_command(folder.path())).await;
        assert_eq!(code, Some(1), "{err}");
        let told = err
            .lines()
            .any(|line| line.contains(&address.to_string()) && line.contains(setting));
        assert!(told, "one line must name {address} and {setting}:\n{err}");
    }
}

#[tokio::test]
async fn an_unknown_device_is_refused_with_the_known_ones() {
    let folder = folder_with(&Settings::with_workers(2).toml());
    let (code, _, err) = output(folder.path(), worker_command(folder.path(), "local/cpu7")).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(
        err.contains("local/cpu7") && err.contains("local/cpu0") && err.contains("local/cpu1"),
        "{err}"
    );
}

#[tokio::test]
async fn secrets_are_made_once_and_for_their_owner_alone() {
    let mut cluster = Cluster::coordinator_only(Settings::new()).await;
    let files = ["var/worker.secret", "var/admin.token"].map(|file| cluster.folder().join(file));
    let before = files
        .each_ref()
        .map(|file| fs::read_to_string(file).unwrap());
    for (file, text) in files.iter().zip(&before) {
        let mode = fs::metadata(file).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", file.display());
        assert!(
            text.trim().len() == 64 && text.trim().chars().all(|c| c.is_ascii_hexdigit()),
            "{}",
            file.display()
        );
    }
    assert_ne!(before[0], before[1]);
    cluster.kill_coordinator();
    cluster.restart_coordinator().await;
    assert_eq!(
        files
            .each_ref()
            .map(|file| fs::read_to_string(file).unwrap()),
        before
    );
}

#[tokio::test]
async fn a_worker_that_comes_first_waits_for_its_secret_and_its_coordinator() {
    let folder = folder_with(&Settings::new().toml());
    let mut worker = run(
        folder.path(),
        "worker",
        worker_command(folder.path(), "local/cpu0"),
    );
    until(
        "the worker to say what it waits for",
        PATIENCE,
        async || {
            assert!(worker.try_exit().is_none(), "{}", worker.stderr());
            let log = worker.stderr();
            if log.contains("worker.secret") {
                Ok(())
            } else {
                Err(log)
            }
        },
    )
    .await;
}

#[tokio::test]
async fn check_tells_what_would_be_placed_where() {
    let mut settings = Settings::with_workers(2);
    settings.extra = "[[endpoints]]\nname = \"wished\"\n[[endpoints.served_entities]]\nentity_name = \"ml.demo.tiny-llama\"\n\
        entity_version = 1\nworkload_type = \"GPU_LARGE_2\"\nworkload_size = \"Small\"\n"
        .into();
    let folder = folder_with(&settings.toml());
    let (code, out, err) = output(folder.path(), check_command(folder.path())).await;
    assert_eq!(code, Some(0), "{err}");
    for part in [
        "local/cpu0",
        "local/cpu1",
        "wished",
        "ml.demo.tiny-llama",
        "GPU_LARGE_2",
    ] {
        assert!(out.contains(part), "{out}\ndoes not say {part}");
    }
    assert!(
        !folder.path().join("var").exists(),
        "a check must not create anything"
    );
}

#[tokio::test]
async fn check_refuses_a_wrong_file_and_passes_the_committed_one() {
    let folder = folder_with(&Settings::new().toml().replace("shards = 2", "shards = 0"));
    let (code, _, err) = output(folder.path(), check_command(folder.path())).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(
        err.contains("shards: must be between 1 and 64, got 0"),
        "{err}"
    );

    let committed = golden::model_folder("").join("../..");
    let (code, out, err) = output(folder.path(), check_command(&committed)).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("ml.demo.tiny-mpt"), "{out}");
}

fn worker_command(folder: &std::path::Path, device: &str) -> Command {
    let mut command = Command::new(binaries::worker());
    command
        .arg("--config")
        .arg(folder.join("cluster.toml"))
        .args(["--device", device]);
    command
}

fn check_command(folder: &std::path::Path) -> Command {
    let mut command = Command::new(binaries::coordinator());
    command.arg("check").arg(folder.join("cluster.toml"));
    command
}
