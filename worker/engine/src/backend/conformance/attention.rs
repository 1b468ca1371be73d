//! Attention over the paged cache: near the reference's, and the same bits however a sequence is cut into chunks.

use super::{SUMS, Twins, bits};
use crate::backend::{Attention, Backend, Batch, BatchSpan, DeviceError, Heads, KvDtype, KvShape};
use crate::plan::{BLOCK_TOKENS, NULL_BLOCK};

/// Sequences in a cache, and the queries of some of their tokens.
struct Scene {
    heads: Heads,
    /// Whole sequences, from position 0.
    sequences: Batch,
    kv: KvShape,
    /// The rows of qkv of all tokens of the sequences.
    qkv: Vec<f32>,
}

impl Scene {
    /// Sequences of these lengths with random q, k and v, their blocks mixed.
    fn new<B: Backend>(
        twins: &mut Twins<B>,
        heads: Heads,
        lengths: &[usize],
        dtype: KvDtype,
    ) -> Scene {
        let mut sequences = Batch::default();
        let tables: Vec<usize> = lengths
            .iter()
            .map(|length| length.div_ceil(BLOCK_TOKENS))
            .collect();
        let total: usize = tables.iter().sum();
        // A prime stride scatters the blocks over the pool.
        let mut ids = (0..total as u32).map(|i| 1 + (i * 7919) % total as u32);
        for (length, blocks) in lengths.iter().zip(tables) {
            let (row, block) = (sequences.len(), sequences.blocks.len());
            sequences.positions.extend(0..*length as u32);
            sequences.tokens.resize(row + length, 0);
            sequences.blocks.extend(ids.by_ref().take(blocks));
            sequences.spans.push(BatchSpan {
                rows: row..row + length,
                position: 0,
                blocks: block..block + blocks,
            });
        }
        let kv = KvShape {
            layers: 2,
            blocks: total + 1,
            heads: heads.kv,
            head_width: heads.width,
            dtype,
        };
        let qkv = twins.input_values(sequences.len() * heads.qkv_width(), 2.0);
        Scene {
            heads,
            sequences,
            kv,
            qkv,
        }
    }

    /// Queries from position `first` on, up to `len` of them, of each sequence; with their rows of qkv. Blocks wholly
    /// behind the window are taken away.
    fn queries(&self, first: usize, len: usize, window: Option<usize>) -> (Batch, Vec<f32>) {
        let (mut batch, mut qkv) = (Batch::default(), Vec::new());
        let width = self.heads.qkv_width();
        for span in &self.sequences.spans {
            let (start, end) = (
                first.min(span.rows.len()),
                (first + len).min(span.rows.len()),
            );
            let (row, block) = (batch.len(), batch.blocks.len());
            if start == end {
                continue;
            }
            batch.positions.extend(start as u32..end as u32);
            batch.tokens.resize(row + end - start, 0);
            let visible =
                window.map_or(0, |window| (start + 1).saturating_sub(window)) / BLOCK_TOKENS;
            let table = &self.sequences.blocks_of(span)[..end.div_ceil(BLOCK_TOKENS)];
            batch.blocks.extend(
                table
                    .iter()
                    .enumerate()
                    .map(|(i, id)| if i < visible { NULL_BLOCK } else { *id }),
            );
            batch.spans.push(BatchSpan {
                rows: row..row + end - start,
                position: start,
                blocks: block..batch.blocks.len(),
            });
            qkv.extend_from_slice(
                &self.qkv[(span.rows.start + start) * width..(span.rows.start + end) * width],
            );
        }
        (batch, qkv)
    }
}

const HEADS: [Heads; 8] = [
    Heads {
        q: 1,
        kv: 1,
        width: 2,
    },
    Heads {
        q: 4,
        kv: 2,
        width: 16,
    },
    Heads {
        q: 8,
        kv: 1,
        width: 64,
    },
    Heads {
        q: 6,
        kv: 3,
        width: 20,
    },
    Heads {
        q: 5,
        kv: 5,
        width: 7,
    },
    Heads {
        q: 2,
        kv: 2,
        width: 128,
    },
    Heads {
        q: 7,
        kv: 1,
        width: 33,
    },
    Heads {
        q: 3,
        kv: 3,
        width: 80,
    },
];

/// Windows, a zero standing for none.
const WINDOWS: [usize; 6] = [0, 1, 5, 16, 17, 40];

/// Every ratio of heads, window, slope and span.
pub(super) fn near<B: Backend>(twins: &mut Twins<B>, dtype: KvDtype) {
    for heads in HEADS {
        let scene = Scene::new(twins, heads, &[1, 16, 37, 90, 17], dtype);
        if !twins.promises.attends(heads.width) {
            let refused = twins.device.alloc_kv(scene.kv).err();
            let expected = matches!(refused, Some(DeviceError::Unsupported(_)));
            assert!(expected, "a cache of {heads:?}: {refused:?}");
            continue;
        }
        let (mut device_kv, mut twin_kv) = (
            twins.device.alloc_kv(scene.kv).expect("memory for a test"),
            twins.twin.alloc_kv(scene.kv).expect("memory for a test"),
        );
        // The whole sequences are in the cache, so that keys after a query are there to be left alone; layer 0 holds
        // others.
        let mut whole = twins.buf(&scene.qkv);
        let mut others = twins.random(scene.qkv.len(), 2.0);
        twins.device.begin_step(&scene.sequences);
        for (layer, values) in [(0, &mut others), (1, &mut whole)] {
            twins.device.write_kv(
                &scene.sequences,
                heads,
                &mut values.device,
                None,
                &mut device_kv,
                layer,
            );
            twins.twin.write_kv(
                &scene.sequences,
                heads,
                &mut values.twin,
                None,
                &mut twin_kv,
                layer,
            );
        }
        let slopes = twins.random(heads.q, 0.5);
        for (first, len) in [(0, 90), (0, 1), (13, 9), (16, 1), (36, 1), (60, 30)] {
            for window in WINDOWS {
                let window = (window > 0).then_some(window);
                let (batch, qkv) = scene.queries(first, len, window);
                let (qkv, mut out) = (twins.buf(&qkv), twins.zeros(batch.len() * heads.q_width()));
                twins.device.begin_step(&batch);
                for (with_slopes, scale) in [(false, 0.25), (true, 0.25), (false, 8.0)] {
                    let attention = Attention {
                        heads,
                        qkv: &qkv.device,
                        scale,
                        window,
                        slopes: with_slopes.then_some(&slopes.device),
                    };
                    twins
                        .device
                        .attention(&batch, &attention, &device_kv, 1, &mut out.device);
                    let attention = Attention {
                        heads,
                        qkv: &qkv.twin,
                        scale,
                        window,
                        slopes: with_slopes.then_some(&slopes.twin),
                    };
                    twins
                        .twin
                        .attention(&batch, &attention, &twin_kv, 1, &mut out.twin);
                    let what = format!(
                        "attention of {heads:?}, {dtype:?}, positions {first}..+{len}, window {window:?}, slopes {with_slopes}, scale {scale}"
                    );
                    // Scores of hundreds: their rounding alone moves a softmax by some 1e-4.
                    let tolerance = if scale > 1.0 { 1e-3 } else { SUMS };
                    let tolerance = twins.promises.attended(tolerance, dtype);
                    twins.compare(&what, &out, batch.len() * heads.q_width(), tolerance);
                }
            }
        }
    }
}

/// A token's attention has the same bits whether its sequence came in one chunk or in many.
pub(super) fn in_chunks<B: Backend>(twins: &mut Twins<B>, dtype: KvDtype) {
    for heads in HEADS {
        if !twins.promises.attends(heads.width) {
            continue;
        }
        let scene = Scene::new(twins, heads, &[75, 50], dtype);
        let slopes = twins.random(heads.q, 0.5);
        for window in WINDOWS {
            let window = (window > 0).then_some(window);
            let mut results: Vec<Vec<Vec<u32>>> = Vec::new();
            for chunk in [75, 1, 7, 16, 33] {
                let mut kv = twins.device.alloc_kv(scene.kv).expect("memory for a test");
                let mut by_sequence = vec![Vec::new(); scene.sequences.spans.len()];
                for first in (0..75).step_by(chunk) {
                    let (batch, qkv) = scene.queries(first, chunk, window);
                    let (mut qkv, mut out) =
                        (twins.buf(&qkv), twins.zeros(batch.len() * heads.q_width()));
                    twins.device.begin_step(&batch);
                    twins
                        .device
                        .write_kv(&batch, heads, &mut qkv.device, None, &mut kv, 1);
                    let attention = Attention {
                        heads,
                        qkv: &qkv.device,
                        scale: 0.25,
                        window,
                        slopes: Some(&slopes.device),
                    };
                    twins
                        .device
                        .attention(&batch, &attention, &kv, 1, &mut out.device);
                    let out = bits(&twins.read(&out.device, batch.len() * heads.q_width()));
                    for (sequence, span) in by_sequence.iter_mut().zip(&batch.spans) {
                        sequence.extend_from_slice(
                            &out[span.rows.start * heads.q_width()
                                ..span.rows.end * heads.q_width()],
                        );
                    }
                }
                results.push(by_sequence);
            }
            for (result, chunk) in results[1..].iter().zip([1, 7, 16, 33]) {
                assert!(
                    *result == results[0],
                    "attention of {heads:?}, {dtype:?}, window {window:?}: chunks of {chunk} differ from one chunk"
                );
            }
        }
    }
}
