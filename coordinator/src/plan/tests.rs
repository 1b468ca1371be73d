//! The seed's size table, for the published models, and the command's words.

use super::*;

/// What shards may use of an 80 GB card: of the 79.1 GiB that the driver counts, the rest is for the CUDA context, NCCL's
/// buffers and fragmentation.
const A100: &str = "76GiB";

fn cluster(memory: &str, models: &str) -> Cluster {
    let folder = tempfile::tempdir().unwrap();
    let devices: String = (0..8)
        .map(|i| {
            format!(
                "[[nodes.devices]]\nname = \"gpu{i}\"\nkind = \"cuda:{i}\"\nmemory = \"{memory}\"\n"
            )
        })
        .collect();
    let types: String = [("GPU_LARGE", 1), ("GPU_LARGE_2", 2), ("GPU_LARGE_8", 8)]
        .map(|(name, shards)| {
            format!("[[workload_types]]\nname = \"{name}\"\ndevice = \"cuda\"\nshards = {shards}\n")
        })
        .concat();
    let text = format!(
        "[[auth.tokens]]\nuser = \"admin\"\nfile = \"token\"\n[[nodes]]\nname = \"n\"\n{devices}{types}{models}"
    );
    let file = folder.path().join("cluster.toml");
    std::fs::write(&file, text).unwrap();
    common::config::load(&file).unwrap_or_else(|e| panic!("{e}"))
}

fn published(name: &str) -> ModelFacts {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/models/configs")
        .join(format!("{name}.json"));
    facts(&cluster(A100, ""), file.to_str().unwrap(), None).unwrap()
}

fn question() -> Question {
    Question {
        concurrency: 4,
        ..Question::default()
    }
}

fn parameters(facts: &ModelFacts) -> u64 {
    let sizes = facts.tensors.iter().map(|t| t.dims.iter().product::<u64>());
    sizes.sum()
}

/// Name, parameters, smallest type, sequences at the longest context on it.
const TABLE: [(&str, u64, &str, u64); 7] = [
    ("llama-2-7b", 6_738_415_616, "GPU_LARGE", 31),
    ("llama-2-13b", 13_015_864_320, "GPU_LARGE", 16),
    ("llama-2-70b", 68_976_648_192, "GPU_LARGE_2", 16),
    ("code-llama-34b", 33_743_970_304, "GPU_LARGE", 3),
    ("mistral-7b", 7_241_732_096, "GPU_LARGE", 15),
    ("mpt-7b", 6_649_286_656, "GPU_LARGE", 62),
    ("mpt-30b", 29_957_200_896, "GPU_LARGE", 1),
];

#[test]
fn the_size_table_holds_for_the_published_models() {
    let cluster = cluster(A100, "");
    for (name, count, workload, sequences) in TABLE {
        let facts = published(name);
        assert_eq!(parameters(&facts), count, "{name}");
        let places = places(&cluster);
        let (smallest, fit) = fit::smallest(&facts, 64, &places, &cluster.workload_types).unwrap();
        assert_eq!(smallest.name, workload, "{name}");
        let need = fit.plan.need;
        // Two bytes a parameter, shared among the ranks; norms are f32 and whole on each.
        let share = 2 * count / u64::from(need.ranks);
        assert!(
            (share..share + share / 500).contains(&need.weight_bytes),
            "{name}: {} planned, {share} by the parameters",
            need.weight_bytes
        );
        assert_eq!(need.sequences_within(76 << 30), sequences, "{name}");
        // K and V, per layer and KV head of the rank, two bytes each.
        let shape = &facts.shape;
        let heads = shape.kv_heads / u64::from(need.ranks);
        let token = 2 * 2 * shape.layers * heads * shape.head_width;
        assert_eq!(need.token_bytes(), token, "{name}");
    }
}

#[test]
fn a_34b_model_on_one_card_says_how_little_is_left_for_kv() {
    let (text, fits) =
        report(&cluster(A100, ""), published("code-llama-34b"), &question()).unwrap();
    assert!(fits, "{text}");
    for words in [
        "code-llama-34b version 1: LlamaForCausalLM, 33.74 billion parameters",
        "GPU_LARGE: little is left for KV: 12 GiB of 76 GiB, room for 3 sequences of 16384 tokens",
        "The smallest workload type that fits: GPU_LARGE\n",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    let few = Question {
        concurrency: 16,
        ..question()
    };
    let (text, _) = report(&cluster(A100, ""), published("mpt-30b"), &few).unwrap();
    assert!(
        text.contains("room for 1 sequence of 8192 tokens where 16 were asked for"),
        "{text}"
    );
}

#[test]
fn a_70b_model_does_not_fit_one_card_and_the_refusal_names_the_type_that_does() {
    let one = Question {
        workload_type: Some("GPU_LARGE".into()),
        ..question()
    };
    let (text, fits) = report(&cluster(A100, ""), published("llama-2-70b"), &one).unwrap();
    assert!(!fits, "{text}");
    assert!(
        text.contains("The smallest workload type that fits: GPU_LARGE_2"),
        "{text}"
    );
}

#[test]
fn where_nothing_fits_it_is_said_what_would() {
    let (text, fits) =
        report(&cluster("16GiB", ""), published("llama-2-70b"), &question()).unwrap();
    assert!(!fits);
    assert!(
        text.contains("No workload type of cluster.toml fits")
            && text.contains("  16 shards, on devices of 16 GiB each")
            && text.contains("  quantization = \"int8\", on GPU_LARGE_8\n")
            && text.contains("  quantization = \"int4\", on GPU_LARGE_8\n"),
        "{text}"
    );
    let (text, _) = report(&cluster("13GiB", ""), published("llama-2-7b"), &question()).unwrap();
    assert!(
        text.contains("The smallest workload type that fits: GPU_LARGE_2"),
        "{text}"
    );
}

#[test]
fn ranks_contexts_and_types_can_be_asked_for() {
    let ranks = Question {
        ranks: vec![1, 3, 4],
        context: Some(1024),
        ..question()
    };
    let (text, fits) = report(&cluster(A100, ""), published("llama-2-70b"), &ranks).unwrap();
    assert!(
        fits && text.contains("GPU_LARGE x 4") && text.contains("context 1024"),
        "{text}"
    );
    assert!(
        text.contains("64 attention heads cannot be divided among 3 shards"),
        "{text}"
    );
    let refused = |question: Question| {
        let facts = published("llama-2-70b");
        report(&cluster(A100, ""), facts, &question)
            .unwrap_err()
            .to_string()
    };
    let long = Question {
        context: Some(4097),
        ..question()
    };
    assert_eq!(
        refused(long),
        "--context 4097 must be 1 to the model's own 4096"
    );
    let unknown = Question {
        workload_type: Some("X".into()),
        ..question()
    };
    assert!(refused(unknown).ends_with("which has GPU_LARGE, GPU_LARGE_2, GPU_LARGE_8"));
}

#[test]
fn models_are_found_by_name_by_folder_and_by_config() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/models/tiny-llama")
        .canonicalize()
        .unwrap();
    let entry = |version: u32| {
        format!(
            "[[models]]\nname = \"tiny\"\nversion = {version}\npath = \"{}\"\n",
            tiny.display()
        )
    };
    let cluster = cluster(A100, &(entry(2) + &entry(10)));
    let named = facts(&cluster, "tiny", None).unwrap();
    assert_eq!(named.model.version, "10", "the newest");
    assert_eq!(
        facts(&cluster, "tiny", Some("2")).unwrap().model.version,
        "2"
    );
    let folder = facts(&cluster, tiny.to_str().unwrap(), None).unwrap();
    let config = tiny.join("config.json");
    let alone = facts(&cluster, config.to_str().unwrap(), None).unwrap();
    assert_eq!(parameters(&folder), parameters(&alone));
    let sorted = |facts: &ModelFacts| {
        let mut tensors: Vec<_> = facts
            .tensors
            .iter()
            .map(|t| (t.name.clone(), t.dims.clone()))
            .collect();
        tensors.sort();
        tensors
    };
    assert_eq!(sorted(&folder), sorted(&alone));
    let gone = facts(&cluster, "gone", None).unwrap_err().to_string();
    assert!(
        gone.contains("Registered model 'gone' does not exist"),
        "{gone}"
    );
}
