//! The server on a real socket: clients that leave, connections that stay, and stopping.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use common::request::End;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::super::serve;
use super::fake::{FakeGateway, Script, delta, end};
use super::state;
use crate::api::{CancelGuard, Generation, GenerationEvent};

/// Longer than anything here should take.
const PATIENCE: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    stopped: actix_web::rt::task::JoinHandle<std::io::Result<()>>,
}

fn run(gateway: Arc<FakeGateway>) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let server = serve(listener, state(gateway), shutdown.clone()).unwrap();
    Running {
        address,
        shutdown,
        stopped: actix_web::rt::spawn(server),
    }
}

/// A guard, and what tells that it was dropped.
fn guard() -> (CancelGuard, oneshot::Receiver<()>) {
    let (sender, dropped) = oneshot::channel();
    let guard = CancelGuard::new(move || {
        let _ = sender.send(());
    });
    (guard, dropped)
}

/// A generation whose events come by hand.
fn by_hand() -> (Script, mpsc::Sender<GenerationEvent>, oneshot::Receiver<()>) {
    let (sender, events) = mpsc::channel(16);
    let (guard, dropped) = guard();
    let generation = Generation {
        prompt_tokens: 1,
        events,
        guard,
    };
    (Script::Generations(vec![generation]), sender, dropped)
}

async fn send(address: SocketAddr, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    write(&mut stream, body).await;
    stream
}

async fn write(stream: &mut TcpStream, body: &Value) {
    let body = body.to_string();
    let head = "POST /serving-endpoints/e/invocations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n";
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
}

/// Reads until what was read holds `text`.
async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut read = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&read).contains(text) {
            let n = stream.read_buf(&mut read).await.unwrap();
            assert!(
                n > 0,
                "closed before {text:?}: {}",
                String::from_utf8_lossy(&read)
            );
        }
    };
    timeout(PATIENCE, reading)
        .await
        .unwrap_or_else(|_| panic!("{text:?} did not come"));
    String::from_utf8(read).unwrap()
}

async fn is_cancelled(dropped: oneshot::Receiver<()>) {
    timeout(PATIENCE, dropped)
        .await
        .expect("the client's leaving was noticed")
        .expect("the guard was dropped once");
}

#[actix_web::test]
async fn a_client_that_leaves_cancels_what_it_asked_for_at_every_stage() {
    // Before the cluster has accepted.
    let (held, dropped) = guard();
    let gateway = FakeGateway::playing([Script::Silence(held)]);
    let server = run(Arc::clone(&gateway));
    let client = send(server.address, &json!({"inputs": "p"})).await;
    let asked = async {
        while gateway.calls.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, asked).await.unwrap();
    drop(client);
    is_cancelled(dropped).await;

    // While a whole answer, and while a stream is under way.
    for stream in [false, true] {
        let (script, events, dropped) = by_hand();
        let gateway = FakeGateway::playing([script]);
        let server = run(Arc::clone(&gateway));
        let mut client = send(server.address, &json!({"prompt": "p", "stream": stream})).await;
        events.send(delta(0, "first")).await.unwrap();
        if stream {
            read_until(&mut client, "first").await;
        } else {
            // It is being collected as soon as it has been taken out of the channel.
            let taken = timeout(PATIENCE, events.reserve_many(16)).await;
            taken
                .expect("the event is taken")
                .expect("the answer is being read");
        }
        drop(client);
        is_cancelled(dropped).await;
    }
}

#[actix_web::test]
async fn events_arrive_as_they_are_made() {
    let (script, events, _dropped) = by_hand();
    let server = run(FakeGateway::playing([script]));
    let mut client = send(server.address, &json!({"prompt": "p", "stream": true})).await;
    for text in ["one", "two", "three"] {
        events.send(delta(0, text)).await.unwrap();
        read_until(&mut client, text).await;
    }
    events.send(end(0, 3, End::Stop)).await.unwrap();
    drop(events);
    read_until(&mut client, "data: [DONE]\n\n\r\n0\r\n\r\n").await;
}

#[actix_web::test]
async fn a_connection_serves_one_request_after_another_also_after_refusals() {
    let answer = || Script::Events(vec![vec![delta(0, "text"), end(0, 1, End::Stop)]]);
    let server = run(FakeGateway::playing([answer(), answer()]));
    let mut client = send(server.address, &json!({"inputs": "p"})).await;
    read_until(&mut client, "\"total_tokens\":4}}]}").await;
    write(&mut client, &json!({"inputs": 5})).await;
    read_until(&mut client, "BAD_REQUEST").await;
    write(&mut client, &json!({"inputs": "p"})).await;
    read_until(&mut client, "\"total_tokens\":4}}]}").await;
}

#[actix_web::test]
async fn a_stop_lets_an_answer_finish_and_takes_no_more() {
    let (script, events, _dropped) = by_hand();
    let server = run(FakeGateway::playing([script]));
    let mut client = send(server.address, &json!({"prompt": "p", "stream": true})).await;
    events.send(delta(0, "first")).await.unwrap();
    read_until(&mut client, "first").await;
    server.shutdown.cancel();
    let refuses = async { while TcpStream::connect(server.address).await.is_ok() {} };
    timeout(PATIENCE, refuses)
        .await
        .expect("new connections are refused");
    events.send(end(0, 1, End::Stop)).await.unwrap();
    drop(events);
    read_until(&mut client, "[DONE]").await;
    let stopped = timeout(PATIENCE, server.stopped)
        .await
        .expect("the server stops");
    stopped
        .expect("the server's task ends")
        .expect("without an error");
}
