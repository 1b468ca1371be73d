//! Contexts of several parts: near the reference on every path, and the same bits whoever computed which part.

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::isa::Path;
use crate::backend::cpu::tests::numbers;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{Attention, Backend, KvDtype, KvShape};

/// Tokens of the sequence: three parts and a bit.
const CONTEXT: usize = 3 * PART + 37;

/// The sequence, or some tokens of it.
fn batch(positions: Range<usize>) -> Batch {
    let blocks = CONTEXT.div_ceil(16);
    Batch {
        tokens: vec![0; positions.len()],
        positions: (positions.start as u32..positions.end as u32).collect(),
        spans: vec![BatchSpan {
            rows: 0..positions.len(),
            position: positions.start,
            blocks: 0..blocks,
        }],
        // Far apart and in no order.
        blocks: (0..blocks as u32)
            .map(|i| 1 + i * 7 % blocks as u32)
            .collect(),
    }
}

/// Writes the whole sequence and gives the attention of some of its tokens.
fn attend<B: Backend>(
    backend: &mut B,
    (heads, dtype): (Heads, KvDtype),
    window: Option<usize>,
    queries: &[Range<usize>],
) -> Vec<f32> {
    let shape = KvShape {
        layers: 1,
        blocks: 1 + CONTEXT.div_ceil(16),
        heads: heads.kv,
        head_width: heads.width,
        dtype,
    };
    let rows = numbers(CONTEXT * heads.qkv_width(), 3);
    let mut kv = backend.alloc_kv(shape).unwrap();
    let mut qkv = backend.alloc(rows.len()).unwrap();
    let mut slopes = backend.alloc(heads.q).unwrap();
    backend.write(&rows, &mut qkv);
    backend.write(&numbers(heads.q, 5), &mut slopes);
    backend.write_kv(&batch(0..CONTEXT), heads, &mut qkv, None, &mut kv, 0);
    let mut results = Vec::new();
    for positions in queries {
        let (batch, width) = (batch(positions.clone()), heads.qkv_width());
        backend.write(
            &rows[positions.start * width..positions.end * width],
            &mut qkv,
        );
        let mut out = backend.alloc(batch.len() * heads.q_width()).unwrap();
        let attention = Attention {
            heads,
            qkv: &qkv,
            scale: 2.0,
            window,
            slopes: Some(&slopes),
        };
        backend.attention(&batch, &attention, &kv, 0, &mut out);
        let mut found = vec![0.0; batch.len() * heads.q_width()];
        backend.read(&out, &mut found).unwrap();
        results.extend(found);
    }
    results
}

const fn heads(q: usize, kv: usize, width: usize) -> Heads {
    Heads { q, kv, width }
}

#[test]
fn long_contexts_are_near_the_reference_on_every_path() {
    let queries = [PART - 3..PART + 5, CONTEXT - 9..CONTEXT];
    let pools = [1, 3].map(|threads| Pool::new(threads, &[]).unwrap());
    for (heads, dtype) in [
        (heads(8, 2, 64), KvDtype::Bf16),
        (heads(2, 2, 20), KvDtype::F32),
        (heads(7, 1, 33), KvDtype::Bf16),
        (heads(4, 1, 40), KvDtype::Int8),
    ] {
        for window in [None, Some(PART + 100), Some(40)] {
            let expected = attend(&mut ReferenceBackend, (heads, dtype), window, &queries);
            for isa in Path::ALL.into_iter().filter_map(Isa::new) {
                let rounds = isa.multiplies_pairs() && dtype == KvDtype::Bf16;
                let tolerance = if rounds { 3e-3 } else { 3e-5 };
                for pool in &pools {
                    let mut backend = CpuBackend::with_isa(pool.clone(), isa).unwrap();
                    let found = attend(&mut backend, (heads, dtype), window, &queries);
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!(
                            (found - expected).abs() < tolerance,
                            "{heads:?}, {dtype:?}, window {window:?}, {:?}: {found}, expected {expected}",
                            isa.path()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_of_a_long_context_has_the_same_bits_in_any_company_and_on_any_threads() {
    let last = CONTEXT - 60..CONTEXT;
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        for (window, dtype) in [
            (None, KvDtype::Bf16),
            (Some(PART + 100), KvDtype::Int8),
            (Some(40), KvDtype::Bf16),
        ] {
            let form = (heads(4, 2, 64), dtype);
            let run = |threads: usize, queries: &[Range<usize>]| {
                let pool = Pool::new(threads, &[]).unwrap();
                bits(attend(
                    &mut CpuBackend::with_isa(pool, isa).unwrap(),
                    form,
                    window,
                    queries,
                ))
            };
            let together = run(1, std::slice::from_ref(&last));
            let alone: Vec<Range<usize>> = last
                .clone()
                .map(|position| position..position + 1)
                .collect();
            // Few items: several threads divide the parts among them.
            for (threads, queries) in [
                (1, &alone[..]),
                (4, &alone),
                (16, std::slice::from_ref(&last)),
            ] {
                assert!(
                    run(threads, queries) == together,
                    "{:?}, window {window:?}, {threads} threads, {} chunks",
                    isa.path(),
                    queries.len()
                );
            }
        }
    }
}
