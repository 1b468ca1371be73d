//! The cluster's numbers, through the `metrics` facade. Labels are bounded: the endpoint's name and a closed list of
//! outcomes.

use std::sync::Arc;
use std::time::Duration;

use common::request::End;
use common::wire::message::Health;
use metrics::{counter, gauge, histogram};

/// Describes all meters; call once the recorder is installed.
pub fn describe() {
    use metrics::{
        Unit, describe_counter as counts, describe_gauge as gauges, describe_histogram as times,
    };
    counts!(
        "tandem_requests_total",
        "prompts that ended, by endpoint and outcome"
    );
    counts!(
        "tandem_prompt_tokens_total",
        "prompt tokens of accepted requests"
    );
    counts!("tandem_generation_tokens_total", "output tokens delivered");
    gauges!(
        "tandem_requests_waiting",
        "prompts waiting in the coordinator"
    );
    gauges!("tandem_requests_running", "prompts given to replicas");
    gauges!(
        "tandem_requests_concurrency",
        "prompts that may run at a time, over all served entities"
    );
    times!(
        "tandem_request_duration_seconds",
        Unit::Seconds,
        "from a prompt's arrival to the end of its answer"
    );
    times!(
        "tandem_time_to_first_token_seconds",
        Unit::Seconds,
        "from a prompt's arrival to its first token"
    );
    times!(
        "tandem_inter_token_latency_seconds",
        Unit::Seconds,
        "between two tokens of an answer"
    );
    times!(
        "tandem_step_seconds",
        Unit::Seconds,
        "one step of an engine"
    );
    gauges!(
        "tandem_kv_blocks_used",
        "KV blocks in use, over all replicas"
    );
    gauges!(
        "tandem_kv_blocks_total",
        "KV blocks in all, over all replicas"
    );
    counts!(
        "tandem_prefix_cache_queries_total",
        "prompt tokens looked up in the prefix cache"
    );
    counts!(
        "tandem_prefix_cache_hits_total",
        "prompt tokens found in the prefix cache"
    );
    counts!("tandem_preemptions_total", "sequences preempted");
    gauges!("tandem_workers", "workers with a link");
    times!(
        "tandem_e2e_request_latency_seconds",
        Unit::Seconds,
        "from a call's coming to its end"
    );
    times!(
        "tandem_request_prompt_tokens",
        Unit::Count,
        "prompt tokens of a call that was taken"
    );
    times!(
        "tandem_request_generation_tokens",
        Unit::Count,
        "output tokens of a call that was taken"
    );
    counts!("tandem_table_rows_total", "rows written, by table");
    counts!(
        "tandem_table_rows_lost_total",
        "rows that could not be written, by table and reason"
    );
    gauges!("tandem_table_bytes", "bytes of the tables' files");
    counts!(
        "tandem_log_lines_dropped_total",
        "lines of served models' logs that could not be written"
    );
}

/// One endpoint's meters.
#[derive(Debug)]
pub struct Meters {
    endpoint: String,
    prompt_tokens: metrics::Counter,
    generation_tokens: metrics::Counter,
    first_token: metrics::Histogram,
    inter_token: metrics::Histogram,
    duration: metrics::Histogram,
}

impl Meters {
    /// Meters labelled with the endpoint's name.
    pub fn new(endpoint: &str) -> Self {
        let endpoint = endpoint.to_owned();
        Meters {
            prompt_tokens: counter!("tandem_prompt_tokens_total", "endpoint" => endpoint.clone()),
            generation_tokens: counter!("tandem_generation_tokens_total", "endpoint" => endpoint.clone()),
            first_token: histogram!("tandem_time_to_first_token_seconds", "endpoint" => endpoint.clone()),
            inter_token: histogram!("tandem_inter_token_latency_seconds", "endpoint" => endpoint.clone()),
            duration: histogram!("tandem_request_duration_seconds", "endpoint" => endpoint.clone()),
            endpoint,
        }
    }

    /// A prompt's answer is complete, so long after its arrival.
    pub fn answered(&self, outcome: &'static str, took: Duration) {
        self.duration.record(took.as_secs_f64());
        self.ended(outcome);
    }

    /// A prompt is over.
    pub fn ended(&self, outcome: &'static str) {
        counter!("tandem_requests_total", "endpoint" => self.endpoint.clone(), "outcome" => outcome).increment(1);
    }

    /// A worker has counted a prompt.
    pub fn accepted(&self, prompt_tokens: u32) {
        self.prompt_tokens.increment(u64::from(prompt_tokens));
    }

    /// Output came: how many tokens, after which time.
    pub fn output(&self, tokens: usize, waited: Duration, first: bool) {
        self.generation_tokens.increment(tokens as u64);
        if first {
            self.first_token.record(waited.as_secs_f64());
        } else if tokens > 0 {
            self.inter_token
                .record(waited.as_secs_f64() / tokens as f64);
        }
    }

    /// How many may run at a time.
    pub fn concurrency(&self, most: u64) {
        gauge!("tandem_requests_concurrency", "endpoint" => self.endpoint.clone()).set(most as f64);
    }

    /// What waits and runs now.
    pub fn load(&self, waiting: u64, running: u64) {
        gauge!("tandem_requests_waiting", "endpoint" => self.endpoint.clone()).set(waiting as f64);
        gauge!("tandem_requests_running", "endpoint" => self.endpoint.clone()).set(running as f64);
    }
}

/// One replica's part in its endpoint's meters. Gauges are sums over replicas: its part goes with it.
#[derive(Debug)]
pub struct ReplicaMeters {
    endpoint: Arc<Meters>,
    last: Health,
}

impl ReplicaMeters {
    /// The part of a replica of which nothing is known yet.
    pub fn new(endpoint: Arc<Meters>) -> Self {
        ReplicaMeters {
            endpoint,
            last: Health::default(),
        }
    }

    /// The replica's counters as they are now.
    pub fn health(&mut self, now: Health) {
        self.gauges(&now);
        let before = std::mem::replace(&mut self.last, now);
        let now = &self.last;
        let endpoint = || self.endpoint.endpoint.clone();
        let more = |name: &'static str, before: u64, now: u64| {
            counter!(name, "endpoint" => endpoint()).increment(now.saturating_sub(before));
        };
        more(
            "tandem_prefix_cache_queries_total",
            before.prefix_queries,
            now.prefix_queries,
        );
        more(
            "tandem_prefix_cache_hits_total",
            before.prefix_hits,
            now.prefix_hits,
        );
        more(
            "tandem_preemptions_total",
            before.preemptions,
            now.preemptions,
        );
        let steps = histogram!("tandem_step_seconds", "endpoint" => endpoint());
        now.step_us
            .iter()
            .for_each(|&us| steps.record(f64::from(us) / 1e6));
    }

    fn gauges(&self, now: &Health) {
        // Whole numbers: they add up and cancel out exactly.
        let moved = |name: &'static str, before: u32, now: u32| {
            gauge!(name, "endpoint" => self.endpoint.endpoint.clone())
                .increment(f64::from(now) - f64::from(before));
        };
        let last = &self.last;
        moved(
            "tandem_kv_blocks_used",
            last.kv_blocks_used,
            now.kv_blocks_used,
        );
        moved(
            "tandem_kv_blocks_total",
            last.kv_blocks_total,
            now.kv_blocks_total,
        );
    }
}

impl Drop for ReplicaMeters {
    fn drop(&mut self) {
        self.gauges(&Health::default());
    }
}

/// An end as a label.
pub fn outcome(end: &End) -> &'static str {
    match end {
        End::Stop => "stop",
        End::Length => "length",
        End::Deadline => "deadline",
        End::Cancelled => "cancelled",
        End::Error(_) => "error",
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;

    #[test]
    fn kv_gauges_are_sums_over_replicas_and_go_with_them() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let shown = recorder.handle();
        let shows = |used: u32, total: u32| {
            let text = shown.render();
            for (name, value) in [("used", used), ("total", total)] {
                let line = format!("tandem_kv_blocks_{name}{{endpoint=\"e\"}} {value}\n");
                assert!(text.contains(&line), "{line} is not in {text}");
            }
        };
        let health = |kv_blocks_used, kv_blocks_total| Health {
            kv_blocks_used,
            kv_blocks_total,
            ..Health::default()
        };
        metrics::with_local_recorder(&recorder, || {
            let endpoint = Arc::new(Meters::new("e"));
            let mut one = ReplicaMeters::new(endpoint.clone());
            let mut other = ReplicaMeters::new(endpoint);
            one.health(health(7, 100));
            other.health(health(2, 50));
            shows(9, 150);
            one.health(health(3, 100));
            shows(5, 150);
            drop(one);
            shows(2, 50);
            drop(other);
            shows(0, 0);
        });
    }
}
