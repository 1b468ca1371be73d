//! Starting: what is refused, what is created, and with which words and exit codes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use cluster_tests::binaries;
use cluster_tests::certificates::Authority;
use cluster_tests::cluster::{Cluster, coordinator_command, run};
use cluster_tests::golden;
use cluster_tests::settings::{Model, Settings};
use cluster_tests::until::{PATIENCE, until};
use common::config;
use reqwest::Method;

const ENDPOINTS: &str = "/api/2.0/serving-endpoints";

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
        .replacen("version = 1", "version = \"x\"", 1)
        + "[[endpoints]]\nname = \"models\"\n[[endpoints.served_entities]]\nentity_name = \"ml.demo.tiny-mpt\"\n\
           entity_version = 1\ntraffic_percentage = 90\n";
    let folder = folder_with(&text);
    let (code, _, err) = output(folder.path(), coordinator_command(folder.path())).await;
    assert_eq!(code, Some(2), "{err}");
    let expected = [
        (
            "kind = \"gpu\"",
            "nodes[0].devices[0].kind: must be \"cpu\" or \"cuda:N\", got \"gpu\"",
        ),
        (
            "version = \"x\"",
            "models[0].version: model version 'x' must be a positive whole number",
        ),
        (
            "name = \"models\"",
            "endpoints[0].name: 'models' is reserved",
        ),
        (
            "[[endpoints.served_entities]]",
            "endpoints[0].served_entities: must have traffic_percentage values that sum to 100, got 90",
        ),
    ];
    let told: Vec<&str> = err.lines().collect();
    assert_eq!(told.len(), expected.len(), "{err}");
    for (told, (written, mistake)) in told.iter().zip(expected) {
        let line = 1 + text.lines().position(|line| line == written).unwrap();
        let place = folder.path().join("cluster.toml");
        let expected = format!("{}:{line}: {mistake}", place.display());
        assert!(told.starts_with(&expected), "{told}\nis not\n{expected}");
    }
    assert!(
        !folder.path().join("var").exists(),
        "a refused configuration must not create anything"
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
async fn a_cluster_without_devices_is_told_to_workers_and_by_a_check() {
    let folder = folder_with(&Settings::with_workers(0).toml());
    let (code, _, err) = output(folder.path(), worker_command(folder.path(), "local/cpu0")).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("has no [[nodes.devices]]"), "{err}");
    let (code, out, err) = output(folder.path(), check_command(folder.path())).await;
    assert_eq!(code, Some(2), "{out}{err}");
    assert!(out.contains("none: nothing can be served"), "{out}");
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

    let folder = folder_with(&committed());
    let (code, out, err) = output(folder.path(), check_command(folder.path())).await;
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("ml.demo.tiny-mpt"), "{out}");
}

/// The repository's cluster.toml with its models' full paths, for a folder of its own: beside the real one may be
/// somebody's cluster.local.toml.
fn committed() -> String {
    let root = golden::model_folder("").join("../..");
    let text = fs::read_to_string(root.join("cluster.toml")).unwrap();
    let relative = "path = \"tests/models/";
    assert_eq!(text.matches(relative).count(), 3, "{text}");
    let models = golden::model_folder("");
    text.replace(relative, &format!("path = \"{}/", models.display()))
}

#[tokio::test]
async fn every_line_that_the_committed_cluster_toml_only_suggests_is_a_known_key() {
    // `# key = value  # why` and `# [[table]]`; prose has no such form.
    let uncommented: Vec<String> = committed()
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.starts_with('[') || is_setting(rest) => rest.to_owned(),
            _ => line.to_owned(),
        })
        .collect();
    let text = uncommented.join("\n");
    for key in KEYS {
        let there = |line: &str| {
            line.strip_prefix(key)
                .is_some_and(|rest| rest.starts_with(" = "))
        };
        assert!(text.lines().any(there), "cluster.toml does not show {key}");
    }
    let folder = folder_with(&text);
    if let Err(mistakes) = config::load(&folder.path().join("cluster.toml")) {
        panic!("{mistakes}");
    }

    // The check also asks registries, and none is there: what needs one stays as it is.
    let remote = ["[[registries]]", "\nhub = ", "\nuri = "];
    let at_hand = text
        .split("\n\n")
        .filter(|block| !remote.iter().any(|word| block.contains(word)));
    let folder = folder_with(&at_hand.collect::<Vec<_>>().join("\n\n"));
    let certificates = folder.path().join("certs");
    fs::create_dir(&certificates).unwrap();
    Authority::new().write(&certificates);
    let (code, out, err) = output(folder.path(), check_command(folder.path())).await;
    assert_eq!(code, Some(0), "{out}{err}");
    for part in ["a100-node/gpu1", "tiny-llama / stable (CPU, Small): on"] {
        assert!(out.contains(part), "{out}\ndoes not say {part}");
    }
}

fn is_setting(line: &str) -> bool {
    line.split_once(" = ").is_some_and(|(key, _)| {
        key.chars()
            .all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
    })
}

/// Every key there is.
const KEYS: [&str; 47] = [
    "usage",
    "usage_days_max",
    "usage_bytes_max",
    "inference_days_max",
    "inference_bytes_max",
    "payload_bytes_max",
    "redact",
    "segment_bytes_max",
    "listen",
    "worker_listen",
    "addresses",
    "data_dir",
    "plain_http",
    "worker_secret_file",
    "user",
    "file",
    "sha256",
    "ca",
    "cert",
    "key",
    "body_bytes_max",
    "deadline_ms",
    "queue_tokens_max",
    "queue_requests_max",
    "idle_stream_ms",
    "name",
    "address",
    "kind",
    "memory",
    "threads",
    "cores",
    "group_port",
    "graphs",
    "batch_invariant",
    "device",
    "shards",
    "stands_in_for",
    "version",
    "path",
    "kv_dtype",
    "quantization",
    "context_max",
    "entity_name",
    "entity_version",
    "workload_type",
    "workload_size",
    "traffic_percentage",
];

#[tokio::test]
async fn options_may_stand_before_and_after_the_subcommand() {
    let folder = folder_with(&Settings::new().toml());
    let mut check = Command::new(binaries::coordinator());
    check.args(["check", "--config"]);
    check.arg(folder.path().join("cluster.toml"));
    let (code, out, err) = output(folder.path(), check).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("local/cpu0"), "{out}");
    let mut doctor = Command::new(binaries::worker());
    doctor.args(["doctor", "--log-json", "--config", "cluster.toml"]);
    let (code, out, err) = output(folder.path(), doctor).await;
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("cores"), "{out}");
}

#[tokio::test]
async fn a_model_that_is_not_there_is_named_by_a_check_and_at_the_start() {
    let model = Model::at("ml.demo.gone", std::path::Path::new("/no/such/model"));
    let settings = Settings::new().model(model);
    let folder = folder_with(&settings.toml());
    let (code, out, err) = output(folder.path(), check_command(folder.path())).await;
    assert_eq!(code, Some(2), "{out}{err}");
    let says = "ml.demo.gone v1: /no/such/model: is not a folder";
    assert!(out.contains(says), "{out}\ndoes not say\n{says}");
    let cluster = Cluster::coordinator_only(settings).await;
    let log = cluster.coordinator.stderr();
    assert!(
        log.contains("/no/such/model") && log.contains("ml.demo.gone"),
        "{log}"
    );
}

#[tokio::test]
async fn an_endpoint_of_cluster_toml_that_was_deleted_stays_deleted() {
    let mut settings = Settings::new();
    settings.extra = "[[endpoints]]\nname = \"wished\"\n[[endpoints.served_entities]]\n\
        entity_name = \"ml.demo.tiny-llama\"\nentity_version = 1\n"
        .into();
    let mut cluster = Cluster::coordinator_only(settings).await;
    let path = format!("{ENDPOINTS}/wished");
    assert_eq!(cluster.client.get(&path).await.ok()["name"], "wished");
    let delete = cluster
        .client
        .call(Method::DELETE, &path, &serde_json::Value::Null);
    delete.await.ok();
    let gone = async || match cluster.client.get(&path).await {
        reply if reply.status == 404 => Ok(()),
        reply => Err(reply.text),
    };
    until("the endpoint to be gone", PATIENCE, gone).await;
    cluster.kill_coordinator();
    cluster.restart_coordinator().await;
    assert_eq!(cluster.client.get(&path).await.status, 404);
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
