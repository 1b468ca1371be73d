//! The plan of one step: which tokens of which sequences run, where their K and V live, which logits are wanted.
//!
//! The leader's scheduler makes it; every rank executes the same plan. It has a fixed byte layout of its own, so that
//! ranks need no wire format: little-endian u32 words, see [`StepPlan::encode`]. Knows nothing of how a plan travels.

use crate::runner::Geometry;

/// One iteration of the forward pass over a flat ragged batch: prefill chunks and decodes together, no padding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Counts the steps of a generation, from 1.
    pub step: u64,
    /// Generation of the shard group: a plan of another generation is refused.
    pub generation: u64,
    /// Input ids of all spans, one after another. Ids with [`DEVICE_SLOT`] set name the output slot of an earlier,
    /// not yet collected step on the device (unused by the CPU backend).
    pub tokens: Vec<u32>,
    /// The sequences' spans; their lengths sum to `tokens.len()`.
    pub spans: Vec<Span>,
}

/// The bit that marks an input id as a device slot.
pub const DEVICE_SLOT: u32 = 1 << 31;

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Span {
    /// Position of the first token in its sequence.
    pub position: u32,
    /// How many tokens.
    pub len: u32,
    /// Which rows of logits are wanted.
    pub logits: Logits,
    /// The sequence's block table: block `i` holds positions `16*i .. 16*i+16`. Covers all positions up to the span's
    /// end. Blocks behind a sliding window may be [`NULL_BLOCK`].
    pub blocks: Vec<u32>,
}

/// Block 0 is never given out: it stands for "no block".
pub const NULL_BLOCK: u32 = 0;

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 16;

/// Rows of logits that a span asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Logits {
    /// None: a prefill chunk that is not the last.
    #[default]
    None,
    /// The last token's.
    Last,
    /// Every token's: prompt log-probabilities.
    All,
    /// None, but every token's hidden state behind the final norm: embeddings.
    Hidden,
}

/// Why bytes are not a plan, or a plan is not one for this model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The bytes end before the plan does.
    #[error("the plan is cut short: it asks for {asked} more words where {left} are left")]
    Truncated {
        /// Words the plan claims to go on for.
        asked: u64,
        /// Words there are.
        left: u64,
    },
    /// The first word is not [`LAYOUT`].
    #[error(
        "the plan has layout {0}; this rank reads layout {LAYOUT}: run one version on all ranks"
    )]
    Layout(u32),
    /// The words contradict each other or the model's sizes.
    #[error("the plan is malformed: {0}")]
    Malformed(String),
}

/// Number of the byte layout, the plan's first word.
pub const LAYOUT: u32 = 2;

/// Words before the tokens: layout, step (2), generation (2), count of tokens, count of spans.
const HEADER_WORDS: usize = 7;

/// Words of a span before its block table: position, length, logits, count of blocks.
const SPAN_WORDS: usize = 4;

impl StepPlan {
    /// Writes the plan over `out`, little-endian u32 words: layout, step (low, high), generation (low, high), count of
    /// tokens, count of spans; the tokens; then per span position, length, logits (0 none, 1 last, 2 all, 3
    /// hidden states), count of blocks, the blocks.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let blocks: usize = self.spans.iter().map(|span| span.blocks.len()).sum();
        let words = HEADER_WORDS + self.tokens.len() + self.spans.len() * SPAN_WORDS + blocks;
        out.clear();
        out.reserve(words * 4);
        let mut put = |word: u32| out.extend_from_slice(&word.to_le_bytes());
        put(LAYOUT);
        for wide in [self.step, self.generation] {
            put(wide as u32);
            put((wide >> 32) as u32);
        }
        put(self.tokens.len() as u32);
        put(self.spans.len() as u32);
        self.tokens.iter().for_each(|&token| put(token));
        for span in &self.spans {
            put(span.position);
            put(span.len);
            put(match span.logits {
                Logits::None => 0,
                Logits::Last => 1,
                Logits::All => 2,
                Logits::Hidden => 3,
            });
            put(span.blocks.len() as u32);
            span.blocks.iter().for_each(|&block| put(block));
        }
    }

    /// Reads what [`StepPlan::encode`] wrote. Never allocates more than a small multiple of the bytes given.
    ///
    /// # Errors
    /// [`PlanError`] when the bytes are cut short, go on after the plan, are of another layout, or when the spans'
    /// lengths and tables contradict the counts. Sizes of a model are checked by [`StepPlan::check`].
    pub fn decode(bytes: &[u8]) -> Result<StepPlan, PlanError> {
        let mut words = Words::new(bytes)?;
        let layout = words.one()?;
        if layout != LAYOUT {
            return Err(PlanError::Layout(layout));
        }
        let step = words.wide()?;
        let generation = words.wide()?;
        let token_count = words.one()? as usize;
        let span_count = words.one()? as usize;
        let tokens = words.many(token_count)?;
        words.expect_left(span_count as u64 * SPAN_WORDS as u64)?;
        let mut spans = Vec::with_capacity(span_count);
        for _ in 0..span_count {
            spans.push(words.span()?);
        }
        if !words.left.is_empty() {
            return Err(malformed(format!(
                "{} bytes follow its end",
                words.left.len()
            )));
        }
        let plan = StepPlan {
            step,
            generation,
            tokens,
            spans,
        };
        plan.check_shape()?;
        Ok(plan)
    }

    /// Counts and lengths agree with each other.
    fn check_shape(&self) -> Result<(), PlanError> {
        let planned: u64 = self.spans.iter().map(|span| u64::from(span.len)).sum();
        if planned != self.tokens.len() as u64 {
            return Err(malformed(format!(
                "its spans hold {planned} tokens and {} are given",
                self.tokens.len()
            )));
        }
        self.spans.iter().try_for_each(Span::check_shape)
    }

    /// Checks the plan, decoded or made by hand, in itself and against a model's sizes: whoever executes it may then
    /// index without fear.
    ///
    /// # Errors
    /// [`PlanError::Malformed`] names the first contradiction, size exceeded or visible position without a block.
    pub fn check(&self, geometry: &Geometry) -> Result<(), PlanError> {
        self.check_shape()?;
        if self.tokens.len() > geometry.step_tokens_max as usize
            || self.spans.len() > geometry.spans_max as usize
        {
            return Err(malformed(format!(
                "{} tokens in {} spans; this model's step takes {} in {}",
                self.tokens.len(),
                self.spans.len(),
                geometry.step_tokens_max,
                geometry.spans_max
            )));
        }
        let known = |&token: &u32| token < geometry.vocab || token & DEVICE_SLOT != 0;
        if let Some(token) = self.tokens.iter().find(|token| !known(token)) {
            return Err(malformed(format!(
                "token {token} is outside the vocabulary of {}",
                geometry.vocab
            )));
        }
        self.spans.iter().try_for_each(|span| span.check(geometry))
    }
}

impl Span {
    /// Position after the span's last token.
    pub fn end(&self) -> u32 {
        self.position.saturating_add(self.len)
    }

    fn check_shape(&self) -> Result<(), PlanError> {
        let Span {
            position,
            len,
            blocks,
            ..
        } = self;
        let end = u64::from(*position) + u64::from(*len);
        if *len == 0 || end > (blocks.len() * BLOCK_TOKENS) as u64 {
            return Err(malformed(format!(
                "a span of {len} tokens at position {position} in {} blocks",
                blocks.len()
            )));
        }
        Ok(())
    }

    fn check(&self, geometry: &Geometry) -> Result<(), PlanError> {
        if self.end() > geometry.context_max {
            return Err(malformed(format!(
                "position {} is beyond the context of {}",
                self.end(),
                geometry.context_max
            )));
        }
        if let Some(block) = self.blocks.iter().find(|&&block| block >= geometry.blocks) {
            return Err(malformed(format!(
                "block {block} is outside the pool of {}",
                geometry.blocks
            )));
        }
        let visible = first_visible_block(self.position as usize, geometry.window);
        let used = &self.blocks[visible..(self.end() as usize).div_ceil(BLOCK_TOKENS)];
        if used.contains(&NULL_BLOCK) {
            return Err(malformed(format!(
                "a position that token {} sees has no block",
                self.position
            )));
        }
        Ok(())
    }
}

/// Index of the first block that a token at `position` can see: with a sliding window it sees itself and the
/// `window - 1` tokens before, without one everything.
pub fn first_visible_block(position: usize, window: Option<u32>) -> usize {
    match window {
        Some(window) => (position + 1).saturating_sub(window as usize) / BLOCK_TOKENS,
        None => 0,
    }
}

fn malformed(what: String) -> PlanError {
    PlanError::Malformed(what)
}

/// The words not yet read.
struct Words<'a> {
    left: &'a [u8],
}

impl<'a> Words<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, PlanError> {
        match bytes.len() % 4 {
            0 => Ok(Words { left: bytes }),
            _ => Err(malformed(format!(
                "{} bytes are no whole number of words",
                bytes.len()
            ))),
        }
    }

    fn expect_left(&self, asked: u64) -> Result<(), PlanError> {
        let left = (self.left.len() / 4) as u64;
        if asked > left {
            Err(PlanError::Truncated { asked, left })
        } else {
            Ok(())
        }
    }

    fn one(&mut self) -> Result<u32, PlanError> {
        match self.left.split_first_chunk::<4>() {
            Some((word, left)) => {
                self.left = left;
                Ok(u32::from_le_bytes(*word))
            }
            None => Err(PlanError::Truncated { asked: 1, left: 0 }),
        }
    }

    fn wide(&mut self) -> Result<u64, PlanError> {
        Ok(u64::from(self.one()?) | u64::from(self.one()?) << 32)
    }

    fn many(&mut self, count: usize) -> Result<Vec<u32>, PlanError> {
        self.expect_left(count as u64)?;
        let (taken, left) = self.left.split_at(count * 4);
        self.left = left;
        let (words, _) = taken.as_chunks::<4>();
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    fn span(&mut self) -> Result<Span, PlanError> {
        let position = self.one()?;
        let len = self.one()?;
        let logits = match self.one()? {
            0 => Logits::None,
            1 => Logits::Last,
            2 => Logits::All,
            3 => Logits::Hidden,
            other => return Err(malformed(format!("{other} names no rows of logits"))),
        };
        let block_count = self.one()? as usize;
        let blocks = self.many(block_count)?;
        Ok(Span {
            position,
            len,
            logits,
            blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn a_span() -> impl Strategy<Value = Span> {
        (0u32..100, 1u32..40, 0usize..4, 0usize..3).prop_flat_map(
            |(position, len, logits, spare)| {
                let count = ((position + len) as usize).div_ceil(BLOCK_TOKENS) + spare;
                prop::collection::vec(any::<u32>(), count).prop_map(move |blocks| Span {
                    position,
                    len,
                    logits: [Logits::None, Logits::Last, Logits::All, Logits::Hidden][logits],
                    blocks,
                })
            },
        )
    }

    fn a_plan() -> impl Strategy<Value = StepPlan> {
        (
            any::<u64>(),
            any::<u64>(),
            prop::collection::vec(a_span(), 0..5),
        )
            .prop_map(|(step, generation, spans)| {
                let count: u32 = spans.iter().map(|span| span.len).sum();
                let tokens = (0..count).map(|i| i.wrapping_mul(2_654_435_761)).collect();
                StepPlan {
                    step,
                    generation,
                    tokens,
                    spans,
                }
            })
    }

    proptest! {
        #[test]
        fn a_decoded_plan_equals_the_encoded_one(plan in a_plan()) {
            let mut bytes = vec![9; 3];
            plan.encode(&mut bytes);
            prop_assert_eq!(StepPlan::decode(&bytes), Ok(plan));
        }

        #[test]
        fn every_cut_of_a_plan_is_an_error(plan in a_plan(), cut in 0.0f64..1.0) {
            let mut bytes = Vec::new();
            plan.encode(&mut bytes);
            bytes.truncate((bytes.len() as f64 * cut) as usize);
            prop_assert!(StepPlan::decode(&bytes).is_err());
        }

        #[test]
        fn a_flipped_word_never_panics_and_what_decodes_is_consistent(plan in a_plan(), at in any::<usize>(), word in any::<u32>()) {
            let mut bytes = Vec::new();
            plan.encode(&mut bytes);
            let at = at % (bytes.len() / 4) * 4;
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            if let Ok(plan) = StepPlan::decode(&bytes) {
                prop_assert_eq!(plan.spans.iter().map(|span| span.len as usize).sum::<usize>(), plan.tokens.len());
                let _ = plan.check(&GEOMETRY);
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = StepPlan::decode(&bytes);
        }
    }

    const GEOMETRY: Geometry = Geometry {
        blocks: 8,
        context_max: 64,
        vocab: 10,
        window: Some(20),
        step_tokens_max: 32,
        spans_max: 2,
    };

    fn small_plan() -> StepPlan {
        let span = Span {
            position: 36,
            len: 3,
            logits: Logits::Last,
            blocks: vec![NULL_BLOCK, 3, 4],
        };
        StepPlan {
            step: 1,
            generation: 1,
            tokens: vec![1, 2, DEVICE_SLOT | 7],
            spans: vec![span],
        }
    }

    #[test]
    fn claimed_counts_do_not_allocate() {
        let mut words = vec![LAYOUT, 0, 0, 0, 0, u32::MAX, u32::MAX];
        let bytes = |words: &[u32]| {
            words
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        assert_eq!(
            StepPlan::decode(&bytes(&words)),
            Err(PlanError::Truncated {
                asked: u64::from(u32::MAX),
                left: 0
            })
        );
        words[5] = 0;
        let asked = u64::from(u32::MAX) * 4;
        assert_eq!(
            StepPlan::decode(&bytes(&words)),
            Err(PlanError::Truncated { asked, left: 0 })
        );
    }

    #[test]
    fn another_layout_is_named() {
        let mut bytes = Vec::new();
        small_plan().encode(&mut bytes);
        bytes[0] = 9;
        assert_eq!(StepPlan::decode(&bytes), Err(PlanError::Layout(9)));
    }

    #[test]
    fn a_plan_is_checked_against_the_models_sizes() {
        assert_eq!(small_plan().check(&GEOMETRY), Ok(()));
        let broken = |change: fn(&mut StepPlan)| {
            let mut plan = small_plan();
            change(&mut plan);
            plan.check(&GEOMETRY)
                .expect_err("the plan is broken")
                .to_string()
        };
        assert!(broken(|plan| plan.tokens[0] = 10).contains("vocabulary of 10"));
        assert!(broken(|plan| plan.spans[0].blocks[1] = 8).contains("pool of 8"));
        assert!(broken(|plan| plan.spans[0].blocks[1] = NULL_BLOCK).contains("has no block"));
        assert!(broken(|plan| plan.spans[0].position = 46).contains("position 46 in 3 blocks"));
        assert!(broken(|plan| plan.spans[0].position = u32::MAX).contains("in 3 blocks"));
        let beyond = broken(|plan| {
            plan.spans[0] = Span {
                position: 62,
                len: 3,
                logits: Logits::Last,
                blocks: vec![1; 5],
            }
        });
        assert!(beyond.contains("context of 64"), "{beyond}");
        assert!(broken(|plan| plan.tokens.push(1)).contains("hold 3 tokens and 4 are given"));
        let wide = broken(|plan| {
            plan.tokens = vec![1; 33];
            plan.spans[0] = Span {
                position: 0,
                len: 33,
                ..plan.spans[0].clone()
            };
        });
        assert!(wide.contains("step takes 32 in 2"), "{wide}");
    }
}
