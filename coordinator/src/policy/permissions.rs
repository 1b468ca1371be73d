//! Who may do what with an endpoint, and how grants come together.

use crate::api::{Access, Caller, EndpointView, Grant, Grantee, Level};

/// The group that every caller is in.
pub const USERS: &str = "users";
/// The group that admins are in.
pub const ADMINS: &str = "admins";

impl Level {
    /// As clients write it.
    pub fn name(self) -> &'static str {
        match self {
            Level::View => "CAN_VIEW",
            Level::Query => "CAN_QUERY",
            Level::Manage => "CAN_MANAGE",
        }
    }

    /// From a client's word; `None` for any other.
    pub fn parse(text: &str) -> Option<Self> {
        [Level::View, Level::Query, Level::Manage]
            .into_iter()
            .find(|level| level.name() == text)
    }
}

impl Caller {
    /// Whether it belongs to a group.
    pub fn is_in(&self, group: &str) -> bool {
        group == USERS
            || (group == ADMINS && self.admin)
            || self.groups.iter().any(|known| known == group)
    }

    /// Whether it is meant. A token says only a name: a program's is its user's.
    pub fn is(&self, who: &Grantee) -> bool {
        match who {
            Grantee::User(name) | Grantee::ServicePrincipal(name) => *name == self.user,
            Grantee::Group(group) => self.is_in(group),
        }
    }
}

/// The most that a caller may do with an endpoint; `None` is nothing.
pub fn level(caller: &Caller, creator: &str, grants: &[Grant]) -> Option<Level> {
    if caller.admin || caller.user == creator {
        return Some(Level::Manage);
    }
    grants
        .iter()
        .filter(|grant| caller.is(&grant.to))
        .map(|grant| grant.level)
        .max()
}

impl Access {
    /// The most that a caller may do with this endpoint.
    pub fn level(&self, caller: &Caller) -> Option<Level> {
        level(caller, &self.creator, &self.settings.grants)
    }
}

impl EndpointView {
    /// The most that a caller may do with this endpoint.
    pub fn level(&self, caller: &Caller) -> Option<Level> {
        level(caller, &self.creator, &self.settings.grants)
    }
}

/// Adds grants one after another: a later one for the same grantee replaces an earlier one.
pub fn merge(grants: &mut Vec<Grant>, more: Vec<Grant>) {
    for grant in more {
        match grants.iter_mut().find(|known| known.to == grant.to) {
            Some(known) => known.level = grant.level,
            None => grants.push(grant),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(to: Grantee, level: Level) -> Grant {
        Grant { to, level }
    }

    #[test]
    fn creators_and_admins_manage_and_others_have_the_highest_of_their_grants() {
        let grants = [
            grant(Grantee::Group("team".into()), Level::Query),
            grant(Grantee::User("bob".into()), Level::View),
            grant(Grantee::ServicePrincipal("robot".into()), Level::Manage),
        ];
        let table = [
            (Caller::admin("root"), Some(Level::Manage)),
            (Caller::user("ann", &[]), Some(Level::Manage)),
            (Caller::user("bob", &[]), Some(Level::View)),
            (Caller::user("bob", &["team"]), Some(Level::Query)),
            (Caller::user("eve", &["team"]), Some(Level::Query)),
            (Caller::user("robot", &[]), Some(Level::Manage)),
            (Caller::user("eve", &["other"]), None),
            (Caller::user("team", &[]), None),
        ];
        for (caller, expected) in table {
            assert_eq!(level(&caller, "ann", &grants), expected, "{caller:?}");
        }
    }

    #[test]
    fn everybody_is_a_user_and_only_admins_are_admins() {
        let of = |group: &str| [grant(Grantee::Group(group.into()), Level::View)];
        let eve = Caller::user("eve", &[]);
        assert_eq!(level(&eve, "ann", &of(USERS)), Some(Level::View));
        assert_eq!(level(&eve, "ann", &of(ADMINS)), None);
    }

    #[test]
    fn the_last_word_on_a_grantee_counts() {
        let bob = || Grantee::User("bob".into());
        let mut grants = vec![grant(bob(), Level::Manage)];
        let group = grant(Grantee::Group("bob".into()), Level::View);
        let more = vec![
            group.clone(),
            grant(bob(), Level::Query),
            grant(bob(), Level::View),
        ];
        merge(&mut grants, more);
        assert_eq!(grants, [grant(bob(), Level::View), group]);
    }
}
