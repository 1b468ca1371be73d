//! Who may do what, through every path.

use actix_web::http::Method;
use actix_web::http::header::AUTHORIZATION;
use actix_web::test::TestRequest;
use serde_json::{Value, json};
use std::sync::Arc;

use super::fake::{FakeGateway, endpoint_view, with_state};
use super::{Reply, call, get};
use crate::api::{DeploymentState, EndpointView, Grant, Grantee, Level};

const ID: &str = "08f9f293f47247588069fa4e4e61a9be";

/// An endpoint of ann's that says this of bob, who is in the group `team`.
fn view(name: &str, grants: Vec<Grant>) -> EndpointView {
    let mut view = with_state(endpoint_view(name), DeploymentState::Ready);
    view.settings.grants = grants;
    view
}

fn with(views: Vec<EndpointView>) -> Arc<FakeGateway> {
    let gateway = FakeGateway::default();
    *gateway.endpoints.lock().unwrap() = views;
    Arc::new(gateway)
}

fn bob(level: Level) -> Vec<Grant> {
    let to = Grantee::User("bob".into());
    vec![Grant { to, level }]
}

async fn as_bob(gateway: &Arc<FakeGateway>, method: Method, path: &str, body: &Value) -> Reply {
    let request = TestRequest::with_uri(path)
        .method(method)
        .insert_header((AUTHORIZATION, "Bearer bobs"));
    let request = match body {
        Value::Null => request,
        body => request.set_payload(body.to_string()),
    };
    call(gateway, request).await
}

#[actix_web::test]
async fn every_path_needs_its_level_and_says_so() {
    let config = json!({"served_entities": [{"entity_name": "m", "entity_version": "1",
        "scale_to_zero_enabled": false}]});
    let chat = json!({"model": "e", "messages": [{"role": "user", "content": "p"}]});
    let (get, put, patch, post) = (Method::GET, Method::PUT, Method::PATCH, Method::POST);
    let by_id = format!("/api/2.0/permissions/serving-endpoints/{ID}");
    let by_name = "/api/2.0/permissions/serving-endpoints/e".to_owned();
    let of = |last: &str| format!("/api/2.0/serving-endpoints/e{last}");
    let none = Value::Null;
    let table = [
        (Level::View, &get, of(""), none.clone()),
        (Level::View, &get, of("/config"), none.clone()),
        (Level::View, &get, of("/metrics/"), none.clone()),
        (
            Level::View,
            &get,
            of("/served-models/llama2-7b-1/logs"),
            none.clone(),
        ),
        (
            Level::View,
            &get,
            of("/served-models/llama2-7b-1/build-logs"),
            none.clone(),
        ),
        (Level::View, &get, by_id.clone(), none.clone()),
        (
            Level::View,
            &get,
            format!("{by_name}/permissionLevels"),
            none.clone(),
        ),
        (
            Level::Query,
            &post,
            "/serving-endpoints/e/invocations".into(),
            json!({"inputs": "p"}),
        ),
        (
            Level::Query,
            &post,
            "/serving-endpoints/completions".into(),
            json!({"model": "e", "prompt": "p"}),
        ),
        (
            Level::Query,
            &post,
            "/serving-endpoints/v1/chat/completions/".into(),
            chat,
        ),
        (Level::Manage, &put, of("/config"), config),
        (Level::Manage, &patch, of("/tags"), json!({})),
        (Level::Manage, &patch, of("/notifications"), json!({})),
        (Level::Manage, &put, of("/rate-limits"), json!({})),
        (Level::Manage, &put, of("/ai-gateway"), json!({})),
        (
            Level::Manage,
            &put,
            by_name,
            json!({"access_control_list": []}),
        ),
        (
            Level::Manage,
            &patch,
            by_id,
            json!({"access_control_list": []}),
        ),
        (Level::Manage, &Method::DELETE, of(""), none),
    ];
    for (needed, method, path, body) in table {
        for level in [
            None,
            Some(Level::View),
            Some(Level::Query),
            Some(Level::Manage),
        ] {
            let gateway = with(vec![view("e", level.map(bob).unwrap_or_default())]);
            let reply = as_bob(&gateway, method.clone(), &path, &body).await;
            if level >= Some(needed) {
                assert_ne!(
                    reply.status, 403,
                    "{method} {path} at {level:?}: {}",
                    reply.text
                );
                assert_ne!(
                    reply.status, 404,
                    "{method} {path} at {level:?}: {}",
                    reply.text
                );
                continue;
            }
            let has = level.map_or("no permission on it", Level::name);
            let says = format!(
                "User 'bob' needs {} on endpoint 'e' and has {has}",
                needed.name()
            );
            reply.refused(403, "PERMISSION_DENIED", &says);
            assert_eq!(gateway.endpoints.lock().unwrap().len(), 1);
            assert!(gateway.calls.lock().unwrap().is_empty());
        }
    }
}

#[actix_web::test]
async fn lists_show_what_the_caller_may_see_and_models_what_it_may_ask() {
    let group = Grant {
        to: Grantee::Group("team".into()),
        level: Level::Query,
    };
    let mut own = view("own", vec![]);
    own.creator = "bob".into();
    let gateway = with(vec![
        view("hidden", vec![]),
        view("seen", bob(Level::View)),
        view("teams", vec![group]),
        own,
    ]);
    let names = |list: &Value, key: &str| -> Vec<String> {
        let list = list.as_array().unwrap().iter();
        list.map(|one| one[key].as_str().unwrap().to_owned())
            .collect()
    };
    let list = as_bob(
        &gateway,
        Method::GET,
        "/api/2.0/serving-endpoints",
        &Value::Null,
    )
    .await;
    assert_eq!(
        names(&list.ok()["endpoints"], "name"),
        ["seen", "teams", "own"]
    );
    let models = as_bob(
        &gateway,
        Method::GET,
        "/serving-endpoints/models",
        &Value::Null,
    )
    .await;
    assert_eq!(names(&models.ok()["data"], "id"), ["teams", "own"]);
    let all = call(&gateway, get("/api/2.0/serving-endpoints")).await.ok();
    assert_eq!(all["endpoints"].as_array().unwrap().len(), 4);
}

#[actix_web::test]
async fn an_endpoint_says_what_its_reader_may_do() {
    for level in [Level::View, Level::Query, Level::Manage] {
        let gateway = with(vec![view("e", bob(level))]);
        let path = "/api/2.0/serving-endpoints/e";
        let shown = as_bob(&gateway, Method::GET, path, &Value::Null).await.ok();
        assert_eq!(shown["permission_level"], level.name());
        let admin = call(&gateway, get(path)).await.ok();
        assert_eq!(admin["permission_level"], "CAN_MANAGE");
    }
}

#[actix_web::test]
async fn permissions_are_shown_merged_and_replaced() {
    let gateway = with(vec![view("e", vec![])]);
    let path = format!("/api/2.0/permissions/serving-endpoints/{ID}");
    let change = |method: Method, list: Value| {
        let body = json!({"access_control_list": list});
        let request = TestRequest::with_uri(&path).method(method);
        super::authorized(request).set_payload(body.to_string())
    };
    let granted = |reply: &Value| -> Vec<(String, String)> {
        let list = reply["access_control_list"].as_array().unwrap().iter();
        let of = |entry: &Value| {
            let names = ["user_name", "group_name", "service_principal_name"];
            let name = names.iter().find_map(|key| entry[key].as_str()).unwrap();
            let level = entry["all_permissions"][0]["permission_level"].as_str();
            (name.to_owned(), level.unwrap().to_owned())
        };
        list.map(of).collect()
    };
    let pair = |name: &str, level: &str| (name.to_owned(), level.to_owned());
    let (ann, admins) = (pair("ann", "CAN_MANAGE"), pair("admins", "CAN_MANAGE"));

    let shown = call(&gateway, get(&path)).await.ok();
    let expected = json!({
        "object_id": format!("/serving-endpoints/{ID}"), "object_type": "serving-endpoint",
        "access_control_list": [
            {"user_name": "ann", "display_name": "ann",
             "all_permissions": [{"permission_level": "CAN_MANAGE", "inherited": false}]},
            {"group_name": "admins", "all_permissions": [{"permission_level": "CAN_MANAGE", "inherited": true,
             "inherited_from_object": ["/serving-endpoints/"]}]}]});
    assert_eq!(shown, expected);

    let list = json!([{"user_name": "bob", "permission_level": "CAN_VIEW"},
                      {"group_name": "team", "permission_level": "CAN_QUERY"}]);
    let merged = call(&gateway, change(Method::PATCH, list)).await.ok();
    let (bob, team) = (pair("bob", "CAN_VIEW"), pair("team", "CAN_QUERY"));
    assert_eq!(
        granted(&merged),
        [ann.clone(), bob, team.clone(), admins.clone()]
    );
    let list = json!([{"user_name": "bob", "permission_level": "CAN_MANAGE"}]);
    let raised = call(&gateway, change(Method::PATCH, list)).await.ok();
    let bob = pair("bob", "CAN_MANAGE");
    assert_eq!(granted(&raised), [ann.clone(), bob, team, admins.clone()]);
    let list = json!([{"service_principal_name": "robot", "permission_level": "CAN_QUERY"}]);
    let replaced = call(&gateway, change(Method::PUT, list)).await.ok();
    let robot = pair("robot", "CAN_QUERY");
    assert_eq!(granted(&replaced), [ann, robot, admins]);
    assert_eq!(call(&gateway, get(&path)).await.ok(), replaced);

    let levels = call(&gateway, get(&format!("{path}/permissionLevels")))
        .await
        .ok();
    let levels = levels["permission_levels"].as_array().unwrap();
    assert_eq!(levels.len(), 3);
    assert!(levels.iter().all(|level| level["description"].is_string()));
    let list = json!([{"user_name": "bob", "permission_level": "IS_OWNER"}]);
    let wrong = call(&gateway, change(Method::PUT, list)).await;
    wrong.refused(
        400,
        "INVALID_PARAMETER_VALUE",
        "must be CAN_VIEW, CAN_QUERY or CAN_MANAGE",
    );
}

#[actix_web::test]
async fn callers_learn_who_they_are() {
    let gateway = Arc::new(FakeGateway::default());
    let path = "/api/2.0/preview/scim/v2/Me";
    let bob = as_bob(&gateway, Method::GET, path, &Value::Null).await.ok();
    assert_eq!(
        (&bob["userName"], &bob["active"]),
        (&json!("bob"), &json!(true))
    );
    assert_eq!(
        bob["groups"],
        json!([{"display": "team"}, {"display": "users"}])
    );
    let id = bob["id"].as_str().unwrap().to_owned();
    assert!(id.parse::<u64>().is_ok_and(|id| id < 1 << 53), "{id}");
    let ann = call(&gateway, get(path)).await.ok();
    assert_eq!(
        ann["groups"],
        json!([{"display": "admins"}, {"display": "users"}])
    );
    assert_ne!(ann["id"], bob["id"]);
}
