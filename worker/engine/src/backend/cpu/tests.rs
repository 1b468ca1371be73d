//! The backend as a whole: every instruction path of this processor against the reference, alone and on several threads.

use super::*;
use crate::backend::{KvDtype, conformance};

/// Numbers between -0.5 and 0.5, the same for the same seed.
pub(super) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 - 0.5
        })
        .collect()
}

#[test]
fn every_path_conforms_to_the_reference() {
    let pools = [1, 2].map(|threads| Pool::new(threads, &[]).unwrap());
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        let promises = conformance::Promises {
            rounds_inputs: isa.multiplies_pairs(),
            ..conformance::Promises::HOST
        };
        for pool in &pools {
            conformance::check(promises, || {
                CpuBackend::with_isa(Arc::clone(pool), isa).unwrap()
            });
        }
    }
}

#[test]
fn stale_numbers_in_a_block_do_not_reach_its_next_owner() {
    let heads = Heads {
        q: 2,
        kv: 1,
        width: 16,
    };
    let shape = |dtype| KvShape {
        layers: 1,
        blocks: 2,
        heads: 1,
        head_width: 16,
        dtype,
    };
    let tokens = |count: usize| Batch {
        tokens: vec![0; count],
        positions: (0..count as u32).collect(),
        spans: vec![crate::backend::BatchSpan {
            rows: 0..count,
            position: 0,
            blocks: 0..1,
        }],
        blocks: vec![1],
    };
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
        let mut backend = CpuBackend::new(Pool::new(1, &[]).unwrap()).unwrap();
        let mut kv = backend.alloc_kv(shape(dtype)).unwrap();
        let mut qkv = backend.alloc(16 * heads.qkv_width()).unwrap();
        let mut out = backend.alloc(16 * heads.q_width()).unwrap();
        qkv.as_mut().fill(f32::NAN);
        backend.write_kv(&tokens(16), heads, &mut qkv, None, &mut kv, 0);
        qkv.as_mut().fill(1.0);
        for count in [1, 2, 5] {
            let batch = tokens(count);
            backend.write_kv(&batch, heads, &mut qkv, None, &mut kv, 0);
            let attention = Attention {
                heads,
                qkv: &qkv,
                scale: 0.5,
                window: None,
                slopes: None,
            };
            backend.attention(&batch, &attention, &kv, 0, &mut out);
            assert!(
                out.as_ref()[..count * heads.q_width()]
                    .iter()
                    .all(|x| (x - 1.0).abs() < 1e-6),
                "{count} tokens, {dtype:?}"
            );
        }
    }
}

#[test]
fn the_paths_are_told_apart_and_odd_ones_are_not_made() {
    let pool = Pool::new(1, &[]).unwrap();
    let names: Vec<String> = Path::ALL
        .into_iter()
        .filter_map(Isa::new)
        .map(|isa| {
            CpuBackend::with_isa(Arc::clone(&pool), isa)
                .unwrap()
                .numerics()
        })
        .collect();
    assert!(names.contains(&"cpu-3-portable".to_owned()));
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    #[cfg(target_arch = "x86_64")]
    assert_eq!(
        Isa::new(Path::Avx512).is_some(),
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
    );
}
