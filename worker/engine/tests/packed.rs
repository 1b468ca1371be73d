//! The cache of packed weights, end to end on a CPU: what one load leaves the next maps, in this process and in others.

mod support;

use engine::backend::cpu::{CpuBackend, Isa, LAYOUT_VERSION, Path as CpuPath, Pool};
use engine::backend::{
    Backend, FloatDtype, KvDtype, LinearShape, PackedShape, QuantBits, QuantOffset, QuantRow,
    QuantShape, WeightDtype,
};
use engine::collective::Collective;
use engine::collective::solo::Solo;
use engine::model_runner::{ModelRunner, RunnerOptions};
use engine::models::checkpoint::Checkpoint;
use engine::plan::{Logits, Span, StepPlan};
use engine::weights::packed::{NotWritten, Origin, PackedCache};
use gguf::TensorType;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::quantiser::Quantiser;
use support::{Threads, cpu, models, ready};
use tempfile::TempDir;

const NAMES: [&str; 3] = ["tiny-llama", "tiny-mistral", "tiny-mpt"];
const DTYPES: [WeightDtype; 4] = [
    WeightDtype::F32,
    WeightDtype::Bf16,
    WeightDtype::Int8,
    WeightDtype::Int4,
];
/// More than all entries of a test.
const BYTES_MAX: u64 = 1 << 30;
/// Tells a child process its cache folder.
const CHILD_FOLDER: &str = "TANDEM_TEST_PACKED_FOLDER";

fn options(weight_dtype: WeightDtype) -> RunnerOptions {
    RunnerOptions {
        weight_dtype,
        kv_dtype: KvDtype::F32,
        blocks: 4,
        step_tokens_max: 40,
        spans_max: 3,
        generation: 1,
    }
}

fn cache_in(folder: &Path) -> PackedCache {
    PackedCache::new(folder.to_owned(), BYTES_MAX)
}

fn load<C: Collective<<CpuBackend as Backend>::Buf>>(
    cache: &PackedCache,
    model: &Path,
    dtype: WeightDtype,
    collective: C,
) -> (ModelRunner<CpuBackend, C>, Origin) {
    let checkpoint = Checkpoint::open(model).expect("a good checkpoint");
    let loaded = ModelRunner::load_through(
        Some(cache),
        &checkpoint,
        &options(dtype),
        cpu(),
        collective,
        &mut |_| {},
    );
    loaded.expect("loads")
}

/// Loads a model alone, writes what is to be written, and gives whether it was mapped, and its logits.
fn logits(cache: &PackedCache, model: &Path, dtype: WeightDtype) -> (bool, Vec<Vec<f32>>) {
    let (mut runner, origin) = load(cache, model, dtype, Solo::new());
    let mapped = match origin {
        Origin::Mapped(bytes) => {
            assert!(bytes > 0);
            true
        }
        Origin::Packed { draft, .. } => {
            draft.write().expect("writes");
            false
        }
        Origin::Checkpoint => panic!("the cache was not asked"),
    };
    let plan = StepPlan {
        step: 1,
        generation: 1,
        tokens: (0..30).map(|i| (5 + i * 37) % 2048).collect(),
        spans: vec![Span {
            position: 0,
            len: 30,
            logits: Logits::All,
            blocks: vec![1, 2],
        }],
    };
    let mut logits = Vec::new();
    runner
        .run(&plan, |_, row| logits.push(row.to_vec()))
        .expect("runs");
    (mapped, logits)
}

/// The entries in a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).expect("a folder");
    files.map(|file| file.expect("readable").path()).collect()
}

fn copy_of(name: &str, to: &Path) -> PathBuf {
    let to = to.join(name);
    fs::create_dir(&to).expect("made");
    for file in files(&models().join(name)) {
        if file.is_file() {
            fs::copy(&file, to.join(file.file_name().expect("a name"))).expect("copied");
        }
    }
    to
}

#[test]
fn a_second_load_maps_what_the_first_packed_and_gives_the_same_bits() {
    for name in NAMES {
        for dtype in DTYPES {
            let folder = tempfile::tempdir().expect("a folder");
            let cache = cache_in(folder.path());
            let (mapped, first) = logits(&cache, &models().join(name), dtype);
            assert!(!mapped);
            let (mapped, second) = logits(&cache, &models().join(name), dtype);
            assert!(mapped);
            assert!(first == second, "{name} {dtype:?}");
        }
    }
}

#[test]
fn each_number_format_and_each_rank_has_an_entry_of_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = cache_in(folder.path());
    let model = models().join(NAMES[0]);
    for dtype in DTYPES {
        assert!(!logits(&cache, &model, dtype).0);
    }
    for collective in Threads::group(2) {
        let (_runner, origin) = load(&cache, &model, WeightDtype::Bf16, collective);
        let Origin::Packed { draft, .. } = origin else {
            panic!("{origin:?}")
        };
        draft.write().expect("writes");
    }
    assert_eq!(files(folder.path()).len(), DTYPES.len() + 2);
    for collective in Threads::group(2) {
        let (_, origin) = load(&cache, &model, WeightDtype::Bf16, collective);
        assert!(matches!(origin, Origin::Mapped(_)), "{origin:?}");
    }
}

/// Folders of checkpoints that are quantised already, each in another form.
fn quantised_already() -> Vec<TempDir> {
    let files = [TensorType::Q8_0, TensorType::Q4_0, TensorType::Q4_1];
    let files = files.map(|tensor_type| ready::gguf(NAMES[0], |_| tensor_type));
    let folders = [Quantiser::GPTQ, Quantiser::AWQ];
    let folders = folders.map(|quantiser| ready::quantised(NAMES[0], quantiser));
    files.into_iter().chain(folders).collect()
}

#[test]
fn a_damaged_entry_is_packed_anew_whatever_form_the_checkpoint_has() {
    let ready = quantised_already();
    let plain = [models().join(NAMES[0])];
    let ready = ready.iter().map(|folder| folder.path());
    for model in plain.iter().map(PathBuf::as_path).chain(ready) {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache_in(folder.path());
        let load = || logits(&cache, model, WeightDtype::Bf16);
        let loads = [load(), load()];
        let entry = files(folder.path()).pop().expect("written");
        let file = OpenOptions::new().write(true).open(entry).expect("there");
        let middle = file.metadata().expect("readable").len() / 2;
        file.write_all_at(b"spoilt", middle).expect("written");
        let after = [load(), load()];
        let (mapped, rows): (Vec<_>, Vec<_>) = loads.into_iter().chain(after).unzip();
        assert_eq!(mapped, [false, true, false, true], "{}", model.display());
        assert!(rows.iter().all(|other| *other == rows[0]));
    }
}

#[test]
fn a_changed_checkpoint_is_packed_anew_whatever_its_times_say() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = cache_in(&folder.path().join("packed"));
    let model = copy_of(NAMES[0], folder.path());
    let (_, first) = logits(&cache, &model, WeightDtype::Bf16);
    let path = model.join("model.safetensors");
    let file = OpenOptions::new().write(true).open(&path).expect("there");
    let found = file.metadata().expect("readable");
    // The last number of the last tensor, which no sample of its middle sees.
    file.write_all_at(&[0, 0x40], found.len() - 2)
        .expect("written");
    file.set_modified(found.modified().expect("known"))
        .expect("set");
    let (mapped, second) = logits(&cache, &model, WeightDtype::Bf16);
    assert!(!mapped);
    assert!(first != second);
}

#[test]
fn a_model_that_is_unloaded_before_it_is_written_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = cache_in(folder.path());
    let model = models().join(NAMES[0]);
    let (runner, origin) = load(&cache, &model, WeightDtype::Bf16, Solo::new());
    drop(runner);
    let Origin::Packed { draft, .. } = origin else {
        panic!("{origin:?}")
    };
    assert!(matches!(draft.write(), Err(NotWritten::Unloaded)));
    assert!(files(folder.path()).is_empty());
}

/// Loads and writes in a process of its own; `limits` is what its shell does first.
fn child(folder: &Path, limits: &str) -> Command {
    let program = std::env::current_exe().expect("known");
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{limits}; exec \"$0\" \"$@\"")])
        .arg(program)
        .args(["--exact", "a_child_loads_and_writes", "--ignored"])
        .arg("--nocapture")
        .env(CHILD_FOLDER, folder);
    command
}

fn text(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
#[ignore = "the body of child processes"]
fn a_child_loads_and_writes() {
    let folder = std::env::var_os(CHILD_FOLDER).expect("a folder");
    let cache = cache_in(Path::new(&folder));
    let model = models().join(NAMES[0]);
    let (_runner, origin) = load(&cache, &model, WeightDtype::Bf16, Solo::new());
    match origin {
        Origin::Packed { draft, .. } => match draft.write() {
            Ok(_) => println!("child: written"),
            Err(error) => println!("child: {error}"),
        },
        other => println!("child: {other:?}"),
    }
}

#[test]
fn of_processes_that_race_on_one_entry_all_load_and_one_writes_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = || child(folder.path(), "true").output().expect("runs");
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let children: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        let outputs = children.into_iter().map(|child| child.join());
        outputs.map(|output| output.expect("no panic")).collect()
    });
    let texts: Vec<String> = outputs.iter().map(text).collect();
    assert!(outputs.iter().all(|o| o.status.success()), "{texts:#?}");
    let said = |what: &str| texts.iter().filter(|text| text.contains(what)).count();
    let (written, mapped) = (said("child: written"), said("child: Mapped("));
    assert_eq!(written, 1, "{texts:#?}");
    assert_eq!(mapped + said("child: another process"), 3, "{texts:#?}");
    assert_eq!(files(folder.path()).len(), 1);
    let (mapped, _) = logits(
        &cache_in(folder.path()),
        &models().join(NAMES[0]),
        WeightDtype::Bf16,
    );
    assert!(mapped);
}

#[test]
fn a_process_that_is_killed_while_it_writes_leaves_no_entry() {
    let folder = tempfile::tempdir().expect("a folder");
    // The signal of a file that grows too large ends it in the middle of a write.
    let output = child(folder.path(), "ulimit -c 0; ulimit -f 64")
        .output()
        .expect("runs");
    assert!(!output.status.success(), "{}", text(&output));
    let left = files(folder.path());
    assert!(
        left.iter()
            .all(|file| file.extension().unwrap() == "partial")
    );
    assert_eq!(left.len(), 1, "it had begun");
    let output = child(folder.path(), "true").output().expect("runs");
    assert!(text(&output).contains("child: written"));
    let left = files(folder.path());
    assert!(
        left.iter()
            .all(|file| file.extension().unwrap() == "packed")
    );
}

#[test]
fn a_disk_that_takes_no_more_is_said_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = child(folder.path(), "trap '' XFSZ; ulimit -f 64")
        .output()
        .expect("runs");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains(".partial: File too large"), "{said}");
    assert!(files(folder.path()).is_empty());
}

#[test]
fn a_folder_that_cannot_be_written_to_is_said_and_the_model_serves() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("a file");
    File::create(&file).expect("made");
    let cache = cache_in(&file);
    let model = models().join(NAMES[0]);
    let (_runner, origin) = load(&cache, &model, WeightDtype::Bf16, Solo::new());
    let Origin::Packed { draft, .. } = origin else {
        panic!("{origin:?}")
    };
    let error = draft.write().expect_err("not a folder").to_string();
    assert!(error.contains("a file: "), "{error}");
}

/// The digest of the bytes of a matrix of known numbers.
fn packed_digest(shape: PackedShape, backend: &mut CpuBackend) -> u64 {
    let number = |row: usize, i: usize| (row * 7 + i * 3) % 16;
    let matrix = match shape {
        PackedShape::Float(shape) => {
            let row = |row: usize, out: &mut [f32]| {
                let numbers = out.iter_mut().enumerate();
                numbers.for_each(|(i, out)| *out = number(row, i) as f32);
            };
            backend.pack(shape, &row, None)
        }
        PackedShape::Quantised(shape) => {
            let row = |row: usize, out: QuantRow<'_>| {
                let numbers = out.q.iter_mut().enumerate();
                numbers.for_each(|(i, q)| *q = number(row, i) as i8);
                for (group, scale) in out.scales.iter_mut().enumerate() {
                    *scale = 0.25 * (1 + (row + group) % 5) as f32;
                }
                let zero = |group: usize| match (shape.offset, shape.bits) {
                    (QuantOffset::Middle, QuantBits::Int8) => 0,
                    (QuantOffset::Middle, QuantBits::Int4) => 8,
                    _ => ((row + group) % 16) as u8,
                };
                let zeros = out.zeros.iter_mut().enumerate();
                zeros.for_each(|(group, out)| *out = zero(group));
                let mins = out.mins.iter_mut().enumerate();
                mins.for_each(|(group, min)| *min = -0.5 * (row + group) as f32);
            };
            backend.pack_quantised(shape, &row, None)
        }
    };
    let bytes = CpuBackend::packed(&matrix.expect("packs")).expect("may be kept");
    assert_eq!(bytes.as_ref().len() as u64, shape.bytes::<CpuBackend>());
    xxhash_rust::xxh3::xxh3_64(bytes.as_ref())
}

#[test]
fn packed_bytes_are_those_of_their_layout_version_on_every_path() {
    let float = |dtype| {
        PackedShape::Float(LinearShape {
            n: 40,
            k: 75,
            dtype,
        })
    };
    let quantised = |bits, offset, group, lead| {
        PackedShape::Quantised(QuantShape {
            n: 40,
            k: 75,
            bits,
            group,
            lead,
            offset,
            head: false,
        })
    };
    let shapes = [
        float(FloatDtype::F32),
        float(FloatDtype::Bf16),
        quantised(QuantBits::Int8, QuantOffset::Middle, 128, 0),
        quantised(QuantBits::Int4, QuantOffset::Middle, 64, 0),
        quantised(QuantBits::Int4, QuantOffset::Zeros, 32, 5),
        quantised(QuantBits::Int4, QuantOffset::Mins, 32, 0),
    ];
    for isa in CpuPath::ALL.into_iter().filter_map(Isa::new) {
        let pool = Pool::new(1, &[]).expect("a thread");
        let mut backend = CpuBackend::with_isa(pool, isa).expect("memory");
        let digests = shapes.map(|shape| packed_digest(shape, &mut backend));
        assert_eq!(
            (LAYOUT_VERSION, digests),
            LAYOUT,
            "{}: entries of this layout are out there: count LAYOUT_VERSION up, then write the new digests here",
            isa.path().name()
        );
    }
}

/// The layout in use, and what it makes of known numbers.
const LAYOUT: (u32, [u64; 6]) = (
    2,
    [
        0xe7cb_c223_e01a_1173,
        0x781a_0f3d_3da7_5c4c,
        0xb33c_6da0_36a0_6647,
        0x7ce1_d31d_760a_cd2a,
        0x4807_6c8e_e455_5d0b,
        0x548b_c4db_0fba_82d3,
    ],
);
