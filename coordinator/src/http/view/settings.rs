//! What stands beside an endpoint's configuration as JSON: tags, limits, the gateway, notifications.

use serde::Serialize;

use crate::api::{AiGateway, EmailNotifications, Grantee, InferenceTable, Limited, RateLimit};

#[derive(Serialize)]
pub(in crate::http) struct Tag<'a> {
    key: &'a str,
    value: &'a str,
}

pub(in crate::http) fn tags(tags: &[(String, String)]) -> Vec<Tag<'_>> {
    tags.iter().map(|(key, value)| Tag { key, value }).collect()
}

/// The gateway's switches; what was not said is not shown.
#[derive(Serialize)]
pub(in crate::http) struct AiGatewayJson<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rate_limits: Vec<RateLimitJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage_tracking_config: Option<Switch>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inference_table_config: Option<TableJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fallback_config: Option<Switch>,
}

impl<'a> AiGatewayJson<'a> {
    pub fn of(gateway: &'a AiGateway) -> Self {
        let switch = |enabled: Option<bool>| enabled.map(|enabled| Switch { enabled });
        AiGatewayJson {
            rate_limits: rate_limits(&gateway.rate_limits),
            usage_tracking_config: switch(gateway.usage_tracking),
            inference_table_config: gateway.inference_table.as_ref().map(TableJson::of),
            fallback_config: switch(gateway.fallback),
        }
    }
}

#[derive(Serialize)]
struct Switch {
    enabled: bool,
}

#[derive(Serialize)]
pub(in crate::http) struct TableJson<'a> {
    enabled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    catalog_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    schema_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table_name_prefix: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    redact: bool,
}

impl<'a> TableJson<'a> {
    pub fn of(table: &'a InferenceTable) -> Self {
        TableJson {
            enabled: table.enabled,
            catalog_name: table.catalog_name.as_deref(),
            schema_name: table.schema_name.as_deref(),
            table_name_prefix: table.table_name_prefix.as_deref(),
            redact: table.redact,
        }
    }
}

/// A limit as both of its paths write it.
#[derive(Serialize)]
pub(in crate::http) struct RateLimitJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    calls: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<u64>,
    key: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    principal: Option<&'a str>,
    renewal_period: &'static str,
}

impl<'a> RateLimitJson<'a> {
    fn of(limit: &'a RateLimit) -> Self {
        let (key, principal) = match &limit.on {
            Limited::Endpoint => ("endpoint", None),
            Limited::EachUser => ("user", None),
            Limited::EachServicePrincipal => ("service_principal", None),
            Limited::One(Grantee::User(name)) => ("user", Some(name)),
            Limited::One(Grantee::Group(name)) => ("user_group", Some(name)),
            Limited::One(Grantee::ServicePrincipal(name)) => ("service_principal", Some(name)),
        };
        RateLimitJson {
            calls: limit.calls,
            tokens: limit.tokens,
            key,
            principal: principal.map(String::as_str),
            renewal_period: "minute",
        }
    }
}

pub(in crate::http) fn rate_limits(limits: &[RateLimit]) -> Vec<RateLimitJson<'_>> {
    limits.iter().map(RateLimitJson::of).collect()
}

#[derive(Serialize)]
pub(in crate::http) struct EmailsJson<'a> {
    on_update_success: &'a [String],
    on_update_failure: &'a [String],
}

impl<'a> EmailsJson<'a> {
    pub fn of(emails: &'a EmailNotifications) -> Self {
        EmailsJson {
            on_update_success: &emails.on_update_success,
            on_update_failure: &emails.on_update_failure,
        }
    }
}
