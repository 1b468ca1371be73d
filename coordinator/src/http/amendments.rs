//! Changes of what stands beside an endpoint's configuration, and what this server does not do there.

use actix_web::web::{Data, Path, ServiceConfig, resource, to};
use actix_web::{HttpRequest, HttpResponse};
use serde::Serialize;

use super::HttpState;
use super::auth::Caller;
use super::endpoints::PATHS;
use super::error::Fault;
use super::json::{FieldError, JsonBody, Object};
use super::permissions::allowed;
use super::settings;
use super::view::{AiGatewayJson, EmailsJson, RateLimitJson, Tag, rate_limits, tags};
use crate::api::{Amendment, ApiError, EndpointView, ErrorKind, Level};

pub(super) fn routes(config: &mut ServiceConfig) {
    for path in PATHS {
        let under = |last: &str| resource(format!("{path}/{{name}}/{last}"));
        config
            .service(under("tags").patch(change_tags))
            .service(under("notifications").patch(change_notifications))
            .service(under("rate-limits").put(change_rate_limits))
            .service(under("ai-gateway").put(change_gateway))
            .service(under("telemetry-config").patch(not_built))
            .service(under("system-metrics-export-state").route(to(not_built)));
    }
}

async fn change_tags(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let view = amend(&state, &caller, &name, &body.0, settings::tag_changes).await?;
    // An object: some clients take a bare list apart as if it were one.
    let tags = tags(&view.settings.tags);
    Ok(HttpResponse::Ok().json(TagsReply { tags }))
}

async fn change_notifications(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let view = amend(&state, &caller, &name, &body.0, settings::notifications).await?;
    let emails = view.settings.email_notifications.unwrap_or_default();
    Ok(HttpResponse::Ok().json(NotificationsReply {
        name: &view.name,
        email_notifications: EmailsJson::of(&emails),
    }))
}

async fn change_rate_limits(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let view = amend(&state, &caller, &name, &body.0, settings::rate_limits).await?;
    let rate_limits = rate_limits(&view.settings.rate_limits);
    Ok(HttpResponse::Ok().json(RateLimitsReply { rate_limits }))
}

async fn change_gateway(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let view = amend(&state, &caller, &name, &body.0, settings::gateway).await?;
    let gateway = view.settings.ai_gateway.unwrap_or_default();
    Ok(HttpResponse::Ok().json(AiGatewayJson::of(&gateway)))
}

async fn amend(
    state: &HttpState,
    caller: &Caller,
    name: &str,
    body: &Object,
    read: fn(&Object) -> Result<Amendment, FieldError>,
) -> Result<EndpointView, Fault> {
    allowed(state, caller, name, Level::Manage)?;
    let amendment = read(body).map_err(Fault::invalid_parameter)?;
    Ok(state.gateway.amend(name.to_owned(), amendment).await?)
}

/// Says so, rather than taking what would have no effect.
async fn not_built(request: HttpRequest) -> Result<HttpResponse, Fault> {
    let message = format!(
        "'{}' is not built in this server: it exports no telemetry; GET …/metrics and /metrics show all there is",
        request.path()
    );
    Err(ApiError::new(ErrorKind::NotImplemented, message).into())
}

#[derive(Serialize)]
struct TagsReply<'a> {
    tags: Vec<Tag<'a>>,
}

#[derive(Serialize)]
struct NotificationsReply<'a> {
    name: &'a str,
    email_notifications: EmailsJson<'a>,
}

#[derive(Serialize)]
struct RateLimitsReply<'a> {
    rate_limits: Vec<RateLimitJson<'a>>,
}
