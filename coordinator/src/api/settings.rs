//! What an endpoint has beside its configuration: labels, limits, the gateway's switches, and who may do what with it.
//!
//! Types only. Who may what is decided in `policy::permissions`, who must wait in `policy::rate_limit`.

use serde::{Deserialize, Serialize};

/// Whom a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The user's name.
    pub user: String,
    /// May do everything with every endpoint.
    pub admin: bool,
    /// Groups it belongs to, beside the built-in ones.
    pub groups: Vec<String>,
}

#[cfg(test)]
impl Caller {
    /// A caller that may do everything.
    pub(crate) fn admin(user: &str) -> Self {
        Caller {
            user: user.into(),
            admin: true,
            groups: Vec::new(),
        }
    }

    /// A caller that may do what it is granted.
    pub(crate) fn user(user: &str, groups: &[&str]) -> Self {
        Caller {
            user: user.into(),
            admin: false,
            groups: groups.iter().map(|&group| group.to_owned()).collect(),
        }
    }
}

/// What somebody may do with an endpoint; each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    /// See it.
    View,
    /// Send requests to it.
    Query,
    /// Change it, delete it, and say who may what.
    Manage,
}

/// Who is granted something, or limited.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Grantee {
    /// A user.
    User(String),
    /// Everybody in a group.
    Group(String),
    /// A program's user.
    ServicePrincipal(String),
}

/// One line of an endpoint's access list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// To whom.
    pub to: Grantee,
    /// What.
    pub level: Level,
}

/// Everything about an endpoint that changes without a deployment. Fields that older records lack are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Free labels, key and value; a key stands once.
    pub tags: Vec<(String, String)>,
    /// For people.
    pub description: Option<String>,
    /// Limits set over the older path; they hold together with the gateway's.
    pub rate_limits: Vec<RateLimit>,
    /// What was set over the gateway's path.
    pub ai_gateway: Option<AiGateway>,
    /// Whom to tell of updates; kept and shown.
    pub email_notifications: Option<EmailNotifications>,
    /// Kept and shown.
    pub budget_policy_id: Option<String>,
    /// Kept and shown: every endpoint here is on the shortest route.
    pub route_optimized: bool,
    /// Who may do what, beside the creator and admins.
    pub grants: Vec<Grant>,
}

impl Settings {
    /// All limits in force.
    pub fn limits(&self) -> impl Iterator<Item = &RateLimit> {
        let gateway = self.ai_gateway.iter();
        self.rate_limits
            .iter()
            .chain(gateway.flat_map(|gateway| &gateway.rate_limits))
    }

    /// Whether what one served entity cannot take is given to another.
    pub fn falls_back(&self) -> bool {
        let gateway = self.ai_gateway.as_ref();
        gateway.and_then(|gateway| gateway.fallback) == Some(true)
    }
}

/// The gateway's switches. `None` is "not said", which is off.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AiGateway {
    /// Limits of calls and tokens.
    pub rate_limits: Vec<RateLimit>,
    /// Rows in the usage table; not said is on.
    pub usage_tracking: Option<bool>,
    /// Requests and answers in a table.
    pub inference_table: Option<InferenceTable>,
    /// What one served entity cannot take is given to another.
    pub fallback: Option<bool>,
}

/// A table of requests and answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InferenceTable {
    /// Whether rows are written.
    pub enabled: bool,
    /// First part of its name.
    pub catalog_name: Option<String>,
    /// Second part of its name.
    pub schema_name: Option<String>,
    /// How the third part begins.
    pub table_name_prefix: Option<String>,
    /// Requests and answers by their lengths and digests alone.
    pub redact: bool,
}

/// A limit per minute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Who shares it.
    pub on: Limited,
    /// Calls per minute.
    pub calls: Option<u64>,
    /// Tokens per minute, of prompts and answers.
    pub tokens: Option<u64>,
}

/// Who shares a limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limited {
    /// All callers of the endpoint together.
    Endpoint,
    /// Each caller for itself, unless it has a limit of its own.
    EachUser,
    /// As `EachUser`, in the words of programs.
    EachServicePrincipal,
    /// This user, program, or all of a group together.
    One(Grantee),
}

/// Whom to tell when an update is done or has failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EmailNotifications {
    /// When it is done.
    pub on_update_success: Vec<String>,
    /// When it has failed.
    pub on_update_failure: Vec<String>,
}

/// A change of an endpoint's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Amendment {
    /// Deletes tags, then adds or replaces others.
    Tags {
        /// Added, or replaced where the key is there.
        put: Vec<(String, String)>,
        /// Keys to delete; those that are not there are no mistake.
        delete: Vec<String>,
    },
    /// Replaces whom to tell.
    EmailNotifications(EmailNotifications),
    /// Replaces the older limits.
    RateLimits(Vec<RateLimit>),
    /// Replaces the gateway's switches.
    AiGateway(AiGateway),
    /// Replaces all grants.
    Grants(Vec<Grant>),
    /// Adds grants; whoever has one already gets the new level.
    MoreGrants(Vec<Grant>),
}

/// What must be known of an endpoint before anything is done with it, known without asking its actors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Who made it.
    pub creator: String,
    /// Its settings.
    pub settings: Settings,
    /// The table of requests and answers that is written: the gateway's, else the active configuration's.
    pub inference_table: Option<InferenceTable>,
}
