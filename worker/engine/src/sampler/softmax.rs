//! Exponentials, logarithms and sums that give the same bits on every machine.
//!
//! The C library's `exp` and `log` differ between versions and processors; these are plain arithmetic in one order.

use crate::backend::cpu::Isa;

/// `e^x` for `x <= 0` (0 below -87), to about one unit in the last place. Written without branches, so that loops over
/// it become vector code.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LEAST: f32 = -87.0;
    // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few bits that its products with small whole numbers are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > LEAST { x } else { LEAST };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let whole = rounded - ROUND;
    let r = (clamped - whole * LN_2_HIGH) - whole * LN_2_LOW;
    // Cephes' polynomial for e^r on |r| <= ln 2 / 2.
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let value = (p * r * r + r) + 1.0;
    let two_to_whole = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LEAST { 0.0 } else { value * two_to_whole }
}

/// Natural logarithm of a normal positive number.
pub fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa /= 2.0;
        exponent += 1;
    }
    // ln m = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...), |s| < 0.172.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let series = (0..12)
        .rev()
        .fold(0.0, |sum, i| sum * square + 1.0 / f64::from(2 * i + 1));
    2.0 * s * series + exponent as f64 * std::f64::consts::LN_2
}

/// Probabilities are summed in runs of this many tokens before one is looked into.
const RUN: usize = 256;

/// Weights computed at a time: a plain loop over memory is what becomes vector code.
const BLOCK: usize = 64;

/// Sums that run side by side.
const LANES: usize = 8;

/// Weights relative to the most probable token's.
pub struct Softmax {
    /// The largest logit.
    pub max: f32,
    /// One over the temperature.
    pub scale: f32,
}

impl Softmax {
    /// `e^((x - max) * scale)`.
    #[inline(always)]
    pub fn weight(&self, x: f32) -> f32 {
        exp((x - self.max) * self.scale)
    }

    /// Sum of a row's weights, in f64: number `i` goes to sum `i % 8`, and those are added in order.
    pub fn sum(&self, row: &[f32]) -> f64 {
        Isa::detect().vectorise(|| self.sum_run(row))
    }

    #[inline(always)]
    fn sum_run(&self, row: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (blocks, rest) = row.as_chunks::<BLOCK>();
        for block in blocks {
            add(&block.map(|x| self.weight(x)), &mut lanes);
        }
        let mut weights = [0.0; BLOCK];
        for (weight, &x) in weights.iter_mut().zip(rest) {
            *weight = self.weight(x);
        }
        add(&weights, &mut lanes);
        lanes.into_iter().sum()
    }

    /// The token of the whole row at which the running sum exceeds the share `u` of all. `sums` is scratch memory.
    pub fn draw_from_row(&self, logits: &[f32], u: f64, sums: &mut Vec<f64>) -> Option<u32> {
        sums.clear();
        Isa::detect().vectorise(|| sums.extend(logits.chunks(RUN).map(|run| self.sum_run(run))));
        let mut left = u * sums.iter().sum::<f64>();
        for (at, sum) in sums.iter().enumerate() {
            if left < *sum {
                for (id, &x) in (at * RUN..).zip(&logits[at * RUN..]).take(RUN) {
                    let weight = f64::from(self.weight(x));
                    if left < weight {
                        return Some(id as u32);
                    }
                    left -= weight;
                }
                return None;
            }
            left -= sum;
        }
        None
    }
}

/// Adds each weight to its sum.
#[inline(always)]
fn add(weights: &[f32; BLOCK], lanes: &mut [f64; LANES]) {
    let (groups, _) = weights.as_chunks::<LANES>();
    for group in groups {
        for (lane, &weight) in lanes.iter_mut().zip(group) {
            *lane += f64::from(weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_the_last_places() {
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let (got, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!(
                (got / expected - 1.0).abs() < 2.5e-7,
                "exp({x}) is {got}, expected {expected}"
            );
        }
        assert_eq!(
            (exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)),
            (1.0, 0.0, 0.0)
        );
    }

    #[test]
    fn ln_is_right_to_the_last_places() {
        for i in 1..100_000 {
            let x = f64::from(i) * 0.37;
            assert!(
                (ln(x) - x.ln()).abs() < 1e-14 * x.ln().abs().max(1.0),
                "ln({x}) is {}, expected {}",
                ln(x),
                x.ln()
            );
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn a_sum_counts_every_place_once() {
        for len in 0..200 {
            let expected = len as f64;
            let softmax = Softmax {
                max: 2.5,
                scale: 0.7,
            };
            assert_eq!(softmax.sum(&vec![2.5; len]), expected);
        }
    }
}
