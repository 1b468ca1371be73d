//! When requests of an open loop come: a Poisson process, as independent users are.

use std::time::Duration;

use rand::Rng;

/// Moments of arrival since the beginning, on average `rate` a second: the gaps are of an exponential distribution.
pub fn poisson(rate: f64, random: &mut impl Rng) -> impl Iterator<Item = Duration> {
    let mut moment = 0.0;
    std::iter::from_fn(move || {
        let unit: f64 = random.random();
        // 1 - unit is never 0.
        moment -= (1.0 - unit).ln() / rate;
        Some(Duration::from_secs_f64(moment))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn moments(seed: u64, count: usize) -> Vec<f64> {
        poisson(4.0, &mut StdRng::seed_from_u64(seed))
            .take(count)
            .map(|moment| moment.as_secs_f64())
            .collect()
    }

    #[test]
    fn arrivals_come_at_the_rate_and_with_the_spread_of_a_poisson_process() {
        let moments = moments(1, 20_000);
        let gaps: Vec<f64> = moments.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let square = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>();
        let deviation = (square / gaps.len() as f64).sqrt();
        assert!((0.24..0.26).contains(&mean), "{mean}");
        // That of an exponential distribution is its mean.
        assert!((0.96..1.04).contains(&(deviation / mean)), "{deviation}");
        assert!(gaps.iter().all(|gap| *gap >= 0.0));
    }

    #[test]
    fn equal_seeds_give_equal_arrivals() {
        assert_eq!(moments(7, 10), moments(7, 10));
        assert_ne!(moments(7, 10), moments(8, 10));
    }
}
