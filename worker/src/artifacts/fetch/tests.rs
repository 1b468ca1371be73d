//! Fetching from a registry that breaks off, lies and changes: what is here in the end is what was listed, or nothing.

use std::cell::RefCell;
use std::collections::BTreeMap;

use cluster_tests::fake_registry::{FakeRegistry, Wrong};
use common::config::{RegistryEntry, RegistryKind};
use common::model_ref::ModelRef;
use registry::Found;

use super::*;

const WEIGHTS: &str = "model/model.safetensors";

/// A registry with one version, and a folder to fetch it into.
struct Fixture {
    fake: FakeRegistry,
    registry: Arc<Registry>,
    remote: RemoteModel,
    folder: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Fixture {
        let fake = FakeRegistry::start().await;
        let weights: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let files = [
            ("MLmodel", b"flavors: {}".to_vec()),
            ("model/config.json", b"{}".to_vec()),
            (WEIGHTS, weights),
        ];
        let files = files.map(|(path, bytes)| (path.to_owned(), bytes));
        fake.register("m", 1, BTreeMap::from(files));
        let entry = RegistryEntry {
            url: Some(fake.url.clone()),
            ..RegistryEntry::new("fake", RegistryKind::Mlflow)
        };
        let registry = Arc::new(Registry::open(&entry, &|_| None).unwrap());
        let found = registry.find(&ModelRef::new("m", "1").unwrap()).await;
        let Found::Remote(listing) = found.unwrap() else {
            panic!("files to fetch");
        };
        let remote = RemoteModel {
            registry: "fake".into(),
            uri: listing.uri,
            identity: listing.identity,
            files: listing.files,
        };
        Fixture {
            fake,
            registry,
            remote,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn weights(&mut self) -> &mut RemoteFile {
        let found = self.remote.files.iter_mut().find(|f| f.path == WEIGHTS);
        found.unwrap()
    }

    fn content(&self) -> Vec<u8> {
        self.fake.state().versions[&("m".to_owned(), "1".to_owned())].files[WEIGHTS].clone()
    }

    /// Fetches on a thread that may block.
    async fn fetch(&self) -> Result<PathBuf, Failure> {
        let (registry, remote) = (self.registry.clone(), self.remote.clone());
        let folder = self.folder.path().to_owned();
        let fetch = move || all(&registry, &remote, &folder, &|_, _, _| (), &|| true);
        tokio::task::spawn_blocking(fetch).await.unwrap()
    }

    /// Fetches, and compares what is here with what is there.
    async fn fetch_all(&self) {
        let files = self.fetch().await.unwrap();
        assert!(
            fs::read(files.join(WEIGHTS)).unwrap() == self.content(),
            "the files differ"
        );
        assert_eq!(fs::read(files.join("model/config.json")).unwrap(), b"{}");
    }

    fn asked_from(&self, from: usize) -> usize {
        self.fake.requested(&format!("{WEIGHTS} from {from}"))
    }
}

fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[tokio::test]
async fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let fixture = Fixture::new().await;
    fixture.fake.fault(WEIGHTS, 1, Wrong::BreaksAfter(100_000));
    fixture.fetch_all().await;
    let requests = fixture.fake.state().requests.clone();
    let resumed = requests.iter().find(|r| r.contains(" from "));
    assert!(resumed.is_some_and(|r| r.contains(WEIGHTS)), "{requests:?}");
}

#[tokio::test]
async fn where_the_registry_does_not_resume_the_file_begins_anew() {
    let mut fixture = Fixture::new().await;
    fixture.fake.state().resumes = false;
    let sha256 = digest(&fixture.content());
    fixture.weights().sha256 = Some(sha256);
    fixture.fake.fault(WEIGHTS, 2, Wrong::BreaksAfter(100_000));
    fixture.fetch_all().await;
}

#[tokio::test]
async fn what_is_here_of_a_file_is_kept_over_a_failure_and_checked_with_the_rest() {
    let mut fixture = Fixture::new().await;
    let sha256 = digest(&fixture.content());
    fixture.weights().sha256 = Some(sha256);
    let gone = Wrong::Status(404, "{\"message\": \"not there any more\"}".into());
    fixture.fake.fault(WEIGHTS, 1, Wrong::BreaksAfter(100_000));
    fixture.fake.fault(WEIGHTS, 1, gone);
    let failure = fixture.fetch().await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::BadRequest);
    assert!(
        failure.message.contains(WEIGHTS) && failure.message.contains("not there any more"),
        "{failure}"
    );
    let part = length(&fixture.folder.path().join("parts/2")) as usize;
    assert!(part > 0 && part <= 100_000, "{part}");
    fixture.fetch_all().await;
    assert_eq!(
        fixture.asked_from(part),
        2,
        "once in vain, once with success"
    );
}

#[tokio::test]
async fn a_wrong_digest_is_tried_once_more_and_then_named() {
    let mut fixture = Fixture::new().await;
    let sha256 = digest(&fixture.content());
    fixture.weights().sha256 = Some(sha256);
    let mut damaged = fixture.content();
    damaged[1234] ^= 1;
    fixture.fake.fault(WEIGHTS, 1, Wrong::Body(damaged.clone()));
    fixture.fetch_all().await;
    let other = tempfile::tempdir().unwrap();
    let fixture = Fixture {
        folder: other,
        ..fixture
    };
    fixture.fake.fault(WEIGHTS, 2, Wrong::Body(damaged));
    let failure = fixture.fetch().await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::BadRequest);
    assert!(
        failure.message.contains(WEIGHTS) && failure.message.contains("its SHA-256 is"),
        "{failure}"
    );
    assert!(!fixture.folder.path().join("files").join(WEIGHTS).exists());
}

#[tokio::test]
async fn another_length_than_the_listed_one_is_refused() {
    for bytes in [299_999, 300_001] {
        let fixture = Fixture::new().await;
        fixture.fake.fault(WEIGHTS, 9, Wrong::Body(vec![1; bytes]));
        let failure = fixture.fetch().await.unwrap_err();
        let says = format!("has {bytes} bytes of it and had listed 300000");
        assert!(failure.message.contains(&says), "{failure}");
    }
}

#[tokio::test]
async fn a_registry_that_keeps_failing_may_be_tried_later() {
    let fixture = Fixture::new().await;
    fixture.fake.fault(WEIGHTS, 99, Wrong::BreaksAfter(0));
    let failure = fixture.fetch().await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unavailable, "{failure}");
    assert!(failure.message.contains(WEIGHTS), "{failure}");
}

#[tokio::test]
async fn progress_grows_to_the_whole_and_a_shard_that_is_not_wanted_stops() {
    let fixture = Fixture::new().await;
    let (registry, remote) = (fixture.registry.clone(), fixture.remote.clone());
    let folder = fixture.folder.path().to_owned();
    let unwanted = tokio::task::spawn_blocking(move || {
        let heard = RefCell::new(Vec::new());
        let told = |stage: &str, done, total| {
            assert_eq!(stage, STAGE);
            heard.borrow_mut().push((done, total));
        };
        let stopped = all(&registry, &remote, &folder, &told, &|| false).unwrap_err();
        all(&registry, &remote, &folder, &told, &|| true).unwrap();
        let heard = heard.into_inner();
        assert_eq!(heard.last(), Some(&(300_013, 300_013)));
        stopped
    });
    assert_eq!(unwanted.await.unwrap().message, "not wanted any more");
}
