//! Embeddings against the recorded ones of transformers: the mean of the last hidden states, for every family, on one
//! and more ranks, whole and in chunks.

mod support;

use engine::backend::KvDtype;
use serde::Deserialize;
use support::{Cut, Setup, cpu, embed, models};

#[derive(Deserialize)]
struct Golden {
    name: String,
    input_ids: Vec<u32>,
    embedding: Vec<f64>,
}

fn compare(model: &str, ranks: u32, kv: KvDtype, off_max: f64) {
    let path = models().join("golden").join(model).join("embeddings.json");
    let text = std::fs::read_to_string(&path).expect("recorded embeddings");
    let goldens: Vec<Golden> = serde_json::from_str(&text).expect("a recording");
    assert!(goldens.len() >= 15);
    let prompts: Vec<Vec<u32>> = goldens
        .iter()
        .map(|golden| golden.input_ids.clone())
        .collect();
    let mut first: Option<Vec<Vec<f64>>> = None;
    for chunk in [512, 48, 5] {
        let setup = Setup {
            cut: Cut {
                chunk,
                step_tokens: 512,
            },
            ..Setup::new(ranks, kv)
        };
        let embeddings = embed(&models().join(model), setup, cpu, &prompts);
        for (golden, embedding) in goldens.iter().zip(&embeddings) {
            let place = format!("{model}, {ranks} ranks, {}", golden.name);
            assert_eq!(golden.embedding.len(), embedding.len(), "{place}");
            for (expected, got) in golden.embedding.iter().zip(embedding) {
                let off = (expected - got).abs();
                assert!(off <= off_max, "{place}: off by {off}");
            }
        }
        let same = first.get_or_insert_with(|| embeddings.clone());
        assert!(*same == embeddings, "chunks of {chunk} change no bit");
    }
}

#[test]
fn embeddings_are_the_mean_of_transformers_last_hidden_states() {
    for model in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        compare(model, 1, KvDtype::F32, 2e-3);
        compare(model, 1, KvDtype::Bf16, 0.1);
    }
}

#[test]
fn embeddings_of_two_and_four_ranks_are_transformers_too() {
    for model in ["tiny-llama", "tiny-mistral", "tiny-mpt"] {
        compare(model, 2, KvDtype::F32, 2e-3);
        compare(model, 4, KvDtype::F32, 2e-3);
    }
}
