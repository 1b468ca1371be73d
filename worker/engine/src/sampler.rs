//! From a row of logits to a token: a pure function of its arguments, equal bit for bit on every machine.
//!
//! In this order, on the row `x` of one position:
//! 1. A row with NaN or an infinity is [`SequenceError::NotFinite`].
//! 2. Log-probabilities, when asked for, are those of the raw row: `x[i] - max - ln(sum e^(x - max))`.
//! 3. Tokens that the row's mask does not allow get `x[i] = -infinity`, and nothing below gives them back.
//! 4. `x[i] += bias` for each entry of `logit_bias`.
//! 5. `repetition_penalty` r, for each token in prompt or outputs: `x[i] = x[i] > 0 ? x[i] / r : x[i] * r`.
//! 6. For each token that the outputs hold c > 0 times: `x[i] -= c * frequency_penalty + presence_penalty`.
//! 7. Temperature 0: the token with the largest x; of equals, the lowest id. Done.
//! 8. Probabilities are proportional to `e^((x[i] - max) / temperature)`.
//! 9. `top_k` k > 0: the k most probable tokens stay (of equals, the lower ids).
//! 10. `top_p` p < 1: of these, the fewest most probable ones whose share of their sum is at least p; one at least.
//! 11. `min_p` m > 0: of these, those at least m times as probable as the most probable one.
//! 12. The first token (by falling probability, or by id where nothing was sorted) at which the running sum exceeds
//!     `u * total`; u is drawn by [`random::uniform`] from seed, candidate and output index.
//!
//! Reads no clock and keeps no state between calls but scratch memory.

mod nucleus;
pub mod random;
mod rank;
mod softmax;

#[cfg(test)]
mod tests;

use crate::backend::cpu::Isa;
use crate::backend::{Draw, NOT_FINITE};
use crate::request::{Sampling, SequenceError, TokenLogprob};
use crate::runner::{SampleRow, Sampled};
use nucleus::Kept;
use rank::argmax;
use softmax::{Softmax, ln};
use std::cell::RefCell;

/// Chooses the next token from `logits`, the full vocabulary's row, which is left changed by biases and penalties.
///
/// # Errors
/// [`SequenceError::NotFinite`] when the row holds NaN or an infinity; [`SequenceError::Invalid`] when it is empty;
/// [`SequenceError::Mask`] when the mask fails or allows nothing.
pub fn sample(logits: &mut [f32], row: &SampleRow<'_>) -> Result<Sampled, SequenceError> {
    check(logits)?;
    SCRATCH.with_borrow_mut(|scratch| {
        let raw = row
            .sampling
            .logprobs
            .map(|top| RawRow::of(logits, top, &mut scratch.kept));
        if let Some(mask) = row.mask {
            mask.restrict(logits)?;
        }
        adjust(logits, row, scratch);
        let id = pick(logits, &draw_of(row, 0), scratch);
        let raw_logit = |id: u32| {
            let changed = scratch.raw.iter().find(|(changed, _)| *changed == id);
            changed.map_or(logits[id as usize], |&(_, x)| x)
        };
        let logprob = raw.map(|raw| raw.of_token(id, raw_logit(id)));
        Ok(Sampled { id, logprob })
    })
}

/// How a device is to choose the same token from row `at` of its logits, where the steps 1 and 7 to 12 are all there is.
/// Whether they are is the sequence's own matter: which rows it shares a step with never decides who chooses.
#[must_use]
pub fn draw(row: &SampleRow<'_>, at: u32) -> Option<Draw> {
    let sampling = row.sampling;
    let plain = row.mask.is_none()
        && sampling.logprobs.is_none()
        && sampling.logit_bias.is_empty()
        && !penalises(sampling);
    plain.then(|| draw_of(row, at))
}

/// The token that a device must choose for a draw from this row of logits; [`NOT_FINITE`] where it has none.
#[must_use]
pub fn choose(logits: &[f32], draw: &Draw) -> u32 {
    match check(logits) {
        Ok(()) => SCRATCH.with_borrow_mut(|scratch| pick(logits, draw, scratch)),
        Err(_) => NOT_FINITE,
    }
}

/// Log-probability of `target` in the row, with the `top` most probable tokens.
///
/// # Errors
/// As for [`sample`]; [`SequenceError::Invalid`] also when `target` is outside the row.
pub fn score(logits: &[f32], target: u32, top: u32) -> Result<TokenLogprob, SequenceError> {
    check(logits)?;
    if target as usize >= logits.len() {
        return Err(SequenceError::Invalid(format!(
            "token {target} is outside the vocabulary of {}",
            logits.len()
        )));
    }
    let raw = SCRATCH.with_borrow_mut(|scratch| RawRow::of(logits, top, &mut scratch.kept));
    Ok(raw.of_token(target, logits[target as usize]))
}

/// Memory kept between calls, so that a token costs no allocation.
#[derive(Default)]
struct Scratch {
    kept: Kept,
    sums: Vec<f64>,
    /// Tokens changed by biases and penalties, with their raw logits.
    raw: Vec<(u32, f32)>,
    /// Per token: occurrences in the outputs, and [`IN_PROMPT`]. All 0 between calls.
    counts: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The bit of a count that says that the prompt holds the token.
const IN_PROMPT: u32 = 1 << 31;

fn check(logits: &[f32]) -> Result<(), SequenceError> {
    const EXPONENT: u32 = f32::INFINITY.to_bits();
    if logits.is_empty() {
        return Err(SequenceError::Invalid("the row of logits is empty".into()));
    }
    // No early return: so it is vector code.
    let bad = Isa::detect().vectorise(|| {
        let is_bad = |x: &f32| u32::from(x.to_bits() & EXPONENT == EXPONENT);
        logits.iter().fold(0, |bad, x| bad | is_bad(x)) != 0
    });
    if bad {
        Err(SequenceError::NotFinite)
    } else {
        Ok(())
    }
}

/// What log-probabilities need to know of a raw row.
struct RawRow {
    max: f32,
    ln_sum: f64,
    top: Vec<(u32, f32)>,
}

impl RawRow {
    fn of(logits: &[f32], top: u32, kept: &mut Kept) -> Self {
        let max = logits[argmax(logits)];
        let mut row = RawRow {
            max,
            ln_sum: ln(Softmax { max, scale: 1.0 }.sum(logits)),
            top: Vec::new(),
        };
        if top > 0 {
            let best = kept.rank(logits, top as usize);
            row.top = best.map(|(id, x)| (id, row.logprob(x))).collect();
        }
        row
    }

    fn logprob(&self, x: f32) -> f32 {
        (f64::from(x) - f64::from(self.max) - self.ln_sum) as f32
    }

    fn of_token(self, id: u32, x: f32) -> TokenLogprob {
        TokenLogprob {
            id,
            logprob: self.logprob(x),
            top: self.top,
        }
    }
}

fn adjust(logits: &mut [f32], row: &SampleRow<'_>, scratch: &mut Scratch) {
    let Sampling {
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        ..
    } = row.sampling;
    let Scratch { raw, counts, .. } = scratch;
    raw.clear();
    for &(id, bias) in logit_bias {
        if let Some(x) = logits.get_mut(id as usize) {
            raw.push((id, *x));
            *x += bias;
        }
    }
    let prompt = if *repetition_penalty == 1.0 {
        &[]
    } else {
        row.prompt
    };
    if !penalises(row.sampling) {
        return;
    }
    if counts.len() < logits.len() {
        counts.resize(logits.len(), 0);
    }
    let known = |id: &&u32| (**id as usize) < logits.len();
    prompt
        .iter()
        .filter(known)
        .for_each(|&id| counts[id as usize] = IN_PROMPT);
    row.outputs
        .iter()
        .filter(known)
        .for_each(|&id| counts[id as usize] += 1);
    for &id in prompt.iter().chain(row.outputs) {
        let Some(x) = logits.get_mut(id as usize) else {
            continue;
        };
        let count = std::mem::take(&mut counts[id as usize]);
        if count == 0 {
            continue;
        }
        raw.push((id, *x));
        *x = if *x > 0.0 {
            *x / repetition_penalty
        } else {
            *x * repetition_penalty
        };
        let outputs = count & !IN_PROMPT;
        if outputs > 0 {
            *x -= outputs as f32 * frequency_penalty + presence_penalty;
        }
    }
}

fn penalises(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0
        || sampling.presence_penalty != 0.0
        || sampling.frequency_penalty != 0.0
}

fn draw_of(row: &SampleRow<'_>, at: u32) -> Draw {
    let Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        ..
    } = *row.sampling;
    Draw {
        row: at,
        temperature,
        top_k,
        top_p,
        min_p,
        u: random::uniform(seed, row.candidate, row.output_index),
    }
}

/// Steps 7 to 12.
fn pick(logits: &[f32], draw: &Draw, scratch: &mut Scratch) -> u32 {
    let best = argmax(logits);
    let Draw {
        temperature,
        top_k,
        top_p,
        min_p,
        u,
        ..
    } = *draw;
    if temperature == 0.0 {
        return best as u32;
    }
    // The bound keeps 0 * scale from being NaN at the smallest temperatures.
    let softmax = Softmax {
        max: logits[best],
        scale: (1.0 / temperature).min(1e30),
    };
    let id = if top_k == 0 && top_p >= 1.0 && min_p <= 0.0 {
        softmax.draw_from_row(logits, u, &mut scratch.sums)
    } else {
        scratch.kept.keep(&softmax, logits, draw);
        scratch.kept.draw(u)
    };
    // Rounding may leave the running sum short of the last draw.
    id.unwrap_or(best as u32)
}
