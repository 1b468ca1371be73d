//! Positions: the rotary angles of a step's tokens, or the slopes of ALiBi.
//!
//! Owns the formulas of both. Angles are made per step, not kept for the whole context: a step has few tokens, and a
//! long context would take much memory.

use crate::backend::{Backend, Batch, DeviceError};
use crate::models::partition::Partition;
use crate::models::spec::{ModelSpec, Positions, RopeScaling};
use std::f64::consts::PI;

/// What attention needs to know positions by.
pub(crate) enum Position<B: Backend> {
    /// Queries and keys are rotated.
    Rope {
        /// Radians per position, of each pair of a head.
        frequencies: Vec<f32>,
        /// The step's angles on the host `[tokens, d]`.
        angles: Vec<f32>,
        /// The same on the device: cosines, then sines, of each row.
        cos_sin: B::Buf,
    },
    /// Scores fall by the distance.
    Alibi {
        /// Of this rank's query heads.
        slopes: B::Buf,
    },
}

impl<B: Backend> Position<B> {
    /// For steps of up to `tokens` tokens.
    pub fn new(
        backend: &mut B,
        spec: &ModelSpec,
        partition: &Partition,
        tokens: usize,
    ) -> Result<Position<B>, DeviceError> {
        match spec.positions {
            Positions::Rope { theta, scaling } => Ok(Position::Rope {
                frequencies: frequencies(spec.head_width, theta, scaling),
                angles: Vec::with_capacity(tokens * spec.head_width),
                cos_sin: backend.alloc(tokens * spec.head_width)?,
            }),
            Positions::Alibi { bias_max } => {
                let mut slopes = backend.alloc(partition.heads.q)?;
                backend.write(
                    &alibi_slopes(spec.heads, bias_max)[partition.q_heads.clone()],
                    &mut slopes,
                );
                Ok(Position::Alibi { slopes })
            }
        }
    }

    /// Makes the angles of the batch's positions, before the first layer.
    pub fn begin_step(&mut self, backend: &mut B, batch: &Batch) {
        let Position::Rope {
            frequencies,
            angles,
            cos_sin,
        } = self
        else {
            return;
        };
        angles.clear();
        for position in &batch.positions {
            let position = *position as f32;
            angles.extend(
                frequencies
                    .iter()
                    .map(|frequency| (position * frequency).cos()),
            );
            angles.extend(
                frequencies
                    .iter()
                    .map(|frequency| (position * frequency).sin()),
            );
        }
        backend.write(angles, cos_sin);
    }
}

/// `theta^(-2i/d)` for each pair of a head, scaled for long contexts; in f32 as the models were trained.
fn frequencies(head_width: usize, theta: f64, scaling: RopeScaling) -> Vec<f32> {
    let plain = (0..head_width / 2).map(|i| theta.powf(-2.0 * i as f64 / head_width as f64));
    plain
        .map(|frequency| scale(frequency, scaling) as f32)
        .collect()
}

/// The scaling that divides the frequencies by these factors, one per pair of a head: none, or Llama 3's with its published
/// limits. A GGUF file has the factors in place of the formula.
///
/// # Errors
/// Factors of another formula.
pub(crate) fn scaling_of(
    factors: &[f32],
    head_width: usize,
    theta: f64,
) -> Result<RopeScaling, String> {
    const TOLERANCE: f64 = 1e-3;
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let scaling = match factor {
        1.0 => RopeScaling::None,
        _ => RopeScaling::Llama3 {
            factor,
            low: 1.0,
            high: 4.0,
            original_context: 8192.0,
        },
    };
    let plain = frequencies(head_width, theta, RopeScaling::None);
    let scaled = frequencies(head_width, theta, scaling);
    let near = |((plain, scaled), factor): ((&f32, &f32), &f32)| {
        (f64::from(plain / factor) / f64::from(*scaled) - 1.0).abs() < TOLERANCE
    };
    let mut pairs = plain.iter().zip(&scaled).zip(factors);
    if factors.len() != plain.len() || !pairs.all(near) {
        return Err(format!(
            "the {} factors of its rotary frequencies are not those of Llama 3.1",
            factors.len()
        ));
    }
    Ok(scaling)
}

fn scale(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low,
            high,
            original_context,
        } => {
            // How often the pair turns within the original context decides: often is kept, seldom is divided.
            let turns = original_context * frequency / (2.0 * PI);
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - kept) * frequency / factor + kept * frequency
        }
    }
}

/// `2^(-bias_max * i / n)` for `i` in `1..=n`, `n` being the next power of two; where there are fewer heads than `n`, those
/// of odd `i` (counted from 0) come first, then the others.
fn alibi_slopes(heads: usize, bias_max: f32) -> Vec<f32> {
    let n = heads.next_power_of_two();
    let slope = |i: usize| (-f64::from(bias_max) * (i + 1) as f64 / n as f64).exp2() as f32;
    if n == heads {
        return (0..n).map(slope).collect();
    }
    (1..n)
        .step_by(2)
        .chain((0..n).step_by(2))
        .map(slope)
        .take(heads)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_scaling_keeps_fast_pairs_and_slows_slow_ones() {
        // Llama 3.1: theta 500000, head width 128, factor 8, low 1, high 4, original context 8192.
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low: 1.0,
            high: 4.0,
            original_context: 8192.0,
        };
        let scaled = frequencies(128, 500_000.0, scaling);
        let plain = frequencies(128, 500_000.0, RopeScaling::None);
        // Pairs 0..=28 turn more than 4 times in 8192 positions, pairs from 36 on less than once.
        for i in 0..64 {
            let turns = 8192.0 * f64::from(plain[i]) / (2.0 * PI);
            match i {
                0..=28 => assert_eq!(scaled[i], plain[i], "pair {i} turns {turns} times"),
                29..=34 => assert!(
                    scaled[i] < plain[i] && scaled[i] > plain[i] / 8.0,
                    "pair {i} turns {turns} times"
                ),
                _ => assert!(
                    (scaled[i] - plain[i] / 8.0).abs() <= plain[i] * 1e-6,
                    "pair {i} turns {turns} times"
                ),
            }
        }
        // Pair 31 by hand: 500000^(-62/128) = 1.736047e-3; it turns 8192 * 1.736047e-3 / 6.283185 = 2.263453 times, so
        // (2.263453 - 1) / 3 = 0.421151 of it is kept: 0.578849 * 1.736047e-3 / 8 + 0.421151 * 1.736047e-3 = 8.567514e-4.
        assert!(
            (f64::from(scaled[31]) - 8.567_514e-4).abs() < 1e-9,
            "{}",
            scaled[31]
        );
    }

    #[test]
    fn factors_in_a_file_are_known_by_the_formula_that_made_them() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low: 1.0,
            high: 4.0,
            original_context: 8192.0,
        };
        let plain = frequencies(64, 500_000.0, RopeScaling::None);
        let scaled = frequencies(64, 500_000.0, scaling);
        let mut factors: Vec<f32> = plain.iter().zip(&scaled).map(|(a, b)| a / b).collect();
        assert_eq!(scaling_of(&factors, 64, 500_000.0), Ok(scaling));
        assert_eq!(scaling_of(&[1.0; 32], 64, 1e4), Ok(RopeScaling::None));
        factors[15] *= 1.1;
        assert!(scaling_of(&factors, 64, 500_000.0).is_err());
        assert!(scaling_of(&factors[..31], 64, 500_000.0).is_err());
    }

    #[test]
    fn linear_scaling_divides_all_frequencies() {
        let (plain, scaled) = (
            frequencies(4, 10_000.0, RopeScaling::None),
            frequencies(4, 10_000.0, RopeScaling::Linear { factor: 4.0 }),
        );
        assert_eq!(plain, [1.0, 0.01]);
        assert_eq!(scaled, [0.25, 0.0025]);
    }

    #[test]
    fn alibi_slopes_equal_the_published_ones() {
        assert_eq!(
            alibi_slopes(8, 8.0),
            [
                0.5,
                0.25,
                0.125,
                0.0625,
                0.03125,
                0.015_625,
                0.007_812_5,
                0.003_906_25
            ]
        );
        // 6 heads: of the 8 slopes above, the 2nd, 4th, 6th, 8th, then the 1st and 3rd.
        assert_eq!(
            alibi_slopes(6, 8.0),
            [0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125]
        );
        assert_eq!(alibi_slopes(1, 8.0), [0.003_906_25]);
        assert_eq!(alibi_slopes(2, 16.0), [0.003_906_25, 1.525_878_9e-5]);
    }
}
