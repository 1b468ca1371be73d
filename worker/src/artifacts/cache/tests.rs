//! The cache with fetches that are closures: what is whole, who waits, what goes.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use common::wire::message::RemoteFile;

use super::*;

const YES: &dyn Fn() -> bool = &|| true;
const SILENT: Told<'_> = &|_, _, _| ();

struct Fixture {
    folder: tempfile::TempDir,
    fetches: AtomicU32,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture {
            folder: tempfile::tempdir().unwrap(),
            fetches: AtomicU32::new(0),
        }
    }

    fn cache(&self, bytes_max: Option<u64>) -> Cache {
        Cache {
            folder: self.folder.path().join("cache"),
            bytes_max,
        }
    }

    /// Writes the version's files as a fetch does.
    fn fetch(&self, remote: &RemoteModel, partial: &Path) -> Result<PathBuf, Failure> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let files = partial.join("files");
        for file in &remote.files {
            let path = files.join(&file.path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![7; file.bytes.unwrap() as usize]).unwrap();
        }
        Ok(files)
    }

    fn hold(&self, cache: &Cache, remote: &RemoteModel) -> Result<Held, Failure> {
        cache.hold(remote, &|partial| self.fetch(remote, partial), SILENT, YES)
    }
}

fn version(identity: &str, bytes: u64) -> RemoteModel {
    let file = |path: &str, bytes| RemoteFile {
        path: path.into(),
        bytes: Some(bytes),
        sha256: None,
    };
    RemoteModel {
        registry: "r".into(),
        uri: "u:/".into(),
        identity: identity.into(),
        files: vec![file("MLmodel", 1), file("model/a", bytes - 1)],
    }
}

#[test]
fn a_version_is_fetched_once_and_found_again() {
    let fixture = Fixture::new();
    let (cache, remote) = (fixture.cache(None), version("a", 100));
    let first = fixture.hold(&cache, &remote).unwrap();
    assert_eq!(fs::read(first.folder.join("model/a")).unwrap(), [7; 99]);
    let second = fixture.hold(&cache, &remote).unwrap();
    assert_eq!(first.folder, second.folder);
    assert_eq!(fixture.fetches.load(Ordering::SeqCst), 1);
    assert!(!first.folder.with_extension(PARTIAL).exists());
}

#[test]
fn a_fetch_that_fails_leaves_its_part_for_the_next_and_no_version() {
    let fixture = Fixture::new();
    let (cache, remote) = (fixture.cache(None), version("a", 100));
    let broken = |partial: &Path| {
        fs::create_dir_all(partial.join("parts")).unwrap();
        fs::write(partial.join("parts/1"), [7; 50]).unwrap();
        Err(Failure::new(FailureKind::Unavailable, "broke off"))
    };
    let failure = cache.hold(&remote, &broken, SILENT, YES).unwrap_err();
    assert_eq!(failure.message, "broke off");
    let seen = Cell::new(0);
    let next = |partial: &Path| {
        seen.set(bytes_in(partial));
        fixture.fetch(&remote, partial)
    };
    cache.hold(&remote, &next, SILENT, YES).unwrap();
    assert_eq!(seen.get(), 50);
}

#[test]
fn a_damaged_version_is_fetched_again() {
    let fixture = Fixture::new();
    let (cache, remote) = (fixture.cache(None), version("a", 100));
    let held = fixture.hold(&cache, &remote).unwrap();
    let file = held.folder.join("model/a");
    drop(held);
    fs::write(&file, [7; 10]).unwrap();
    fixture.hold(&cache, &remote).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().len(), 99);
    assert_eq!(fixture.fetches.load(Ordering::SeqCst), 2);
}

#[test]
fn many_who_want_one_version_at_a_time_fetch_it_once() {
    let fixture = Fixture::new();
    let remote = version("a", 100);
    std::thread::scope(|scope| {
        let holders: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| fixture.hold(&fixture.cache(None), &remote).unwrap()))
            .collect();
        for holder in holders {
            assert!(holder.join().unwrap().folder.join("MLmodel").is_file());
        }
    });
    assert_eq!(fixture.fetches.load(Ordering::SeqCst), 1);
}

#[test]
fn one_who_waits_sees_the_others_progress_and_leaves_when_not_wanted() {
    let fixture = Fixture::new();
    let (cache, remote) = (fixture.cache(None), version("a", 100));
    let version = Version {
        remote: &remote,
        folder: cache.folder.join(key(&remote)),
    };
    let parts = version.with(PARTIAL).join("parts");
    fs::create_dir_all(&parts).unwrap();
    fs::write(parts.join("0"), [7; 30]).unwrap();
    let other = version.lock().unwrap();
    other.try_lock().unwrap();
    let told = Cell::new((0, 0));
    let waits = cache.hold(
        &remote,
        &|_| panic!("the other fetches"),
        &|stage, done, total| {
            assert_eq!(stage, WAITING);
            told.set((done, total));
        },
        &|| told.get() == (0, 0),
    );
    assert_eq!(told.get(), (30, 100));
    assert_eq!(waits.unwrap_err().message, "not wanted any more");
}

#[test]
fn the_longest_unused_version_goes_and_one_in_use_stays() {
    let fixture = Fixture::new();
    let cache = fixture.cache(Some(250));
    let hold = |identity| fixture.hold(&cache, &version(identity, 100));
    let used = hold("in use").unwrap();
    let old = hold("old").unwrap().folder;
    // Two are there, one of them in use: a third drives out the other, though it was used later.
    let new = hold("new").unwrap().folder;
    assert!(used.folder.is_dir() && !old.exists() && new.is_dir());
    assert!(!old.with_extension(LOCK).exists());
    let both = hold("new").unwrap();
    let failure = hold("fourth").unwrap_err();
    assert_eq!(failure.kind, FailureKind::TooLarge);
    assert!(
        failure.message.contains("worker.cache_bytes_max"),
        "{failure}"
    );
    drop(both);
    hold("fourth").unwrap();
}

#[test]
fn a_version_larger_than_the_cache_or_the_disk_is_refused_with_numbers() {
    let fixture = Fixture::new();
    let remote = version("a", 100);
    let failure = fixture.hold(&fixture.cache(Some(99)), &remote).unwrap_err();
    assert!(
        failure.message.contains("may hold")
            && failure.message.contains("raise worker.cache_bytes_max"),
        "{failure}"
    );
    let mut huge = version("b", 100);
    huge.files[1].bytes = Some(1 << 60);
    let failure = fixture.hold(&fixture.cache(None), &huge).unwrap_err();
    assert_eq!(failure.kind, FailureKind::TooLarge);
    assert!(failure.message.contains("the disk has"), "{failure}");
}

#[test]
fn the_key_depends_on_what_the_version_is_and_on_what_is_fetched_of_it() {
    let a = version("a", 100);
    let mut fewer = a.clone();
    fewer.files.pop();
    let keys = [key(&a), key(&fewer), key(&version("b", 100))];
    assert!(keys[0] != keys[1] && keys[0] != keys[2]);
    assert_eq!(keys[0], key(&a.clone()));
}
