//! Waiting for conditions: the only place where a test lets time pass.

use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

/// Long enough for anything that a healthy cluster does on a busy two-core machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks until `look` gives something. `look` answers what it saw instead as an error, for the message.
///
/// # Panics
/// When `limit` has passed.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let started = Instant::now();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match look().await {
            Ok(found) => return found,
            Err(seen) if started.elapsed() >= limit => {
                panic!("waited {limit:?} for {what}; last seen: {seen}")
            }
            Err(_) => {}
        }
    }
}
