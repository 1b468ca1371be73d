//! The numerics id: two replicas with one id give the same bits for the same sequence.
//!
//! Owns what goes into it: whatever can change a sum's order or rounding. A sequence is moved to a replica of equal id
//! where there is one.

use crate::backend::{KvDtype, WeightDtype};
use crate::weights::quant;
use sha2::{Digest, Sha256};

/// Counts changes of the forward pass itself (the layers, the order of its ops). Kernels have versions of their own.
const FORWARD_VERSION: u32 = 1;

/// Sixteen hex digits of the hash over forward pass, kernels (a backend's [`numerics`]), number formats (with the
/// way into them, where weights are quantised) and ranks.
///
/// [`numerics`]: crate::backend::Backend::numerics
#[must_use]
pub fn numerics_id(kernels: &str, weights: WeightDtype, kv: KvDtype, ranks: u32) -> String {
    let quantiser = match weights.quantised() {
        Some(_) => format!("-{}-{}", quant::GROUP, quant::VERSION),
        None => String::new(),
    };
    let text = format!(
        "forward-{FORWARD_VERSION}/{kernels}/weights-{}{quantiser}/kv-{}/ranks-{ranks}",
        weights.name(),
        kv.name()
    );
    Sha256::digest(text)[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_input_changes_the_id() {
        let mut ids = HashSet::new();
        for kernels in ["cpu-1-avx2", "cpu-2-avx2", "cpu-1-avx512"] {
            for weights in [
                WeightDtype::F32,
                WeightDtype::Bf16,
                WeightDtype::Int8,
                WeightDtype::Int4,
            ] {
                for kv in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
                    for ranks in [1, 2, 4] {
                        let id = numerics_id(kernels, weights, kv, ranks);
                        assert_eq!(id, numerics_id(kernels, weights, kv, ranks));
                        assert_eq!(id.len(), 16);
                        ids.insert(id);
                    }
                }
            }
        }
        assert_eq!(ids.len(), 3 * 4 * 3 * 3);
    }
}
