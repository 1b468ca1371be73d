//! The tokens of one step and where their K and V live, as a backend sees them.

use std::ops::Range;

/// The flat ragged batch of a step: the tokens of all spans, one after another, no padding. Checked against the cache
/// and the vocabulary by the runner before a backend sees it.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Input ids.
    pub tokens: Vec<u32>,
    /// Each token's position in its sequence.
    pub positions: Vec<u32>,
    /// Which tokens belong to which sequence; in the order of the tokens.
    pub spans: Vec<BatchSpan>,
    /// The block tables of all spans, one after another.
    pub blocks: Vec<u32>,
}

/// Consecutive tokens of one sequence in a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSpan {
    /// Its tokens, as rows of the batch.
    pub rows: Range<usize>,
    /// Position of its first token.
    pub position: usize,
    /// Its block table in [`Batch::blocks`]: entry `i` holds the positions `16 i .. 16 i + 16`.
    pub blocks: Range<usize>,
}

impl Batch {
    /// Tokens of the step.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the step has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// A span's block table.
    #[must_use]
    pub fn blocks_of(&self, span: &BatchSpan) -> &[u32] {
        &self.blocks[span.blocks.clone()]
    }
}
