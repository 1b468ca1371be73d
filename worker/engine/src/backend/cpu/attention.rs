//! Paged attention: queries of neighbouring tokens against the blocks of their sequence.
//!
//! Owns the cut into work items (some tokens of a span, one KV head and all query heads that share it) and the softmax.
//! Scores are a product with the panels of keys, outputs one with the panels of values, so both have [`Tile`]'s fixed
//! order; the softmax takes the whole row in two passes over blocks of 16 aligned to absolute position. A token's
//! result depends on its own position alone, not on which tokens share its item: keys that it does not see weigh
//! exactly zero.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::isa::{Isa, Kernel};
use super::kv::{CpuKv, HeadBlocks, KvValues, head_blocks, value_width};
use super::pool::{Base, Pool};
use super::simd::{LANES, Simd};
use super::tile::{Element, PANEL, Tile, tile_bounds, tile_panels, tile_rows};
use crate::backend::{Attention, Batch, BatchSpan, Heads};
use crate::plan::BLOCK_TOKENS;

/// Query vectors of an item: they share each block of K and V while it is in the L1 cache.
const ITEM_VECTORS: usize = 24;
/// Products of one step's attention in one layer worth waking a helper for.
const PARALLEL_MIN: usize = 64 << 10;

/// What attention keeps between steps, so that a step allocates nothing.
#[derive(Debug, Default)]
pub(super) struct AttentionSpace {
    items: Vec<Item>,
    /// One per thread.
    scratch: Vec<Mutex<Scratch>>,
}

/// Some neighbouring tokens of a span.
#[derive(Debug, Clone)]
struct Item {
    span: usize,
    /// Rows of the batch.
    rows: Range<usize>,
    /// Position of the first.
    position: usize,
}

/// One thread's numbers for one item.
#[derive(Debug, Default)]
struct Scratch {
    /// `[vectors][d]`, scaled.
    queries: Vec<f32>,
    /// `[vectors][keys]`: scores, then weights.
    scores: Vec<f32>,
    /// `[vectors][value width]`.
    outputs: Vec<f32>,
    /// The reciprocal of each vector's sum of weights.
    norms: Vec<f32>,
}

/// The read-only side of a call, shared by its items.
#[derive(Clone, Copy)]
struct Call<'a> {
    heads: Heads,
    qkv: &'a [f32],
    scale: f32,
    window: Option<usize>,
    slopes: Option<&'a [f32]>,
    /// `[tokens, q * d]`; an item writes its tokens' and heads' part.
    out: &'a Base<f32>,
}

impl AttentionSpace {
    /// See [`crate::backend::Backend::attention`].
    pub(super) fn run<B: AsRef<[f32]>>(
        &mut self,
        (isa, pool): (Isa, &Pool),
        batch: &Batch,
        attention: &Attention<'_, B>,
        kv: &CpuKv,
        layer: usize,
        out: &mut [f32],
    ) {
        let heads = attention.heads;
        assert!(
            layer < kv.shape.layers
                && heads.kv == kv.shape.heads
                && heads.width == kv.shape.head_width
        );
        let out = Base::new(&mut out[..batch.len() * heads.q_width()]);
        let call = Call {
            heads,
            qkv: attention.qkv.as_ref(),
            scale: attention.scale,
            window: attention.window,
            slopes: attention.slopes.map(AsRef::as_ref),
            out: &out,
        };
        self.plan(pool, batch, call);
        let products: usize = self
            .items
            .iter()
            .map(|item| item.rows.len() * call.blocks(item).len() * BLOCK_TOKENS)
            .sum();
        let parallel = products * heads.q_width() >= PARALLEL_MIN;
        match &kv.values {
            KvValues::F32(values) => self.run_items((isa, pool), batch, call, parallel, &|head| {
                head_blocks(kv.shape, values.as_ref(), layer, head)
            }),
            KvValues::Bf16(values) => self.run_items((isa, pool), batch, call, parallel, &|head| {
                head_blocks(kv.shape, values.as_ref(), layer, head)
            }),
        }
    }

    /// Cuts the batch into items and makes room for the largest.
    fn plan(&mut self, pool: &Pool, batch: &Batch, call: Call<'_>) {
        let shared_by = call.heads.q / call.heads.kv;
        let rows_max = (ITEM_VECTORS / shared_by).max(1);
        self.items.clear();
        for (span, BatchSpan { rows, position, .. }) in batch.spans.iter().enumerate() {
            for start in rows.clone().step_by(rows_max) {
                let position = position + start - rows.start;
                self.items.push(Item {
                    span,
                    rows: start..(start + rows_max).min(rows.end),
                    position,
                });
            }
        }
        let vectors = rows_max * shared_by;
        let keys = self
            .items
            .iter()
            .map(|item| call.blocks(item).len())
            .max()
            .unwrap_or(0)
            * BLOCK_TOKENS;
        self.scratch.resize_with(pool.threads(), Mutex::default);
        for scratch in &mut self.scratch {
            let Scratch {
                queries,
                scores,
                outputs,
                norms,
            } = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            grow(queries, vectors * call.heads.width);
            grow(scores, vectors * keys);
            grow(outputs, vectors * value_width(call.heads.width));
            grow(norms, vectors);
        }
    }

    fn run_items<'a, E: Element>(
        &self,
        (isa, pool): (Isa, &Pool),
        batch: &Batch,
        call: Call<'_>,
        parallel: bool,
        blocks_of: &(dyn Fn(usize) -> HeadBlocks<'a, E> + Sync),
    ) {
        let run = |index: usize, thread: usize| {
            let (item, head) = (&self.items[index / call.heads.kv], index % call.heads.kv);
            let scratch = &mut *self.scratch[thread]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let table = batch.blocks_of(&batch.spans[item.span]);
            isa.run(ItemKernel {
                call,
                item,
                head,
                blocks: blocks_of(head),
                table,
                scratch,
            });
        };
        let count = self.items.len() * call.heads.kv;
        if parallel {
            pool.run(count, &run);
        } else {
            pool.run(1, &|_, thread| {
                (0..count).for_each(|index| run(index, thread))
            });
        }
    }
}

fn grow(values: &mut Vec<f32>, len: usize) {
    if values.len() < len {
        values.resize(len.next_power_of_two(), 0.0);
    }
}

impl Call<'_> {
    /// The first key that the token at `position` sees.
    fn first_key(self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The blocks that an item's tokens see.
    fn blocks(self, item: &Item) -> Range<usize> {
        let last = item.position + item.rows.len() - 1;
        self.first_key(item.position) / BLOCK_TOKENS..last / BLOCK_TOKENS + 1
    }
}

/// The attention of an item's tokens, for the query heads of one KV head.
struct ItemKernel<'a, E> {
    call: Call<'a>,
    item: &'a Item,
    head: usize,
    blocks: HeadBlocks<'a, E>,
    table: &'a [u32],
    scratch: &'a mut Scratch,
}

impl<E: Element> Kernel for ItemKernel<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let blocks = self.call.blocks(self.item);
        self.take_queries();
        // SAFETY: the features are the caller's promise; the scratch has room for the largest item.
        unsafe {
            self.scores::<S>(blocks.clone());
            for vector in 0..self.vectors() {
                self.softmax::<S>(vector, blocks.clone());
            }
            self.outputs::<S>(blocks);
        }
        self.give_outputs();
    }
}

impl<E: Element> ItemKernel<'_, E> {
    /// Query heads per KV head.
    fn shared_by(&self) -> usize {
        self.call.heads.q / self.call.heads.kv
    }

    fn vectors(&self) -> usize {
        self.item.rows.len() * self.shared_by()
    }

    /// Copies the item's queries, scaled: token by token, the heads of each side by side.
    fn take_queries(&mut self) {
        let Heads { width, .. } = self.call.heads;
        let (shared_by, scale) = (self.shared_by(), self.call.scale);
        let group = shared_by * width;
        for (row, queries) in self
            .item
            .rows
            .clone()
            .zip(self.scratch.queries.chunks_exact_mut(group))
        {
            let from =
                &self.call.qkv[row * self.call.heads.qkv_width() + self.head * group..][..group];
            queries
                .iter_mut()
                .zip(from)
                .for_each(|(query, x)| *query = x * scale);
        }
    }

    /// The product of all queries with the keys of all blocks.
    #[inline(always)]
    unsafe fn scores<S: Simd>(&mut self, blocks: Range<usize>) {
        let (width, vectors) = (self.call.heads.width, self.vectors());
        let keys = blocks.len() * BLOCK_TOKENS;
        let tiles = Tiles::of::<S>(vectors);
        let queries = &self.scratch.queries[..vectors * width];
        let scores = &mut self.scratch.scores[..vectors * keys];
        let mut block = blocks.start;
        while block < blocks.end {
            let panels = if blocks.end - block >= tiles.panels {
                tiles.panels
            } else {
                1
            };
            let keys_of = |block: usize| {
                let block = self.table[block.min(blocks.end - 1)];
                self.blocks.block(block).0.as_ptr()
            };
            let w = std::array::from_fn(|p| keys_of(block + p.min(panels - 1)));
            // The next blocks lie anywhere: the processor cannot guess where.
            let next = std::array::from_fn(|p| keys_of(block + panels + p));
            for rows in tiles.bounds(vectors) {
                let tile = Tile {
                    k: width,
                    w,
                    x: queries[rows.start * width..].as_ptr(),
                    x_stride: width,
                    init: std::ptr::null(),
                    init_stride: 0,
                    y: scores[rows.start * keys + (block - blocks.start) * BLOCK_TOKENS..]
                        .as_mut_ptr(),
                    y_stride: keys,
                    next,
                };
                // SAFETY: the panels hold the head's width, the slices all vectors and keys of the item.
                unsafe { S::tile(&tile, rows.len(), panels) };
            }
            block += panels;
        }
    }

    /// Turns a vector's scores into weights, zero for keys that its token does not see, and notes their sum.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&mut self, vector: usize, blocks: Range<usize>) {
        let position = self.item.position + vector / self.shared_by();
        let query_head = self.head * self.shared_by() + vector % self.shared_by();
        let slope = self.call.slopes.map_or(0.0, |slopes| slopes[query_head]);
        let seen = self.call.first_key(position)..position + 1;
        let own = seen.start / BLOCK_TOKENS..position / BLOCK_TOKENS + 1;
        let keys = blocks.len() * BLOCK_TOKENS;
        let scores = &mut self.scratch.scores[vector * keys..][..keys];
        let (before, rest) = scores.split_at_mut((own.start - blocks.start) * BLOCK_TOKENS);
        let (scores, after) = rest.split_at_mut(own.len() * BLOCK_TOKENS);
        before.fill(0.0);
        after.fill(0.0);
        let first = own.start * BLOCK_TOKENS;
        let unseen = [0..seen.start - first, seen.end - first..scores.len()];
        for range in unseen.clone() {
            scores[range].fill(f32::NEG_INFINITY);
        }
        // SAFETY: the scores are whole blocks, a block is the lanes of a vector.
        unsafe {
            const COUNT: [f32; LANES] = [
                0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
            ];
            let (count, slopes) = (S::load(COUNT.as_ptr()), S::splat(slope));
            let mut largest = S::splat(f32::NEG_INFINITY);
            for (i, block) in scores.chunks_exact_mut(LANES).enumerate() {
                let mut score = S::load(block.as_ptr());
                if slope != 0.0 {
                    // Both exact: positions are far below 2^24.
                    let distance = S::add(
                        count,
                        S::splat((first + i * LANES) as f32 - position as f32),
                    );
                    score = S::fma(slopes, distance, score);
                    S::store(block.as_mut_ptr(), score);
                }
                largest = S::max(largest, score);
            }
            let largest = S::splat(S::largest(largest));
            for block in scores.chunks_exact_mut(LANES) {
                let weight = S::exp(S::sub(S::load(block.as_ptr()), largest));
                S::store(block.as_mut_ptr(), weight);
            }
            // Minus infinity gives 0 already, unless the largest score is minus infinity too.
            for range in unseen {
                scores[range].fill(0.0);
            }
            let mut sum = S::zero();
            for block in scores.chunks_exact(LANES) {
                sum = S::add(sum, S::load(block.as_ptr()));
            }
            self.scratch.norms[vector] = 1.0 / S::sum(sum);
        }
    }

    /// The product of all weights with the values of all blocks.
    #[inline(always)]
    unsafe fn outputs<S: Simd>(&mut self, blocks: Range<usize>) {
        let vectors = self.vectors();
        let (width, keys) = (
            value_width(self.call.heads.width),
            blocks.len() * BLOCK_TOKENS,
        );
        let tiles = Tiles::of::<S>(vectors);
        let outputs = &mut self.scratch.outputs[..vectors * width];
        let scores = &self.scratch.scores[..vectors * keys];
        let end = self.item.position + self.item.rows.len();
        for block in blocks.clone() {
            let values_of = |block: usize| {
                let block = self.table[block.min(blocks.end - 1)];
                self.blocks.block(block).1
            };
            let (values, next_values) = (values_of(block), values_of(block + 1));
            let panel_len = E::panel_len(BLOCK_TOKENS);
            // What lies behind the sequence's end was never written, or by another sequence: not even zero times it.
            let tokens = (end - block * BLOCK_TOKENS).min(BLOCK_TOKENS);
            let mut panel = 0;
            while panel < width / PANEL {
                let panels = if width / PANEL - panel >= tiles.panels {
                    tiles.panels
                } else {
                    1
                };
                let place = |p: usize| (panel + p.min(panels - 1)) * panel_len;
                let w = std::array::from_fn(|p| values[place(p)..].as_ptr());
                let next = std::array::from_fn(|p| next_values[place(p)..].as_ptr());
                for rows in tiles.bounds(vectors) {
                    let y = outputs[rows.start * width + panel * PANEL..].as_mut_ptr();
                    let first = block == blocks.start;
                    let tile = Tile {
                        k: tokens,
                        w,
                        x: scores[rows.start * keys + (block - blocks.start) * BLOCK_TOKENS..]
                            .as_ptr(),
                        x_stride: keys,
                        init: if first { std::ptr::null() } else { y },
                        init_stride: width,
                        y,
                        y_stride: width,
                        next,
                    };
                    // SAFETY: the panels hold the block's tokens, the slices all vectors of the item.
                    unsafe { S::tile(&tile, rows.len(), panels) };
                }
                panel += panels;
            }
        }
    }

    /// Copies the outputs to their tokens and heads, divided by the sums of the weights.
    fn give_outputs(&self) {
        let Heads { width, .. } = self.call.heads;
        let shared_by = self.shared_by();
        for (i, row) in self.item.rows.clone().enumerate() {
            let start = row * self.call.heads.q_width() + self.head * shared_by * width;
            // SAFETY: inside the output; the columns of this item's rows and heads are written by this item alone.
            let out = unsafe {
                std::slice::from_raw_parts_mut(self.call.out.at(start), shared_by * width)
            };
            for (j, out) in out.chunks_exact_mut(width).enumerate() {
                let vector = i * shared_by + j;
                let from = &self.scratch.outputs[vector * value_width(width)..][..width];
                let norm = self.scratch.norms[vector];
                out.iter_mut()
                    .zip(from)
                    .for_each(|(out, x)| *out = x * norm);
            }
        }
    }
}

/// How vectors are cut into tiles.
#[derive(Clone, Copy)]
struct Tiles {
    count: usize,
    /// Panels that each of the tiles takes at once.
    panels: usize,
}

impl Tiles {
    #[inline(always)]
    fn of<S: Simd>(vectors: usize) -> Tiles {
        let count = vectors.div_ceil(tile_rows::<S>());
        let (few, many) = (
            tile_panels::<S>(vectors / count),
            tile_panels::<S>(vectors.div_ceil(count)),
        );
        Tiles {
            count,
            panels: if few == many { few } else { 1 },
        }
    }

    fn bounds(self, vectors: usize) -> impl Iterator<Item = Range<usize>> {
        (0..self.count).map(move |i| tile_bounds(vectors, i, self.count))
    }
}
