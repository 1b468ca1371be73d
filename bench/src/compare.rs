//! Two systems under the same load, in turn: medians of their runs, and ratios, as rows of a table in Markdown.

use std::fmt;

use crate::report::Report;

/// A name, and how it is read from a report, where that has it.
type Measure = (&'static str, fn(&Report) -> Option<f64>);

/// What is compared.
const MEASURES: [Measure; 6] = [
    ("output tokens/s", |report| Some(report.output_tokens_per_s)),
    ("time to first token p50 ms", |report| {
        answered(report, report.ttft_ms.p50)
    }),
    ("between tokens p50 ms", |report| {
        answered(report, report.itl_ms.p50)
    }),
    ("end to end p50 ms", |report| {
        answered(report, report.e2e_ms.p50)
    }),
    ("processor ms per token", |report| {
        Some(1e3 * report.cpu_s_per_output_token?)
    }),
    ("failed requests %", |report| {
        let failed = report.failed() as f64;
        Some(100.0 * failed / (failed + report.answered as f64).max(1.0))
    }),
];

/// A latency: none where nothing was answered, which is not the best of latencies.
fn answered(report: &Report, latency: f64) -> Option<f64> {
    (report.answered > 0).then_some(latency)
}

/// A measure of both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// Its name.
    pub name: &'static str,
    /// Median of our runs.
    pub ours: f64,
    /// Median of theirs.
    pub theirs: f64,
}

impl Ratio {
    /// Ours divided by theirs; none where they have nothing to divide by.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        (self.theirs > 0.0 && self.ours > 0.0).then(|| self.ours / self.theirs)
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ratio { name, ours, theirs } = self;
        let ratio = match self.value() {
            Some(ratio) => format!("{ratio:.2}"),
            None => "-".into(),
        };
        write!(f, "{name} | {ours:.2} | {theirs:.2} | {ratio} |")
    }
}

/// All measures of both systems' runs that one of them has anything of.
#[must_use]
pub fn ratios(ours: &[Report], theirs: &[Report]) -> Vec<Ratio> {
    MEASURES
        .iter()
        .map(|&(name, measure)| Ratio {
            name,
            ours: median(ours.iter().filter_map(measure).collect()),
            theirs: median(theirs.iter().filter_map(measure).collect()),
        })
        .filter(|ratio| ratio.ours > 0.0 || ratio.theirs > 0.0)
        .collect()
}

/// The middle one, or between the two in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn run(output_tokens_per_s: f64) -> Report {
        Report {
            output_tokens_per_s,
            ..Report::default()
        }
    }

    #[test]
    fn a_ratio_is_that_of_the_medians() {
        let all = ratios(&[run(10.0), run(90.0), run(20.0)], &[run(4.0), run(6.0)]);
        assert_eq!((all[0].ours, all[0].theirs), (20.0, 5.0));
        assert_eq!(all[0].value(), Some(4.0));
        assert_eq!(
            all[0].to_string(),
            "output tokens/s | 20.00 | 5.00 | 4.00 |"
        );
    }

    #[test]
    fn what_nobody_measured_has_no_ratio() {
        let all = ratios(&[run(10.0)], &[]);
        assert_eq!((all.len(), all[0].value()), (1, None));
    }

    #[test]
    fn a_run_without_answers_has_no_latency() {
        let mut answered = run(4.0);
        (answered.answered, answered.e2e_ms.p50) = (1, 70.0);
        let all = ratios(&[], &[Report::default(), answered]);
        assert_eq!((all[0].theirs, all[1].theirs), (2.0, 70.0));
    }

    #[test]
    fn failed_requests_are_told_as_a_share_of_all() {
        let half = Report {
            answered: 2,
            failures: BTreeMap::from([("status 504".into(), 2)]),
            ..Report::default()
        };
        let all = ratios(&[run(10.0)], &[half]);
        assert_eq!(all[1].to_string(), "failed requests % | 0.00 | 50.00 | - |");
    }
}
