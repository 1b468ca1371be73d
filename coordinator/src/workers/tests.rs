//! The door for workers: who is let in, and what a link that misbehaves costs.

use common::ids::{BootId, WorkerId};
use common::wire::message::{Command, Hello, Report};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::Core;
use crate::actors::testing::{FakeWorker, cluster, serve_link, soon};
use crate::api::Gateway;

async fn empty() -> (tempfile::TempDir, Core) {
    let folder = tempfile::tempdir().unwrap();
    let core = cluster(folder.path(), |text| text).await;
    (folder, core)
}

async fn refusal(core: &Core, change: impl FnOnce(&mut Hello)) -> String {
    let mut hello = FakeWorker::hello(core, "0");
    change(&mut hello);
    let mut worker = FakeWorker::dial(core, hello).await;
    let Some(Command::Refused { reason }) = worker.command().await else {
        panic!("it was let in")
    };
    assert!(worker.command().await.is_none(), "the link is closed");
    reason
}

#[actix::test]
async fn who_may_not_join_is_told_why() {
    let (_folder, core) = empty().await;
    let reason = refusal(&core, |hello| hello.secret.push('x')).await;
    assert!(reason.contains("auth.worker_secret_file"), "{reason}");
    let reason = refusal(&core, |hello| hello.worker = WorkerId("n/9".into())).await;
    assert_eq!(reason, "cluster.toml has no device n/9; it has n/0, n/1");
    let reason = refusal(&core, |hello| {
        (hello.protocol_min, hello.protocol_max) = (7, 9)
    })
    .await;
    assert!(
        reason.contains("the worker speaks protocol 7 to 9"),
        "{reason}"
    );
    let reason = refusal(&core, |hello| {
        hello.device.kind = common::wire::message::DeviceKind::Cuda
    })
    .await;
    assert!(
        reason.contains("of kind Cpu; the worker has Cuda"),
        "{reason}"
    );
    assert_eq!(core.gateway.health().await.workers, 0);
}

#[actix::test]
async fn the_newer_process_of_a_name_stays_and_the_older_does_not_dial_again() {
    let (_folder, core) = empty().await;
    let mut older = FakeWorker::join(&core, "0").await;
    let _newer = FakeWorker::join(&core, "0").await;
    let Some(Command::Refused { reason }) = older.command().await else {
        panic!("the older one stays")
    };
    assert!(
        reason.contains("another process has joined as n/0"),
        "{reason}"
    );
    assert!(older.command().await.is_none());
    assert_eq!(core.gateway.health().await.workers, 1);
}

#[actix::test]
async fn a_worker_that_redials_is_not_refused() {
    let (_folder, core) = empty().await;
    let boot = BootId(5);
    let hello = || Hello {
        boot,
        ..FakeWorker::hello(&core, "0")
    };
    let mut before = FakeWorker::dial(&core, hello()).await;
    assert!(matches!(
        before.command().await,
        Some(Command::Welcome { .. })
    ));
    let mut after = FakeWorker::dial(&core, hello()).await;
    assert!(matches!(
        after.command().await,
        Some(Command::Welcome { .. })
    ));
    assert!(
        before.command().await.is_none(),
        "closed without a last word"
    );
}

#[actix::test]
async fn a_bad_frame_closes_its_link_and_no_other() {
    let (_folder, core) = empty().await;
    let mut good = FakeWorker::join(&core, "0").await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x1a, 0x7d, 1, 1, 4, 0, 0, 0, 255, 255, 255, 255],
    ] {
        let (mut ours, theirs) = tokio::io::duplex(1 << 16);
        let doorkeeper = core.doorkeeper.clone();
        let link = tokio::spawn(serve_link(doorkeeper, theirs, "stranger"));
        ours.write_all(garbage).await.unwrap();
        soon("the link's end", link).await.unwrap();
        assert_eq!(ours.read(&mut [0; 1]).await.unwrap(), 0);
    }
    // Also one that was let in before.
    let hello = FakeWorker::hello(&core, "1");
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let doorkeeper = core.doorkeeper.clone();
    let link = tokio::spawn(serve_link(doorkeeper, theirs, "worker"));
    let (mut send, mut commands) = link::split::<Report, Command>(ours);
    send.send(&Report::Hello(Box::new(hello.clone())))
        .await
        .unwrap();
    soon("welcome", commands.receive()).await.unwrap();
    assert_eq!(core.gateway.health().await.workers, 2);
    send.send(&Report::Hello(Box::new(hello))).await.unwrap();
    soon("the link's end", link).await.unwrap();
    assert_eq!(core.gateway.health().await.workers, 1);
    let report = Report::Pong { nonce: 1 };
    good.report(report).await;
    good.is_left_alone(Duration::from_millis(50)).await;
}

/// Writes an authority and a certificate of it for 127.0.0.1 to `folder`; `name` tells authorities apart.
fn certificates(folder: &std::path::Path, name: &str) -> common::config::TlsFiles {
    let mut parameters = rcgen::CertificateParams::new(vec![]).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let authority = parameters.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["127.0.0.1".into()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let file = |kind: &str, text: String| {
        let path = folder.join(format!("{name}.{kind}.pem"));
        std::fs::write(&path, text).unwrap();
        path
    };
    common::config::TlsFiles {
        ca: file("ca", authority.pem()),
        cert: file("cert", cert.pem()),
        key: file("key", key.serialize_pem()),
    }
}

#[actix::test]
async fn with_tls_only_certificates_of_the_clusters_authority_get_to_hello() {
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path(), "ours");
    let tls = "[tls]\nca = \"ours.ca.pem\"\ncert = \"ours.cert.pem\"\nkey = \"ours.key.pem\"\n";
    let core = cluster(folder.path(), |text| tls.to_owned() + &text).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(core.doorkeeper.clone().serve(listener, core.links.clone()));
    let ours = core.doorkeeper.cluster.tls.clone().unwrap();
    let stranger = certificates(folder.path(), "stranger");
    let mixed = common::config::TlsFiles {
        ca: ours.ca.clone(),
        ..stranger
    };
    let welcomed = async |files: Option<&common::config::TlsFiles>| {
        let socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let stream: Box<dyn Stream> = match files {
            Some(files) => {
                let connector =
                    tokio_rustls::TlsConnector::from(common::tls::client(files).unwrap());
                let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
                let Ok(stream) = connector.connect(name, socket).await else {
                    return false;
                };
                Box::new(stream)
            }
            None => Box::new(socket),
        };
        let (mut send, mut commands) = link::split::<Report, Command>(stream);
        let _ = send
            .send(&Report::Hello(Box::new(FakeWorker::hello(&core, "0"))))
            .await;
        matches!(
            soon("an answer", commands.receive()).await,
            Ok(Some(Command::Welcome { .. }))
        )
    };
    assert!(welcomed(Some(&ours)).await);
    assert!(
        !welcomed(Some(&mixed)).await,
        "another authority's certificate"
    );
    assert!(!welcomed(None).await, "no TLS");
}

#[actix::test]
async fn silent_connections_keep_no_worker_out_and_no_door_open() {
    let (_folder, core) = empty().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let doors = tokio::spawn(core.doorkeeper.clone().serve(listener, stop.clone()));
    let mut strangers = Vec::new();
    for _ in 0..3 * STRANGERS_MAX {
        strangers.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut send, mut commands) = link::split::<Report, Command>(socket);
    send.send(&Report::Hello(Box::new(FakeWorker::hello(&core, "0"))))
        .await
        .unwrap();
    let welcome = soon("welcome", commands.receive()).await.unwrap();
    assert!(matches!(welcome, Some(Command::Welcome { .. })));
    // The first ones had to go.
    let closed = soon("an end", strangers[0].read(&mut [0; 1])).await;
    assert_eq!(closed.unwrap(), 0);
    stop.cancel();
    soon("the doors close", doors).await.unwrap();
}

#[actix::test]
async fn a_stranger_cannot_say_a_hello_without_bounds() {
    let (_folder, core) = empty().await;
    let mut hello = FakeWorker::hello(&core, "0");
    hello.group_address = "x".repeat(HELLO_BYTES_MAX);
    let mut worker = FakeWorker::dial(&core, hello).await;
    assert!(worker.command().await.is_none(), "its link is closed");
}
