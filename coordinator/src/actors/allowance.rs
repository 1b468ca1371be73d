//! What an endpoint's callers have used of their limits: the clock and the lock around `policy::rate_limit`.
//!
//! Counted in memory: a coordinator that is started again begins with nothing used.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::api::{Access, ApiError, Caller, ErrorKind, RateLimit};
use crate::policy::rate_limit::{Refused, Share, Windows};

/// An endpoint's counts. They stay when its limits are changed.
#[derive(Debug)]
pub struct Allowance {
    origin: Instant,
    windows: Mutex<Windows>,
}

impl Allowance {
    /// Nothing was used.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Allowance {
            origin: now,
            windows: Mutex::default(),
        })
    }

    /// Takes a call in, and gives what counts its tokens where they are limited.
    ///
    /// # Errors
    /// Says which limit is used up and when to come again.
    pub fn admit(
        self: &Arc<Self>,
        access: &Access,
        caller: &Caller,
        now: Instant,
    ) -> Result<Option<Charge>, ApiError> {
        let limits: Vec<&RateLimit> = access.settings.limits().collect();
        if limits.is_empty() {
            return Ok(None);
        }
        let admitted = self.windows().admit(&limits, caller, self.ms(now));
        let shares = admitted.map_err(|refused| told(&access.name, &refused))?;
        let counts = limits.iter().any(|limit| limit.tokens.is_some());
        Ok(counts.then(|| Charge {
            allowance: self.clone(),
            shares: shares.into(),
        }))
    }

    fn ms(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.origin).as_millis() as u64
    }

    fn windows(&self) -> MutexGuard<'_, Windows> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a call's tokens as they are used.
#[derive(Debug, Clone)]
pub struct Charge {
    allowance: Arc<Allowance>,
    shares: Arc<[Share]>,
}

impl Charge {
    /// So many tokens were read or given.
    pub fn tokens(&self, tokens: u64, now: Instant) {
        let now_ms = self.allowance.ms(now);
        self.allowance
            .windows()
            .charge(&self.shares, tokens, now_ms);
    }
}

fn told(endpoint: &str, refused: &Refused) -> ApiError {
    let Refused {
        share,
        limit,
        unit,
        wait_s,
    } = refused;
    match wait_s {
        Some(wait_s) => {
            let message = format!(
                "Endpoint '{endpoint}' takes {limit} {unit} a minute of {share}, and they are used up; try again in {wait_s} s."
            );
            ApiError::new(ErrorKind::Overloaded, message).retry_after(*wait_s)
        }
        None => {
            let message = format!(
                "Endpoint '{endpoint}' takes no {unit} of {share}: its limit is 0. Whoever has CAN_MANAGE can change it."
            );
            ApiError::new(ErrorKind::PermissionDenied, message)
        }
    }
}
