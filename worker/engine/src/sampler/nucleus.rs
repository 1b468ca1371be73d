//! Which tokens `top_k`, `top_p` and `min_p` leave, and the draw among them.
//!
//! Only what may be left is sorted. What `top_p` cuts off is found first by adding weights in buckets of like logits, in any
//! order; the sums that decide are then added in falling order, as the sampler's rules say.

use super::rank::{self, Key, logit};
use super::softmax::{Softmax, ln};
use crate::backend::Draw;
use crate::backend::cpu::Isa;

/// From this many tokens on, sorting them costs more than looking for those that need no sorting.
const NARROW_MIN: usize = 512;
/// Buckets of like logits.
const BUCKETS: usize = 1024;
/// Far more than sums in any order can differ by, relative to their size.
const DOUBT: f64 = 1e-9;

/// The tokens that are left, with their weights. Kept between calls for its memory.
#[derive(Default)]
pub(super) struct Kept {
    keys: Vec<Key>,
    spare: Vec<Key>,
    weights: Vec<f32>,
    least_weight: f32,
    maxima: Vec<f32>,
    buckets: Vec<u16>,
}

impl Kept {
    /// The `count` best tokens, or all when there are fewer, in falling order.
    pub(super) fn rank(
        &mut self,
        logits: &[f32],
        count: usize,
    ) -> impl Iterator<Item = (u32, f32)> {
        rank::rank(logits, count, &mut self.keys, &mut self.maxima);
        self.keys.iter().map(|&key| (rank::id(key), logit(key)))
    }

    /// Keeps the tokens that pass `top_k`, `top_p` and `min_p`.
    pub(super) fn keep(&mut self, softmax: &Softmax, logits: &[f32], draw: &Draw) {
        let top_p = f64::from(draw.top_p);
        self.least_weight = 0.0;
        if draw.top_k > 0 {
            rank::rank(
                logits,
                draw.top_k as usize,
                &mut self.keys,
                &mut self.maxima,
            );
            self.weigh(softmax);
            if draw.top_p < 1.0 {
                self.cut(top_p * self.sum());
            }
        } else if draw.top_p < 1.0 {
            // Tokens that each hold less than an equal part of what may be cut off are cut off all together.
            let sum = softmax.sum(logits);
            let least = least(softmax, sum * (1.0 - top_p) / logits.len() as f64);
            rank::collect(logits, least, &mut self.keys);
            if self.keys.len() > NARROW_MIN {
                self.narrow(softmax, least, top_p * sum);
            }
            rank::sort(&mut self.keys, &mut self.spare);
            self.weigh(softmax);
            self.cut(top_p * sum);
        } else {
            let least = least(softmax, f64::from(draw.min_p));
            rank::collect(logits, least, &mut self.keys);
            self.weigh(softmax);
        }
        self.least_weight = draw.min_p.max(0.0);
    }

    /// The token at which the running sum exceeds the share `u` of all.
    pub(super) fn draw(&self, u: f64) -> Option<u32> {
        let mut left = u * self.sum();
        for (key, weight) in self.keys.iter().zip(&self.weights) {
            if *weight < self.least_weight {
                continue;
            }
            if left < f64::from(*weight) {
                return Some(rank::id(*key));
            }
            left -= f64::from(*weight);
        }
        None
    }

    fn sum(&self) -> f64 {
        let weights = self.weights.iter();
        weights
            .filter(|weight| **weight >= self.least_weight)
            .map(|weight| f64::from(*weight))
            .sum()
    }

    fn weigh(&mut self, softmax: &Softmax) {
        self.weights.clear();
        self.weights.resize(self.keys.len(), 0.0);
        let (keys, weights) = (&self.keys, &mut self.weights);
        Isa::detect().vectorise(|| {
            for (weight, key) in weights.iter_mut().zip(keys) {
                *weight = softmax.weight(logit(*key));
            }
        });
    }

    /// Cuts ranked tokens after the first at which their sum reaches `share`.
    fn cut(&mut self, share: f64) {
        let mut sum = 0.0;
        let reached = self.weights.iter().position(|weight| {
            sum += f64::from(*weight);
            sum >= share
        });
        if let Some(at) = reached {
            self.keys.truncate(at + 1);
            self.weights.truncate(at + 1);
        }
    }

    /// Drops tokens, of those of at least `least`, that come after the sum has reached `share` beyond doubt.
    fn narrow(&mut self, softmax: &Softmax, least: f32, share: f64) {
        self.weigh(softmax);
        self.buckets.clear();
        self.buckets.resize(self.keys.len(), 0);
        let (keys, buckets) = (&self.keys, &mut self.buckets);
        let width = (softmax.max - least) / (BUCKETS - 1) as f32;
        Isa::detect().vectorise(|| {
            for (bucket, key) in buckets.iter_mut().zip(keys) {
                // Each operation keeps the order, so a lower bucket holds larger logits.
                let number = (softmax.max - logit(*key)) / width;
                *bucket = (number as u32).min(BUCKETS as u32 - 1) as u16;
            }
        });
        let mut sums = [0.0f64; BUCKETS];
        for (bucket, weight) in self.buckets.iter().zip(&self.weights) {
            sums[usize::from(*bucket)] += f64::from(*weight);
        }
        let mut sum = 0.0;
        let reached = sums.iter().position(|of_bucket| {
            sum += of_bucket;
            sum > share * (1.0 + DOUBT)
        });
        if let Some(last) = reached {
            let mut buckets = self.buckets.iter();
            self.keys.retain(|_| {
                buckets
                    .next()
                    .is_some_and(|bucket| usize::from(*bucket) <= last)
            });
        }
    }
}

/// The least logit that can have this weight, with some room for rounding.
fn least(softmax: &Softmax, weight: f64) -> f32 {
    (f64::from(softmax.max) + (ln(weight) - 0.01) / f64::from(softmax.scale)) as f32
}
