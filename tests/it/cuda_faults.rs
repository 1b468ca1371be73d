//! Emulated GPUs whose processes die, stand still or find no driver.

use std::process::Command;
use std::time::{Duration, Instant};

use cluster_tests::binaries;
use cluster_tests::cluster::{Cluster, run};
use cluster_tests::golden;
use cluster_tests::process::Signal;
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};
use serde_json::json;

/// A group is formed again within this time and that of loading its lost rank, which is a second for a tiny model.
const FORMED_AGAIN_MAX: Duration = Duration::from_secs(5);

/// Two emulated GPUs and nothing else.
fn pair() -> Settings {
    Settings::with_workers(0).gpus(2, cuda_rig::env())
}

/// An endpoint `pair` of two ranks, and which worker is its second rank.
async fn serving_pair() -> (Cluster, usize) {
    let cluster = Cluster::start(pair()).await;
    cluster
        .client
        .deploy_on("pair", "tiny-llama", "GPU_2", "Large")
        .await;
    (cluster, 1)
}

async fn answers(cluster: &Cluster) {
    let golden = golden::named("tiny-llama", "hello_lm");
    let text = cluster
        .client
        .continue_text("pair", &golden.prompt, 6)
        .await;
    assert!(
        !text.is_empty() && golden.text.starts_with(&text),
        "{text:?}"
    );
}

async fn wait_lost(cluster: &Cluster) {
    let lost = |view: &serde_json::Value| view["state"]["ready"] == "NOT_READY";
    cluster.client.wait_for("pair", "NOT_READY", lost).await;
}

#[tokio::test]
async fn a_killed_rank_costs_the_streams_their_end_and_nobody_else_anything() {
    let (mut cluster, second) = serving_pair().await;
    let golden = golden::named("tiny-llama", "hello_lm");
    let endless = json!({"prompt": golden.prompt, "max_tokens": 900, "ignore_eos": true, "temperature": 0, "stream": true});
    let mut streamed = cluster.client.stream("pair", &endless).await;
    streamed.next().await.expect("a first event");
    // These have no output when the rank dies: their prompts wait, or have only begun.
    let waiting: Vec<_> = (0..6)
        .map(|_| {
            let client = cluster.client.clone();
            let body = json!({"prompt": "word ".repeat(60), "max_tokens": 2, "ignore_eos": true, "temperature": 0});
            tokio::spawn(async move { client.invoke("pair", &body).await })
        })
        .collect();
    until("all requests to run", PATIENCE, async || {
        let metrics = cluster.client.metrics().await;
        match metrics.sum("tandem_requests_running", "") {
            Some(7.0) => Ok(()),
            running => Err(format!("{running:?} are running")),
        }
    })
    .await;
    cluster.kill_worker(second);
    let killed = Instant::now();
    cluster.start_worker(second);
    let error = streamed
        .collect()
        .await
        .error
        .expect("a stream that breaks says so");
    let error = &error["error"];
    assert_eq!(
        (&error["code"], &error["retryable"]),
        (&json!("TEMPORARILY_UNAVAILABLE"), &json!(true)),
        "{error}"
    );
    for reply in waiting {
        let answer = reply.await.unwrap().ok();
        assert_eq!(answer["usage"]["completion_tokens"], 2, "{answer:#}");
    }
    cluster.client.wait_ready("pair").await;
    let load = Duration::from_secs(5);
    assert!(
        killed.elapsed() < FORMED_AGAIN_MAX + load,
        "ready again after {:?}",
        killed.elapsed()
    );
    answers(&cluster).await;
    let log = cluster.worker(0).stderr();
    assert!(log.contains("weights kept, taken over"), "{log}");
    cluster.wait_idle().await;
}

#[tokio::test]
async fn a_rank_that_stands_still_is_given_up_and_used_again_when_it_goes_on() {
    let (mut cluster, second) = serving_pair().await;
    cluster.worker(second).signal(Signal::Stop);
    let body = json!({"prompt": "word ".repeat(20), "max_tokens": 2, "ignore_eos": true, "temperature": 0});
    let asked = {
        let client = cluster.client.clone();
        tokio::spawn(async move { client.invoke("pair", &body).await })
    };
    wait_lost(&cluster).await;
    cluster.worker(second).signal(Signal::Continue);
    cluster.client.wait_ready("pair").await;
    let answer = asked.await.unwrap().ok();
    assert_eq!(answer["usage"]["completion_tokens"], 2, "{answer:#}");
    answers(&cluster).await;
}

#[tokio::test]
async fn gpus_with_other_switches_do_not_add_their_numbers() {
    let cluster = Cluster::start(pair().gpu_lines(&["graphs = true", "graphs = false"])).await;
    let created = cluster
        .client
        .create("pair", "tiny-llama", "GPU_2", "Small");
    created.await.ok();
    let message = cluster.client.wait_failed("pair").await;
    // Whichever rank is heard first, it says the same.
    for part in [
        "compute differently: rank 0 with ",
        "graphs = true, NCCL ",
        ", rank 1 with ",
        "graphs = false, NCCL ",
        "; give them the same switches",
    ] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    let build_logs = "/api/2.0/serving-endpoints/pair/served-models/tiny-llama-1/build-logs";
    let logs = cluster.client.get(build_logs).await.ok();
    let logs = logs["logs"].as_str().unwrap_or_default();
    assert!(logs.contains("give them the same switches"), "{logs}");
}

#[tokio::test]
async fn what_was_kept_for_an_endpoint_goes_with_it() {
    let (mut cluster, second) = serving_pair().await;
    cluster.kill_worker(second);
    // Nothing that was kept can be freed before it is there.
    wait_told(&mut cluster, "weights kept").await;
    let path = "/api/2.0/serving-endpoints/pair";
    let delete = reqwest::Method::DELETE;
    let none = serde_json::Value::Null;
    cluster.client.call(delete, path, &none).await.ok();
    wait_told(&mut cluster, "kept weights freed").await;
}

/// Waits for a line of the first rank's worker.
async fn wait_told(cluster: &mut Cluster, line: &str) {
    let worker = cluster.worker(0);
    until(line, PATIENCE, async || {
        let log = worker.stderr();
        log.contains(line).then_some(()).ok_or(log)
    })
    .await;
}

/// Runs the worker with these arguments beside a cluster.toml with one GPU, and gives exit code, output and errors.
async fn worker(arguments: &[&str], env: Vec<(String, String)>) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings::with_workers(0).gpus(8, Vec::new());
    std::fs::write(folder.path().join("cluster.toml"), settings.toml()).unwrap();
    let mut command = Command::new(binaries::worker());
    command
        .arg("--config")
        .arg(folder.path().join("cluster.toml"))
        .args(arguments)
        .envs(env);
    let mut process = run(folder.path(), "worker", command);
    let code = process.exit(PATIENCE).await.code();
    (code, process.stdout(), process.stderr())
}

/// The last line of what a worker wrote to standard error, and how many begin with its name.
fn complaint(errors: &str) -> &str {
    let mut lines = errors.lines().filter(|line| line.starts_with("worker: "));
    let line = lines
        .next()
        .unwrap_or_else(|| panic!("no complaint in {errors:?}"));
    assert_eq!(lines.next(), None, "{errors}");
    line
}

#[tokio::test]
async fn a_worker_whose_gpu_cannot_be_had_ends_with_one_line_that_says_why() {
    let (code, _, errors) = worker(&["--device", "local/gpu0"], Vec::new()).await;
    assert_eq!(code, Some(1), "{errors}");
    for part in ["local/gpu0 is cuda:0", "libcuda.so.1", "driver"] {
        assert!(complaint(&errors).contains(part), "{errors}");
    }
    let (code, _, errors) = worker(&["--device", "local/gpu7"], cuda_rig::env()).await;
    assert_eq!(code, Some(1), "{errors}");
    for part in ["local/gpu7 is cuda:7", "cuda:0 to cuda:1"] {
        assert!(complaint(&errors).contains(part), "{errors}");
    }
}

#[tokio::test]
async fn the_doctor_tells_of_devices_and_of_what_is_missing() {
    let (code, report, _) = worker(&["doctor"], cuda_rig::env()).await;
    assert_eq!(code, Some(0));
    let line = |name: &str| {
        let found = report.lines().find(|line| line.starts_with(name));
        found.unwrap_or_else(|| panic!("no line {name} in\n{report}"))
    };
    for (name, part) in [
        ("cuda driver", "CUDA 12."),
        ("cuda:0", "compute capability 8.0"),
        ("cuda:1", "PCI "),
        ("peer access", "0-1 yes"),
        ("cublas", "12."),
        ("nccl", "libnccl.so.2"),
    ] {
        assert!(line(name).contains(part), "{report}");
    }
    let (code, report, _) = worker(&["doctor"], Vec::new()).await;
    assert_eq!(code, Some(0));
    assert!(
        report.contains("install NVIDIA's driver") && report.contains("NCCL was not found"),
        "{report}"
    );
}
