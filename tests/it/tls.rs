//! Links between machines: TLS with certificates of the cluster's own authority on both sides.

use cluster_tests::certificates::Authority;
use cluster_tests::cluster::Cluster;
use cluster_tests::fault;
use cluster_tests::golden::{self, TOKENS_MAX};
use cluster_tests::settings::Settings;
use cluster_tests::until::{PATIENCE, until};

#[tokio::test]
async fn a_cluster_over_tls_serves() {
    let certificates = tempfile::tempdir().unwrap();
    let mut settings = Settings::with_workers(2);
    settings.extra = Authority::new().write(certificates.path());
    let cluster = Cluster::start(settings).await;
    cluster
        .client
        .deploy_on("llama", "tiny-llama", "GPU_LARGE_2", "Small")
        .await;
    let golden = golden::named("tiny-llama", "spark");
    assert_eq!(
        cluster
            .client
            .continue_text("llama", &golden.prompt, TOKENS_MAX)
            .await,
        golden.text
    );
    // Who speaks without TLS is not listened to.
    fault::throw(&cluster.worker_address, b"\x1a\x7d\x01\x01\x00\x00\x00\x00").await;
}

#[tokio::test]
async fn a_worker_of_another_authority_does_not_get_in() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut settings = Settings::new();
    settings.extra = Authority::new().write(ours.path());
    let mut cluster = Cluster::coordinator_only(settings).await;
    // The worker reads its files when it starts: it gets those of another cluster.
    Authority::new().write(theirs.path());
    for file in ["ca.pem", "cert.pem", "key.pem"] {
        std::fs::copy(theirs.path().join(file), ours.path().join(file)).unwrap();
    }
    cluster.start_worker(0);
    until(
        "the worker to say why it has no link",
        PATIENCE,
        async || {
            let log = cluster.worker(0).stderr();
            if log.contains("certificate") {
                Ok(())
            } else {
                Err(log)
            }
        },
    )
    .await;
    assert_eq!(cluster.client.get("/health").await.json()["workers"], 0);
}
