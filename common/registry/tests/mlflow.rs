//! An MLflow server that is played by the test: what is found, what is refused, and what a hostile answer comes to.

use std::collections::BTreeMap;

use cluster_tests::fake_registry::{FakeRegistry, Wrong};
use common::config::{Credentials, RegistryEntry, RegistryKind, SecretSource};
use common::model_ref::ModelRef;
use registry::{Error, Found, Listing, Registry};

const ROOT: &str = "path=0/ml.demo.a-1/artifacts/model";

fn files() -> BTreeMap<String, Vec<u8>> {
    let files = [("MLmodel", 3), ("model/config.json", 2), ("model/w", 1000)];
    let file = |(path, bytes): (&str, usize)| (path.to_owned(), vec![7; bytes]);
    files.map(file).into_iter().collect()
}

async fn fake() -> FakeRegistry {
    let fake = FakeRegistry::start().await;
    for version in [1, 2, 10] {
        fake.register("ml.demo.a", version, files());
    }
    fake
}

fn entry(fake: &FakeRegistry) -> RegistryEntry {
    RegistryEntry {
        url: Some(fake.url.clone()),
        ..RegistryEntry::new("tracking", RegistryKind::Mlflow)
    }
}

fn open(fake: &FakeRegistry) -> Registry {
    Registry::open(&entry(fake), &|_| None).unwrap()
}

async fn find(fake: &FakeRegistry, name: &str, version: &str) -> Result<Found, Error> {
    open(fake)
        .find(&ModelRef::new(name, version).unwrap())
        .await
}

fn listing(found: Result<Found, Error>) -> Listing {
    match found.unwrap() {
        Found::Remote(listing) => listing,
        Found::Folder(path) => panic!("{} is a folder", path.display()),
    }
}

/// What finding comes to when the listing of the version's folder is this.
async fn listed(body: &str) -> String {
    let fake = fake().await;
    fake.fault(ROOT, 99, Wrong::Body(body.as_bytes().to_vec()));
    find(&fake, "ml.demo.a", "1").await.unwrap_err().to_string()
}

async fn bytes(registry: &Registry, uri: &str, path: &str, from: u64) -> (u64, Vec<u8>) {
    let mut body = registry.read(uri, path, from).await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await {
        bytes.extend_from_slice(&chunk.unwrap());
    }
    (body.from, bytes)
}

#[tokio::test]
async fn a_version_is_listed_with_lengths_and_its_files_are_read_from_any_byte() {
    let fake = fake().await;
    let listing = listing(find(&fake, "ml.demo.a", "1").await);
    let paths: Vec<_> = listing
        .files
        .iter()
        .map(|f| (f.path.as_str(), f.bytes))
        .collect();
    assert_eq!(
        paths,
        [
            ("MLmodel", Some(3)),
            ("model/config.json", Some(2)),
            ("model/w", Some(1000))
        ]
    );
    let registry = open(&fake);
    let (from, whole) = bytes(&registry, &listing.uri, "model/w", 0).await;
    assert_eq!((from, whole.len()), (0, 1000));
    let (from, rest) = bytes(&registry, &listing.uri, "model/w", 990).await;
    assert_eq!((from, rest.len()), (990, 10));
    // Beyond the end, and where the server does not resume, it begins at the start.
    assert_eq!(bytes(&registry, &listing.uri, "model/w", 1000).await.0, 0);
    fake.state().resumes = false;
    assert_eq!(bytes(&registry, &listing.uri, "model/w", 990).await.0, 0);
}

#[tokio::test]
async fn what_is_missing_is_told_apart_and_known_versions_are_named() {
    let fake = fake().await;
    let version = find(&fake, "ml.demo.a", "3").await.unwrap_err();
    assert_eq!(
        version.to_string(),
        "Model version '3' of registered model 'ml.demo.a' does not exist. Known versions: 1, 2, 10"
    );
    let model = find(&fake, "b", "1").await;
    assert_eq!(model, Err(Error::NoModel("b".into())));
}

#[tokio::test]
async fn a_version_that_is_not_ready_says_what_to_do() {
    let fake = fake().await;
    let set = |status: &str| {
        let key = ("ml.demo.a".to_owned(), "1".to_owned());
        let status = Some(status.to_owned());
        fake.state().versions.get_mut(&key).unwrap().status = status;
    };
    set("PENDING_REGISTRATION");
    let message = find(&fake, "ml.demo.a", "1").await.unwrap_err().to_string();
    assert!(
        message.contains("is PENDING_REGISTRATION; wait until"),
        "{message}"
    );
    set("FAILED_REGISTRATION");
    let message = find(&fake, "ml.demo.a", "1").await.unwrap_err().to_string();
    assert!(message.contains("register the model again"), "{message}");
}

#[tokio::test]
async fn aliases_and_numbers_are_found_by_uri() {
    let fake = fake().await;
    let registry = open(&fake);
    let by_alias = listing(registry.locate("models:/ml.demo.a@a2").await);
    let by_number = listing(registry.locate("models:/ml.demo.a/2").await);
    assert_eq!(by_alias, by_number);
    assert_ne!(by_alias, listing(find(&fake, "ml.demo.a", "1").await));
}

#[tokio::test]
async fn a_shared_folder_is_given_as_it_is() {
    let (fake, folder) = (fake().await, tempfile::tempdir().unwrap());
    let key = ("ml.demo.a".to_owned(), "1".to_owned());
    let set = |uri: String| {
        fake.state().versions.get_mut(&key).unwrap().artifact_uri = Some(uri);
    };
    set(format!("file://{}", folder.path().display()));
    let found = find(&fake, "ml.demo.a", "1").await;
    assert_eq!(found, Ok(Found::Folder(folder.path().to_owned())));
    set("s3://bucket/model".into());
    let error = find(&fake, "ml.demo.a", "1").await.unwrap_err().to_string();
    assert!(error.contains("s3://bucket/model"), "{error}");
}

#[tokio::test]
async fn secrets_are_sent_and_a_refusal_says_where_they_belong_and_not_what_they_are() {
    let fake = fake().await;
    fake.state().token = Some("hush".into());
    let without = find(&fake, "ml.demo.a", "1").await.unwrap_err().to_string();
    assert!(
        without.contains("answered 401: no valid token (no credentials were given; see"),
        "{without}"
    );
    let open = |value: &'static str| {
        let entry = RegistryEntry {
            credentials: Credentials {
                token: Some(SecretSource::Variable("MY_TOKEN".into())),
                basic: None,
            },
            ..entry(&fake)
        };
        Registry::open(&entry, &move |name| {
            (name == "MY_TOKEN").then(|| value.to_owned())
        })
        .unwrap()
    };
    let model = ModelRef::new("ml.demo.a", "1").unwrap();
    open("hush").find(&model).await.unwrap();
    let wrong = open("not-that-one").find(&model).await.unwrap_err();
    let wrong = wrong.to_string();
    assert!(
        wrong.contains("a token was given") && !wrong.contains("not-that-one"),
        "{wrong}"
    );
}

#[tokio::test]
async fn passing_trouble_is_waited_out_and_lasting_trouble_is_told() {
    let fake = fake().await;
    let busy = || Wrong::Status(503, "{\"message\": \"busy\"}".into());
    fake.fault(ROOT, 2, busy());
    listing(find(&fake, "ml.demo.a", "1").await);
    fake.fault(ROOT, 99, busy());
    let lasting = find(&fake, "ml.demo.a", "1").await.unwrap_err();
    assert!(matches!(lasting, Error::Unavailable(_)), "{lasting:?}");
    assert!(
        lasting.to_string().contains("answered 503: busy"),
        "{lasting}"
    );
    let url = fake.url.clone();
    let gone = entry(&fake);
    drop(fake);
    let nobody = Registry::open(&gone, &|_| None).unwrap();
    let error = nobody.find(&ModelRef::new("a", "1").unwrap()).await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, Error::Unavailable(message) if message.contains(&url)),
        "{error:?}"
    );
}

#[tokio::test]
async fn listings_that_lead_out_of_the_model_are_refused() {
    for path in ["../up", "/etc/passwd", "a/../../b", "", "."] {
        for is_dir in [true, false] {
            let file = serde_json::json!({"path": path, "is_dir": is_dir, "file_size": 1});
            let message = listed(&serde_json::json!({ "files": [file] }).to_string()).await;
            assert!(
                message.contains("which is not a plain path"),
                "{path}: {message}"
            );
        }
    }
}

#[tokio::test]
async fn listings_without_end_are_refused() {
    let many: Vec<_> = (0..20_000)
        .map(|i| serde_json::json!({"path": format!("f{i}"), "file_size": 1}))
        .collect();
    let message = listed(&serde_json::json!({ "files": many }).to_string()).await;
    assert!(message.contains("or 10000 files"), "{message}");
    let fake = fake().await;
    let deeper = br#"{"files": [{"path": "d", "is_dir": true}]}"#;
    fake.fault(ROOT, 1, Wrong::Body(deeper.to_vec()));
    fake.fault("/d", 999, Wrong::Body(deeper.to_vec()));
    let message = find(&fake, "ml.demo.a", "1").await.unwrap_err().to_string();
    assert!(message.contains("which is not a plain path"), "{message}");
    let pages = r#"{"files": [], "next_page_token": "again"}"#;
    let turns = FakeRegistry::start().await;
    turns.register("ml.demo.a", 1, files());
    turns.fault(ROOT, 1, Wrong::Body(pages.into()));
    turns.fault("page_token=again", 999, Wrong::Body(pages.into()));
    let message = find(&turns, "ml.demo.a", "1")
        .await
        .unwrap_err()
        .to_string();
    assert!(message.contains("more than 100 pages"), "{message}");
}

#[tokio::test]
async fn answers_that_are_not_the_api_are_told_with_their_words() {
    let message = listed("<html>Sign in</html>").await;
    assert!(
        message.contains("<html>Sign in</html>; is it the registry's address?"),
        "{message}"
    );
    let message = listed(&"x".repeat(17 << 20)).await;
    assert!(
        message.contains("the answer is longer than 16777216 bytes"),
        "{message}"
    );
    let message = listed("{\"files\": []}").await;
    assert!(message.contains("there are no files at"), "{message}");
}
