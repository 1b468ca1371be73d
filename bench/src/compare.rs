//! Two systems under the same load, in turn: medians of their runs, and ratios.

use std::fmt;

use crate::report::Report;

/// A name, and how it is read from a report.
type Measure = (&'static str, fn(&Report) -> f64);

/// What is compared.
const MEASURES: [Measure; 5] = [
    ("output tokens/s", |report| report.output_tokens_per_s),
    ("time to first token p50 ms", |report| report.ttft_ms.p50),
    ("between tokens p50 ms", |report| report.itl_ms.p50),
    ("end to end p50 ms", |report| report.e2e_ms.p50),
    ("processor ms per token", |report| {
        1e3 * report.cpu_s_per_output_token.unwrap_or_default()
    }),
];

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
        write!(f, "{name:<28} {ours:>12.2} {theirs:>12.2} {ratio:>8}")
    }
}

/// All measures of both systems' runs.
#[must_use]
pub fn ratios(ours: &[Report], theirs: &[Report]) -> Vec<Ratio> {
    MEASURES
        .iter()
        .map(|&(name, measure)| Ratio {
            name,
            ours: median(ours.iter().map(measure).collect()),
            theirs: median(theirs.iter().map(measure).collect()),
        })
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
        assert!(all[0].to_string().ends_with("4.00"), "{}", all[0]);
    }

    #[test]
    fn what_nobody_measured_has_no_ratio() {
        let all = ratios(&[run(10.0)], &[]);
        assert!(all.iter().all(|ratio| ratio.value().is_none()));
    }
}
