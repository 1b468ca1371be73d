//! From rows of logits to a step's output: which row is sampled, which is scored.

use super::batch::WantedRow;
use crate::plan::{Logits, StepPlan};
use crate::request::{SequenceError, TokenLogprob};
use crate::runner::{SampleRow, Sampled, ScoreRows, StepError, StepOutput};
use crate::sampler;

/// Every row to be sampled or scored must be among the rows that the plan asks for.
pub(super) fn check_wanted(
    plan: &StepPlan,
    samples: &[SampleRow<'_>],
    scores: &[ScoreRows<'_>],
) -> Result<(), StepError> {
    let span = |index: usize| {
        plan.spans
            .get(index)
            .ok_or_else(|| StepError::Broken(format!("the plan has no span {index}")))
    };
    for sample in samples {
        if span(sample.span)?.logits == Logits::None {
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
    Ok(())
}

/// What becomes of the rows of logits of one step.
pub(super) struct Outputs<'a> {
    samples: &'a [SampleRow<'a>],
    scores: &'a [ScoreRows<'a>],
    sampled: Vec<Option<Result<Sampled, SequenceError>>>,
    scored: Vec<Result<Vec<TokenLogprob>, SequenceError>>,
    scratch: Vec<f32>,
}

impl<'a> Outputs<'a> {
    pub fn new(
        samples: &'a [SampleRow<'a>],
        scores: &'a [ScoreRows<'a>],
        scratch: Vec<f32>,
    ) -> Outputs<'a> {
        let scored = scores
            .iter()
            .map(|score| Ok(Vec::with_capacity(score.targets.len())))
            .collect();
        Outputs {
            samples,
            scores,
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
            },
            self.scratch,
        )
    }
}
