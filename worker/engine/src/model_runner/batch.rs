//! From a plan to a batch: the check, and the flat form that backends read.

use crate::backend::{Batch, BatchSpan};
use crate::plan::{BLOCK_TOKENS, DEVICE_SLOT, Logits, Span, StepPlan};
use crate::runner::{Geometry, StepError};

/// A row of logits that a plan asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedRow {
    /// Index of the span in the plan.
    pub span: usize,
    /// Index of the token in the span.
    pub token: usize,
    /// Whether it is the span's last.
    pub last: bool,
}

/// Refuses a plan that does not fit the model or the cache: after this nothing indexes out of bounds.
pub(super) fn check(
    plan: &StepPlan,
    geometry: &Geometry,
    generation: u64,
) -> Result<(), StepError> {
    let refuse = |reason: String| Err(StepError::Broken(reason));
    if plan.generation != generation {
        return refuse(format!(
            "a plan of generation {} came to generation {}",
            plan.generation, generation
        ));
    }
    let mut tokens = 0usize;
    for (i, span) in plan.spans.iter().enumerate() {
        let end = u64::from(span.position) + u64::from(span.len);
        if span.len == 0 || end > u64::from(geometry.context_max) {
            return refuse(format!(
                "span {i} of {} tokens from position {} does not fit the context",
                span.len, span.position
            ));
        }
        if ((span.blocks.len() * BLOCK_TOKENS) as u64) < end {
            return refuse(format!(
                "span {i} ends at position {end}, past its {} blocks",
                span.blocks.len()
            ));
        }
        tokens += span.len as usize;
    }
    if plan.tokens.is_empty() || tokens != plan.tokens.len() {
        return refuse(format!(
            "the plan has {} tokens, its spans {tokens}",
            plan.tokens.len()
        ));
    }
    if let Some(token) = plan.tokens.iter().find(|token| **token & DEVICE_SLOT != 0) {
        return refuse(format!(
            "the plan names the device slot {token:#x}, which this runner does not have"
        ));
    }
    plan.check(geometry)
        .map_err(|error| StepError::Broken(error.to_string()))
}

/// How many rows a step has of which every span is one token that wants its last logits, if they are at most `rows_max`:
/// then a backend may record it. Depends on the plan alone, so that all ranks do alike.
pub(super) fn decode_rows(plan: &StepPlan, rows_max: usize) -> Option<usize> {
    let rows = plan.spans.len();
    let decodes = |span: &Span| span.len == 1 && span.logits == Logits::Last;
    (rows <= rows_max && plan.spans.iter().all(decodes)).then_some(rows)
}

/// Fills the batch of a step of decodes up to `rows`, with tokens of no sequence.
pub(super) fn pad(batch: &mut Batch, rows: usize) {
    let blocks = batch.blocks.len();
    for row in batch.len()..rows {
        batch.tokens.push(0);
        batch.positions.push(0);
        batch.spans.push(BatchSpan {
            rows: row..row + 1,
            position: 0,
            blocks: blocks..blocks,
        });
    }
}

/// Turns a checked plan into the batch, and lists the rows of logits that it asks for. Vectors keep their memory.
pub(super) fn fill(batch: &mut Batch, wanted: &mut Vec<WantedRow>, plan: &StepPlan) {
    let Batch {
        tokens,
        positions,
        spans,
        blocks,
    } = batch;
    tokens.clear();
    tokens.extend_from_slice(&plan.tokens);
    positions.clear();
    spans.clear();
    blocks.clear();
    wanted.clear();
    for (i, span) in plan.spans.iter().enumerate() {
        let (row, len, block) = (positions.len(), span.len as usize, blocks.len());
        positions.extend(span.position..span.position + span.len);
        blocks.extend_from_slice(&span.blocks);
        spans.push(BatchSpan {
            rows: row..row + len,
            position: span.position as usize,
            blocks: block..blocks.len(),
        });
        let first = match span.logits {
            Logits::None | Logits::Hidden => len,
            Logits::Last => len - 1,
            Logits::All => 0,
        };
        wanted.extend((first..len).map(|token| WantedRow {
            span: i,
            token,
            last: token + 1 == len,
        }));
    }
}
