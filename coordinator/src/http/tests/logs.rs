//! Logs of served entities through their paths.

use std::sync::Arc;

use actix_web::test::{call_service, init_service, read_body};
use actix_web::web::Data;
use common::ids::ReplicaId;
use common::wire::message::LogPhase;
use serde_json::Value;

use super::super::app;
use super::fake::{FakeGateway, endpoint_view};
use super::{Reply, get, state};
use crate::logs::Logs;

/// A cluster with the endpoint `e`, which is being deployed, and one line in each of its logs.
async fn ask(path: &str) -> Reply {
    let folder = tempfile::tempdir().unwrap();
    let logs = Logs::open(folder.path()).unwrap();
    logs.place(ReplicaId(1), "e", "llama2-7b-1");
    logs.note(ReplicaId(1), LogPhase::Build, "weights read");
    logs.note(ReplicaId(1), LogPhase::Run, "serves");
    logs.flush();
    let gateway = Arc::new(FakeGateway::default());
    gateway.endpoints.lock().unwrap().push(endpoint_view("e"));
    let mut state = state(gateway);
    state.logs = logs;
    let service = init_service(app(Data::new(state))).await;
    let response = call_service(&service, get(path).to_request()).await;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let text = String::from_utf8(read_body(response).await.to_vec()).unwrap();
    Reply {
        status,
        headers,
        text,
    }
}

fn logs(reply: &Value) -> &str {
    assert_eq!(reply.as_object().unwrap().len(), 1, "{reply}");
    reply["logs"].as_str().unwrap()
}

#[actix_web::test]
async fn logs_and_build_logs_are_text_in_an_object_on_both_paths() {
    for base in [
        "/api/2.0/serving-endpoints",
        "/api/2.0/preview/serving-endpoints",
    ] {
        let entity = format!("{base}/e/served-models/llama2-7b-1");
        let build = ask(&format!("{entity}/build-logs")).await.ok();
        assert!(logs(&build).ends_with("[coordinator] weights read\n"));
        let run = ask(&format!("{entity}/logs/")).await.ok();
        assert!(logs(&run).ends_with("[coordinator] serves\n"));
    }
}

#[actix_web::test]
async fn logs_of_what_is_not_there_are_404() {
    let base = "/api/2.0/serving-endpoints";
    let unknown = ask(&format!("{base}/e/served-models/other/logs")).await;
    unknown.refused(
        404,
        "RESOURCE_DOES_NOT_EXIST",
        "Endpoint 'e' has no served model 'other'.",
    );
    let unknown = ask(&format!("{base}/f/served-models/other/build-logs")).await;
    unknown.refused(404, "RESOURCE_DOES_NOT_EXIST", "'f' does not exist");
}
