//! What clients ask before they do anything: where they are, and who they are.

use actix_web::HttpResponse;
use actix_web::web::{ServiceConfig, resource};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::auth::Caller;
use super::json::Object;
use crate::policy::permissions::{ADMINS, USERS};

pub(super) fn routes(config: &mut ServiceConfig) {
    config
        .service(resource("/.well-known/databricks-config").get(host))
        .service(resource("/api/2.0/preview/scim/v2/Me").get(me));
}

/// Databricks' clients ask before they have a token, and go on with what they were told by their user when the answer
/// says nothing. To any other status they write a warning, and some they repeat for minutes.
async fn host() -> HttpResponse {
    HttpResponse::Ok().json(Object::new())
}

async fn me(caller: Caller) -> HttpResponse {
    let admins = caller.admin.then_some(ADMINS);
    let groups = caller.groups.iter().map(String::as_str);
    let groups = groups.chain(admins).chain([USERS]);
    HttpResponse::Ok().json(Me {
        schemas: ["urn:ietf:params:scim:schemas:core:2.0:User"],
        id: id(&caller.user),
        user_name: &caller.user,
        display_name: &caller.user,
        active: true,
        groups: groups.map(|display| Group { display }).collect(),
    })
}

/// Digits that stay the same for a user, as clients expect them.
fn id(user: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(user.as_bytes()).into();
    let number = digest[..8]
        .iter()
        .fold(0, |number: u64, &byte| (number << 8) | u64::from(byte));
    // At most 2^53, which every client's numbers can hold.
    (number >> 11).to_string()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Me<'a> {
    schemas: [&'static str; 1],
    id: String,
    user_name: &'a str,
    display_name: &'a str,
    active: bool,
    groups: Vec<Group<'a>>,
}

#[derive(Serialize)]
struct Group<'a> {
    display: &'a str,
}
