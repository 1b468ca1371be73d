//! Whether a call may come in now: limits of calls and tokens per minute, and who shares them.
//!
//! Windows slide: in no 60 seconds, wherever they begin, more comes in than the limit. (Fixed windows let twice as much
//! through around their borders, and a bucket that refills lets a full bucket and a minute's refill through.) They are
//! counted in cells of one second: a window is at most 61 numbers whatever its limit, and errs by less than a second,
//! towards refusing. A call counts when it comes in. Its tokens are known only once they are there: a call comes in as
//! long as fewer tokens than the limit were used, and what runs by then may go beyond it, which later calls wait for.

use std::collections::{HashMap, VecDeque};

use crate::api::{Caller, Grantee, Limited, RateLimit};

/// What is counted in one cell lies at most this far back.
const WINDOW_S: u64 = 60;

/// Whose use is counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Share {
    /// All callers'.
    Endpoint,
    /// A user's.
    User(String),
    /// That of all members of a group.
    Group(String),
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Share::Endpoint => f.write_str("all callers together"),
            Share::User(name) => write!(f, "user '{name}'"),
            Share::Group(name) => write!(f, "group '{name}' together"),
        }
    }
}

/// Why a call may not come in now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Who has used up a limit.
    pub share: Share,
    /// The limit.
    pub limit: u64,
    /// `calls` or `tokens`.
    pub unit: &'static str,
    /// When there is room for a call again; `None` for a limit of 0.
    pub wait_s: Option<u64>,
}

/// What an endpoint's callers have used. Knows nobody whose minute is over.
#[derive(Debug, Default)]
pub struct Windows {
    used: HashMap<Share, Used>,
}

#[derive(Debug, Default)]
struct Used {
    calls: Window,
    tokens: Window,
}

impl Windows {
    /// Takes a call in at `now_ms` of a clock that only goes forward: counts it, and says whom its tokens count for.
    ///
    /// The endpoint's limits hold for everybody. Of the others the most special ones that mean the caller hold alone:
    /// its own, else its groups', else those of each user. Who is in several limited groups comes in by the first that
    /// has room.
    ///
    /// # Errors
    /// [`Refused`] when a limit is used up; nothing is counted then.
    pub fn admit(
        &mut self,
        limits: &[&RateLimit],
        caller: &Caller,
        now_ms: u64,
    ) -> Result<Vec<Share>, Refused> {
        self.forget(now_ms);
        let all: Vec<&RateLimit> = limits
            .iter()
            .copied()
            .filter(|limit| limit.on == Limited::Endpoint)
            .collect();
        let mut shares = Vec::new();
        if !all.is_empty() {
            self.check(&Share::Endpoint, &all, now_ms)?;
            shares.push(Share::Endpoint);
        }
        let ways = ways(limits, caller);
        let mut refused: Option<Refused> = None;
        let mut found = None;
        for (share, limits) in ways {
            match self.check(&share, &limits, now_ms) {
                Ok(()) => {
                    found = Some(share);
                    break;
                }
                // No wait at all is the longest.
                Err(other) => {
                    let wait = |refused: &Refused| refused.wait_s.unwrap_or(u64::MAX);
                    if refused
                        .as_ref()
                        .is_none_or(|known| wait(&other) < wait(known))
                    {
                        refused = Some(other);
                    }
                }
            }
        }
        match (found, refused) {
            (Some(share), _) => shares.push(share),
            (None, Some(refused)) => return Err(refused),
            (None, None) => {}
        }
        for share in &shares {
            let used = self.used.entry(share.clone()).or_default();
            used.calls.add(1, now_ms);
        }
        Ok(shares)
    }

    /// Counts tokens for those that [`Windows::admit`] named.
    pub fn charge(&mut self, shares: &[Share], tokens: u64, now_ms: u64) {
        for share in shares {
            let used = self.used.entry(share.clone()).or_default();
            used.tokens.forget(now_ms);
            used.tokens.add(tokens, now_ms);
        }
    }

    /// Whether there is room in all of these limits; else the one to wait for longest.
    fn check(&self, share: &Share, limits: &[&RateLimit], now_ms: u64) -> Result<(), Refused> {
        let (nothing, unused) = (Window::default(), Window::default());
        let used = self.used.get(share);
        let calls = used.map_or(&nothing, |used| &used.calls);
        let tokens = used.map_or(&unused, |used| &used.tokens);
        let full = |limit: Option<u64>, window: &Window, unit| {
            let limit = limit.filter(|&limit| window.sum >= limit)?;
            Some(Refused {
                share: share.clone(),
                limit,
                unit,
                wait_s: window.wait_s(limit, now_ms),
            })
        };
        let each = limits.iter().flat_map(|limit| {
            let calls = full(limit.calls, calls, "calls");
            [calls, full(limit.tokens, tokens, "tokens")]
        });
        let longest = each
            .flatten()
            .max_by_key(|refused| refused.wait_s.unwrap_or(u64::MAX));
        longest.map_or(Ok(()), Err)
    }

    fn forget(&mut self, now_ms: u64) {
        self.used.retain(|_, used| {
            used.calls.forget(now_ms);
            used.tokens.forget(now_ms);
            used.calls.sum > 0 || used.tokens.sum > 0
        });
    }
}

/// The most special limits that mean the caller, by who shares them: there must be room in those of one.
fn ways<'a>(limits: &[&'a RateLimit], caller: &Caller) -> Vec<(Share, Vec<&'a RateLimit>)> {
    let which = |means: &dyn Fn(&Limited) -> bool| -> Vec<&'a RateLimit> {
        let those = limits.iter().copied();
        those.filter(|limit| means(&limit.on)).collect()
    };
    let own = || Share::User(caller.user.clone());
    let named = which(&|on| match on {
        Limited::One(Grantee::Group(_)) => false,
        Limited::One(who) => caller.is(who),
        _ => false,
    });
    if !named.is_empty() {
        return vec![(own(), named)];
    }
    let mut groups: Vec<(Share, Vec<&RateLimit>)> = Vec::new();
    for &limit in limits {
        let Limited::One(Grantee::Group(group)) = &limit.on else {
            continue;
        };
        if !caller.is_in(group) {
            continue;
        }
        let share = Share::Group(group.clone());
        match groups.iter_mut().find(|(known, _)| *known == share) {
            Some((_, limits)) => limits.push(limit),
            None => groups.push((share, vec![limit])),
        }
    }
    if !groups.is_empty() {
        return groups;
    }
    let each = which(&|on| matches!(on, Limited::EachUser | Limited::EachServicePrincipal));
    if each.is_empty() {
        return Vec::new();
    }
    vec![(own(), each)]
}

/// What was used in the last minute, by the second, oldest first.
#[derive(Debug, Default)]
struct Window {
    cells: VecDeque<(u64, u64)>,
    sum: u64,
}

/// When a cell is out of every window that reaches back from then on: its last moment is a whole window ago.
fn over_ms(second: u64) -> u64 {
    (second + 1 + WINDOW_S) * 1000
}

impl Window {
    fn add(&mut self, amount: u64, now_ms: u64) {
        let second = now_ms / 1000;
        self.sum = self.sum.saturating_add(amount);
        match self.cells.back_mut() {
            Some((last, used)) if *last >= second => *used = used.saturating_add(amount),
            _ => self.cells.push_back((second, amount)),
        }
    }

    fn forget(&mut self, now_ms: u64) {
        while let Some(&(second, used)) = self.cells.front()
            && over_ms(second) <= now_ms
        {
            self.sum = self.sum.saturating_sub(used);
            self.cells.pop_front();
        }
    }

    /// Whole seconds until less than `limit` is in the window, if nothing is added; `None` if that is never.
    fn wait_s(&self, limit: u64, now_ms: u64) -> Option<u64> {
        if limit == 0 {
            return None;
        }
        let mut left = self.sum;
        for &(second, used) in &self.cells {
            left = left.saturating_sub(used);
            if left < limit {
                return Some(over_ms(second).saturating_sub(now_ms).div_ceil(1000).max(1));
            }
        }
        Some(1)
    }
}

#[cfg(test)]
mod tests;
