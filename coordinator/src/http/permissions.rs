//! Who may do what: the check that stands before every other route, and the paths that show and change it.

use std::sync::Arc;

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource};
use serde::Serialize;

use super::HttpState;
use super::auth::Caller;
use super::error::Fault;
use super::json::JsonBody;
use super::settings;
use crate::api::{Access, Amendment, Grant, Grantee, Level};
use crate::policy::permissions::ADMINS;

/// Endpoints are named by their id here, or by their name.
const PATH: &str = "/api/2.0/permissions/serving-endpoints/{id}";

pub(super) fn routes(config: &mut ServiceConfig) {
    config
        .service(resource(format!("{PATH}/permissionLevels")).get(levels))
        .service(resource(PATH).get(show).put(replace).patch(merge));
}

/// The endpoint, if the caller may do as much with it. Asks no actor.
pub(super) fn allowed(
    state: &HttpState,
    caller: &Caller,
    name: &str,
    needed: Level,
) -> Result<Arc<Access>, Fault> {
    let access = state.gateway.access(name)?;
    let level = access.level(caller);
    if level.is_some_and(|level| level >= needed) {
        return Ok(access);
    }
    let has = level.map_or("no permission on it", Level::name);
    Err(Fault::permission_denied(format!(
        "User '{}' needs {} on endpoint '{name}' and has {has}. Its creator, or whoever has CAN_MANAGE, can grant it.",
        caller.user,
        needed.name()
    )))
}

/// The same for an endpoint's id or name.
fn allowed_by_id(
    state: &HttpState,
    caller: &Caller,
    id: &str,
    needed: Level,
) -> Result<Arc<Access>, Fault> {
    let name = state.gateway.name_of(id);
    allowed(state, caller, name.as_deref().unwrap_or(id), needed)
}

async fn levels(
    state: Data<HttpState>,
    caller: Caller,
    id: Path<String>,
) -> Result<HttpResponse, Fault> {
    allowed_by_id(&state, &caller, &id, Level::View)?;
    let described = |(level, description): (Level, _)| LevelJson {
        permission_level: level.name(),
        description,
    };
    let permission_levels = [
        (
            Level::Manage,
            "Can query, change and delete the endpoint, and say who may do what with it",
        ),
        (Level::Query, "Can see the endpoint and query it"),
        (Level::View, "Can see the endpoint"),
    ]
    .map(described);
    Ok(HttpResponse::Ok().json(Levels { permission_levels }))
}

async fn show(
    state: Data<HttpState>,
    caller: Caller,
    id: Path<String>,
) -> Result<HttpResponse, Fault> {
    let access = allowed_by_id(&state, &caller, &id, Level::View)?;
    Ok(HttpResponse::Ok().json(Permissions::of(&access)))
}

async fn replace(
    state: Data<HttpState>,
    caller: Caller,
    id: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    change(&state, &caller, &id, &body, Amendment::Grants).await
}

async fn merge(
    state: Data<HttpState>,
    caller: Caller,
    id: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    change(&state, &caller, &id, &body, Amendment::MoreGrants).await
}

async fn change(
    state: &HttpState,
    caller: &Caller,
    id: &str,
    body: &JsonBody,
    amendment: fn(Vec<Grant>) -> Amendment,
) -> Result<HttpResponse, Fault> {
    let grants = settings::grants(&body.0).map_err(Fault::invalid_parameter)?;
    let access = allowed_by_id(state, caller, id, Level::Manage)?;
    let name = access.name.clone();
    let view = state.gateway.amend(name, amendment(grants)).await?;
    let changed = Access {
        settings: view.settings,
        ..Access::clone(&access)
    };
    Ok(HttpResponse::Ok().json(Permissions::of(&changed)))
}

#[derive(Serialize)]
struct Levels {
    permission_levels: [LevelJson; 3],
}

#[derive(Serialize)]
struct LevelJson {
    permission_level: &'static str,
    description: &'static str,
}

#[derive(Serialize)]
struct Permissions<'a> {
    object_id: String,
    object_type: &'static str,
    access_control_list: Vec<Entry<'a>>,
}

impl<'a> Permissions<'a> {
    /// The creator first, then who was granted something, then admins, who are not to be changed here.
    fn of(access: &'a Access) -> Self {
        let creator = Grantee::User(access.creator.clone());
        let grants = &access.settings.grants;
        let granted = grants.iter().filter(|grant| grant.to != creator);
        let mut list = vec![Entry {
            user_name: Some(&access.creator),
            display_name: Some(&access.creator),
            ..Entry::with(Level::Manage, false)
        }];
        list.extend(granted.map(|grant| {
            let entry = Entry::with(grant.level, false);
            match &grant.to {
                Grantee::User(name) => Entry {
                    user_name: Some(name),
                    display_name: Some(name),
                    ..entry
                },
                Grantee::Group(name) => Entry {
                    group_name: Some(name),
                    ..entry
                },
                Grantee::ServicePrincipal(name) => Entry {
                    service_principal_name: Some(name),
                    display_name: Some(name),
                    ..entry
                },
            }
        }));
        list.push(Entry {
            group_name: Some(ADMINS),
            ..Entry::with(Level::Manage, true)
        });
        Permissions {
            object_id: format!("/serving-endpoints/{}", access.id),
            object_type: "serving-endpoint",
            access_control_list: list,
        }
    }
}

#[derive(Serialize)]
struct Entry<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    user_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_principal_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    display_name: Option<&'a str>,
    all_permissions: [Permission; 1],
}

impl Entry<'_> {
    /// For nobody yet.
    fn with(level: Level, inherited: bool) -> Self {
        Entry {
            user_name: None,
            group_name: None,
            service_principal_name: None,
            display_name: None,
            all_permissions: [Permission {
                permission_level: level.name(),
                inherited,
                inherited_from_object: inherited.then_some(["/serving-endpoints/"]),
            }],
        }
    }
}

#[derive(Serialize)]
struct Permission {
    permission_level: &'static str,
    inherited: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    inherited_from_object: Option<[&'static str; 1]>,
}
