//! Holds the documents against the planner: every command's output that they show, and every table that is computed.
//!
//! A table that differs is printed as it should be, to be pasted.

use std::fmt::Write;
use std::path::PathBuf;

use common::wire::message::Quantization;

use super::*;
use crate::policy::memory_plan::need;

/// What shards may use of an 80 GB card.
const CARD_BYTES: u64 = 76 << 30;

struct Card {
    name: &'static str,
    /// Bytes per second of its memory.
    reads: f64,
    /// Additions and multiplications per second, dense bf16.
    computes: f64,
}

const A100: Card = Card {
    name: "A100 80 GB SXM",
    reads: 2039e9,
    computes: 312e12,
};
const H100: Card = Card {
    name: "H100 80 GB SXM",
    reads: 3350e9,
    computes: 989e12,
};

/// Between two cards: what a sum over ranks takes.
struct Link {
    name: &'static str,
    /// Seconds of a call, however small.
    latency: f64,
    /// Bytes per second and direction.
    carries: f64,
}

const LINKS: [Link; 2] = [
    Link {
        name: "NVLink",
        latency: 10e-6,
        carries: 240e9,
    },
    Link {
        name: "PCIe 4.0 x16",
        latency: 20e-6,
        carries: 25e9,
    },
];

/// Name, file, ranks of the rooflines.
const ROOFS: [(&str, &str, u32); 4] = [
    ("Llama 2 7B", "llama-2-7b", 1),
    ("Llama 2 13B", "llama-2-13b", 1),
    ("Code Llama 34B", "code-llama-34b", 1),
    ("Llama 2 70B", "llama-2-70b", 2),
];
const BATCHES: [u64; 4] = [1, 8, 32, 64];
const PROMPT: f64 = 2048.0;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document(name: &str) -> String {
    std::fs::read_to_string(root().join("docs").join(name)).unwrap()
}

fn cluster_of(file: &str) -> Cluster {
    common::config::load(&root().join(file)).unwrap_or_else(|e| panic!("{e}"))
}

fn facts_of(config: &str) -> ModelFacts {
    let file = root().join(format!("tests/models/configs/{config}.json"));
    facts_at(&file).unwrap()
}

/// The plan of a model for sequences of 4096 tokens, or of its own longest.
fn planned(config: &str, ranks: u32, quantization: Quantization) -> (ModelFacts, RankNeed) {
    let facts = facts_of(config);
    let facts = ModelFacts {
        quantization,
        context_max: facts.context_max.min(4096),
        ..facts
    };
    let need = need(&facts, DeviceKind::Cuda, ranks, 4).unwrap();
    (facts, need)
}

/// What `coordinator` prints for these words behind its name.
fn output(words: &str) -> String {
    let mut question = Question {
        concurrency: 4,
        ..Question::default()
    };
    let (mut config, mut model) = (None, None);
    let mut words = words.split_whitespace();
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap();
        match word {
            "plan" => {}
            "--config" => config = Some(value()),
            "--context" => question.context = Some(value().parse().unwrap()),
            "--concurrency" => question.concurrency = value().parse().unwrap(),
            "--bytes" => question.bytes = true,
            _ => model = Some(word),
        }
    }
    let cluster = cluster_of(config.expect("a document's command names its cluster"));
    let facts = facts_at(&root().join(model.unwrap())).unwrap();
    report(&cluster, facts, &question).unwrap().0
}

/// Commands of a document's blocks, each with the start of its output.
fn commands(text: &str) -> Vec<(&str, &str)> {
    let blocks = text.split("```\n$ coordinator ").skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap())
        .map(|block| block.split_once('\n').unwrap())
        .collect()
}

#[test]
fn commands_in_the_documents_print_what_stands_below_them() {
    for name in ["gpu.md", "memory.md"] {
        let text = document(name);
        let commands = commands(&text);
        assert!(!commands.is_empty(), "{name}");
        for (command, shown) in commands {
            let printed = output(command);
            assert!(
                printed.starts_with(shown) && shown.contains("Bytes on each rank"),
                "{name}: coordinator {command} prints\n{printed}"
            );
        }
    }
}

#[test]
fn the_table_of_sequences_is_the_planners() {
    let models = [
        ("Llama 2 7B", "llama-2-7b"),
        ("Llama 2 13B", "llama-2-13b"),
        ("Code Llama 34B", "code-llama-34b"),
        ("Llama 2 70B", "llama-2-70b"),
        ("MPT 7B (2048 tokens)", "mpt-7b"),
        ("MPT 30B", "mpt-30b"),
        ("Mistral 7B", "mistral-7b"),
    ];
    let mut table = String::new();
    for (name, config) in models {
        write!(table, "| {name} |").unwrap();
        for ranks in [1, 2] {
            for quantization in Quantization::ALL {
                let (_, need) = planned(config, ranks, quantization);
                match need.sequences_within(CARD_BYTES) {
                    0 => write!(table, " does not fit |").unwrap(),
                    sequences => write!(table, " {sequences} |").unwrap(),
                }
            }
        }
        table.push('\n');
    }
    assert_shown(&table);
}

fn assert_shown(table: &str) {
    assert!(
        document("gpu.md").contains(table),
        "docs/gpu.md should have\n{table}"
    );
}

/// Numbers of a rank's embedding table, of which a step reads a row per token, and of its head.
fn end_numbers(facts: &ModelFacts, ranks: u32) -> f64 {
    (facts.shape.vocab * facts.shape.hidden / u64::from(ranks)) as f64
}

/// Seconds of a step of decodes: all weights but the table and all keys and values are read, or all multiplications are
/// made, whichever takes longer.
fn decode_s(card: &Card, facts: &ModelFacts, need: &RankNeed, batch: u64, context: u64) -> f64 {
    let table = end_numbers(facts, need.ranks);
    let weights = need.weight_bytes as f64 - 2.0 * table;
    let kv = (batch * context * need.token_bytes()) as f64;
    let flops = 2.0 * (need.parameters as f64 - table) * batch as f64;
    ((weights + kv) / card.reads).max(flops / card.computes)
}

#[test]
fn the_roofline_of_decode_is_its_arithmetic() {
    let mut table = String::new();
    for card in [A100, H100] {
        for (name, config, ranks) in ROOFS {
            let (facts, need) = planned(config, ranks, Quantization::None);
            write!(table, "| {} | {ranks} x {} |", name, card.name).unwrap();
            for context in [1024, 4096] {
                let room = need.kv_left(CARD_BYTES) / (context * need.token_bytes());
                for batch in BATCHES {
                    if batch > room {
                        write!(table, " - |").unwrap();
                    } else {
                        let seconds = decode_s(&card, &facts, &need, batch, context);
                        write!(table, " {:.0} |", batch as f64 / seconds).unwrap();
                    }
                }
            }
            table.push('\n');
        }
    }
    assert_shown(&table);
}

/// Seconds of a prompt of 2048 tokens: products of all tokens but the head's, and attention's two products over half of
/// all pairs.
fn prefill_s(card: &Card, facts: &ModelFacts, need: &RankNeed) -> f64 {
    let shape = &facts.shape;
    let ends = 2.0 * end_numbers(facts, need.ranks);
    let products = 2.0 * (need.parameters as f64 - ends) * PROMPT;
    let q = (shape.heads / u64::from(need.ranks) * shape.head_width * shape.layers) as f64;
    (products + 2.0 * q * PROMPT * PROMPT) / card.computes
}

#[test]
fn the_roofline_of_prefill_is_its_arithmetic() {
    let mut table = String::new();
    for (name, config, ranks) in ROOFS {
        let (facts, need) = planned(config, ranks, Quantization::None);
        write!(table, "| {name} | {ranks} |").unwrap();
        for card in [A100, H100] {
            let seconds = prefill_s(&card, &facts, &need);
            write!(
                table,
                " {:.0} ms | {:.0} |",
                seconds * 1e3,
                PROMPT / seconds
            )
            .unwrap();
        }
        table.push('\n');
    }
    assert_shown(&table);
}

/// Seconds that sums over two ranks take in a step of so many tokens: two per layer and one for the embedding.
fn sums_s(link: &Link, facts: &ModelFacts, tokens: f64) -> f64 {
    let calls = (2 * facts.shape.layers + 1) as f64;
    calls * (link.latency + tokens * facts.shape.hidden as f64 * 4.0 / link.carries)
}

#[test]
fn the_share_of_sums_over_ranks_is_its_arithmetic() {
    let mut table = String::new();
    let (facts, need) = planned("llama-2-70b", 2, Quantization::None);
    let prefill = prefill_s(&A100, &facts, &need);
    let decodes = [1, 8, 32].map(|batch| {
        (
            format!("decode, {batch} at 1024"),
            batch as f64,
            decode_s(&A100, &facts, &need, batch, 1024),
        )
    });
    let prompt = ("prefill of 2048".to_owned(), PROMPT, prefill);
    for (what, tokens, computes) in decodes.into_iter().chain([prompt]) {
        write!(table, "| {what} | {:.1} ms |", computes * 1e3).unwrap();
        for link in &LINKS {
            let sums = sums_s(link, &facts, tokens);
            let share = sums / (sums + computes) * 100.0;
            write!(table, " {:.1} ms | {share:.0} % |", sums * 1e3).unwrap();
        }
        table.push('\n');
    }
    assert!(LINKS[0].name == "NVLink" && LINKS[1].name.starts_with("PCIe"));
    assert_shown(&table);
}
