//! Usage and inference tables: sums, totals and rows, as JSON or as files.
//!
//! Whoever may manage an endpoint sees all of its calls, anybody else sees their own; bodies are for managers alone.

mod form;
mod question;

use actix_web::web::{Data, Path, ServiceConfig, resource};
use actix_web::{HttpRequest, HttpResponse};

use self::form::{INFERENCE_COLUMNS, TOTAL_KEYS, USAGE_COLUMNS};
pub(super) use self::question::{BYTES_MAX as PARAMETER_BYTES_MAX, ROWS_MAX};

use self::question::Question;
use super::HttpState;
use super::auth::Caller;
use super::endpoints::PATHS;
use super::error::Fault;
use super::json::FieldError;
use super::permissions::allowed;
use crate::api::{ApiError, ErrorKind, Level};
use crate::tables::query::QueryError;
use crate::tables::totals::Sums;

/// The calls of all endpoints.
const ALL: &str = "/api/2.0/usage";

pub(super) fn routes(config: &mut ServiceConfig) {
    config
        .service(resource(ALL).get(all_sums))
        .service(resource(format!("{ALL}/rows")).get(all_rows))
        .service(resource(format!("{ALL}/totals")).get(all_totals));
    for path in PATHS {
        let one = format!("{path}/{{name}}");
        config
            .service(resource(format!("{one}/usage")).get(sums))
            .service(resource(format!("{one}/usage/rows")).get(rows))
            .service(resource(format!("{one}/usage/totals")).get(totals))
            .service(resource(format!("{one}/inference-table")).get(inference_rows));
    }
}

/// What every handler here needs of its request.
type Asked = (Data<HttpState>, Caller, HttpRequest);

async fn all_sums(asked: Asked) -> Result<HttpResponse, Fault> {
    show_sums(asked, None).await
}

async fn sums(asked: Asked, name: Path<String>) -> Result<HttpResponse, Fault> {
    show_sums(asked, Some(name.into_inner())).await
}

async fn all_rows(asked: Asked) -> Result<HttpResponse, Fault> {
    show_rows(asked, None).await
}

async fn rows(asked: Asked, name: Path<String>) -> Result<HttpResponse, Fault> {
    show_rows(asked, Some(name.into_inner())).await
}

async fn all_totals(asked: Asked) -> Result<HttpResponse, Fault> {
    show_totals(asked, None).await
}

async fn totals(asked: Asked, name: Path<String>) -> Result<HttpResponse, Fault> {
    show_totals(asked, Some(name.into_inner())).await
}

async fn show_sums(
    (state, caller, request): Asked,
    endpoint: Option<String>,
) -> Result<HttpResponse, Fault> {
    let mut question = Question::read(&request, question::SUMS)?;
    narrow(&state, &caller, endpoint, &mut question)?;
    let Question {
        filter, by, form, ..
    } = question;
    let groups = state.tables.usage_sums(filter.clone(), by.clone()).await?;
    let mut whole = Sums::default();
    groups.iter().for_each(|group| whole.add(&group.sums));
    let keys: Vec<&str> = by.iter().map(|by| by.word()).collect();
    let groups = groups.iter().map(|group| (&group.keys[..], &group.sums));
    Ok(form.sums("groups", &keys, groups, &whole, Some(&filter)))
}

async fn show_totals(
    (state, caller, request): Asked,
    endpoint: Option<String>,
) -> Result<HttpResponse, Fault> {
    let mut question = Question::read(&request, question::TOTALS)?;
    narrow(&state, &caller, endpoint, &mut question)?;
    let Question { filter, form, .. } = question;
    let mut totals = state
        .tables
        .usage_totals(filter.user, filter.endpoint_id)
        .await?;
    totals.retain(|total| {
        let mut asked = filter.endpoint.iter();
        asked.all(|name| total.endpoint == *name)
    });
    let mut whole = Sums::default();
    totals.iter().for_each(|total| whole.add(&total.sums));
    let keys: Vec<[String; 3]> = totals
        .iter()
        .map(|total| {
            let (user, endpoint) = (total.user.clone(), total.endpoint.clone());
            [user, endpoint, total.endpoint_id.clone()]
        })
        .collect();
    let sums = totals.iter().map(|total| &total.sums);
    let groups = keys.iter().map(|keys| &keys[..]).zip(sums);
    Ok(form.sums("totals", &TOTAL_KEYS, groups, &whole, None))
}

async fn show_rows(
    (state, caller, request): Asked,
    endpoint: Option<String>,
) -> Result<HttpResponse, Fault> {
    let mut question = Question::read(&request, question::ROWS)?;
    narrow(&state, &caller, endpoint, &mut question)?;
    let Question {
        filter,
        from,
        rows_max,
        form,
        ..
    } = question;
    let page = state.tables.usage_rows(filter, from, rows_max).await?;
    Ok(form.rows("usage", &USAGE_COLUMNS, &page))
}

async fn inference_rows(
    (state, caller, request): Asked,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    let access = allowed(&state, &caller, &name, Level::Manage)?;
    let Question {
        mut filter,
        from,
        rows_max,
        form,
        ..
    } = Question::read(&request, question::BODIES)?;
    filter.endpoint = Some(name.into_inner());
    filter.endpoint_id = Some(access.id.clone());
    let page = state.tables.inference_rows(filter, from, rows_max).await?;
    Ok(form.rows("inference", &INFERENCE_COLUMNS, &page))
}

/// Narrows a question to what the caller may see; `endpoint` is the one that the path names. Earlier endpoints of its name
/// were somebody else's.
fn narrow(
    state: &HttpState,
    caller: &Caller,
    endpoint: Option<String>,
    question: &mut Question,
) -> Result<(), Fault> {
    let filter = &mut question.filter;
    let sees_all = match endpoint {
        Some(name) => {
            let access = allowed(state, caller, &name, Level::View)?;
            if filter.endpoint.as_ref().is_some_and(|asked| *asked != name) {
                let why = format!("must be left out, or be that of the path, '{name}'");
                return Err(Fault::invalid_parameter(FieldError::at("endpoint", why)));
            }
            filter.endpoint = Some(name);
            filter.endpoint_id = Some(access.id.clone());
            access.level(caller) == Some(Level::Manage)
        }
        None => caller.admin,
    };
    if sees_all {
        return Ok(());
    }
    match &filter.user {
        Some(user) if *user != caller.user => Err(Fault::permission_denied(format!(
            "User '{}' may see only calls of their own: leave user out. Others' calls are for whoever has CAN_MANAGE on the endpoint, and those of all endpoints for admins.",
            caller.user
        ))),
        _ => {
            filter.user = Some(caller.user.clone());
            Ok(())
        }
    }
}

impl From<QueryError> for Fault {
    fn from(error: QueryError) -> Self {
        let kind = match &error {
            QueryError::Refused(_) => ErrorKind::InvalidParameter,
            QueryError::Unavailable(_) => ErrorKind::Unavailable,
        };
        ApiError::new(kind, error.to_string()).into()
    }
}
