//! How long prompts and answers are: a distribution of token counts.

use std::str::FromStr;

use rand::Rng;

/// Longest prompt or answer that is asked for: longer than any model's context.
const TOKENS_MAX: u32 = 1 << 24;

/// A distribution of token counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Always as many.
    Fixed(u32),
    /// All counts of a range alike, both ends included.
    Uniform(u32, u32),
    /// As lengths of texts are: many short ones, few long ones.
    LogNormal {
        /// Half of the counts are below.
        median: u32,
        /// Deviation of the logarithm.
        sigma: f64,
        /// Longer ones are cut to this.
        max: u32,
    },
}

impl Length {
    /// Draws a count; at least 1.
    pub fn draw(&self, random: &mut impl Rng) -> u32 {
        match *self {
            Length::Fixed(tokens) => tokens,
            Length::Uniform(low, high) => random.random_range(low..=high),
            Length::LogNormal { median, sigma, max } => {
                let tokens = f64::from(median) * (sigma * normal(random)).exp();
                // What is too large for a u32 becomes its largest.
                (tokens.round() as u32).clamp(1, max)
            }
        }
    }
}

/// A number of the standard normal distribution, by the method of Box and Muller.
fn normal(random: &mut impl Rng) -> f64 {
    let (u, v): (f64, f64) = (random.random(), random.random());
    // 1 - u is never 0.
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Length, String> {
        let wrong = || {
            format!(
                "'{text}' is no length: say 128, uniform:64-256 or lognormal:128,0.6,1024 (median, sigma, most)"
            )
        };
        let count = |word: &str| match word.trim().parse() {
            Ok(tokens) if (1..=TOKENS_MAX).contains(&tokens) => Ok(tokens),
            _ => Err(wrong()),
        };
        if let Some(range) = text.strip_prefix("uniform:") {
            let (low, high) = range.split_once('-').ok_or_else(wrong)?;
            let (low, high) = (count(low)?, count(high)?);
            return if low <= high {
                Ok(Length::Uniform(low, high))
            } else {
                Err(wrong())
            };
        }
        if let Some(values) = text.strip_prefix("lognormal:") {
            let values: Vec<&str> = values.split(',').collect();
            let [median, sigma, max] = values[..] else {
                return Err(wrong());
            };
            let sigma: f64 = sigma.trim().parse().map_err(|_| wrong())?;
            if !(0.0..=10.0).contains(&sigma) {
                return Err(wrong());
            }
            let (median, max) = (count(median)?, count(max)?);
            return Ok(Length::LogNormal { median, sigma, max });
        }
        count(text).map(Length::Fixed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn drawn(text: &str, count: usize) -> Vec<u32> {
        let length: Length = text.parse().unwrap();
        let mut random = StdRng::seed_from_u64(1);
        let mut drawn: Vec<u32> = (0..count).map(|_| length.draw(&mut random)).collect();
        drawn.sort_unstable();
        drawn
    }

    #[test]
    fn a_fixed_length_is_always_the_same() {
        assert_eq!(drawn("128", 3), [128; 3]);
    }

    #[test]
    fn a_uniform_length_reaches_both_ends_and_no_further() {
        let all = drawn("uniform:3-6", 1000);
        assert_eq!((all[0], all[999]), (3, 6));
    }

    #[test]
    fn half_of_lognormal_lengths_are_below_the_median_and_none_above_the_most() {
        let all = drawn("lognormal:100,0.5,300", 4000);
        assert!((90..=110).contains(&all[2000]), "{}", all[2000]);
        // One deviation is at the 84th of 100.
        assert!((150..=180).contains(&all[3365]), "{}", all[3365]);
        assert!(all[0] >= 1 && all[3999] == 300, "{} {}", all[0], all[3999]);
    }

    #[test]
    fn what_is_no_length_is_refused_with_an_example() {
        for text in [
            "",
            "0",
            "-1",
            "99999999999",
            "uniform:5",
            "uniform:6-3",
            "uniform:0-3",
            "lognormal:1,2",
            "lognormal:100,nan,200",
            "lognormal:100,99,200",
            "words",
        ] {
            let error = text.parse::<Length>().unwrap_err();
            assert!(error.contains("uniform:64-256"), "{text}: {error}");
        }
    }
}
