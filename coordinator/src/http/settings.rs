//! Bodies about everything beside the configuration as checked types: tags, limits, the gateway, notifications,
//! permissions.
//!
//! Pure. What would change how an endpoint behaves and is not built is refused; what asks for nothing is taken.

use serde_json::Value;

use super::json::{Field, FieldError, Fields, Object};
use crate::api::{
    AiGateway, Amendment, EmailNotifications, Grant, Grantee, InferenceTable, Level, Limited,
    RateLimit, Settings,
};
use crate::policy::settings::{GRANTS_MAX, TAGS_MAX};

/// Longest tag, name, environment variable or description in bytes: what the store is willing to keep.
pub(super) const TEXT_BYTES_MAX: usize = 4096;
/// Most limits of an endpoint: each is looked at with every call.
pub(super) const LIMITS_MAX: usize = 64;
/// Most addresses of a notification.
pub(super) const ADDRESSES_MAX: usize = 64;
/// Highest limit; higher ones would not be told apart from it.
pub(super) const LIMIT_MAX: i128 = 1_000_000_000_000;

/// The settings in the body of a create.
pub(super) fn settings(fields: &Fields<'_>) -> Result<Settings, FieldError> {
    refuse_unsupported(fields, &["telemetry_config"])?;
    let text = |key| fields.get(key).map(|field| short_text(&field)).transpose();
    let tags = fields.get("tags").map(|field| tags(&field)).transpose()?;
    let limits = fields
        .get("rate_limits")
        .map(|field| limits(&field, Form::Older));
    let gateway = fields
        .get("ai_gateway")
        .map(|field| ai_gateway(&field.fields()?));
    let emails = fields
        .get("email_notifications")
        .map(|field| emails(&field));
    Ok(Settings {
        tags: tags.unwrap_or_default(),
        description: text("description")?,
        rate_limits: limits.transpose()?.unwrap_or_default(),
        ai_gateway: gateway.transpose()?,
        email_notifications: emails.transpose()?,
        budget_policy_id: text("budget_policy_id")?,
        route_optimized: fields.flag("route_optimized")?,
        grants: Vec::new(),
    })
}

/// The body of a change of tags.
pub(super) fn tag_changes(body: &Object) -> Result<Amendment, FieldError> {
    let fields = Fields::of("", body);
    let added = fields
        .get("add_tags")
        .map(|field| tags(&field))
        .transpose()?;
    let put = added.unwrap_or_default();
    let deleted = fields
        .get("delete_tags")
        .map(|field| texts(&field, TAGS_MAX));
    let delete = deleted.transpose()?.unwrap_or_default();
    if let Some((key, _)) = put.iter().find(|(key, _)| delete.contains(key)) {
        let why = format!("and delete_tags both name {key:?}: give it to one of them");
        return Err(FieldError::at("add_tags", why));
    }
    Ok(Amendment::Tags { put, delete })
}

/// The body of a change of notifications.
pub(super) fn notifications(body: &Object) -> Result<Amendment, FieldError> {
    let field = Fields::of("", body).get("email_notifications");
    let emails = field.map(|field| emails(&field)).transpose()?;
    Ok(Amendment::EmailNotifications(emails.unwrap_or_default()))
}

/// The body of a change of the older limits.
pub(super) fn rate_limits(body: &Object) -> Result<Amendment, FieldError> {
    let field = Fields::of("", body).get("rate_limits");
    let limits = field.map(|field| limits(&field, Form::Older)).transpose()?;
    Ok(Amendment::RateLimits(limits.unwrap_or_default()))
}

/// The body of a change of the gateway.
pub(super) fn gateway(body: &Object) -> Result<Amendment, FieldError> {
    ai_gateway(&Fields::of("", body)).map(Amendment::AiGateway)
}

/// The body of a change of permissions.
pub(super) fn grants(body: &Object) -> Result<Vec<Grant>, FieldError> {
    let Some(field) = Fields::of("", body).get("access_control_list") else {
        return Ok(Vec::new());
    };
    let list = bounded(&field, GRANTS_MAX)?;
    let grant = |(i, value)| grant(&field.item(i, value));
    list.iter().enumerate().map(grant).collect()
}

fn grant(item: &Field<'_>) -> Result<Grant, FieldError> {
    let fields = item.fields()?;
    let mut named = Vec::new();
    for (key, grantee) in [
        ("user_name", Grantee::User as fn(String) -> Grantee),
        ("group_name", Grantee::Group),
        ("service_principal_name", Grantee::ServicePrincipal),
    ] {
        if let Some(field) = fields.get(key) {
            named.push(grantee(name(&field)?));
        }
    }
    let level = fields.need("permission_level")?;
    let known = Level::parse(level.text()?);
    let level = known.ok_or_else(|| level.wrong("CAN_VIEW, CAN_QUERY or CAN_MANAGE"))?;
    match <[Grantee; 1]>::try_from(named) {
        Ok([to]) => Ok(Grant { to, level }),
        Err(named) => Err(item.refuse(format!(
            "must have exactly one of user_name, group_name and service_principal_name, got {}",
            named.len()
        ))),
    }
}

/// The table of requests and answers as both of its switches write it.
pub(super) fn inference_table(field: &Field<'_>) -> Result<InferenceTable, FieldError> {
    let fields = field.fields()?;
    let text = |key| fields.get(key).map(|field| short_text(&field)).transpose();
    Ok(InferenceTable {
        enabled: fields.flag("enabled")?,
        catalog_name: text("catalog_name")?,
        schema_name: text("schema_name")?,
        table_name_prefix: text("table_name_prefix")?,
        redact: fields.flag("redact")?,
    })
}

fn ai_gateway(fields: &Fields<'_>) -> Result<AiGateway, FieldError> {
    if let Some(guardrails) = fields.get("guardrails")
        && !asks_nothing(guardrails.value)
    {
        return Err(guardrails.refuse(
            "are not supported by this server, which would let everything pass: leave them out",
        ));
    }
    let enabled = |key: &str| {
        let field = fields.get(key).map(|field| field.fields()).transpose()?;
        let enabled = field.and_then(|fields| fields.get("enabled"));
        enabled.map(|field| field.flag()).transpose()
    };
    let table = fields.get("inference_table_config");
    let limits = fields
        .get("rate_limits")
        .map(|field| limits(&field, Form::Gateway));
    Ok(AiGateway {
        rate_limits: limits.transpose()?.unwrap_or_default(),
        usage_tracking: enabled("usage_tracking_config")?,
        inference_table: table.map(|field| inference_table(&field)).transpose()?,
        fallback: enabled("fallback_config")?,
    })
}

/// Guardrails that are all off are none.
fn asks_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => matches!(text.as_str(), "" | "NONE"),
        Value::Array(values) => values.iter().all(asks_nothing),
        Value::Object(object) => object.values().all(asks_nothing),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// What a list of limits may say.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Calls of the endpoint or of each user.
    Older,
    /// Calls or tokens, and also of one user or group.
    Gateway,
}

fn limits(field: &Field<'_>, form: Form) -> Result<Vec<RateLimit>, FieldError> {
    let list = bounded(field, LIMITS_MAX)?;
    let mut limits: Vec<RateLimit> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let item = field.item(i, value);
        let limit = limit(&item, form)?;
        let again = |other: &RateLimit| {
            other.on == limit.on
                && (other.calls.is_some() && limit.calls.is_some()
                    || other.tokens.is_some() && limit.tokens.is_some())
        };
        if limits.iter().any(again) {
            return Err(item.refuse("limits the same again: give one limit for each"));
        }
        limits.push(limit);
    }
    Ok(limits)
}

fn limit(item: &Field<'_>, form: Form) -> Result<RateLimit, FieldError> {
    let fields = item.fields()?;
    let period = fields.need("renewal_period")?;
    if period.text()? != "minute" {
        return Err(period.wrong("\"minute\""));
    }
    let number = |key| {
        let field = fields.get(key);
        field
            .map(|field| Ok(field.whole(0..=LIMIT_MAX)? as u64))
            .transpose()
    };
    let (calls, tokens) = match form {
        Form::Older => (
            Some(fields.need("calls")?.whole(0..=LIMIT_MAX)? as u64),
            None,
        ),
        Form::Gateway => (number("calls")?, number("tokens")?),
    };
    if calls.is_none() && tokens.is_none() {
        return Err(item.refuse("needs calls or tokens"));
    }
    let on = limited(&fields, form)?;
    Ok(RateLimit { on, calls, tokens })
}

fn limited(fields: &Fields<'_>, form: Form) -> Result<Limited, FieldError> {
    let key = fields.get("key");
    let word = key.as_ref().map_or(Ok("endpoint"), Field::text)?;
    let principal = match form {
        Form::Older => None,
        Form::Gateway => fields
            .get("principal")
            .map(|field| name(&field))
            .transpose()?,
    };
    match (word, principal, form) {
        ("endpoint", None, _) => Ok(Limited::Endpoint),
        ("user", None, _) => Ok(Limited::EachUser),
        ("user", Some(user), _) => Ok(Limited::One(Grantee::User(user))),
        ("service_principal", None, Form::Gateway) => Ok(Limited::EachServicePrincipal),
        ("service_principal", Some(name), _) => Ok(Limited::One(Grantee::ServicePrincipal(name))),
        ("user_group", _, Form::Gateway) => {
            let group = name(&fields.need("principal")?)?;
            Ok(Limited::One(Grantee::Group(group)))
        }
        ("endpoint", Some(_), _) => {
            let why = "must be left out with key \"endpoint\", which limits all callers together";
            Err(fields.need("principal")?.refuse(why))
        }
        _ => {
            let words = match form {
                Form::Older => "user or endpoint",
                Form::Gateway => "user, endpoint, user_group or service_principal",
            };
            Err(fields.need("key")?.wrong(words))
        }
    }
}

fn emails(field: &Field<'_>) -> Result<EmailNotifications, FieldError> {
    let fields = field.fields()?;
    let to = |key| {
        let list = fields.get(key).map(|field| texts(&field, ADDRESSES_MAX));
        Ok(list.transpose()?.unwrap_or_default())
    };
    Ok(EmailNotifications {
        on_update_success: to("on_update_success")?,
        on_update_failure: to("on_update_failure")?,
    })
}

fn tags(field: &Field<'_>) -> Result<Vec<(String, String)>, FieldError> {
    let list = bounded(field, TAGS_MAX)?;
    let mut tags: Vec<(String, String)> = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let item = field.item(i, value);
        let fields = item.fields()?;
        let key = name(&fields.need("key")?)?;
        if tags.iter().any(|(known, _)| *known == key) {
            return Err(item.refuse(format!("would be the second tag {key:?}")));
        }
        let value = fields.get("value").map(|field| short_text(&field));
        tags.push((key, value.transpose()?.unwrap_or_default()));
    }
    Ok(tags)
}

fn texts(field: &Field<'_>, most: usize) -> Result<Vec<String>, FieldError> {
    let list = bounded(field, most)?;
    let text = |(i, value)| short_text(&field.item(i, value));
    list.iter().enumerate().map(text).collect()
}

fn bounded<'a>(field: &Field<'a>, most: usize) -> Result<&'a [Value], FieldError> {
    let list = field.list()?;
    if list.len() > most {
        let got = list.len();
        return Err(field.refuse(format!("must have at most {most} entries, got {got}")));
    }
    Ok(list)
}

fn name(field: &Field<'_>) -> Result<String, FieldError> {
    let name = short_text(field)?;
    if name.trim().is_empty() {
        return Err(field.wrong("a name"));
    }
    Ok(name)
}

/// A text that the store is willing to keep.
pub(super) fn short_text(field: &Field<'_>) -> Result<String, FieldError> {
    let text = field.text()?;
    if text.len() > TEXT_BYTES_MAX {
        return Err(field.refuse(format!(
            "must be at most {TEXT_BYTES_MAX} bytes long, got {}",
            text.len()
        )));
    }
    Ok(text.to_owned())
}

/// What would change how an endpoint behaves is refused rather than forgotten; what is empty asks for nothing.
pub(super) fn refuse_unsupported(fields: &Fields<'_>, keys: &[&str]) -> Result<(), FieldError> {
    for key in keys {
        let asked = fields.get(key).filter(|field| match field.value {
            Value::Array(values) => !values.is_empty(),
            Value::Object(object) => !object.is_empty(),
            _ => true,
        });
        if let Some(field) = asked {
            return Err(field.refuse("is not supported by this server: leave it out"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
