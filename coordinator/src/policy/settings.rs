//! Changes of an endpoint's settings, each checked against what the store is willing to keep.

use super::permissions;
use crate::api::{Amendment, ApiError, ErrorKind, Settings};

/// Most tags of an endpoint.
pub const TAGS_MAX: usize = 64;
/// Most grants of an endpoint.
pub const GRANTS_MAX: usize = 256;

/// Takes a change in, or leaves everything as it was.
///
/// # Errors
/// When there would be too many tags or grants.
pub fn amend(settings: &mut Settings, amendment: Amendment) -> Result<(), ApiError> {
    match amendment {
        Amendment::Tags { put, delete } => {
            let mut tags = settings.tags.clone();
            tags.retain(|(key, _)| !delete.contains(key));
            for (key, value) in put {
                match tags.iter_mut().find(|(known, _)| *known == key) {
                    Some(tag) => tag.1 = value,
                    None => tags.push((key, value)),
                }
            }
            bounded("tags", tags.len(), TAGS_MAX)?;
            settings.tags = tags;
        }
        Amendment::EmailNotifications(to) => settings.email_notifications = Some(to),
        Amendment::RateLimits(limits) => settings.rate_limits = limits,
        Amendment::AiGateway(gateway) => settings.ai_gateway = Some(gateway),
        Amendment::Grants(grants) => {
            let mut all = Vec::new();
            permissions::merge(&mut all, grants);
            bounded("grants", all.len(), GRANTS_MAX)?;
            settings.grants = all;
        }
        Amendment::MoreGrants(more) => {
            let mut all = settings.grants.clone();
            permissions::merge(&mut all, more);
            bounded("grants", all.len(), GRANTS_MAX)?;
            settings.grants = all;
        }
    }
    Ok(())
}

fn bounded(what: &str, count: usize, most: usize) -> Result<(), ApiError> {
    if count <= most {
        return Ok(());
    }
    let message = format!(
        "the endpoint would have {count} {what}; at most {most} are kept: delete some first"
    );
    Err(ApiError::new(ErrorKind::InvalidParameter, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Grant, Grantee, Level};

    fn tags(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    #[test]
    fn tags_are_deleted_replaced_and_added_in_their_order() {
        let mut settings = Settings {
            tags: tags(&[("a", "1"), ("b", "2"), ("c", "3")]),
            ..Settings::default()
        };
        let change = Amendment::Tags {
            put: tags(&[("d", "4"), ("b", "5"), ("d", "6")]),
            delete: vec!["a".into(), "unknown".into()],
        };
        amend(&mut settings, change).unwrap();
        assert_eq!(settings.tags, tags(&[("b", "5"), ("c", "3"), ("d", "6")]));
    }

    #[test]
    fn what_is_too_much_is_refused_and_changes_nothing() {
        let mut settings = Settings::default();
        let many = |count: usize| Amendment::Tags {
            put: (0..count).map(|i| (i.to_string(), String::new())).collect(),
            delete: vec![],
        };
        amend(&mut settings, many(TAGS_MAX)).unwrap();
        let before = settings.clone();
        let error = amend(&mut settings, many(TAGS_MAX + 1)).unwrap_err();
        assert!(error.message.contains("65 tags; at most 64"), "{error}");
        assert_eq!(settings, before);
    }

    #[test]
    fn grants_are_replaced_or_merged() {
        let grant = |name: &str, level| Grant {
            to: Grantee::User(name.into()),
            level,
        };
        let mut settings = Settings::default();
        let first = vec![grant("ann", Level::View), grant("bob", Level::View)];
        amend(&mut settings, Amendment::Grants(first)).unwrap();
        let more = Amendment::MoreGrants(vec![grant("bob", Level::Manage)]);
        amend(&mut settings, more).unwrap();
        let both = [grant("ann", Level::View), grant("bob", Level::Manage)];
        assert_eq!(settings.grants, both);
        amend(&mut settings, Amendment::Grants(vec![])).unwrap();
        assert_eq!(settings.grants, []);
    }
}
