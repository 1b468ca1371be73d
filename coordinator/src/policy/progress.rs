//! Whether a replica still gets on: its loading, and its engine's steps.
//!
//! Owns how long silence is borne. Busy is never dead: an engine is given up only when its worker calls it stalled
//! again and again at one and the same step, for longer than any step can take, judged by the steps it has done.

use std::time::{Duration, Instant};

use common::wire::message::Health;

/// A group that loads reports several times a second while it reads, and gives up by itself after a minute when a rank
/// does not come to meet the others. What is silent for so long hangs: a dead network file system, mostly.
pub const LOAD_SILENCE_MAX: Duration = Duration::from_secs(300);
/// The least time for which an engine must be called stalled. Its worker has waited for 3 s or more before.
const STALL_MIN: Duration = Duration::from_secs(5);
/// How much longer than the longest step so far another one may take: the first steps may have been of a single token,
/// bound by memory, and the next is of a full chunk of a prompt, bound by arithmetic.
const STEP_SPREAD: u32 = 150;
/// The longest time for which an engine may be called stalled, also while no step is known: a full chunk through the
/// largest model that fits two slow cores takes about a minute.
const STALL_MAX: Duration = Duration::from_secs(120);

/// How one generation of a replica gets on.
#[derive(Debug)]
pub struct Progress {
    loaded_on: Instant,
    step_longest: Duration,
    /// The step at which the engine is stalled, and since when.
    stalled: Option<(u64, Instant)>,
}

impl Progress {
    /// A replica about which nothing is known yet.
    pub fn new(now: Instant) -> Self {
        Progress {
            loaded_on: now,
            step_longest: Duration::ZERO,
            stalled: None,
        }
    }

    /// A shard of the group has something new to say.
    pub fn load_went_on(&mut self, now: Instant) {
        self.loaded_on = now;
    }

    /// No shard of the group has had anything new to say for too long.
    pub fn load_hangs(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.loaded_on) >= LOAD_SILENCE_MAX
    }

    /// Takes the engine's counters in. Says since when it is stalled, once that is too long.
    pub fn health(&mut self, health: &Health, now: Instant) -> Option<Duration> {
        let longest = health.step_us.iter().copied().max().unwrap_or_default();
        self.step_longest = self
            .step_longest
            .max(Duration::from_micros(u64::from(longest)));
        let since = match self.stalled {
            Some((step, since)) if step == health.steps => since,
            _ => now,
        };
        self.stalled = health.stalled.then_some((health.steps, since));
        let stood = now.saturating_duration_since(since);
        (health.stalled && stood >= self.patience()).then_some(stood)
    }

    /// The link is gone, and with it what was said of the engine.
    pub fn forget_stall(&mut self) {
        self.stalled = None;
    }

    /// The engine has work and its worker sees no progress.
    pub fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    fn patience(&self) -> Duration {
        if self.step_longest.is_zero() {
            return STALL_MAX;
        }
        (self.step_longest * STEP_SPREAD).clamp(STALL_MIN, STALL_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(steps: u64, step_us: &[u32], stalled: bool) -> Health {
        Health {
            steps,
            step_us: step_us.to_vec(),
            stalled,
            ..Health::default()
        }
    }

    /// Reports once a second that the engine is stalled at `step`; when it is given up, in seconds.
    fn given_up(progress: &mut Progress, step: u64, start: Instant) -> Option<u64> {
        (0..1000).find(|&s| {
            let now = start + Duration::from_secs(s);
            progress.health(&health(step, &[], true), now).is_some()
        })
    }

    #[test]
    fn an_engine_is_given_up_after_the_longest_time_a_step_can_take() {
        let start = Instant::now();
        for (step_us, seconds) in [(1_000, 5), (100_000, 15), (30_000_000, 120)] {
            let mut progress = Progress::new(start);
            assert_eq!(
                progress.health(&health(9, &[7, step_us], false), start),
                None
            );
            assert_eq!(
                given_up(&mut progress, 9, start),
                Some(seconds),
                "{step_us}"
            );
        }
        let mut unknown = Progress::new(start);
        assert_eq!(
            given_up(&mut unknown, 0, start),
            Some(120),
            "its first step"
        );
    }

    #[test]
    fn a_step_that_is_done_or_a_report_without_the_word_begins_the_time_anew() {
        let (start, mut progress) = (Instant::now(), Progress::new(Instant::now()));
        progress.health(&health(0, &[1_000], false), start);
        for second in 0..1000 {
            let now = start + Duration::from_secs(second);
            // Slow steps: each is called stalled for some seconds, and then it is done.
            let report = health(second / 4, &[], true);
            assert_eq!(progress.health(&report, now), None, "{second}");
            assert!(progress.is_stalled());
        }
        let now = start + Duration::from_secs(1000);
        progress.health(&health(250, &[], false), now);
        assert!(!progress.is_stalled());
        assert_eq!(given_up(&mut progress, 250, now), Some(5));
    }

    #[test]
    fn a_load_hangs_when_nothing_new_was_said_for_long() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        let later = start + LOAD_SILENCE_MAX;
        assert!(progress.load_hangs(later) && !progress.load_hangs(later - Duration::from_secs(1)));
        progress.load_went_on(later);
        assert!(!progress.load_hangs(later));
    }
}
