//! From rows of logits and of hidden states to a step's output: which row is sampled, and by whom, which is scored, which
//! is summed.

use super::batch::WantedRow;
use crate::backend::{Draw, NOT_FINITE};
use crate::plan::{Logits, StepPlan};
use crate::request::{SequenceError, TokenLogprob};
use crate::runner::{PoolRows, SampleRow, Sampled, ScoreRows, StepError, StepOutput};
use crate::sampler;

/// Every row to be sampled, scored or summed must be among the rows that the plan asks for.
pub(super) fn check_wanted(
    plan: &StepPlan,
    samples: &[SampleRow<'_>],
    scores: &[ScoreRows<'_>],
    pools: &[PoolRows<'_>],
) -> Result<(), StepError> {
    let span = |index: usize| {
        plan.spans
            .get(index)
            .ok_or_else(|| StepError::Broken(format!("the plan has no span {index}")))
    };
    for sample in samples {
        if !matches!(span(sample.span)?.logits, Logits::Last | Logits::All) {
            return Err(StepError::Broken(format!(
                "span {} is to be sampled and asks for no logits",
                sample.span
            )));
        }
    }
    for score in scores {
        let span_of = span(score.span)?;
        if span_of.logits != Logits::All || score.targets.len() > span_of.len as usize {
            return Err(StepError::Broken(format!(
                "span {} cannot score {} rows",
                score.span,
                score.targets.len()
            )));
        }
    }
    for pool in pools {
        if span(pool.span)?.logits != Logits::Hidden {
            return Err(StepError::Broken(format!(
                "span {} is to be summed and asks for no hidden states",
                pool.span
            )));
        }
    }
    Ok(())
}

/// What becomes of the rows of logits of one step.
pub(super) struct Outputs<'a> {
    samples: &'a [SampleRow<'a>],
    scores: &'a [ScoreRows<'a>],
    pools: &'a [PoolRows<'a>],
    pending: Pending,
    scratch: Vec<f32>,
}

/// A step's output, with the tokens that the device still draws left open.
#[derive(Default)]
pub(super) struct Pending {
    sampled: Vec<Choice>,
    scored: Vec<Result<Vec<TokenLogprob>, SequenceError>>,
    pooled: Vec<Vec<f64>>,
    /// How many tokens the device draws.
    pub draws: usize,
}

/// A token to be chosen.
enum Choice {
    /// Its row of logits has not been seen.
    Open,
    /// The host chose it.
    Made(Result<Sampled, SequenceError>),
    /// The device draws it, as this one of the step's.
    Drawn(usize),
}

impl<'a> Outputs<'a> {
    /// Keeps what becomes of the rows in `pending`, whatever an earlier step left there.
    pub fn new(
        samples: &'a [SampleRow<'a>],
        scores: &'a [ScoreRows<'a>],
        pools: &'a [PoolRows<'a>],
        mut pending: Pending,
        scratch: Vec<f32>,
    ) -> Outputs<'a> {
        let Pending {
            sampled,
            scored,
            pooled,
            draws,
        } = &mut pending;
        sampled.clear();
        sampled.extend(samples.iter().map(|_| Choice::Open));
        let scores_of = |score: &ScoreRows<'_>| Ok(Vec::with_capacity(score.targets.len()));
        scored.clear();
        scored.extend(scores.iter().map(scores_of));
        pooled.clear();
        pooled.extend(pools.iter().map(|pool| pool.sum.to_vec()));
        *draws = 0;
        Outputs {
            samples,
            scores,
            pools,
            pending,
            scratch,
        }
    }

    /// Lists the tokens that a device can draw from some wanted rows. A span that is scored is the host's: it reads it
    /// anyway.
    pub fn draw_rows(&mut self, wanted: &[WantedRow], draws: &mut Vec<Draw>) {
        let Pending {
            sampled,
            draws: count,
            ..
        } = &mut self.pending;
        for (sample, choice) in self.samples.iter().zip(sampled) {
            let scored = self.scores.iter().any(|score| score.span == sample.span);
            let row = last_row(wanted, sample.span).filter(|_| !scored);
            if let Some(draw) = row.and_then(|row| sampler::draw(sample, row as u32)) {
                draws.push(draw);
                *choice = Choice::Drawn(*count);
                *count += 1;
            }
        }
    }

    /// How many of these rows, from the first on, hold all that the host must see.
    pub fn rows_read(&self, wanted: &[WantedRow]) -> usize {
        let choices = self.samples.iter().zip(&self.pending.sampled);
        let open = choices.filter(|(_, choice)| matches!(choice, Choice::Open));
        let sampled = open.filter_map(|(sample, _)| last_row(wanted, sample.span));
        let scored = self.scores.iter().filter_map(|score| {
            let is_scored =
                |row: &WantedRow| row.span == score.span && row.token < score.targets.len();
            wanted.iter().rposition(is_scored)
        });
        sampled.chain(scored).max().map_or(0, |last| last + 1)
    }

    pub fn take_row(&mut self, row: WantedRow, logits: &[f32]) {
        let Pending {
            sampled, scored, ..
        } = &mut self.pending;
        for (score, out) in self.scores.iter().zip(scored) {
            if score.span != row.span {
                continue;
            }
            if let (Ok(values), Some(target)) = (out.as_mut(), score.targets.get(row.token)) {
                match sampler::score(logits, *target, score.top) {
                    Ok(value) => values.push(value),
                    Err(error) => *out = Err(error),
                }
            }
        }
        for (sample, choice) in self.samples.iter().zip(sampled) {
            if row.last && sample.span == row.span && matches!(choice, Choice::Open) {
                // Candidates may share a row, and sampling changes it.
                self.scratch.clear();
                self.scratch.extend_from_slice(logits);
                *choice = Choice::Made(sampler::sample(&mut self.scratch, sample));
            }
        }
    }

    /// Adds a token's hidden state to its span's sum; tokens come in order.
    pub fn take_hidden(&mut self, span: usize, hidden: &[f32]) {
        for (_, sum) in self
            .pools
            .iter()
            .zip(&mut self.pending.pooled)
            .filter(|(pool, _)| pool.span == span)
        {
            sum.resize(hidden.len(), 0.0);
            for (sum, value) in sum.iter_mut().zip(hidden) {
                *sum += f64::from(*value);
            }
        }
    }

    pub fn finish(self) -> (Pending, Vec<f32>) {
        (self.pending, self.scratch)
    }
}

/// Where a span's last row lies among wanted rows, which are in the order of the spans.
fn last_row(wanted: &[WantedRow], span: usize) -> Option<usize> {
    let after = wanted.partition_point(|row| row.span <= span);
    let row = after.checked_sub(1)?;
    (wanted[row].span == span && wanted[row].last).then_some(row)
}

impl Pending {
    /// Moves everything to `output`, in place of what is there, with the tokens that the device drew for it.
    pub fn finish(&mut self, drawn: &[u32], output: &mut StepOutput) {
        let token = |choice| match choice {
            Choice::Made(sampled) => sampled,
            Choice::Drawn(at) => match drawn[at] {
                NOT_FINITE => Err(SequenceError::NotFinite),
                id => Ok(Sampled { id, logprob: None }),
            },
            Choice::Open => Err(SequenceError::Engine(
                "the step gave no logits for this sequence".to_owned(),
            )),
        };
        let StepOutput {
            samples,
            scores,
            pools,
        } = output;
        samples.clear();
        samples.extend(self.sampled.drain(..).map(token));
        scores.clear();
        scores.append(&mut self.scored);
        pools.clear();
        pools.extend(self.pooled.drain(..).map(finite));
    }
}

fn finite(sum: Vec<f64>) -> Result<Vec<f64>, SequenceError> {
    if sum.iter().all(|value| value.is_finite()) {
        Ok(sum)
    } else {
        Err(SequenceError::NotFinite)
    }
}
