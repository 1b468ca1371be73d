//! The architecture's walls: who may know what. Each test names the wall and the file that breaks it.

use cluster_tests::source::{Source, all, dependencies, manifest};

/// Longest source file: beyond, it has more than one noun.
const LINES_MAX: usize = 600;

/// Longest file that holds nothing but tests.
const TEST_LINES_MAX: usize = 1000;

/// Where a message may pass a full mailbox: control that must arrive, and that requests do not multiply.
const DO_SEND: [(&str, &str); 4] = [
    (
        "coordinator/src/actors/coordinator/",
        "changes of workers, replicas and endpoints",
    ),
    (
        "coordinator/src/actors/death.rs",
        "an actor's last word, once in its life",
    ),
    (
        "coordinator/src/actors/replica.rs",
        "a replica's change of status",
    ),
    (
        "worker/src/actors/shard.rs",
        "the two ends of a shard's life",
    ),
];

/// Where JSON may stand in the coordinator.
const JSON: [(&str, &str); 5] = [
    ("coordinator/src/http/", "bodies"),
    ("coordinator/src/store/", "what is stored"),
    ("coordinator/src/registry/", "models' files"),
    ("coordinator/src/tables/", "rows in files"),
    (
        "coordinator/src/actors/record.rs",
        "the records that actors put into the store",
    ),
];

/// Where sockets are named, and why.
const SOCKETS: [(&str, &str); 8] = [
    ("common/src/wire/link", "prepares a link's socket"),
    ("coordinator/src/lib", "opens the two ports"),
    ("coordinator/src/http/mod", "serves HTTP"),
    ("coordinator/src/workers", "accepts links"),
    ("worker/src/session", "dials the coordinator"),
    ("worker/src/device", "opens the port for other ranks"),
    ("worker/src/group", "knows other ranks' addresses"),
    ("worker/engine/src/collective/", "ranks among themselves"),
];

/// Where `unsafe` may stand, each with the reason why it must.
const UNSAFE: [(&str, &str); 8] = [
    (
        "worker/engine/src/backend/cpu",
        "SIMD, and the pool's scoped work",
    ),
    (
        "worker/engine/src/backend/cuda",
        "a driver and a device's memory",
    ),
    (
        "worker/engine/src/collective/host",
        "shared memory between ranks",
    ),
    (
        "worker/engine/src/collective/nccl",
        "device memory between ranks",
    ),
    ("worker/engine/src/weights", "memory-mapped files"),
    ("worker/nccl-rs/src", "a C library"),
    ("tests/cuda-rig", "emulated C libraries"),
    (
        "tests/src/process.rs",
        "signals, and children that end with their test",
    ),
];

/// Fails with every offender at once.
fn none(wall: &str, offenders: Vec<String>) {
    assert!(
        offenders.is_empty(),
        "{wall}:\n  {}",
        offenders.join("\n  ")
    );
}

/// Every place where a file, if it is one that `applies`, uses one of `words` in code outside its test module.
fn uses(applies: impl Fn(&Source) -> bool, words: &[&str]) -> Vec<String> {
    let mut offenders = Vec::new();
    for source in all()
        .iter()
        .filter(|source| !source.is_test() && applies(source))
    {
        let product_lines = source.product_code().lines().count();
        for word in words {
            let lines = source
                .lines_with(word)
                .into_iter()
                .filter(|line| *line <= product_lines);
            offenders.extend(lines.map(|line| format!("{}:{line}: {word}", source.path)));
        }
    }
    offenders
}

/// Whether a file is in one of these places.
fn within(places: &[(&str, &str)], source: &Source) -> bool {
    places
        .iter()
        .any(|(place, _)| source.path.starts_with(place))
}

fn not_of(member: &str, banned: &[&str]) {
    let dependencies = dependencies(member);
    let found = banned
        .iter()
        .filter(|name| dependencies.contains(**name))
        .map(|name| format!("{member}: {name}"));
    none("a member depends on what it must not know", found.collect());
}

#[test]
fn the_engine_knows_no_http_actors_async_runtime_wire_or_text() {
    not_of(
        "worker/engine",
        &[
            "actix",
            "actix-rt",
            "actix-web",
            "bincode",
            "common",
            "coordinator",
            "futures",
            "minijinja",
        ],
    );
    not_of(
        "worker/engine",
        &["reqwest", "tokenizers", "tokio", "tokio-util", "worker"],
    );
}

#[test]
fn the_coordinator_knows_no_tensors_tokenizers_or_weights() {
    not_of(
        "coordinator",
        &[
            "engine",
            "half",
            "memmap2",
            "minijinja",
            "nccl-rs",
            "safetensors",
            "tokenizers",
            "worker",
        ],
    );
}

#[test]
fn the_worker_knows_no_rest_and_no_store() {
    not_of(
        "worker",
        &["actix-web", "bincode", "coordinator", "redb", "reqwest"],
    );
}

#[test]
fn registries_are_asked_through_one_crate() {
    not_of(
        "common/registry",
        &[
            "actix",
            "actix-web",
            "coordinator",
            "engine",
            "redb",
            "worker",
        ],
    );
    for member in ["common", "coordinator", "worker"] {
        not_of(member, &["reqwest", "object_store"]);
    }
}

#[test]
fn common_knows_neither_process() {
    not_of(
        "common",
        &[
            "actix",
            "actix-rt",
            "actix-web",
            "coordinator",
            "engine",
            "redb",
            "tokenizers",
            "worker",
        ],
    );
}

#[test]
fn bincode_is_named_in_one_file() {
    let offenders = uses(
        |source| source.path != "common/src/wire/codec.rs",
        &["bincode"],
    );
    none("only common::wire::codec names bincode", offenders);
}

#[test]
fn cluster_toml_is_read_in_one_place() {
    let offenders = uses(
        |source| !source.path.starts_with("common/src/config/"),
        &["toml"],
    );
    none("only common::config reads TOML", offenders);
}

#[test]
fn json_stays_in_http_store_and_registry() {
    let applies =
        |source: &Source| source.path.starts_with("coordinator/src/") && !within(&JSON, source);
    none(
        "actors and policies never see JSON",
        uses(applies, &["serde_json"]),
    );
}

#[test]
fn http_words_stay_in_http() {
    let applies = |source: &Source| {
        source.path.starts_with("coordinator/src/")
            && !source.path.starts_with("coordinator/src/http/")
    };
    let exempt = |source: &Source| {
        matches!(
            source.path.as_str(),
            "coordinator/src/main.rs" | "coordinator/src/lib.rs"
        )
    };
    let offenders = uses(
        |source| applies(source) && !exempt(source),
        &["actix_web", "HttpResponse", "StatusCode"],
    );
    none("only http/ speaks HTTP", offenders);
}

#[test]
fn handlers_never_see_actors() {
    let applies = |source: &Source| source.path.starts_with("coordinator/src/http/");
    none(
        "http/ reaches the cluster through api::Gateway alone",
        uses(applies, &["actix", "actors"]),
    );
}

#[test]
fn decisions_are_pure() {
    let pure = [
        "coordinator/src/policy/",
        "worker/engine/src/scheduler/",
        "worker/engine/src/kv/blocks",
        "worker/engine/src/kv/prefix",
        "worker/engine/src/kv/table",
        "worker/engine/src/sampler",
        "coordinator/src/http/inputs",
        "worker/src/text/stop",
    ];
    let applies = |source: &Source| pure.iter().any(|place| source.path.starts_with(place));
    let impure = [
        "::now",
        "fs",
        "net",
        "tokio",
        "actix",
        "rand",
        "thread",
        "SystemTime",
        "Mutex",
        "AtomicU64",
    ];
    none(
        "decisions see no clock, no chance, no disk, no network",
        uses(applies, &impure),
    );
}

#[test]
fn models_and_layers_see_backends_and_collectives_only_through_their_traits() {
    let applies = |source: &Source| {
        source.path.starts_with("worker/engine/src/models/")
            || source.path.starts_with("worker/engine/src/layers/")
    };
    none(
        "models and layers are generic",
        uses(
            applies,
            &[
                "CpuBackend",
                "CudaBackend",
                "ReferenceBackend",
                "arch",
                "cudarc",
                "Solo",
                "thread",
            ],
        ),
    );
}

#[test]
fn actors_wait_in_bounded_mailboxes() {
    let applies = |source: &Source| {
        source.path.starts_with("coordinator/src/") || source.path.starts_with("worker/src/")
    };
    let on_load_paths = |source: &Source| applies(source) && !within(&DO_SEND, source);
    none(
        "do_send ignores a full mailbox: use try_send or send",
        uses(on_load_paths, &["do_send"]),
    );
    none(
        "every queue has a bound",
        uses(applies, &["unbounded_channel", "unbounded"]),
    );
}

#[test]
fn only_links_http_and_collectives_cross_between_processes() {
    let elsewhere =
        |source: &Source| !source.path.starts_with("tests/") && !within(&SOCKETS, source);
    let words = [
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "UnixStream",
        "UnixListener",
    ];
    none("sockets stand at the edges", uses(elsewhere, &words));
}

#[test]
fn unsafe_stands_only_where_it_must() {
    let mut offenders = Vec::new();
    for source in all() {
        if !within(&UNSAFE, &source) {
            offenders.extend(
                source
                    .lines_with("unsafe")
                    .iter()
                    .map(|line| format!("{}:{line}", source.path)),
            );
        }
    }
    none("unsafe outside the places that need it", offenders);
    let forbid = [
        "bench/src/lib.rs",
        "bench/src/main.rs",
        "common/gguf/src/lib.rs",
        "common/registry/src/lib.rs",
        "common/src/lib.rs",
        "coordinator/src/lib.rs",
        "coordinator/src/main.rs",
        "worker/src/lib.rs",
        "worker/src/main.rs",
    ];
    let sources = all();
    let lacks = |path: &&&str| {
        let source = sources
            .iter()
            .find(|source| source.path == **path)
            .unwrap_or_else(|| panic!("{path} is not there"));
        !source.code.contains("#![forbid(unsafe_code)]")
    };
    none(
        "crates that need no unsafe forbid it",
        forbid
            .iter()
            .filter(lacks)
            .map(|path| (*path).to_owned())
            .collect(),
    );
}

#[test]
fn each_unsafe_block_has_its_reason() {
    /// How far above the block its reason may begin.
    const LINES_ABOVE: usize = 10;
    let mut offenders = Vec::new();
    for source in all() {
        let lines: Vec<&str> = source.text.lines().collect();
        for line in source.lines_with("unsafe") {
            let above = &lines[line.saturating_sub(LINES_ABOVE + 1)..line];
            let code = source.code.lines().nth(line - 1).unwrap_or_default();
            // `unsafe fn` types and declarations oblige the caller; blocks and impls oblige the writer.
            let obliges = ["unsafe {", "unsafe impl"]
                .iter()
                .any(|form| code.contains(form));
            if obliges && !above.iter().any(|line| line.contains("SAFETY:")) {
                offenders.push(format!("{}:{line}", source.path));
            }
        }
    }
    none(
        "an unsafe block or impl without a SAFETY reason above it",
        offenders,
    );
}

#[test]
fn each_file_says_what_it_owns_and_is_no_giant() {
    let mut offenders = Vec::new();
    for source in all() {
        if !source.text.starts_with("//!") && !source.path.ends_with("/tests.rs") {
            offenders.push(format!("{}: does not begin with //!", source.path));
        }
        let lines = source.text.lines().count();
        let lines_max = if source.is_test() {
            TEST_LINES_MAX
        } else {
            LINES_MAX
        };
        if lines > lines_max {
            offenders.push(format!(
                "{}: {lines} lines, more than {lines_max}",
                source.path
            ));
        }
    }
    none("files have one noun, and say which", offenders);
}

#[test]
fn tests_wait_for_conditions_and_do_not_sleep() {
    let mut offenders = Vec::new();
    for source in all() {
        let product_lines = if source.is_test() {
            0
        } else {
            source.product_code().lines().count()
        };
        let lines = source
            .lines_with("sleep")
            .into_iter()
            .filter(|line| *line > product_lines);
        offenders.extend(lines.map(|line| format!("{}:{line}", source.path)));
    }
    none(
        "a test that sleeps is slow or flaky, mostly both",
        offenders,
    );
}

#[test]
fn all_members_take_the_workspaces_lints() {
    let members = [
        "bench",
        "common",
        "common/gguf",
        "common/registry",
        "coordinator",
        "worker",
        "worker/engine",
        "worker/nccl-rs",
        "tests",
        "tests/cuda-rig",
    ];
    let lacks = |member: &&&str| {
        manifest(member)
            .get("lints")
            .and_then(|l| l.get("workspace"))
            .and_then(|w| w.as_bool())
            != Some(true)
    };
    none(
        "[lints] workspace = true is missing",
        members
            .iter()
            .filter(lacks)
            .map(|m| (*m).to_owned())
            .collect(),
    );
}
