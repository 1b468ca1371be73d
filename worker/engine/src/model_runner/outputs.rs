//! From rows of logits and of hidden states to a step's output: which row is sampled, which is scored, which is summed.

use super::batch::WantedRow;
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
    sampled: Vec<Option<Result<Sampled, SequenceError>>>,
    scored: Vec<Result<Vec<TokenLogprob>, SequenceError>>,
    pooled: Vec<Vec<f64>>,
    scratch: Vec<f32>,
}

impl<'a> Outputs<'a> {
    pub fn new(
        samples: &'a [SampleRow<'a>],
        scores: &'a [ScoreRows<'a>],
        pools: &'a [PoolRows<'a>],
        scratch: Vec<f32>,
    ) -> Outputs<'a> {
        let scored = scores
            .iter()
            .map(|score| Ok(Vec::with_capacity(score.targets.len())))
            .collect();
        Outputs {
            samples,
            scores,
            pools,
            pooled: pools.iter().map(|pool| pool.sum.to_vec()).collect(),
            sampled: samples.iter().map(|_| None).collect(),
            scored,
            scratch,
        }
    }

    pub fn take_row(&mut self, row: WantedRow, logits: &[f32]) {
        for (score, out) in self.scores.iter().zip(&mut self.scored) {
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
        for (sample, out) in self.samples.iter().zip(&mut self.sampled) {
            if row.last && sample.span == row.span {
                // Candidates may share a row, and sampling changes it.
                self.scratch.clear();
                self.scratch.extend_from_slice(logits);
                *out = Some(sampler::sample(&mut self.scratch, sample));
            }
        }
    }

    /// Adds a token's hidden state to its span's sum; tokens come in order.
    pub fn take_hidden(&mut self, span: usize, hidden: &[f32]) {
        for (_, sum) in self
            .pools
            .iter()
            .zip(&mut self.pooled)
            .filter(|(pool, _)| pool.span == span)
        {
            sum.resize(hidden.len(), 0.0);
            for (sum, value) in sum.iter_mut().zip(hidden) {
                *sum += f64::from(*value);
            }
        }
    }

    pub fn finish(self) -> (StepOutput, Vec<f32>) {
        let missed = || {
            Err(SequenceError::Engine(
                "the step gave no logits for this sequence".to_owned(),
            ))
        };
        let samples = self
            .sampled
            .into_iter()
            .map(|sampled| sampled.unwrap_or_else(missed))
            .collect();
        (
            StepOutput {
                samples,
                scores: self.scored,
                pools: self.pooled.into_iter().map(finite).collect(),
            },
            self.scratch,
        )
    }
}

fn finite(sum: Vec<f64>) -> Result<Vec<f64>, SequenceError> {
    if sum.iter().all(|value| value.is_finite()) {
        Ok(sum)
    } else {
        Err(SequenceError::NotFinite)
    }
}
