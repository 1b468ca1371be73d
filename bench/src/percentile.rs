//! Percentiles of measured values.

use serde::{Deserialize, Serialize};

/// The usual percentiles of some values, and their mean; all 0 where there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half are at most this.
    pub p50: f64,
    /// Nine of ten.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
    /// Their sum divided by their number.
    pub mean: f64,
    /// The largest.
    pub max: f64,
}

impl Percentiles {
    /// Of these values, in any order.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Percentiles {
        values.sort_by(f64::total_cmp);
        let (Some(max), count) = (values.last().copied(), values.len()) else {
            return Percentiles::default();
        };
        Percentiles {
            p50: nearest(&values, 0.50),
            p90: nearest(&values, 0.90),
            p99: nearest(&values, 0.99),
            mean: values.iter().sum::<f64>() / count as f64,
            max,
        }
    }
}

/// The smallest of some ordered values that at least a `share` of them does not exceed; there is at least one.
fn nearest(ordered: &[f64], share: f64) -> f64 {
    let rank = (share * ordered.len() as f64).ceil() as usize;
    ordered[rank.clamp(1, ordered.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let all = Percentiles::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((all.p50, all.p90, all.p99), (50.0, 90.0, 99.0));
        assert_eq!((all.mean, all.max), (50.5, 100.0));
    }

    #[test]
    fn one_value_is_all_percentiles_and_none_are_zero() {
        let one = Percentiles::of(vec![7.0]);
        assert_eq!((one.p50, one.p90, one.p99, one.max), (7.0, 7.0, 7.0, 7.0));
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }
}
