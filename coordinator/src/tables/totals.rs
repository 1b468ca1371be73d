//! Running totals by user and endpoint: what all rows ever written sum up to, those of dropped segments included.
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
    /// Its sums.
    pub sums: Sums,
}

/// All totals.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    sums: HashMap<String, HashMap<String, Sums>>,
    pairs: usize,
}

impl Totals {
    /// Totals that were kept.
    pub fn of(kept: Vec<Total>) -> Self {
        let mut totals = Totals::default();
        for total in kept {
            totals
                .of_pair(&total.user, &total.endpoint)
                .add(&total.sums);
        }
        totals
    }

    /// Adds a call.
    pub fn add(&mut self, row: &UsageRow) {
        self.of_pair(&row.user, &row.endpoint).add_row(row);
    }

    fn of_pair(&mut self, user: &str, endpoint: &str) -> &mut Sums {
        let known = self
            .sums
            .get(endpoint)
            .is_some_and(|users| users.contains_key(user));
        let (user, endpoint) = if known || self.pairs < PAIRS_MAX {
            (user, endpoint)
        } else {
            ("", "")
        };
        let users = self.sums.entry(endpoint.to_owned()).or_default();
        if !users.contains_key(user) {
            self.pairs += 1;
        }
        users.entry(user.to_owned()).or_default()
    }

    /// The totals of this user or all, on this endpoint or all, in order.
    pub fn get(&self, user: Option<&str>, endpoint: Option<&str>) -> Vec<Total> {
        let mut found = Vec::new();
        let mut take = |endpoint: &str, users: &HashMap<String, Sums>| {
            let mut one = |user: &str, sums: &Sums| {
                found.push(Total {
                    user: user.to_owned(),
                    endpoint: endpoint.to_owned(),
                    sums: *sums,
                });
            };
            match user {
                Some(user) => {
                    if let Some(sums) = users.get(user) {
                        one(user, sums);
                    }
                }
                None => users.iter().for_each(|(user, sums)| one(user, sums)),
            }
        };
        match endpoint {
            Some(endpoint) => {
                if let Some(users) = self.sums.get(endpoint) {
                    take(endpoint, users);
                }
            }
            None => self
                .sums
                .iter()
                .for_each(|(endpoint, users)| take(endpoint, users)),
        }
        found.sort_unstable_by(|a, b| (&a.endpoint, &a.user).cmp(&(&b.endpoint, &b.user)));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(user: &str, endpoint: &str, outcome: &str, output_tokens: u64) -> UsageRow {
        UsageRow {
            user: user.into(),
            endpoint: endpoint.into(),
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
            assert_eq!(totals.get(Some("ann"), Some("b"))[0].sums.failed, 1);
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
