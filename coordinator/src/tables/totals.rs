//! Running totals by user and endpoint: what all rows ever written sum up to, those of dropped segments included. An
//! endpoint is its id: one that is made anew under an old name begins at zero.
//!
//! A lookup costs the same however many rows there are. Pure.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::row::UsageRow;

/// Pairs of user and endpoint that are counted apart; more are counted together under empty names.
const PAIRS_MAX: usize = 100_000;

/// Sums over calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sums {
    /// All calls.
    pub calls: u64,
    /// Those answered to their end.
    pub complete: u64,
    /// Those that their client left.
    pub cancelled: u64,
    /// Those that were refused or failed.
    pub failed: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens made.
    pub output_tokens: u64,
    /// Prompt tokens from the prefix cache.
    pub cached_tokens: u64,
    /// Milliseconds of all calls together.
    pub latency_ms: u64,
    /// Milliseconds to the first outputs, together.
    pub ttft_ms: u64,
    /// Calls that had an output.
    pub with_output: u64,
}

impl Sums {
    /// Adds a call.
    pub fn add_row(&mut self, row: &UsageRow) {
        let (complete, cancelled) = match row.outcome.as_str() {
            "complete" => (1, 0),
            "cancelled" => (0, 1),
            _ => (0, 0),
        };
        self.add(&Sums {
            calls: 1,
            complete,
            cancelled,
            failed: 1 - complete - cancelled,
            prompt_tokens: row.prompt_tokens,
            output_tokens: row.output_tokens,
            cached_tokens: row.cached_tokens,
            latency_ms: row.latency_ms,
            ttft_ms: row.ttft_ms.unwrap_or(0),
            with_output: u64::from(row.ttft_ms.is_some()),
        });
    }

    /// Adds other sums.
    pub fn add(&mut self, more: &Sums) {
        let both: [(&mut u64, u64); 10] = [
            (&mut self.calls, more.calls),
            (&mut self.complete, more.complete),
            (&mut self.cancelled, more.cancelled),
            (&mut self.failed, more.failed),
            (&mut self.prompt_tokens, more.prompt_tokens),
            (&mut self.output_tokens, more.output_tokens),
            (&mut self.cached_tokens, more.cached_tokens),
            (&mut self.latency_ms, more.latency_ms),
            (&mut self.ttft_ms, more.ttft_ms),
            (&mut self.with_output, more.with_output),
        ];
        for (sum, more) in both {
            *sum = sum.saturating_add(more);
        }
    }
}

/// The sums of one user on one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    /// The user.
    pub user: String,
    /// The endpoint's name.
    pub endpoint: String,
    /// The endpoint's id.
    pub endpoint_id: String,
    /// Its sums.
    pub sums: Sums,
}

/// All totals.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// By the endpoints' ids.
    endpoints: HashMap<String, Endpoint>,
    pairs: usize,
}

#[derive(Debug, Clone, Default)]
struct Endpoint {
    name: String,
    users: HashMap<String, Sums>,
}

impl Totals {
    /// Totals that were kept.
    pub fn of(kept: Vec<Total>) -> Self {
        let mut totals = Totals::default();
        for total in kept {
            totals
                .of_pair(&total.user, &total.endpoint, &total.endpoint_id)
                .add(&total.sums);
        }
        totals
    }

    /// Adds a call.
    pub fn add(&mut self, row: &UsageRow) {
        self.of_pair(&row.user, &row.endpoint, &row.endpoint_id)
            .add_row(row);
    }

    fn of_pair(&mut self, user: &str, name: &str, id: &str) -> &mut Sums {
        let known = self
            .endpoints
            .get(id)
            .is_some_and(|endpoint| endpoint.users.contains_key(user));
        let (user, name, id) = if known || self.pairs < PAIRS_MAX {
            (user, name, id)
        } else {
            ("", "", "")
        };
        let endpoint = self.endpoints.entry(id.to_owned()).or_default();
        if !endpoint.users.contains_key(user) {
            self.pairs += 1;
        }
        name.clone_into(&mut endpoint.name);
        endpoint.users.entry(user.to_owned()).or_default()
    }

    /// The totals of this user or all, on the endpoint with this id or all, in order.
    pub fn get(&self, user: Option<&str>, endpoint_id: Option<&str>) -> Vec<Total> {
        let mut found = Vec::new();
        let mut take = |id: &str, endpoint: &Endpoint| {
            let mut one = |user: &str, sums: &Sums| {
                found.push(Total {
                    user: user.to_owned(),
                    endpoint: endpoint.name.clone(),
                    endpoint_id: id.to_owned(),
                    sums: *sums,
                });
            };
            let users = &endpoint.users;
            match user {
                Some(user) => users.get(user).into_iter().for_each(|sums| one(user, sums)),
                None => users.iter().for_each(|(user, sums)| one(user, sums)),
            }
        };
        match endpoint_id {
            Some(id) => {
                if let Some(endpoint) = self.endpoints.get(id) {
                    take(id, endpoint);
                }
            }
            None => self
                .endpoints
                .iter()
                .for_each(|(id, endpoint)| take(id, endpoint)),
        }
        let key = |total: &Total| {
            (
                total.endpoint.clone(),
                total.endpoint_id.clone(),
                total.user.clone(),
            )
        };
        found.sort_by_cached_key(key);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(user: &str, endpoint: &str, outcome: &str, output_tokens: u64) -> UsageRow {
        UsageRow {
            user: user.into(),
            endpoint: format!("name of {endpoint}"),
            endpoint_id: endpoint.into(),
            outcome: outcome.into(),
            output_tokens,
            prompt_tokens: 1,
            ttft_ms: (output_tokens > 0).then_some(3),
            ..UsageRow::default()
        }
    }

    #[test]
    fn calls_are_summed_by_user_and_endpoint_and_the_sums_come_back() {
        let mut totals = Totals::default();
        for (user, endpoint, outcome, output) in [
            ("ann", "a", "complete", 5),
            ("ann", "a", "cancelled", 2),
            ("ann", "b", "REQUEST_LIMIT_EXCEEDED", 0),
            ("bob", "a", "complete", 7),
        ] {
            totals.add(&row(user, endpoint, outcome, output));
        }
        let again = Totals::of(totals.get(None, None));
        for totals in [totals, again] {
            let ann = totals.get(Some("ann"), Some("a"));
            let sums = ann[0].sums;
            assert_eq!(
                (sums.calls, sums.complete, sums.cancelled, sums.failed),
                (2, 1, 1, 0)
            );
            assert_eq!((sums.output_tokens, sums.prompt_tokens), (7, 2));
            assert_eq!((sums.with_output, sums.ttft_ms), (2, 6));
            assert_eq!(totals.get(Some("ann"), None).len(), 2);
            assert_eq!(totals.get(None, Some("a")).len(), 2);
            let failed = totals.get(Some("ann"), Some("b"));
            assert_eq!(
                (failed[0].endpoint.as_str(), failed[0].sums.failed),
                ("name of b", 1)
            );
            assert!(totals.get(Some("eve"), None).is_empty());
        }
    }

    #[test]
    fn names_do_not_fill_memory() {
        let mut totals = Totals::default();
        for i in 0..PAIRS_MAX + 50 {
            totals.add(&row("ann", &i.to_string(), "complete", 0));
        }
        totals.add(&row("ann", "5", "complete", 0));
        assert_eq!(totals.get(None, None).len(), PAIRS_MAX + 1);
        assert_eq!(totals.get(None, Some(""))[0].sums.calls, 50);
        assert_eq!(totals.get(None, Some("5"))[0].sums.calls, 2);
    }
}
