//! What came of a load: rates, percentiles of latencies, failures by kind, processor time.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::load::Record;
use crate::percentile::Percentiles;

/// Points of a curve of latencies.
const CURVE_POINTS: usize = 101;

/// What came of a load. Latencies are those of requests that were answered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was asked, in the words of whoever asked.
    pub label: String,
    /// From the first request to the end of the last, answered or not: who keeps clients waiting for nothing is not faster.
    pub seconds: f64,
    /// Requests that were answered.
    pub answered: u64,
    /// The others, by kind.
    pub failures: BTreeMap<String, u64>,
    /// Tokens of answered prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub output_tokens: u64,
    /// Tokens of answers a second.
    pub output_tokens_per_s: f64,
    /// The same, with the tokens of prompts.
    pub total_tokens_per_s: f64,
    /// Time to the first part of an answer. Where an answer comes whole: to all of it.
    pub ttft_ms: Percentiles,
    /// Time between the parts of an answer.
    pub itl_ms: Percentiles,
    /// Time to the end of an answer.
    pub e2e_ms: Percentiles,
    /// Processor time of the server for each token of an answer, where its processes are known.
    pub cpu_s_per_output_token: Option<f64>,
    /// Tokens of answers in each second from the beginning on.
    pub tokens_by_second: Vec<f64>,
    /// Time to the first part, from the shortest to the longest, in equal shares of the answers.
    pub ttft_curve_ms: Vec<f64>,
    /// Time to the end, likewise.
    pub e2e_curve_ms: Vec<f64>,
}

impl Report {
    /// Sums up records. `cpu_seconds` is what the server used meanwhile, where that is known.
    #[must_use]
    pub fn of(label: &str, records: &[Record], cpu_seconds: Option<f64>) -> Report {
        let mut report = Report {
            label: label.to_owned(),
            ..Report::default()
        };
        let (mut ttft, mut itl, mut e2e) = (Vec::new(), Vec::new(), Vec::new());
        for record in records {
            report.seconds = report.seconds.max(record.over.as_secs_f64());
            let answer = match &record.end {
                Ok(answer) => answer,
                Err(failure) => {
                    *report.failures.entry(failure.to_string()).or_default() += 1;
                    continue;
                }
            };
            report.answered += 1;
            report.prompt_tokens += u64::from(answer.prompt_tokens);
            report.output_tokens += u64::from(answer.output_tokens);
            ttft.extend(answer.parts.first().map(|first| ms(*first)));
            itl.extend(answer.parts.windows(2).map(|pair| ms(pair[1] - pair[0])));
            e2e.push(ms(answer.end));
            let tokens = f64::from(answer.output_tokens) / answer.parts.len() as f64;
            for part in &answer.parts {
                let second = (record.start + *part).as_secs() as usize;
                if report.tokens_by_second.len() <= second {
                    report.tokens_by_second.resize(second + 1, 0.0);
                }
                report.tokens_by_second[second] += tokens;
            }
        }
        if report.seconds > 0.0 {
            let output = report.output_tokens as f64;
            report.output_tokens_per_s = output / report.seconds;
            report.total_tokens_per_s = (output + report.prompt_tokens as f64) / report.seconds;
        }
        if report.output_tokens > 0 {
            let each = |seconds| seconds / report.output_tokens as f64;
            report.cpu_s_per_output_token = cpu_seconds.map(each);
        }
        report.ttft_curve_ms = curve(&mut ttft);
        report.e2e_curve_ms = curve(&mut e2e);
        report.ttft_ms = Percentiles::of(ttft);
        report.itl_ms = Percentiles::of(itl);
        report.e2e_ms = Percentiles::of(e2e);
        report
    }

    /// How many requests failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} requests answered in {:.1} s, {} prompt and {} output tokens",
            self.label, self.answered, self.seconds, self.prompt_tokens, self.output_tokens
        )?;
        for (failure, count) in &self.failures {
            writeln!(f, "  failed: {count} ({failure})")?;
        }
        writeln!(
            f,
            "  output tokens/s {:.1}   total tokens/s {:.1}",
            self.output_tokens_per_s, self.total_tokens_per_s
        )?;
        for (name, values) in [
            ("time to first token", self.ttft_ms),
            ("between tokens", self.itl_ms),
            ("end to end", self.e2e_ms),
        ] {
            writeln!(
                f,
                "  {name:<20} p50 {:>10.1} ms   p90 {:>10.1} ms   p99 {:>10.1} ms",
                values.p50, values.p90, values.p99
            )?;
        }
        if let Some(seconds) = self.cpu_s_per_output_token {
            writeln!(f, "  processor seconds per output token {seconds:.4}")?;
        }
        Ok(())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Values in order, thinned to the points of a curve.
fn curve(values: &mut [f64]) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else {
        return Vec::new();
    };
    let points = CURVE_POINTS.min(values.len());
    let at = |point: usize| values[point * last / (points - 1).max(1)];
    (0..points).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Answer, Failure};

    fn answered(start_ms: u64, parts_ms: &[u64], tokens: u32) -> Record {
        let parts: Vec<Duration> = parts_ms
            .iter()
            .copied()
            .map(Duration::from_millis)
            .collect();
        let end = *parts.last().unwrap();
        let start = Duration::from_millis(start_ms);
        Record {
            start,
            over: start + end,
            end: Ok(Answer {
                prompt_tokens: 10,
                output_tokens: tokens,
                parts,
                end,
            }),
        }
    }

    fn failed(failure: Failure) -> Record {
        Record {
            start: Duration::ZERO,
            over: Duration::from_secs(4),
            end: Err(failure),
        }
    }

    #[test]
    fn rates_count_answered_requests_from_the_first_to_the_end_of_all() {
        let records = [
            answered(0, &[100, 200, 300], 3),
            answered(1000, &[500, 1000], 7),
            failed(Failure::Status(429)),
            failed(Failure::Status(429)),
            failed(Failure::Cut),
        ];
        let report = Report::of("x", &records, Some(5.0));
        assert_eq!((report.seconds, report.answered), (4.0, 2));
        assert_eq!(report.output_tokens_per_s, 2.5);
        assert_eq!(report.total_tokens_per_s, 7.5);
        assert_eq!(report.cpu_s_per_output_token, Some(0.5));
        assert_eq!(report.failures["status 429"], 2);
        assert_eq!((report.failures["cut short"], report.failed()), (1, 3));
        assert_eq!((report.ttft_ms.p50, report.ttft_ms.max), (100.0, 500.0));
        assert_eq!((report.itl_ms.p50, report.itl_ms.max), (100.0, 500.0));
        assert_eq!((report.e2e_ms.p50, report.e2e_ms.max), (300.0, 1000.0));
        assert_eq!(report.tokens_by_second, [3.0, 3.5, 3.5]);
        assert_eq!(report.e2e_curve_ms, [300.0, 1000.0]);
    }

    #[test]
    fn a_load_that_failed_whole_is_a_report_of_zeros() {
        let report = Report::of("x", &[failed(Failure::Connection)], Some(1.0));
        assert_eq!((report.answered, report.output_tokens_per_s), (0, 0.0));
        assert_eq!(report.cpu_s_per_output_token, None);
        assert!(report.to_string().contains("failed: 1 (connection)"));
    }

    #[test]
    fn a_curve_keeps_its_ends_and_its_order() {
        let mut values: Vec<f64> = (0..1000).rev().map(f64::from).collect();
        let curve = curve(&mut values);
        assert_eq!((curve.len(), curve[0], curve[100]), (101, 0.0, 999.0));
        assert!(curve.is_sorted());
    }
}
