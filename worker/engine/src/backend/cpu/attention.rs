//! Paged attention: queries of neighbouring tokens against the blocks of their sequence.
//!
//! Owns the cut into work items (some tokens of a span, one KV head and all query heads that share it), who computes
//! them, and how the parts of a long context are put together. A context is cut into parts of [`PART`] keys aligned to
//! absolute position; each is computed on its own ([`vectors`]) and the parts are merged in their order ([`merge`]). A
//! token's result depends on its own position alone, not on which tokens share its item, nor on whether one thread took
//! all parts of an item or several did.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::isa::Isa;
use super::kv::{CpuKv, HeadBlocks, KvElement, KvValues, Paired, head_blocks};
use super::pool::{Base, Pool};
use crate::backend::{Attention, Batch, BatchSpan, Heads};
use merge::{Merge, record_len};
use vectors::{VectorSpace, Vectors};

mod merge;
#[cfg(test)]
mod tests;
mod tile;
mod vectors;

/// Keys of a part: its scores, keys and values stay in the L2 cache while all vectors of an item meet them.
const PART: usize = 512;
/// Numbers from one row of scores or queries to the next, known when compiled. No multiple of a page: rows would meet in
/// the same places of the L1 cache.
const STRIDE: usize = PART + 16;
/// Widest head: its queries lie in a row.
pub(super) const HEAD_WIDTH_MAX: usize = PART;
/// Query vectors of an item: they share each part of K and V while it is in a near cache.
const ITEM_VECTORS: usize = 48;
/// Products of one step's attention in one layer worth waking a helper for.
const PARALLEL_MIN: usize = 64 << 10;
/// With fewer items per thread, long contexts are divided too, as long as what is found in all parts takes no more
/// numbers than the second.
const ITEMS_PER_THREAD: usize = 4;
const DIVIDED_MAX: usize = 2 << 20;

/// What attention keeps between steps, so that a step allocates nothing.
#[derive(Debug, Default)]
pub(super) struct AttentionSpace {
    items: Vec<Item>,
    /// One per thread.
    scratch: Vec<Mutex<Scratch>>,
    /// What several threads found in the parts of the same items: `[part of an item][KV head]`, records.
    divided: Vec<f32>,
}

/// Some neighbouring tokens of a span.
#[derive(Debug, Clone)]
struct Item {
    span: usize,
    /// Rows of the batch.
    rows: Range<usize>,
    /// Position of the first.
    position: usize,
    /// Parts of its context, and how many parts the items before it have.
    parts: Range<usize>,
    parts_before: usize,
}

/// One thread's numbers for one item: records of its vectors, see [`merge`].
#[derive(Debug, Default)]
struct Scratch {
    vectors: VectorSpace,
    /// Of the parts so far, and of the one in work.
    merged: Vec<f32>,
    found: Vec<f32>,
}

/// The read-only side of a call, shared by its items.
#[derive(Clone, Copy)]
struct Call<'a> {
    isa: Isa,
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
            isa,
            heads,
            qkv: attention.qkv.as_ref(),
            scale: attention.scale,
            window: attention.window,
            slopes: attention.slopes.map(AsRef::as_ref),
            out: &out,
        };
        match &kv.values {
            KvValues::F32(values) => self.run_items(pool, batch, call, &|head| {
                head_blocks(kv.shape, values.as_ref(), layer, head)
            }),
            KvValues::Bf16(values) if isa.multiplies_pairs() => {
                let values: &[Paired] = bytemuck::cast_slice(values.as_ref());
                self.run_items(pool, batch, call, &|head| {
                    head_blocks(kv.shape, values, layer, head)
                });
            }
            KvValues::Bf16(values) => self.run_items(pool, batch, call, &|head| {
                head_blocks(kv.shape, values.as_ref(), layer, head)
            }),
            KvValues::Int8(values) => self.run_items(pool, batch, call, &|head| {
                head_blocks(kv.shape, values.as_ref(), layer, head)
            }),
        }
    }

    fn run_items<'a, E: KvElement>(
        &mut self,
        pool: &Pool,
        batch: &Batch,
        call: Call<'_>,
        blocks_of: &(dyn Fn(usize) -> HeadBlocks<'a, E> + Sync),
    ) {
        let parts = self.plan(pool, batch, call);
        let (items, scratch, kv) = (&self.items, &self.scratch, call.heads.kv);
        let lock = |thread: usize| {
            scratch[thread]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let vectors_of = |item: &Item, head: usize| Vectors {
            call,
            rows: item.rows.clone(),
            position: item.position,
            head,
            blocks: blocks_of(head),
            table: batch.blocks_of(&batch.spans[item.span]),
        };
        // One thread takes all parts of an item.
        let whole = |index: usize, thread: usize| {
            let (item, scratch) = (&items[index / kv], &mut *lock(thread));
            let vectors = vectors_of(item, index % kv);
            let len = vectors.len() * record_len(call.heads.width);
            let (merged, found) = (&mut scratch.merged[..len], &mut scratch.found[..len]);
            vectors.take_queries(&mut scratch.vectors);
            vectors.find(item.parts.start, &mut scratch.vectors, merged);
            for part in item.parts.clone().skip(1) {
                vectors.find(part, &mut scratch.vectors, found);
                merge(call, found, merged);
            }
            vectors.give(merged);
        };
        let count = items.len() * kv;
        let pairs: usize = items.iter().map(|item| call.pairs(item)).sum();
        if pairs * call.heads.q_width() < PARALLEL_MIN {
            pool.run(1, &|_, thread| {
                (0..count).for_each(|index| whole(index, thread))
            });
            return;
        }
        let rows_most = items.iter().map(|item| item.rows.len()).max().unwrap_or(0);
        let len = rows_most * call.shared_by() * record_len(call.heads.width);
        let enough = count >= ITEMS_PER_THREAD * pool.threads();
        if enough || parts == items.len() || parts * kv * len > DIVIDED_MAX {
            pool.run(count, &whole);
            return;
        }
        // Several threads take the parts of an item, which are merged in the same order.
        grow(&mut self.divided, parts * kv * len);
        pool.run_chunks(
            &mut self.divided[..parts * kv * len],
            len,
            &|index, found, thread| {
                let (part, head) = (index / kv, index % kv);
                let item = &items[items.partition_point(|item| item.parts_before <= part) - 1];
                let (vectors, space) = (vectors_of(item, head), &mut lock(thread).vectors);
                vectors.take_queries(space);
                vectors.find(item.parts.start + part - item.parts_before, space, found);
            },
        );
        let divided = &self.divided;
        pool.run(count, &|index, thread| {
            let (item, head) = (&items[index / kv], index % kv);
            let vectors = vectors_of(item, head);
            let own = vectors.len() * record_len(call.heads.width);
            let merged = &mut lock(thread).merged[..own];
            let found = |part: usize| &divided[(part * kv + head) * len..][..own];
            merged.copy_from_slice(found(item.parts_before));
            for part in 1..item.parts.len() {
                merge(call, found(item.parts_before + part), merged);
            }
            vectors.give(merged);
        });
    }

    /// Cuts the batch into items and makes room for the largest. Gives how many parts they have together.
    fn plan(&mut self, pool: &Pool, batch: &Batch, call: Call<'_>) -> usize {
        let rows_max = (ITEM_VECTORS / call.shared_by()).max(1);
        self.items.clear();
        let (mut parts_before, mut rows_most) = (0, 0);
        for (span, BatchSpan { rows, position, .. }) in batch.spans.iter().enumerate() {
            for start in rows.clone().step_by(rows_max) {
                let position = position + start - rows.start;
                let rows = start..(start + rows_max).min(rows.end);
                let last = position + rows.len() - 1;
                let parts = call.first_key(position) / PART..last / PART + 1;
                rows_most = rows_most.max(rows.len());
                self.items.push(Item {
                    span,
                    rows,
                    position,
                    parts: parts.clone(),
                    parts_before,
                });
                parts_before += parts.len();
            }
        }
        let vectors = rows_most * call.shared_by();
        self.scratch.resize_with(pool.threads(), Mutex::default);
        for scratch in &mut self.scratch {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            scratch.vectors.make_room(vectors);
            grow(&mut scratch.merged, vectors * record_len(call.heads.width));
            grow(&mut scratch.found, vectors * record_len(call.heads.width));
        }
        parts_before
    }
}

fn grow(values: &mut Vec<f32>, len: usize) {
    if values.len() < len {
        values.resize(len.next_power_of_two(), 0.0);
    }
}

/// Merges what was found in a part into what was found in the parts before it.
fn merge(call: Call<'_>, found: &[f32], merged: &mut [f32]) {
    call.isa.run(Merge {
        found,
        merged,
        record_len: record_len(call.heads.width),
    });
}

impl Call<'_> {
    /// Query heads per KV head.
    fn shared_by(self) -> usize {
        self.heads.q / self.heads.kv
    }

    /// The first key that the token at `position` sees.
    fn first_key(self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Pairs of a token of an item and a key that the item sees.
    fn pairs(self, item: &Item) -> usize {
        let rows = item.rows.len();
        rows * (item.position + rows - self.first_key(item.position))
    }
}
