use super::draft::NotWritten;
use super::*;
use crate::models::checkpoint::Fingerprint;
use crate::weights::FileMark;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// A cache folder, and a file that stands for the model.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().expect("a folder"));
        fs::write(folder.model(), "weights").expect("written");
        folder
    }

    fn model(&self) -> PathBuf {
        self.0.path().join("model.safetensors")
    }

    fn cache(&self, bytes_max: u64) -> PackedCache {
        PackedCache::new(self.0.path().join("packed"), bytes_max)
    }

    fn draft(&self, cache: &PackedCache, key: &PackedKey, matrices: &[PackedBytes]) -> Draft {
        let marks = vec![FileMark::of(&self.model()).expect("there")];
        let mut draft = Draft::new(cache.clone(), key.clone(), Fingerprint(marks));
        for (i, bytes) in matrices.iter().enumerate() {
            draft.add(name(i), bytes);
        }
        draft
    }

    /// Names of the cache's files.
    fn names(&self) -> Vec<String> {
        let files = fs::read_dir(self.0.path().join("packed"))
            .into_iter()
            .flatten();
        let name = |file: io::Result<fs::DirEntry>| {
            file.expect("readable")
                .file_name()
                .to_string_lossy()
                .into_owned()
        };
        let mut names: Vec<String> = files.map(name).collect();
        names.sort();
        names
    }
}

fn key(model: &str) -> PackedKey {
    PackedKey::new(model, (0, 1), WeightDtype::Bf16, "cpu-1")
}

fn name(i: usize) -> MatrixName {
    MatrixName {
        name: format!("layers.{i}"),
        shape: "some".to_owned(),
    }
}

fn bytes(len: usize) -> PackedBytes {
    let bytes: Vec<u8> = (0..len).map(|i| (i * 31 + i / 251) as u8).collect();
    PackedBytes::whole(bytes)
}

fn find(cache: &PackedCache, key: &PackedKey) -> Result<Option<Entry>, String> {
    let serial = |items: usize, body: &(dyn Fn(usize) + Sync)| (0..items).for_each(body);
    cache.find(key, &serial, &mut |_| {})
}

#[test]
fn an_entry_gives_back_the_very_bytes_and_nothing_under_another_shape() {
    let folder = Folder::new();
    let cache = folder.cache(1 << 30);
    let matrices = [0, 1, ALIGNED, ALIGNED + 1, format::PIECE_BYTES + 5, 77].map(bytes);
    assert!(find(&cache, &key("a")).expect("no folder yet").is_none());
    let written = folder
        .draft(&cache, &key("a"), &matrices)
        .write()
        .expect("writes");
    let path = cache.path(&key("a"), ENTRY);
    assert_eq!(fs::metadata(path).expect("there").len(), written);
    let entry = find(&cache, &key("a")).expect("sound").expect("found");
    for (i, matrix) in matrices.iter().enumerate() {
        let len = matrix.as_ref().len();
        let found = entry.matrix(&name(i), len as u64).expect("found");
        assert!(found.as_ref() == matrix.as_ref(), "{i}");
        assert_eq!(found.as_ref().as_ptr().align_offset(64), 0);
        assert!(entry.matrix(&name(i), len as u64 + 1).is_none());
    }
    let other = MatrixName {
        shape: "other".to_owned(),
        ..name(1)
    };
    assert!(entry.matrix(&other, 1).is_none());
    assert!(find(&cache, &key("b")).expect("no error").is_none());
    assert_eq!(folder.names().len(), 1);
}

const ALIGNED: usize = format::ALIGNMENT;

#[test]
fn every_flipped_byte_and_every_cut_is_found_and_the_entry_is_removed() {
    let folder = Folder::new();
    let cache = folder.cache(1 << 30);
    let path = cache.path(&key("a"), ENTRY);
    folder
        .draft(&cache, &key("a"), &[bytes(5000), bytes(9)])
        .write()
        .expect("writes");
    let whole = fs::read(&path).expect("readable");
    let data_end = 4 * ALIGNED;
    let spoilt = (0..data_end).step_by(97).chain(data_end..whole.len());
    for at in spoilt {
        let mut spoilt = whole.clone();
        spoilt[at] ^= 16;
        fs::write(&path, spoilt).expect("written");
        let reason = find(&cache, &key("a")).expect_err("damaged");
        assert!(reason.ends_with("it was removed"), "byte {at}: {reason}");
        assert!(!path.exists());
    }
    for end in (0..data_end).step_by(501).chain(data_end..whole.len()) {
        fs::write(&path, &whole[..end]).expect("written");
        find(&cache, &key("a")).expect_err("cut short");
    }
    fs::write(&path, &whole).expect("written");
    assert!(find(&cache, &key("a")).expect("sound").is_some());
}

#[test]
fn an_entry_under_the_name_of_another_is_damaged() {
    let folder = Folder::new();
    let cache = folder.cache(1 << 30);
    folder
        .draft(&cache, &key("a"), &[bytes(10)])
        .write()
        .expect("writes");
    fs::rename(cache.path(&key("a"), ENTRY), cache.path(&key("b"), ENTRY)).expect("renamed");
    let reason = find(&cache, &key("b")).expect_err("of another key");
    assert!(reason.contains("it is of format-1/"), "{reason}");
}

#[test]
fn an_unloaded_or_a_changed_model_leaves_no_entry() {
    let folder = Folder::new();
    let cache = folder.cache(1 << 30);
    let draft = folder.draft(&cache, &key("a"), &[bytes(10)]);
    assert!(matches!(draft.write(), Err(NotWritten::Unloaded)));
    let matrix = bytes(10);
    let draft = folder.draft(&cache, &key("a"), std::slice::from_ref(&matrix));
    let file = OpenOptions::new()
        .write(true)
        .open(folder.model())
        .expect("there");
    file.write_all_at(b"W", 0).expect("written");
    file.set_modified(SystemTime::UNIX_EPOCH).expect("set");
    assert!(matches!(draft.write(), Err(NotWritten::ModelChanged)));
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn of_several_writers_one_writes() {
    let folder = Folder::new();
    let cache = folder.cache(1 << 30);
    let matrix = bytes(3 * format::PIECE_BYTES);
    let results: Vec<_> = std::thread::scope(|scope| {
        let write = || {
            folder
                .draft(&cache, &key("a"), std::slice::from_ref(&matrix))
                .write()
        };
        let writers: Vec<_> = (0..4).map(|_| scope.spawn(write)).collect();
        writers
            .into_iter()
            .map(|writer| writer.join().expect("no panic"))
            .collect()
    });
    let written = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!(written, 1, "{results:?}");
    for result in results {
        assert!(
            matches!(result, Ok(_) | Err(NotWritten::Elsewhere)),
            "{result:?}"
        );
    }
    assert!(find(&cache, &key("a")).expect("sound").is_some());
    assert_eq!(folder.names().len(), 1);
}

#[test]
fn what_a_killed_writer_left_is_written_anew_or_cleaned_up() {
    let folder = Folder::new();
    let cache = folder.cache(1 << 30);
    let matrix = bytes(100);
    fs::create_dir_all(&cache.folder).expect("made");
    for model in ["a", "b"] {
        fs::write(cache.path(&key(model), PARTIAL), vec![7; 20000]).expect("written");
    }
    let held = File::create(cache.path(&key("c"), PARTIAL)).expect("made");
    held.lock().expect("locked");
    folder
        .draft(&cache, &key("a"), std::slice::from_ref(&matrix))
        .write()
        .expect("writes");
    assert!(find(&cache, &key("a")).expect("sound").is_some());
    let mut expected = vec![
        format!("{}.{ENTRY}", key("a").name()),
        format!("{}.{PARTIAL}", key("c").name()),
    ];
    expected.sort();
    assert_eq!(folder.names(), expected);
}

#[test]
fn the_longest_unused_entries_go_first_and_mapped_ones_stay() {
    let folder = Folder::new();
    let cache = folder.cache(73_000);
    let matrix = bytes(10_000);
    let write = |model: &str| {
        folder
            .draft(&cache, &key(model), std::slice::from_ref(&matrix))
            .write()
    };
    let there = |model: &str| cache.path(&key(model), ENTRY).exists();
    for (age_s, model) in [(50, "mapped"), (40, "oldest"), (10, "newest"), (20, "used")] {
        write(model).expect("writes");
        let file = File::open(cache.path(&key(model), ENTRY)).expect("there");
        let time = SystemTime::now() - Duration::from_secs(age_s);
        file.set_modified(time).expect("set");
    }
    let mapped = find(&cache, &key("mapped")).expect("sound").expect("there");
    let mapped_time = SystemTime::now() - Duration::from_secs(60);
    let file = File::open(cache.path(&key("mapped"), ENTRY)).expect("there");
    file.set_modified(mapped_time).expect("set");
    drop(find(&cache, &key("used")).expect("sound").expect("there"));
    write("more").expect("writes");
    let all = ["mapped", "oldest", "newest", "used", "more"];
    assert_eq!(all.map(there), [true, false, true, true, true]);
    write("yet more").expect("writes");
    assert_eq!(all.map(there), [true, false, false, true, true]);
    drop(mapped);
    write("and more").expect("writes");
    assert_eq!(all.map(there), [false, false, false, true, true]);
}

#[test]
fn an_entry_that_the_cache_may_not_hold_is_not_written() {
    let folder = Folder::new();
    let cache = folder.cache(9_999);
    let matrix = bytes(10_000);
    let draft = folder.draft(&cache, &key("a"), std::slice::from_ref(&matrix));
    let error = draft.write().expect_err("too large").to_string();
    assert!(error.starts_with("10000 bytes are needed in ") && error.ends_with("it may hold 9999"));
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
    let folder = Folder::new();
    let cache = PackedCache::new(folder.model().join("below a file"), 1 << 30);
    let matrix = bytes(10);
    let draft = folder.draft(&cache, &key("a"), std::slice::from_ref(&matrix));
    let error = draft.write().expect_err("no folder").to_string();
    assert!(
        error.contains("model.safetensors/below a file: "),
        "{error}"
    );
}

#[test]
fn every_input_changes_the_key() {
    let mut names = std::collections::HashSet::new();
    for model in ["a", "b"] {
        for rank in [(0, 1), (0, 2), (1, 2)] {
            for dtype in [
                WeightDtype::F32,
                WeightDtype::Bf16,
                WeightDtype::Int8,
                WeightDtype::Int4,
            ] {
                for layout in ["cpu-1", "cpu-2"] {
                    names.insert(PackedKey::new(model, rank, dtype, layout).name());
                }
            }
        }
    }
    assert_eq!(names.len(), 2 * 3 * 4 * 2);
}
