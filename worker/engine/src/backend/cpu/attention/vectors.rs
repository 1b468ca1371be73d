//! The vectors of an item in one part of their context: scores, weights, and the weighted sum of the values.
//!
//! Scores are a product with the panels of keys, outputs one with the panels of values, both in [`Tile`]'s fixed order;
//! the softmax takes the part's scores in two passes over blocks of 16 aligned to absolute position. Keys that a token
//! does not see weigh exactly zero. Sliding windows and the end of the causal triangle are ranges that are filled before
//! and after; a model without slopes has slopes of zero: no loop over keys asks for either.

use std::ops::Range;

use super::super::isa::Kernel;
use super::super::kv::{Format, HeadBlock, HeadBlocks, KvElement, PANEL, value_width};
use super::super::simd::{LANES, Simd};
use super::merge::{Divide, LARGEST, SUM, record_len};
use super::tile::{AHEAD, Over, ROWS_MAX, Tile, panels_of, tile_rows};
use super::{Call, PART, STRIDE, grow};
use crate::backend::Heads;
use crate::plan::BLOCK_TOKENS;

const BLOCKS: usize = PART / BLOCK_TOKENS;
/// Panels of keys that a tile takes at most: their lines lie in the same places of the L1 cache, and so do the next ones'.
const KEY_PANELS: usize = 2;

/// One thread's numbers for some vectors.
#[derive(Debug, Default)]
pub(super) struct VectorSpace {
    /// `[vectors][STRIDE]`: see [`Vectors::take_queries`].
    queries: Vec<f32>,
    /// `[ROWS_MAX][STRIDE]`: scores of one tile, then weights.
    scores: Vec<f32>,
    /// `[PART]`: scales of a tile's keys and of its values, where they are quantised.
    key_scales: Vec<f32>,
    value_scales: Vec<f32>,
}

/// The queries of some neighbouring tokens that share one KV head.
pub(super) struct Vectors<'a, E> {
    pub(super) call: Call<'a>,
    /// Rows of the batch.
    pub(super) rows: Range<usize>,
    /// Position of the first.
    pub(super) position: usize,
    /// The KV head.
    pub(super) head: usize,
    pub(super) blocks: HeadBlocks<'a, E>,
    pub(super) table: &'a [u32],
}

impl VectorSpace {
    pub(super) fn make_room(&mut self, vectors: usize) {
        grow(&mut self.queries, vectors * STRIDE);
        grow(&mut self.scores, ROWS_MAX * STRIDE);
        grow(&mut self.key_scales, PART);
        grow(&mut self.value_scales, PART);
    }
}

impl<E: KvElement> Vectors<'_, E> {
    /// How many they are: token by token, the heads of each side by side.
    pub(super) fn len(&self) -> usize {
        self.rows.len() * self.call.shared_by()
    }

    /// Copies the queries: scaled, but where they are rounded, of which the scores are scaled.
    pub(super) fn take_queries(&self, space: &mut VectorSpace) {
        let Heads { width, .. } = self.call.heads;
        let group = self.call.shared_by() * width;
        let rows = self.rows.clone().flat_map(|row| {
            let row = &self.call.qkv[row * self.call.heads.qkv_width() + self.head * group..];
            row[..group].chunks_exact(width)
        });
        for (query, from) in space.queries.chunks_exact_mut(STRIDE).zip(rows) {
            if E::FORMAT == Format::Pairs {
                query[..width].copy_from_slice(from);
                self.call.isa.run_pairs(PairUp {
                    row: query,
                    len: width,
                });
            } else {
                for (query, x) in query.iter_mut().zip(from) {
                    *query = x * self.call.scale;
                }
            }
        }
    }

    /// Computes the vectors' records of part `part` of the context.
    pub(super) fn find(&self, part: usize, space: &mut VectorSpace, records: &mut [f32]) {
        let find = Find {
            vectors: self,
            part,
            space,
            records,
        };
        if E::FORMAT == Format::Pairs {
            self.call.isa.run_pairs(find);
        } else {
            self.call.isa.run(find);
        }
    }

    /// Writes the outputs of merged records to their tokens and heads.
    pub(super) fn give(&self, records: &[f32]) {
        let Heads { width, .. } = self.call.heads;
        let shared_by = self.call.shared_by();
        for (vector, record) in records.chunks_exact(record_len(width)).enumerate() {
            let row = self.rows.start + vector / shared_by;
            let head = self.head * shared_by + vector % shared_by;
            let start = row * self.call.heads.q_width() + head * width;
            // SAFETY: inside the output; the columns of this item's rows and heads are written by this item alone.
            let out = unsafe { std::slice::from_raw_parts_mut(self.call.out.at(start), width) };
            self.call.isa.run(Divide { record, out });
        }
    }
}

/// Rounds the first numbers of a row to bf16, two in the place of one, the last beside zeros.
struct PairUp<'a> {
    row: &'a mut [f32],
    len: usize,
}

impl Kernel for PairUp<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let all = self.len.next_multiple_of(2 * LANES);
        let row = &mut self.row[..all];
        row[self.len..].fill(0.0);
        let from = row.as_mut_ptr();
        for i in (0..all).step_by(2 * LANES) {
            // SAFETY: two vectors are read inside the row, and their pairs written no further behind; the features are the
            // caller's promise.
            unsafe {
                let (first, second) = (
                    S::load(from.wrapping_add(i)),
                    S::load(from.wrapping_add(i + LANES)),
                );
                S::store(from.wrapping_add(i / 2), S::round_pairs(first, second));
            }
        }
    }
}

/// See [`Vectors::find`].
struct Find<'a, 'b, E> {
    vectors: &'a Vectors<'b, E>,
    part: usize,
    space: &'a mut VectorSpace,
    records: &'a mut [f32],
}

impl<E: KvElement> Kernel for Find<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let count = self.vectors.len();
        let record_len = record_len(self.vectors.call.heads.width);
        let tiles = count.div_ceil(tile_rows::<S>());
        let VectorSpace {
            queries,
            scores,
            key_scales,
            value_scales,
        } = self.space;
        for tile in 0..tiles {
            let vectors = count * tile / tiles..count * (tile + 1) / tiles;
            let records = &mut self.records[vectors.start * record_len..vectors.end * record_len];
            let queries = &queries[vectors.start * STRIDE..vectors.end * STRIDE];
            let Some(scene) = Scene::new(self.vectors, self.part, vectors) else {
                for record in records.chunks_exact_mut(record_len) {
                    record[record_len - SUM] = 0.0;
                }
                continue;
            };
            scene.take_scales(key_scales, value_scales);
            // SAFETY: the features are the caller's promise.
            unsafe {
                scene.scores::<S>(queries, scores);
                scene.ask_for_values::<S>();
                let rows = scores.chunks_exact_mut(STRIDE);
                for (i, (scores, record)) in
                    rows.zip(records.chunks_exact_mut(record_len)).enumerate()
                {
                    let record = &mut record[record_len - LANES..];
                    scene.softmax::<S>(i, scores, (key_scales, value_scales), record);
                    if E::FORMAT == Format::Pairs {
                        let len = scene.blocks * BLOCK_TOKENS;
                        PairUp { row: scores, len }.run::<S>();
                    }
                }
                scene.outputs::<S>(scores, records);
            }
        }
    }
}

/// The vectors of one tile and the keys of one part that any of them sees.
struct Scene<'a, 'b, E> {
    all: &'a Vectors<'b, E>,
    vectors: Range<usize>,
    keys: Range<usize>,
    /// The first key of the first block.
    first: usize,
    /// How many blocks, where each begins, and what comes behind: the values behind the keys, the next part behind the
    /// values. They lie anywhere: the processor cannot guess where.
    blocks: usize,
    key_blocks: [*const E; BLOCKS + AHEAD],
    value_blocks: [*const E; BLOCKS + AHEAD],
}

impl<'a, 'b, E: KvElement> Scene<'a, 'b, E> {
    /// None if no vector sees any key of the part.
    #[inline(always)]
    fn new(
        all: &'a Vectors<'b, E>,
        part: usize,
        vectors: Range<usize>,
    ) -> Option<Scene<'a, 'b, E>> {
        let position = |vector: usize| all.position + vector / all.call.shared_by();
        let (first, last) = (position(vectors.start), position(vectors.end - 1));
        let keys = (part * PART).max(all.call.first_key(first))..((part + 1) * PART).min(last + 1);
        if keys.is_empty() {
            return None;
        }
        let table = &all.table[keys.start / BLOCK_TOKENS..];
        let blocks = keys.end.div_ceil(BLOCK_TOKENS) - keys.start / BLOCK_TOKENS;
        let at = |block: usize| all.blocks.block(table[block.min(table.len() - 1)]);
        let mut scene = Scene {
            all,
            vectors,
            first: keys.start / BLOCK_TOKENS * BLOCK_TOKENS,
            keys,
            blocks,
            key_blocks: [std::ptr::null(); _],
            value_blocks: [std::ptr::null(); _],
        };
        for block in 0..blocks {
            let HeadBlock { keys, values, .. } = at(block);
            scene.key_blocks[block] = keys.as_ptr();
            scene.value_blocks[block] = values.as_ptr();
        }
        for ahead in 0..AHEAD {
            scene.key_blocks[blocks + ahead] = scene.value_blocks[ahead.min(blocks - 1)];
            scene.value_blocks[blocks + ahead] = at(blocks + ahead).keys.as_ptr();
        }
        Some(scene)
    }

    /// Copies the scales of the keys and values of all blocks, where they have them.
    #[inline(always)]
    fn take_scales(&self, key_scales: &mut [f32], value_scales: &mut [f32]) {
        if E::FORMAT != Format::Int8 {
            return;
        }
        let blocks = &self.all.table[self.first / BLOCK_TOKENS..][..self.blocks];
        let into = key_scales
            .chunks_exact_mut(BLOCK_TOKENS)
            .zip(value_scales.chunks_exact_mut(BLOCK_TOKENS));
        for (block, (key_scales, value_scales)) in blocks.iter().zip(into) {
            let (of_keys, of_values) = self.all.blocks.block(*block).scales.split_at(BLOCK_TOKENS);
            key_scales.copy_from_slice(of_keys);
            value_scales.copy_from_slice(of_values);
        }
    }

    #[inline(always)]
    fn run(&self, tile: Tile<'_, E>) {
        if E::FORMAT == Format::Pairs {
            self.all.call.isa.run_pairs(tile);
        } else {
            self.all.call.isa.run(tile);
        }
    }

    /// The product of all queries with the keys of all blocks.
    #[inline(always)]
    unsafe fn scores<S: Simd>(&self, queries: &[f32], scores: &mut [f32]) {
        let rows = self.vectors.len();
        let mut block = 0;
        while block < self.blocks {
            let panels = panels_of::<S>(rows, KEY_PANELS.min(self.blocks - block));
            self.run(Tile {
                rows,
                panels,
                blocks: &self.key_blocks[block..],
                over: Over::Width(self.all.call.heads.width),
                x: queries.as_ptr(),
                y: scores[block * BLOCK_TOKENS..].as_mut_ptr(),
                y_stride: STRIDE,
            });
            block += panels;
        }
    }

    /// Asks for the first blocks of values, so that they come while scores become weights.
    #[inline(always)]
    unsafe fn ask_for_values<S: Simd>(&self) {
        for block in &self.value_blocks[..AHEAD.min(self.blocks)] {
            let numbers = value_width(self.all.call.heads.width) * BLOCK_TOKENS;
            for line in (0..numbers).step_by(64 / size_of::<E>()) {
                // SAFETY: prefetches may go anywhere; the features are the caller's promise.
                unsafe { S::prefetch(block.wrapping_add(line).cast()) };
            }
        }
    }

    /// Turns a vector's scores into weights, zero for keys that its token does not see, and notes the largest score and
    /// the sum of the weights.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(
        &self,
        i: usize,
        scores: &mut [f32],
        (key_scales, value_scales): (&[f32], &[f32]),
        record: &mut [f32],
    ) {
        const COUNT: [f32; LANES] = [
            0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
        ];
        let (call, vector) = (self.all.call, self.vectors.start + i);
        let position = self.all.position + vector / call.shared_by();
        let query_head = self.all.head * call.shared_by() + vector % call.shared_by();
        let slope = call.slopes.map_or(0.0, |slopes| slopes[query_head]);
        let seen = self.keys.start.max(call.first_key(position))..self.keys.end.min(position + 1);
        let quantised = E::FORMAT == Format::Int8;
        let scores = &mut scores[..self.blocks * BLOCK_TOKENS];
        if seen.is_empty() {
            scores.fill(0.0);
            record[LANES - SUM] = 0.0;
            return;
        }
        let own = seen.start / BLOCK_TOKENS * BLOCK_TOKENS..seen.end.next_multiple_of(BLOCK_TOKENS);
        let (before, rest) = scores.split_at_mut(own.start - self.first);
        let (scores, after) = rest.split_at_mut(own.len());
        before.fill(0.0);
        after.fill(0.0);
        let key_scales = key_scales[own.start - self.first..].chunks_exact(LANES);
        let value_scales = value_scales[own.start - self.first..].chunks_exact(LANES);
        if quantised {
            // What lies behind the sequence's end may be any number, and so may its scale.
            for (score, scale) in scores.iter_mut().zip(key_scales.clone().flatten()) {
                *score *= scale;
            }
        }
        scores[..seen.start - own.start].fill(f32::NEG_INFINITY);
        scores[seen.end - own.start..].fill(f32::NEG_INFINITY);
        // SAFETY: the scores are whole blocks, a block is the lanes of a vector; the features are the caller's promise.
        unsafe {
            // Both exact: positions are far below 2^24.
            let slope = S::splat(slope);
            let mut distance = S::add(
                S::load(COUNT.as_ptr()),
                S::splat(own.start as f32 - position as f32),
            );
            let step = S::splat(LANES as f32);
            let mut largest = S::splat(f32::NEG_INFINITY);
            for block in scores.chunks_exact_mut(LANES) {
                let mut score = S::load(block.as_ptr());
                if E::FORMAT == Format::Pairs {
                    score = S::mul(score, S::splat(call.scale));
                }
                let score = S::fma(slope, distance, score);
                S::store(block.as_mut_ptr(), score);
                largest = S::max(largest, score);
                distance = S::add(distance, step);
            }
            let largest = S::largest(largest);
            let offset = S::splat(largest);
            let mut sum = S::zero();
            for (block, scales) in scores.chunks_exact_mut(LANES).zip(value_scales) {
                let weight = S::exp(S::sub(S::load(block.as_ptr()), offset));
                sum = S::add(sum, weight);
                let weight = if quantised {
                    S::mul(weight, S::load(scales.as_ptr()))
                } else {
                    weight
                };
                S::store(block.as_mut_ptr(), weight);
            }
            record[LANES - LARGEST] = largest;
            record[LANES - SUM] = S::sum(sum);
        }
    }

    /// The product of all weights with the values of all blocks.
    #[inline(always)]
    unsafe fn outputs<S: Simd>(&self, scores: &[f32], records: &mut [f32]) {
        let (rows, width) = (self.vectors.len(), self.all.call.heads.width);
        let panel_len = E::panel_len(BLOCK_TOKENS);
        let count = value_width(width) / PANEL;
        let mut panel = 0;
        while panel < count {
            let panels = panels_of::<S>(rows, count - panel);
            self.run(Tile {
                rows,
                panels,
                blocks: &self.value_blocks,
                // What lies behind the sequence's end was never written, or by another sequence: not even zero times it.
                over: Over::Tokens {
                    count: self.keys.end - self.first,
                    first: panel * panel_len,
                    panel_len,
                },
                x: scores.as_ptr(),
                y: records[panel * PANEL..].as_mut_ptr(),
                y_stride: record_len(width),
            });
            panel += panels;
        }
    }
}
