//! Provisioned throughput: how many tokens per second a replica gives, in which chunks they are asked for, and how an
//! endpoint keeps to what was asked.
//!
//! Owns the forecast, the rule for what may be asked and the bucket at the door. The forecast comes from what the device
//! measured of itself when its worker started and from the memory plan: it is there before anything is deployed.

use std::time::Instant;

use common::wire::message::DeviceRates;

use super::memory_plan::{BLOCK_TOKENS, MemoryPlan};
use crate::api::{EntitySpec, Provisioned, WorkloadSize};

/// A chunk is this part of what one replica gives on the smallest workload type that fits, so that a device can be
/// divided among a few endpoints.
pub const CHUNKS_PER_REPLICA: u64 = 4;
/// Tokens that an idle endpoint saves up, in seconds of its rate.
const BURST_S: f64 = 1.0;
/// Nothing larger is believed, so that sums stay far inside 64 bits.
const RATE_MAX: f64 = 1e12;

/// What a replica is foretold to give.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    rates: DeviceRates,
    weight_bytes: f64,
    parameters: f64,
    /// Bytes of K and V that one sequence of half the longest context reads per token.
    sequence_bytes: f64,
    sequences_max: u64,
}

impl Forecast {
    /// Of a replica planned for [`WorkloadSize::Large`] on devices of these rates.
    pub fn of(plan: &MemoryPlan, rates: DeviceRates) -> Self {
        let token_bytes = plan.need.block_bytes as f64 / BLOCK_TOKENS as f64;
        Forecast {
            rates,
            weight_bytes: plan.need.weight_bytes as f64,
            parameters: plan.need.parameters as f64,
            sequence_bytes: token_bytes * f64::from(plan.need.context_max) / 2.0,
            sequences_max: plan.concurrency().max(1),
        }
    }

    /// Output tokens per second of so many sequences at a time, or of as many as fit. A step reads all weights or
    /// multiplies them with each sequence's token, whichever takes longer, and reads each sequence's keys and values.
    pub fn tokens_per_s(&self, sequences: u64) -> f64 {
        let sequences = sequences.clamp(1, self.sequences_max) as f64;
        let reads_s = self.weight_bytes / self.rates.bytes_per_s.max(1) as f64;
        let flops = 2.0 * sequences * self.parameters;
        let multiplies_s = flops / self.rates.flops_per_s.max(1) as f64;
        let attends_s = sequences * self.sequence_bytes / self.rates.bytes_per_s.max(1) as f64;
        sequences / (reads_s.max(multiplies_s) + attends_s).max(1.0 / RATE_MAX)
    }

    /// Tokens per second of one chunk: two digits of it, so that it reads like what it is.
    pub fn chunk(&self) -> u64 {
        let full = u64::from(WorkloadSize::Large.concurrency());
        let chunk = (self.tokens_per_s(full) / CHUNKS_PER_REPLICA as f64).min(RATE_MAX) as u64;
        let digits = chunk.checked_ilog10().unwrap_or(0);
        let unit = 10u64.pow(digits.saturating_sub(1));
        (chunk / unit * unit).max(1)
    }

    /// The smallest size that keeps so many tokens per second up, if any does.
    pub fn size(&self, tokens_per_s: u64) -> WorkloadSize {
        [WorkloadSize::Small, WorkloadSize::Medium]
            .into_iter()
            .find(|size| self.tokens_per_s(u64::from(size.concurrency())) >= tokens_per_s as f64)
            .unwrap_or(WorkloadSize::Large)
    }
}

/// What was asked for with both rates filled in.
///
/// # Errors
/// Says what may be asked for.
pub fn settle(asked: Provisioned, chunk: u64) -> Result<Provisioned, String> {
    let most = CHUNKS_PER_REPLICA * chunk;
    let allowed = || {
        let steps: Vec<String> = (1..=CHUNKS_PER_REPLICA)
            .map(|n| (n * chunk).to_string())
            .collect();
        format!(
            "this model is served here in chunks of {chunk} tokens per second, at most {CHUNKS_PER_REPLICA} of them \
             per served entity: {}",
            steps.join(", ")
        )
    };
    if let Some(units) = asked.model_units {
        if !(1..=CHUNKS_PER_REPLICA).contains(&units) {
            return Err(format!(
                "provisioned_model_units must be 1 to {CHUNKS_PER_REPLICA}, got {units}: one unit is one chunk, and {}",
                allowed()
            ));
        }
        return Ok(Provisioned {
            min_tokens_per_s: units * chunk,
            max_tokens_per_s: units * chunk,
            model_units: Some(units),
        });
    }
    let (min, max) = (asked.min_tokens_per_s, asked.max_tokens_per_s);
    for (name, rate) in [
        ("max_provisioned_throughput", max),
        ("min_provisioned_throughput", min),
    ] {
        if !rate.is_multiple_of(chunk) || rate > most {
            return Err(format!("{name} = {rate} cannot be had: {}", allowed()));
        }
    }
    Ok(asked)
}

/// The entity asks for what `old` has: its rates, type and size stay, also where devices were measured anew since.
pub fn is_unchanged(old: &EntitySpec, new: &EntitySpec) -> bool {
    let (Some(had), Some(asked)) = (old.provisioned, new.provisioned) else {
        return false;
    };
    let same = match asked.model_units {
        Some(units) => had.model_units == Some(units),
        None => {
            (had.min_tokens_per_s, had.max_tokens_per_s)
                == (asked.min_tokens_per_s, asked.max_tokens_per_s)
        }
    };
    let free = new.workload_type.is_empty() || new.workload_type == old.workload_type;
    same && free && old.model == new.model && old.quantization == new.quantization
}

/// Keeps a rate: tokens that were spent are waited for before anything new begins. What runs is not slowed down, so that
/// the rate holds over time, not in each second.
#[derive(Debug, Clone)]
pub struct Bucket {
    tokens_per_s: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(tokens_per_s: u64, now: Instant) -> Self {
        let tokens_per_s = tokens_per_s as f64;
        Bucket {
            tokens_per_s,
            level: tokens_per_s * BURST_S,
            at: now,
        }
    }

    /// Another rate from here on; what is owed stays owed.
    pub fn set_rate(&mut self, tokens_per_s: u64, now: Instant) {
        self.refill(now);
        self.tokens_per_s = tokens_per_s as f64;
        self.level = self.level.min(self.tokens_per_s * BURST_S);
    }

    /// Takes tokens out, also more than there are.
    pub fn spend(&mut self, tokens: u64, now: Instant) {
        self.refill(now);
        self.level -= tokens as f64;
    }

    /// Something new may begin.
    pub fn is_open(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.level > 0.0
    }

    fn refill(&mut self, now: Instant) {
        let passed_s = now.saturating_duration_since(self.at).as_secs_f64();
        let full = self.tokens_per_s * BURST_S;
        self.level = (self.level + passed_s * self.tokens_per_s).min(full);
        self.at = now.max(self.at);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::policy::memory_plan::RankNeed;

    /// Llama 2 7B on one card that reads 1.5 TB/s and multiplies at 200 TFLOP/s, with 62 GiB for KV.
    fn seven_b() -> Forecast {
        let need = RankNeed {
            ranks: 1,
            parameters: 6_738_415_616,
            weight_bytes: 13_476_831_232,
            workspace_bytes: 0,
            scratch_bytes: 0,
            overhead_bytes: 0,
            block_bytes: 16 * 524_288,
            context_max: 4096,
            step_tokens_max: 2048,
            sequences_max: 64,
        };
        let plan = need.fit(need.bytes_for(31), 64).unwrap();
        let rates = DeviceRates {
            bytes_per_s: 1_500_000_000_000,
            flops_per_s: 200_000_000_000_000,
        };
        Forecast::of(&plan, rates)
    }

    #[test]
    fn a_step_takes_as_long_as_its_reads() {
        let forecast = seven_b();
        // 13.5 GB of weights and 1.07 GB of keys and values at 1.5 TB/s.
        assert!((forecast.tokens_per_s(1) - 103.1).abs() < 0.5);
        // 31 sequences: 13.5 + 33.3 GB; more do not fit.
        assert!((forecast.tokens_per_s(31) - 993.8).abs() < 5.0);
        assert_eq!(forecast.tokens_per_s(64), forecast.tokens_per_s(31));
        assert_eq!(forecast.chunk(), 240);
    }

    #[test]
    fn a_slow_processor_is_bound_by_its_multiplications() {
        let mut forecast = seven_b();
        forecast.rates.flops_per_s = 100_000_000_000;
        // 2 x 6.74e9 per token at 1e11 per second, however many at a time.
        assert!((forecast.tokens_per_s(31) - 7.4).abs() < 0.1);
        assert_eq!(forecast.chunk(), 1);
    }

    #[test]
    fn the_size_is_the_smallest_that_keeps_the_rate_up() {
        let forecast = seven_b();
        assert_eq!(forecast.size(240), WorkloadSize::Small);
        assert_eq!(forecast.size(480), WorkloadSize::Medium);
        assert_eq!(forecast.size(960), WorkloadSize::Large);
        assert_eq!(forecast.size(1 << 40), WorkloadSize::Large);
    }

    fn asked(min: u64, max: u64) -> Provisioned {
        Provisioned {
            min_tokens_per_s: min,
            max_tokens_per_s: max,
            model_units: None,
        }
    }

    #[test]
    fn rates_are_asked_for_in_chunks_and_units_become_rates() {
        assert_eq!(settle(asked(0, 240), 240), Ok(asked(0, 240)));
        assert_eq!(settle(asked(240, 960), 240), Ok(asked(240, 960)));
        for (min, max) in [(0, 241), (10, 240), (0, 1200)] {
            let refused = settle(asked(min, max), 240).unwrap_err();
            assert!(
                refused.contains("cannot be had") && refused.ends_with("240, 480, 720, 960"),
                "{refused}"
            );
        }
        let units = |units| Provisioned {
            model_units: Some(units),
            ..asked(0, 0)
        };
        let two = settle(units(2), 240).unwrap();
        assert_eq!((two.min_tokens_per_s, two.max_tokens_per_s), (480, 480));
        for wrong in [0, 5, u64::MAX] {
            assert!(settle(units(wrong), 240).unwrap_err().contains("1 to 4"));
        }
    }

    #[test]
    fn what_is_owed_is_waited_for_and_nothing_is_saved_beyond_the_burst() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut bucket = Bucket::new(100, start);
        bucket.spend(100, at(0));
        assert!(!bucket.is_open(at(0)) && bucket.is_open(at(20)));
        bucket.spend(300, at(1_000));
        assert!(!bucket.is_open(at(2_999)) && bucket.is_open(at(3_010)));
        // An hour's idleness saves one second.
        bucket.spend(150, at(3_600_000));
        assert!(!bucket.is_open(at(3_600_490)) && bucket.is_open(at(3_600_510)));
        bucket.set_rate(1_000, at(3_600_510));
        bucket.spend(1_000, at(3_600_510));
        assert!(!bucket.is_open(at(3_601_400)) && bucket.is_open(at(3_601_600)));
    }

    proptest! {
        #[test]
        fn over_time_no_more_is_spent_than_the_rate_the_burst_and_what_ran_at_once(
            rate in 1u64..1_000, looks in proptest::collection::vec((0u64..500, 0u64..400), 1..200),
        ) {
            let start = Instant::now();
            let (mut bucket, mut ms, mut spent, mut largest) = (Bucket::new(rate, start), 0, 0u64, 0);
            for (pause, tokens) in looks {
                ms += pause;
                let now = start + Duration::from_millis(ms);
                if bucket.is_open(now) {
                    bucket.spend(tokens, now);
                    spent += tokens;
                    largest = largest.max(tokens);
                }
            }
            let bound = rate as f64 * (ms as f64 / 1e3 + BURST_S) + largest as f64 + 1e-3;
            prop_assert!(spent as f64 <= bound, "{spent} of {bound}");
        }
    }
}
