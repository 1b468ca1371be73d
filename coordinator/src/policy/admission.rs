//! Arithmetic at a served entity's door: run now, wait, or come again later.
//!
//! Owns the rule and the measured drain rate. The counters come from permits that give themselves back; the queue
//! itself is the endpoint actor's.

use std::time::Instant;

/// What an entity holds at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Requests that wait in the queue.
    pub waiting: u64,
    /// Requests that were given to replicas and are not over.
    pub running: u64,
    /// Prompt tokens that are not prefilled yet, of queued and given requests: upper bounds until a worker has counted.
    pub tokens: u64,
}

/// What an entity may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Requests that run at a time.
    pub concurrency: u64,
    /// Requests that may wait.
    pub waiting_max: u64,
    /// Prompt tokens that may wait, over all replicas of the entity.
    pub tokens_max: u64,
}

/// A call at the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Its prompts.
    pub requests: u64,
    /// Upper bound of their tokens.
    pub tokens: u64,
}

/// What to do with a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Queue it; what can run is taken from the queue at once.
    Take,
    /// Full: come again after this many seconds.
    Later(u64),
    /// Too large for this entity even when it is idle.
    Never(String),
}

/// Decides about one call. A call that is alone is always taken if its prompts fit the queue at all: a long prompt must
/// not be starved by a bound that is smaller than itself.
pub fn decide(load: Load, bounds: Bounds, ask: Ask, drained_per_s: f64) -> Verdict {
    let room = bounds.concurrency + bounds.waiting_max;
    if ask.requests > room {
        return Verdict::Never(format!(
            "the call has {} prompts; this endpoint takes at most {room} at a time: send them in several calls",
            ask.requests
        ));
    }
    let held = load.waiting + load.running;
    let fits = held + ask.requests <= room;
    let backlog_fits = load.tokens == 0 || load.tokens + ask.tokens <= bounds.tokens_max;
    if fits && backlog_fits {
        return Verdict::Take;
    }
    Verdict::Later(retry_after_s(held.max(1), drained_per_s))
}

/// Longest time a client is sent away for: the rate may rise again.
const RETRY_AFTER_MAX_S: u64 = 60;

/// Seconds until `held` requests are done at this rate: at least 1, and 1 while nothing is known.
pub fn retry_after_s(held: u64, drained_per_s: f64) -> u64 {
    if drained_per_s <= 0.0 {
        return 1;
    }
    ((held as f64 / drained_per_s).ceil() as u64).clamp(1, RETRY_AFTER_MAX_S)
}

/// How fast requests end while others wait, over about the last ones. Time without a queue does not count: then requests
/// end as fast as they come, which says nothing of how fast a full queue drains.
#[derive(Debug, Default)]
pub struct DrainRate {
    /// The last look, and whether requests waited then.
    last: Option<(Instant, bool)>,
    /// Requests that ended while others waited; older ones count less.
    ended: f64,
    /// The time they took.
    busy_s: f64,
}

impl DrainRate {
    /// Ends beyond which older ones count less.
    const REMEMBERED: f64 = 64.0;

    /// Notes that requests ended since the last note; `waiting` says whether others wait now.
    pub fn note(&mut self, count: u64, waiting: bool, now: Instant) {
        if let Some((last, true)) = self.last
            && waiting
        {
            self.ended += count as f64;
            self.busy_s += now.saturating_duration_since(last).as_secs_f64();
            let kept = (Self::REMEMBERED / self.ended).min(1.0);
            self.ended *= kept;
            self.busy_s *= kept;
        }
        self.last = Some((now, waiting));
    }

    /// Requests per second; 0 while nothing is known.
    pub fn per_second(&self) -> f64 {
        if self.ended > 0.0 && self.busy_s > 0.0 {
            self.ended / self.busy_s
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        concurrency: 4,
        waiting_max: 8,
        tokens_max: 100,
    };

    proptest! {
        #[test]
        fn the_queue_never_grows_beyond_its_bounds(calls in proptest::collection::vec((1u64..20, 0u64..200, 0u64..6), 1..200)) {
            let (mut load, mut alone) = (Load::default(), 0);
            for (requests, tokens, ends) in calls {
                if let Verdict::Take = decide(load, BOUNDS, Ask { requests, tokens }, 1.0) {
                    if load.tokens == 0 { alone = tokens; }
                    load.waiting += requests;
                    load.tokens += tokens;
                }
                let start = (BOUNDS.concurrency - load.running).min(load.waiting);
                load.waiting -= start;
                load.running += start;
                prop_assert!(load.waiting + load.running <= BOUNDS.concurrency + BOUNDS.waiting_max);
                prop_assert!(load.tokens <= BOUNDS.tokens_max.max(alone));
                load.running -= ends.min(load.running);
                if load.running + load.waiting == 0 { load.tokens = 0; }
            }
        }
    }

    #[test]
    fn a_call_that_can_never_fit_is_told_so_at_once() {
        let Verdict::Never(message) = decide(
            Load::default(),
            BOUNDS,
            Ask {
                requests: 13,
                tokens: 1,
            },
            1.0,
        ) else {
            panic!("13 prompts cannot fit 4 + 8")
        };
        assert!(
            message.contains("13 prompts") && message.contains("at most 12"),
            "{message}"
        );
        assert_eq!(
            decide(
                Load::default(),
                BOUNDS,
                Ask {
                    requests: 12,
                    tokens: 1
                },
                1.0
            ),
            Verdict::Take
        );
    }

    #[test]
    fn a_long_prompt_is_taken_when_it_is_alone_and_waits_otherwise() {
        let long = Ask {
            requests: 1,
            tokens: 1000,
        };
        assert_eq!(decide(Load::default(), BOUNDS, long, 0.0), Verdict::Take);
        let busy = Load {
            waiting: 0,
            running: 1,
            tokens: 5,
        };
        assert_eq!(decide(busy, BOUNDS, long, 0.0), Verdict::Later(1));
    }

    #[test]
    fn the_time_to_come_again_follows_the_drain_rate() {
        let full = Load {
            waiting: 8,
            running: 4,
            tokens: 12,
        };
        let one = Ask {
            requests: 1,
            tokens: 1,
        };
        assert_eq!(decide(full, BOUNDS, one, 0.0), Verdict::Later(1));
        assert_eq!(decide(full, BOUNDS, one, 2.0), Verdict::Later(6));
        assert_eq!(decide(full, BOUNDS, one, 0.001), Verdict::Later(60));
    }

    #[test]
    fn the_drain_rate_is_that_of_a_queue_and_follows_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rate = DrainRate::default();
        // Light traffic: one request every five seconds, none waits.
        for i in 0..6 {
            rate.note(1, false, at(5_000 * i));
        }
        assert_eq!(rate.per_second(), 0.0, "no queue was seen yet");
        // A flood: eight end each second, looked at often.
        rate.note(0, true, at(30_000));
        for i in 1..=40 {
            rate.note(1, true, at(30_000 + 125 * i));
        }
        assert!(
            (rate.per_second() - 8.0).abs() < 0.01,
            "{}",
            rate.per_second()
        );
        // Quiet again: what is known of a full queue still holds.
        rate.note(216, false, at(65_000));
        rate.note(0, false, at(600_000));
        assert!((rate.per_second() - 8.0).abs() < 0.01);
        // A flood of longer requests, looked at rarely.
        for i in 0..60 {
            rate.note(if i == 0 { 0 } else { 10 }, true, at(700_000 + 5_000 * i));
        }
        assert!(
            (rate.per_second() - 2.0).abs() < 0.01,
            "{}",
            rate.per_second()
        );
    }

    #[test]
    fn a_full_queue_says_how_long_it_takes_to_drain() {
        let (concurrency, waiting_max) = (4, 256);
        let bounds = Bounds {
            concurrency,
            waiting_max,
            tokens_max: 1 << 20,
        };
        let one = Ask {
            requests: 1,
            tokens: 1,
        };
        let start = Instant::now();
        let mut rate = DrainRate::default();
        let load = Load {
            waiting: waiting_max,
            running: concurrency,
            tokens: 1,
        };
        rate.note(0, true, start);
        // Waves of four, 540 ms each; clients ask four times a wave and fill what is free.
        for look in 1..=200u64 {
            let ended = if look % 4 == 0 { 4 } else { 0 };
            rate.note(ended, true, start + Duration::from_millis(135 * look));
            let told = decide(load, bounds, one, rate.per_second());
            if look >= 40 {
                let Verdict::Later(seconds) = told else {
                    panic!("{told:?}")
                };
                assert!((35..=40).contains(&seconds), "{seconds} s at look {look}");
            }
        }
    }
}
