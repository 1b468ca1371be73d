use std::fs;
use std::path::PathBuf;

use super::*;
use crate::wire::message::{DeviceKind, Quantization};

struct Folder(tempfile::TempDir);

impl Folder {
    fn with(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cluster.toml"), text).unwrap();
        Folder(folder)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("cluster.toml")
    }

    fn mistakes(&self) -> Vec<String> {
        self.mistakes_with(&[])
    }

    /// With these environment variables.
    fn mistakes_with(&self, variables: &[(&str, &str)]) -> Vec<String> {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let ConfigError(mistakes) = load_with(&self.file(), variables).unwrap_err();
        mistakes
            .iter()
            .map(|m| {
                m.to_string()
                    .replace(&format!("{}/", self.0.path().display()), "")
            })
            .collect()
    }
}

fn begin_with(mistakes: &[String], expected: &[&str]) {
    assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
    for (mistake, expected) in mistakes.iter().zip(expected) {
        assert!(
            mistake.starts_with(expected),
            "{mistake}\ndoes not start with\n{expected}"
        );
    }
}

const SMALL: &str = r#"
[[auth.tokens]]
user = "admin"
file = "var/admin.token"
[[nodes]]
name = "local"
[[nodes.devices]]
name = "cpu0"
kind = "cpu"
memory = "2GiB"
[[workload_types]]
name = "GPU_LARGE"
device = "cpu"
[[models]]
name = "ml.demo.tiny-llama"
version = 1
path = "models/tiny"
"#;

#[test]
fn defaults_are_loopback_and_paths_are_beside_the_file() {
    let folder = Folder::with(SMALL);
    let cluster = load(&folder.file()).unwrap();
    assert!(cluster.coordinator.listen.ip().is_loopback());
    assert_eq!(cluster.coordinator.addresses, ["127.0.0.1:8471"]);
    assert_eq!(
        cluster.models[0].origin,
        ModelOrigin::Folder(folder.0.path().join("models/tiny"))
    );
    assert_eq!(
        cluster.cache.folder,
        folder.0.path().join("var/cache/models")
    );
    assert_eq!(
        cluster.device("local/cpu0").unwrap().1.memory_bytes,
        Some(2 << 30)
    );
    assert_eq!(cluster.workload_types[0].name, "GPU_LARGE");
}

#[test]
fn the_local_override_wins_and_mistakes_in_it_name_it() {
    let folder = Folder::with(SMALL);
    let local = folder.0.path().join("cluster.local.toml");
    fs::write(&local, "[coordinator]\nlisten = \"127.0.0.1:9\"\n").unwrap();
    assert_eq!(load(&folder.file()).unwrap().coordinator.listen.port(), 9);
    fs::write(&local, "[coordinator]\n\nlisten = \"here\"\n").unwrap();
    let mistakes = folder.mistakes();
    assert_eq!(mistakes.len(), 1);
    assert!(
        mistakes[0].starts_with("cluster.local.toml:3: coordinator.listen: must be an IP address"),
        "{}",
        mistakes[0]
    );
}

#[test]
fn a_mistake_of_the_environment_names_the_variable_whatever_files_say() {
    let text = format!("[coordinator]\nlisten = \"127.0.0.1:9\"\n{SMALL}");
    let folder = Folder::with(&text);
    let mistakes = folder.mistakes_with(&[
        ("TANDEM__COORDINATOR__LISTEN", "here"),
        ("Tandem__Limits__Deadline_Ms", "soon"),
        ("TANDEM__COORDINATOR__LISTN", "x"),
    ]);
    begin_with(
        &mistakes,
        &[
            "TANDEM__COORDINATOR__LISTEN: coordinator.listen: must be an IP address",
            "TANDEM__COORDINATOR__LISTN: coordinator.listn: unknown key",
            "Tandem__Limits__Deadline_Ms: limits.deadline_ms: must be a whole number, got a text",
        ],
    );
}

#[test]
fn two_listeners_on_one_port_are_a_mistake() {
    let with = |listen: &str, worker_listen: &str| {
        let worker = match worker_listen {
            "" => String::new(),
            address => format!("worker_listen = \"{address}\"\n"),
        };
        Folder::with(&format!(
            "[coordinator]\nplain_http = true\nlisten = \"{listen}\"\n{worker}\
             [tls]\nca = \"a\"\ncert = \"b\"\nkey = \"c\"\n{SMALL}"
        ))
    };
    for (listen, worker_listen, place) in [
        ("127.0.0.1:9", "127.0.0.1:9", "4: coordinator.worker_listen"),
        ("0.0.0.0:9", "127.0.0.1:9", "4: coordinator.worker_listen"),
        ("127.0.0.1:9", "[::]:9", "4: coordinator.worker_listen"),
        ("127.0.0.1:8471", "", "3: coordinator.listen"),
    ] {
        let expected = format!("cluster.toml:{place}: the HTTP API (coordinator.listen {listen})");
        begin_with(&with(listen, worker_listen).mistakes(), &[&expected]);
    }
    for (listen, worker_listen) in [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("127.0.0.1:9", "127.0.0.2:9"),
        ("0.0.0.0:9", "[::1]:9"),
        ("127.0.0.1:9", "127.0.0.1:10"),
    ] {
        let loaded = load(&with(listen, worker_listen).file());
        assert!(loaded.is_ok(), "{listen} {worker_listen}: {loaded:?}");
    }
}

#[test]
fn memory_that_holds_nothing_is_a_mistake() {
    let text = SMALL
        .replace("memory = \"2GiB\"", "memory = 0")
        .replace("device = \"cpu\"", "device = \"cpu\"\nmemory = \"0GiB\"");
    begin_with(
        &Folder::with(&text).mistakes(),
        &[
            "cluster.toml:10: nodes[0].devices[0].memory: must be above 0; leave it out",
            "cluster.toml:14: workload_types[0].memory: must be above 0; leave it out",
        ],
    );
}

#[test]
fn all_mistakes_come_at_once_each_with_its_line() {
    let text = SMALL
        .replace("kind = \"cpu\"", "kind = \"gpu\"\nthreds = 2")
        .replace("version = 1", "version = \"latest\"")
        .replace("device = \"cpu\"", "shards = 0\ndevice = \"cpu\"")
        .replace("memory = \"2GiB\"", "memory = \"lots\"");
    let mistakes = Folder::with(&text).mistakes();
    let expected = [
        "cluster.toml:9: nodes[0].devices[0].kind: must be \"cpu\" or \"cuda:N\", got \"gpu\"",
        "cluster.toml:10: nodes[0].devices[0].threds: unknown key; known here: batch_invariant, cores,",
        "cluster.toml:11: nodes[0].devices[0].memory: must be a size",
        "cluster.toml:14: workload_types[0].shards: must be between 1 and 64, got 0",
        "cluster.toml:18: models[0].version: model version 'latest' must be a positive whole number",
    ];
    begin_with(&mistakes, &expected);
}

#[test]
fn a_gpu_has_switches_and_a_cpu_has_none() {
    let gpu = |more: &str| SMALL.replace("kind = \"cpu\"", &format!("kind = \"cuda:1\"\n{more}"));
    let switches = |more: &str| {
        let cluster = load(&Folder::with(&gpu(more)).file()).unwrap();
        let device = cluster.nodes[0].devices[0].clone();
        assert_eq!((device.kind, device.ordinal), (DeviceKind::Cuda, 1));
        (device.cuda.graphs, device.cuda.batch_invariant)
    };
    assert_eq!(switches(""), (true, false));
    assert_eq!(
        switches("graphs = false\nbatch_invariant = true"),
        (false, true)
    );
    let cpu = SMALL.replace(
        "kind = \"cpu\"",
        "kind = \"cpu\"\ngraphs = true\nbatch_invariant = false",
    );
    begin_with(
        &Folder::with(&cpu).mistakes(),
        &[
            "cluster.toml:10: nodes[0].devices[0].graphs: is a switch of GPUs; leave it out",
            "cluster.toml:11: nodes[0].devices[0].batch_invariant: is a switch of GPUs; leave it out",
        ],
    );
}

#[test]
fn how_weights_are_kept_stands_with_models_registries_and_served_entities() {
    let text = format!(
        "{}{MLFLOW}quantization = \"int4\"\n[[endpoints]]\nname = \"e\"\n[[endpoints.served_entities]]\n\
         entity_name = \"ml.demo.tiny-llama\"\nentity_version = 1\nworkload_type = \"GPU_LARGE\"\nquantization = \"none\"\n",
        SMALL.replace("version = 1", "version = 1\nquantization = \"int8\"")
    );
    let cluster = load_with(&Folder::with(&text).file(), Default::default()).unwrap();
    assert_eq!(cluster.models[0].serving.quantization, Quantization::Int8);
    assert_eq!(
        cluster.registries[0].serving.quantization,
        Quantization::Int4
    );
    let entity = &cluster.endpoints[0].served_entities[0];
    assert_eq!(entity.quantization, Some(Quantization::None));
    let plain = load(&Folder::with(&endpoint(&[""])).file()).unwrap();
    assert_eq!(plain.models[0].serving.quantization, Quantization::None);
    assert_eq!(plain.endpoints[0].served_entities[0].quantization, None);
    let mistakes =
        Folder::with(&text.replace("\"int8\"", "\"fp8\"").replace("\"none\"", "8")).mistakes();
    assert!(
        mistakes[0].ends_with(
            "models[0].quantization: must be \"none\", \"int8\" or \"int4\", got \"fp8\""
        ) && mistakes[1].contains("served_entities[0].quantization: must be"),
        "{mistakes:#?}"
    );
}

#[test]
fn a_bad_name_hides_nothing_of_what_it_names() {
    let text = SMALL
        .replace("name = \"local\"", "name = \"lo cal\"")
        .replace("name = \"cpu0\"", "name = \"\"")
        .replace(
            "kind = \"cpu\"",
            "kind = \"gpu\"\nthreads = 0\ncores = \"9-1\"\ngroup_port = 70000",
        )
        .replace("name = \"GPU_LARGE\"", "name = \"GPU LARGE\"\nshards = 65")
        .replace(
            "name = \"ml.demo.tiny-llama\"",
            "name = \"a.b\"\nkv_dtype = \"f8\"\ncontext_max = 0",
        )
        .replace("version = 1", "version = 0")
        + "[[endpoints]]\nname = \"a b\"\n[[endpoints.served_entities]]\nname = \"-\"\nentity_name = \"..\"\n\
           entity_version = \"x\"\nworkload_type = \"TPU\"\nworkload_size = \"Huge\"\ntraffic_percentage = 101\n";
    let mistakes = Folder::with(&text).mistakes();
    let expected = [
        "cluster.toml:6: nodes[0].name: must be 1 to 63 letters",
        "cluster.toml:8: nodes[0].devices[0].name: must be 1 to 63 letters",
        "cluster.toml:9: nodes[0].devices[0].kind: must be",
        "cluster.toml:10: nodes[0].devices[0].threads: must be between 1 and 1024, got 0",
        "cluster.toml:11: nodes[0].devices[0].cores: must be a list of cores",
        "cluster.toml:12: nodes[0].devices[0].group_port: must be a port, 0 to 65535, got 70000",
        "cluster.toml:15: workload_types[0].name: must be 1 to 63 letters",
        "cluster.toml:16: workload_types[0].shards: must be between 1 and 64, got 65",
        "cluster.toml:19: models[0].name: model name 'a.b' must have one level or three",
        "cluster.toml:20: models[0].kv_dtype: must be \"bf16\", \"int8\" or \"f32\", got \"f8\"",
        "cluster.toml:21: models[0].context_max: must be a number of tokens above 0, got 0",
        "cluster.toml:22: models[0].version: model version '0' must be",
        "cluster.toml:25: endpoints[0].name: must be 1 to 63 letters",
        "cluster.toml:27: endpoints[0].served_entities[0].name: must be 1 to 63 letters",
        "cluster.toml:28: endpoints[0].served_entities[0].entity_name: model name '..' must",
        "cluster.toml:29: endpoints[0].served_entities[0].entity_version: model version 'x' must",
        "cluster.toml:30: endpoints[0].served_entities[0].workload_type: \"TPU\" is not mapped",
        "cluster.toml:31: endpoints[0].served_entities[0].workload_size: must be Small, Medium or Large",
        "cluster.toml:32: endpoints[0].served_entities[0].traffic_percentage: must be between 0 and 100",
    ];
    begin_with(&mistakes, &expected);
}

/// Endpoint `e`, one entity of `SMALL`'s model per text.
fn endpoint(entities: &[&str]) -> String {
    let entities: String = entities
        .iter()
        .map(|more| {
            format!(
                "[[endpoints.served_entities]]\nentity_name = \"ml.demo.tiny-llama\"\nentity_version = 1\n\
                 workload_type = \"GPU_LARGE\"\n{more}\n"
            )
        })
        .collect();
    format!("{SMALL}[[endpoints]]\nname = \"e\"\n{entities}")
}

#[test]
fn an_endpoint_gets_its_defaults() {
    let cluster = load(&Folder::with(&endpoint(&[""])).file()).unwrap();
    let entity = &cluster.endpoints[0].served_entities[0];
    assert_eq!(
        (entity.name.as_str(), entity.traffic_percentage),
        ("tiny-llama-1", 100)
    );
    let two = endpoint(&[
        "traffic_percentage = 0",
        "name = \"b\"\ntraffic_percentage = 100",
    ]);
    assert!(load(&Folder::with(&two).file()).is_ok());
}

#[test]
fn shares_that_do_not_make_a_hundred_are_told_where_they_stand() {
    let mistakes = |entities: &[&str]| Folder::with(&endpoint(entities)).mistakes();
    let list = "cluster.toml:20: endpoints[0].served_entities: must have";
    begin_with(
        &mistakes(&["traffic_percentage = 90"]),
        &[&format!(
            "{list} traffic_percentage values that sum to 100, got 90"
        )],
    );
    begin_with(
        &mistakes(&[
            "traffic_percentage = 60",
            "name = \"b\"\ntraffic_percentage = 60",
        ]),
        &[&format!(
            "{list} traffic_percentage values that sum to 100, got 120"
        )],
    );
    let at = "endpoints[0].served_entities";
    begin_with(
        &mistakes(&[
            "",
            "name = \"b\"",
            "name = \"c\"\ntraffic_percentage = \"x\"",
        ]),
        &[
            &format!("cluster.toml:20: {at}[0].traffic_percentage: is missing: with several"),
            &format!("cluster.toml:25: {at}[1].traffic_percentage: is missing: with several"),
            &format!(
                "cluster.toml:35: {at}[2].traffic_percentage: must be a whole number, got a text"
            ),
        ],
    );
}

#[test]
fn an_endpoint_has_at_most_ten_entities_each_with_a_name_of_its_own() {
    let many: Vec<String> = (0..11)
        .map(|i| {
            format!(
                "name = \"e{i}\"\ntraffic_percentage = {}",
                if i == 0 { 100 } else { 0 }
            )
        })
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    begin_with(
        &Folder::with(&endpoint(&many)).mistakes(),
        &["cluster.toml:20: endpoints[0].served_entities: must have 1 to 10 entries, got 11"],
    );
    assert!(load(&Folder::with(&endpoint(&many[..10])).file()).is_ok());
    let half = "traffic_percentage = 50";
    let again = "another served entity of this endpoint is already called \"tiny-llama-1\"";
    begin_with(
        &Folder::with(&endpoint(&[half, half])).mistakes(),
        &[&format!(
            "cluster.toml:25: endpoints[0].served_entities[1].name: {again}"
        )],
    );
    let named = format!("{half}\nname = \"tiny-llama-1\"");
    begin_with(
        &Folder::with(&endpoint(&[half, &named])).mistakes(),
        &[&format!(
            "cluster.toml:30: endpoints[0].served_entities[1].name: {again}"
        )],
    );
}

#[test]
fn names_that_the_api_refuses_are_refused_here_too() {
    for name in [
        "chat",
        "v1",
        "databricks-dbrx",
        "a.b",
        "a:b",
        "-a",
        &"x".repeat(64),
    ] {
        let text = endpoint(&[""]).replace("name = \"e\"", &format!("name = \"{name}\""));
        let expected = crate::names::check_endpoint(name).unwrap_err();
        assert_eq!(
            Folder::with(&text).mistakes(),
            [format!("cluster.toml:19: endpoints[0].name: {expected}")]
        );
    }
}

#[test]
fn mistakes_in_a_list_name_the_layer_that_has_the_list() {
    let folder = Folder::with(SMALL);
    let local = "\n[[workload_types]]\nname = \"CPU\"\n";
    fs::write(folder.0.path().join("cluster.local.toml"), local).unwrap();
    assert_eq!(
        folder.mistakes(),
        ["cluster.local.toml:2: workload_types[0].device: is missing"]
    );
}

#[test]
fn a_missing_key_names_its_table_and_a_syntax_error_its_line() {
    let missing = Folder::with(&SMALL.replace("version = 1", "")).mistakes();
    assert_eq!(missing, ["cluster.toml:14: models[0].version: is missing"]);
    let nowhere = Folder::with(&SMALL.replace("path = \"models/tiny\"", "")).mistakes();
    begin_with(&nowhere, &["cluster.toml:14: models[0]: needs one of path"]);
    let broken = Folder::with("[coordinator\nlisten = 1").mistakes();
    assert!(
        broken[0].starts_with("cluster.toml:1: not TOML"),
        "{broken:?}"
    );
}

#[test]
fn addresses_off_loopback_need_certificates_or_consent() {
    let text = format!(
        "[coordinator]\nlisten = \"0.0.0.0:8470\"\nworker_listen = \"0.0.0.0:8471\"\n{SMALL}"
    );
    let mistakes = Folder::with(&text).mistakes();
    assert_eq!(mistakes.len(), 2, "{mistakes:#?}");
    assert!(mistakes[0].contains("plain_http") && mistakes[1].contains("[tls]"));
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let folder = Folder::with("");
    fs::remove_file(folder.file()).unwrap();
    assert!(folder.mistakes()[0].starts_with("cluster.toml: cannot be read"));
}

#[test]
fn the_first_caller_is_the_admin_unless_the_file_says_otherwise() {
    let token = |user: &str, more: &str| {
        format!("[[auth.tokens]]\nuser = \"{user}\"\nfile = \"var/{user}\"\n{more}")
    };
    let read = |tokens: &[String]| {
        let folder = Folder::with(&tokens.concat());
        let tokens = load(&folder.file()).unwrap().auth.tokens.into_iter();
        tokens
            .map(|token| (token.user, token.admin, token.groups))
            .collect::<Vec<_>>()
    };
    let plain = |name: &str, admin| (name.to_owned(), admin, vec![]);
    let both = [token("a", ""), token("b", "")];
    assert_eq!(read(&both), [plain("a", true), plain("b", false)]);
    let turned = [token("a", "admin = false\n"), token("b", "admin = true\n")];
    assert_eq!(read(&turned), [plain("a", false), plain("b", true)]);
    let grouped = [token("a", ""), token("b", "groups = [\"team\", \"x\"]\n")];
    assert_eq!(read(&grouped)[1].2, ["team", "x"]);
}

#[test]
fn callers_without_an_admin_and_built_in_groups_are_mistakes() {
    let folder = Folder::with(
        "[[auth.tokens]]\nuser = \"a\"\nfile = \"a\"\nadmin = false\ngroups = [\"users\", \" \"]\n",
    );
    begin_with(
        &folder.mistakes(),
        &[
            "cluster.toml:1: auth.tokens: none is an admin",
            "cluster.toml:5: auth.tokens[0].groups[0]: \"users\" is built in",
            "cluster.toml:5: auth.tokens[0].groups[1]: must be a group's name",
        ],
    );
}

const MLFLOW: &str = r#"
[[registries]]
name = "tracking"
kind = "mlflow"
url = "https://mlflow.example/prefix"
username = "reader"
password_file = "var/mlflow.password"
kv_dtype = "f32"
context_max = 2048
"#;

#[test]
fn registries_keep_their_order_and_their_secrets_are_named_not_written() {
    let folder = Folder::with(&format!(
        "{SMALL}{MLFLOW}[[registries]]\nname = \"shelf\"\nkind = \"folder\"\npath = \"shelf\"\n\
         [worker]\ncache_dir = \"/srv/cache\"\ncache_bytes_max = \"2GiB\"\npacked_dir = \"packed\"\n"
    ));
    let cluster = load_with(&folder.file(), Default::default()).unwrap();
    let [tracking, shelf] = &cluster.registries[..] else {
        panic!("{:?}", cluster.registries)
    };
    let password = SecretSource::File(folder.0.path().join("var/mlflow.password"));
    assert_eq!(tracking.kind, RegistryKind::Mlflow);
    assert_eq!(
        tracking.credentials.basic,
        Some(("reader".into(), password))
    );
    assert_eq!(tracking.serving.context_max, Some(2048));
    assert_eq!(
        shelf.kind,
        RegistryKind::Folder(folder.0.path().join("shelf"))
    );
    assert_eq!(cluster.cache.folder, PathBuf::from("/srv/cache"));
    assert_eq!(cluster.cache.bytes_max, Some(2 << 30));
    let packed = cluster.packed.expect("kept unless told otherwise");
    assert_eq!(packed.folder, folder.0.path().join("packed"));
    assert_eq!(packed.bytes_max, 64 << 30);
}

#[test]
fn no_packed_weights_are_kept_where_they_may_take_nothing() {
    let of = |worker: &str| {
        let folder = Folder::with(&format!("{SMALL}[worker]\n{worker}\n"));
        let cluster = load_with(&folder.file(), Default::default()).unwrap();
        cluster.packed.map(|packed| packed.bytes_max)
    };
    assert_eq!(of("packed_bytes_max = 0"), None);
    assert_eq!(of("packed_bytes_max = \"3GiB\""), Some(3 << 30));
}

#[test]
fn a_model_on_the_hub_brings_the_hub_with_it_and_an_alias_needs_its_registry() {
    let hub = SMALL.replace("path = \"models/tiny\"", "hub = \"org/name\"");
    let cluster = load_with(&Folder::with(&hub).file(), Default::default()).unwrap();
    let origin = |registry: &str, uri: &str| ModelOrigin::Registry {
        registry: registry.into(),
        uri: uri.into(),
    };
    assert_eq!(
        cluster.models[0].origin,
        origin("huggingface", "hf://org/name@main")
    );
    assert_eq!(cluster.registries[0].kind, RegistryKind::HuggingFace);
    let alias = SMALL.replace("path = \"models/tiny\"", "uri = \"models:/llama@champion\"");
    let mistakes = Folder::with(&alias).mistakes();
    let expected = "cluster.toml:14: models[0].registry: needs a [[registries]] of kind \"mlflow\"";
    assert_eq!(mistakes, [expected]);
    let folder = Folder::with(&format!("{alias}{MLFLOW}"));
    let cluster = load_with(&folder.file(), Default::default()).unwrap();
    assert_eq!(
        cluster.models[0].origin,
        origin("tracking", "models:/llama@champion")
    );
}

#[test]
fn mistakes_in_registries_are_told_and_repeat_no_secret() {
    let text = format!(
        "{SMALL}{}{}",
        MLFLOW
            .replace("https://mlflow.example", "https://me:hush@mlflow.example")
            .replace("username = \"reader\"\n", ""),
        "[[registries]]\nname = \"tracking\"\nkind = \"git\"\n\
         [[registries]]\nname = \"shelf\"\nkind = \"folder\"\nurl = \"ftp://x\"\n\
         [[models]]\nname = \"h\"\nversion = 1\nhub = \"../x\"\n\
         [[models]]\nname = \"i\"\nversion = 1\npath = \"x\"\nuri = \"runs:/1/model\"\n"
    );
    let mistakes = Folder::with(&text).mistakes();
    begin_with(
        &mistakes,
        &[
            "cluster.toml:19: registries[0].username: username and password_file",
            "cluster.toml:22: registries[0].url: must not hold a user or a password",
            "cluster.toml:27: registries[1].name: another registry is already called",
            "cluster.toml:28: registries[1].kind: must be \"mlflow\"",
            "cluster.toml:29: registries[2].path: is missing",
            "cluster.toml:32: registries[2].url: must begin with https://",
            "cluster.toml:36: models[1].hub: must be a model's id",
            "cluster.toml:37: models[2]: needs one of path",
        ],
    );
    assert!(!mistakes.join("\n").contains("hush"));
}

#[test]
fn an_endpoint_may_name_a_model_that_only_a_registry_knows() {
    let endpoint = "[[endpoints]]\nname = \"e\"\n[[endpoints.served_entities]]\n\
                    entity_name = \"elsewhere\"\nentity_version = 3\nworkload_type = \"GPU_LARGE\"\n";
    let unknown = Folder::with(&format!("{SMALL}{endpoint}")).mistakes();
    assert!(unknown[0].contains("elsewhere version 3 is not among [[models]]"));
    let folder = Folder::with(&format!("{SMALL}{MLFLOW}{endpoint}"));
    load_with(&folder.file(), Default::default()).unwrap();
}
