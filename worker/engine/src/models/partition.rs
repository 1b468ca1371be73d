//! One rank's part of a model: which heads, which part of the MLP's middle, which rows of the vocabulary.
//!
//! Owns the division alone, a pure function of spec, rank and ranks. Query heads divide evenly; KV heads divide, or are
//! repeated where there are fewer than ranks; MLP and vocabulary are cut as evenly as they go.

use super::spec::{ModelSpec, SpecError};
use crate::backend::Heads;
use std::ops::Range;

/// One rank's part of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Which rank, from 0.
    pub rank: usize,
    /// Of how many.
    pub ranks: usize,
    /// Its heads.
    pub heads: Heads,
    /// Its query heads among all.
    pub q_heads: Range<usize>,
    /// Its KV heads among all.
    pub kv_heads: Range<usize>,
    /// Its part of the MLP's middle.
    pub intermediate: Range<usize>,
    /// Its rows of the embedding and the head.
    pub vocab: Range<usize>,
    /// How many rows of the vocabulary each rank has.
    pub vocab_widths: Vec<usize>,
}

impl Partition {
    /// The part of `rank` of `ranks`.
    ///
    /// # Errors
    /// [`SpecError::Ranks`]: the heads do not divide, or there are more ranks than rows to divide.
    ///
    /// # Panics
    /// Where `rank` is not below `ranks`.
    pub fn new(spec: &ModelSpec, rank: usize, ranks: usize) -> Result<Partition, SpecError> {
        assert!(rank < ranks, "rank {rank} of {ranks}");
        let refuse = |what: String, needs: String| Err(SpecError::Ranks { what, ranks, needs });
        if !spec.heads.is_multiple_of(ranks) {
            return refuse(
                format!("{} attention heads", spec.heads),
                format!("a divisor of {}", spec.heads),
            );
        }
        let shared = ranks > spec.kv_heads && ranks.is_multiple_of(spec.kv_heads);
        if !spec.kv_heads.is_multiple_of(ranks) && !shared {
            let needs = format!("a divisor or a multiple of {}", spec.kv_heads);
            return refuse(format!("{} KV heads", spec.kv_heads), needs);
        }
        for (what, count) in [
            ("columns of the MLP", spec.intermediate),
            ("rows of the vocabulary", spec.vocab),
        ] {
            if count < ranks {
                return refuse(format!("{count} {what}"), format!("at most {count} ranks"));
            }
        }
        let cut = |count: usize, rank: usize| count * rank / ranks..count * (rank + 1) / ranks;
        let q_heads = cut(spec.heads, rank);
        let kv_heads = match shared {
            true => rank * spec.kv_heads / ranks..rank * spec.kv_heads / ranks + 1,
            false => cut(spec.kv_heads, rank),
        };
        Ok(Partition {
            rank,
            ranks,
            heads: Heads {
                q: q_heads.len(),
                kv: kv_heads.len(),
                width: spec.head_width,
            },
            q_heads,
            kv_heads,
            intermediate: cut(spec.intermediate, rank),
            vocab: cut(spec.vocab, rank),
            vocab_widths: (0..ranks).map(|rank| cut(spec.vocab, rank).len()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(heads: usize, kv_heads: usize, intermediate: usize, vocab: usize) -> ModelSpec {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": heads * 4, "num_hidden_layers": 1,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
            "vocab_size": vocab, "max_position_embeddings": 64
        });
        ModelSpec::from_config(&json.to_string()).expect("a valid config")
    }

    proptest! {
        #[test]
        fn the_parts_of_all_ranks_cover_the_model_without_overlap(
            per_kv in 1usize..4, kv in 1usize..9, ranks in 1usize..9, intermediate in 8usize..100, vocab in 8usize..100,
        ) {
            let spec = spec(kv * per_kv, kv, intermediate, vocab);
            let parts: Result<Vec<_>, _> = (0..ranks).map(|rank| Partition::new(&spec, rank, ranks)).collect();
            let Ok(parts) = parts else {
                prop_assert!(!spec.heads.is_multiple_of(ranks) || (!kv.is_multiple_of(ranks) && !ranks.is_multiple_of(kv)));
                return Ok(());
            };
            let (mut q, mut middle, mut rows) = (0, 0, 0);
            for part in &parts {
                prop_assert_eq!((part.q_heads.start, part.intermediate.start, part.vocab.start), (q, middle, rows));
                (q, middle, rows) = (part.q_heads.end, part.intermediate.end, part.vocab.end);
                prop_assert!(!part.intermediate.is_empty() && !part.vocab.is_empty());
                prop_assert_eq!(part.vocab.len(), parts[0].vocab_widths[part.rank]);
                prop_assert_eq!(part.heads.q % part.heads.kv, 0);
                for (i, head) in part.q_heads.clone().enumerate() {
                    let own = part.kv_heads.start + i / (part.heads.q / part.heads.kv);
                    prop_assert_eq!(own, head / per_kv, "query head {} reads its own KV head", head);
                }
            }
            prop_assert_eq!((q, middle, rows), (spec.heads, intermediate, vocab));
        }
    }

    #[test]
    fn ranks_that_do_not_divide_the_heads_are_refused_by_name() {
        let message = |heads, kv, ranks| {
            Partition::new(&spec(heads, kv, 64, 64), 0, ranks)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            message(8, 4, 3),
            "8 attention heads cannot be divided among 3 ranks; it needs a divisor of 8"
        );
        assert_eq!(
            message(12, 3, 2),
            "3 KV heads cannot be divided among 2 ranks; it needs a divisor or a multiple of 3"
        );
    }
}
