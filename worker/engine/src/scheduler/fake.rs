//! A runner without a model, for tests: its "K and V" at a position are a hash of the whole prefix up to there, its
//! logits a function of that hash. So each mistake in blocks, positions or tokens shows as wrong content.

use crate::mask::{MaskSlot, Next};
use crate::plan::{BLOCK_TOKENS, NULL_BLOCK, Span, StepPlan};
use crate::request::{Candidate, EndReason, Request, SequenceError, TokenLogprob};
use crate::runner::{
    Geometry, PoolRows, Runner, SampleRow, Sampled, ScoreRows, StepError, StepOutput, Ticket,
};
use crate::sampler;

/// One hash in this many stands for logits that are not finite.
const NOT_FINITE_ONE_IN: u64 = 1999;

pub(crate) struct Fake {
    geometry: Geometry,
    slots: Vec<[u64; BLOCK_TOKENS]>,
    output: Option<StepOutput>,
    /// Called before each step is run.
    pub before_step: BeforeStep,
}

type BeforeStep = Box<dyn FnMut(&StepPlan) -> Result<(), StepError> + Send>;

/// Hash of a prefix from the hash of all but its last token.
fn extend(prefix: u64, token: u32) -> u64 {
    let mixed = (prefix ^ u64::from(token).wrapping_add(0x9e37_79b9_7f4a_7c15))
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ mixed >> 29).wrapping_mul(0x94d0_49bb_1331_11eb) ^ mixed >> 32
}

/// Hashes of all prefixes of `tokens`, the shortest one first.
fn prefixes(tokens: impl IntoIterator<Item = u32>) -> impl Iterator<Item = u64> {
    tokens.into_iter().scan(0, |prefix, token| {
        *prefix = extend(*prefix, token);
        Some(*prefix)
    })
}

fn logits(prefix: u64, vocab: u32) -> Vec<f32> {
    if prefix.is_multiple_of(NOT_FINITE_ONE_IN) {
        return vec![f32::NAN; vocab as usize];
    }
    (0..vocab)
        .map(|token| (extend(prefix, token) % 1000) as f32 / 100.0)
        .collect()
}

/// Width of the hidden states.
const HIDDEN: usize = 3;

fn add_hidden(sum: &mut [f64], prefix: u64) {
    for (i, sum) in sum.iter_mut().enumerate() {
        *sum += f64::from((extend(prefix, i as u32) % 1000) as f32 / 7.0);
    }
}

/// The embedding that a prompt must give.
pub(crate) fn expected_embedding(prompt: &[u32]) -> Vec<f32> {
    let mut sum = [0.0; HIDDEN];
    prefixes(prompt.iter().copied()).for_each(|prefix| add_hidden(&mut sum, prefix));
    sum.iter()
        .map(|sum| (sum / prompt.len() as f64) as f32)
        .collect()
}

impl Fake {
    pub fn new(geometry: Geometry) -> Self {
        let slots = vec![[u64::MAX; BLOCK_TOKENS]; geometry.blocks as usize];
        Fake {
            geometry,
            slots,
            output: None,
            before_step: Box::new(|_| Ok(())),
        }
    }

    /// Writes the span's slots, each from the one before it, and gives the prefix of each of its rows.
    fn write(&mut self, span: &Span, tokens: &[u32]) -> Vec<u64> {
        let mut prefix = match span.position {
            0 => 0,
            position => self.slot(span, position - 1),
        };
        let write = |(&token, position): (&u32, u32)| {
            prefix = extend(prefix, token);
            let block = span.blocks[position as usize / BLOCK_TOKENS];
            assert_ne!(block, NULL_BLOCK);
            self.slots[block as usize][position as usize % BLOCK_TOKENS] = prefix;
            prefix
        };
        tokens.iter().zip(span.position..).map(write).collect()
    }

    fn slot(&self, span: &Span, position: u32) -> u64 {
        let block = span.blocks[position as usize / BLOCK_TOKENS];
        assert_ne!(
            block, NULL_BLOCK,
            "position {position} is read and has no block"
        );
        self.slots[block as usize][position as usize % BLOCK_TOKENS]
    }

    /// Panics unless all positions that the span sees hold the K and V of `tokens`, the sequence's own.
    pub fn check_visible(&self, span: &Span, tokens: &[u32]) {
        let first = self
            .geometry
            .window
            .map_or(0, |window| (span.position + 1).saturating_sub(window));
        for (position, prefix) in (0..span.end())
            .zip(prefixes(tokens.iter().copied()))
            .skip(first as usize)
        {
            assert_eq!(
                self.slot(span, position),
                prefix,
                "position {position} holds another sequence's K and V"
            );
        }
    }

    pub fn run(
        &mut self,
        plan: &StepPlan,
        samples: &[SampleRow<'_>],
        scores: &[ScoreRows<'_>],
        pools: &[PoolRows<'_>],
    ) -> StepOutput {
        plan.check(&self.geometry).expect("the plan fits the model");
        let mut left = &plan.tokens[..];
        let mut rows = Vec::new();
        for span in &plan.spans {
            let (tokens, rest) = left.split_at(span.len as usize);
            left = rest;
            rows.push(self.write(span, tokens));
        }
        for row in samples {
            let tokens: Vec<u32> = row.prompt.iter().chain(row.outputs).copied().collect();
            assert_eq!(
                plan.spans[row.span].end() as usize,
                tokens.len(),
                "the sampled row is the last token's"
            );
            self.check_visible(&plan.spans[row.span], &tokens);
        }
        let vocab = self.geometry.vocab;
        let sample = |row: &SampleRow<'_>| {
            sampler::sample(
                &mut logits(rows[row.span][rows[row.span].len() - 1], vocab),
                row,
            )
        };
        let score = |row: &ScoreRows<'_>| {
            row.targets
                .iter()
                .zip(&rows[row.span])
                .map(|(&id, &p)| sampler::score(&logits(p, vocab), id, row.top))
                .collect()
        };
        let pool = |row: &PoolRows<'_>| {
            let mut sum = row.sum.to_vec();
            sum.resize(HIDDEN, 0.0);
            for &prefix in &rows[row.span] {
                add_hidden(&mut sum, prefix);
            }
            Ok(sum)
        };
        StepOutput {
            samples: samples.iter().map(sample).collect(),
            scores: scores.iter().map(score).collect(),
            pools: pools.iter().map(pool).collect(),
        }
    }
}

impl Runner for Fake {
    fn submit(
        &mut self,
        plan: &StepPlan,
        samples: &[SampleRow<'_>],
        scores: &[ScoreRows<'_>],
        pools: &[PoolRows<'_>],
    ) -> Result<Ticket, StepError> {
        (self.before_step)(plan)?;
        self.output = Some(self.run(plan, samples, scores, pools));
        Ok(Ticket(plan.step))
    }

    fn collect(&mut self, _: Ticket) -> Result<&mut StepOutput, StepError> {
        self.output
            .as_mut()
            .ok_or_else(|| StepError::Broken("nothing was submitted".into()))
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

/// What a candidate must give, reckoned without engine: its tokens and why it ends.
#[derive(Debug, PartialEq)]
pub(crate) struct Expected {
    pub tokens: Vec<Sampled>,
    pub reason: EndReason,
}

pub(crate) fn expected(request: &Request, candidate: &Candidate, geometry: &Geometry) -> Expected {
    let mut outputs = candidate.emitted.clone();
    let mut tokens = Vec::new();
    let mut reason = EndReason::Length;
    let mask = candidate.mask.clone().map(MaskSlot::new);
    let mut prefix = prefixes(request.prompt.iter().chain(&outputs).copied())
        .last()
        .expect("a prompt");
    while outputs.len() < request.tokens_max as usize
        && request.prompt.len() + outputs.len() < geometry.context_max as usize
    {
        let row = SampleRow {
            span: 0,
            sampling: &request.sampling,
            candidate: candidate.index,
            output_index: outputs.len() as u32,
            prompt: &request.prompt,
            outputs: &outputs,
            mask: mask.as_deref(),
        };
        match sampler::sample(&mut logits(prefix, geometry.vocab), &row) {
            Err(error) => reason = EndReason::Error(error),
            Ok(sampled) if request.stop_ids.contains(&sampled.id) => {
                let Sampled { id, logprob } = sampled;
                reason = EndReason::StopToken { id, logprob }
            }
            Ok(sampled) => {
                outputs.push(sampled.id);
                prefix = extend(prefix, sampled.id);
                let next = mask.as_ref().map(|mask| mask.accept(sampled.id));
                tokens.push(sampled);
                if let Some(Ok(Next::Complete)) = next {
                    reason = EndReason::Complete;
                    break;
                }
                continue;
            }
        }
        break;
    }
    Expected { tokens, reason }
}

pub(crate) fn expected_scores(
    request: &Request,
    geometry: &Geometry,
) -> Result<Vec<Option<TokenLogprob>>, SequenceError> {
    let top = request.prompt_logprobs.expect("asked for");
    let targets = request
        .prompt
        .iter()
        .skip(1)
        .zip(prefixes(request.prompt.iter().copied()));
    let scores = targets
        .map(|(&id, prefix)| sampler::score(&logits(prefix, geometry.vocab), id, top).map(Some));
    std::iter::once(Ok(None)).chain(scores).collect()
}

/// Random numbers for tests (SplitMix64).
pub(crate) struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number in `range`.
    pub fn of(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.of(0..n) == 0
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.of(0..of.len() as u64) as usize]
    }
}
