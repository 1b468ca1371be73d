//! Unity Catalog's verbs, played by the test. Files themselves come from a cloud's store, which is not played here.

use cluster_tests::fake_registry::{FakeRegistry, Wrong};
use common::config::{RegistryEntry, RegistryKind};
use common::model_ref::ModelRef;
use registry::{Error, Found, Registry};

const VERBS: &str = "/api/2.0/mlflow/unity-catalog";

fn open(fake: &FakeRegistry) -> Registry {
    let entry = RegistryEntry::new("catalog", RegistryKind::UnityCatalog);
    let url = fake.url.clone();
    let environment = move |name: &str| match name {
        "DATABRICKS_HOST" => Some(url.clone()),
        "DATABRICKS_TOKEN" => Some("hush".to_owned()),
        _ => None,
    };
    Registry::open(&entry, &environment).unwrap()
}

async fn find(fake: &FakeRegistry, name: &str, version: &str) -> Result<Found, Error> {
    open(fake)
        .find(&ModelRef::new(name, version).unwrap())
        .await
}

fn says(fake: &FakeRegistry, verb: &str, body: &str) {
    let body = Wrong::Body(body.as_bytes().to_vec());
    fake.fault(&format!("{VERBS}/{verb}"), usize::MAX, body);
}

#[tokio::test]
async fn a_model_of_one_level_is_not_asked_for() {
    let fake = FakeRegistry::start().await;
    let found = find(&fake, "llama", "1").await;
    assert_eq!(found, Err(Error::NoModel("llama".into())));
    assert!(fake.state().requests.is_empty());
}

#[tokio::test]
async fn a_missing_model_is_told_from_a_missing_version() {
    let fake = FakeRegistry::start().await;
    fake.state().token = Some("hush".into());
    let found = find(&fake, "ml.demo.llama", "7").await;
    assert_eq!(found, Err(Error::NoModel("ml.demo.llama".into())));
    says(&fake, "registered-models/get?name=ml.demo.llama", "{}");
    let found = find(&fake, "ml.demo.llama", "7").await;
    assert!(matches!(found, Err(Error::NoVersion { .. })), "{found:?}");
}

#[tokio::test]
async fn a_version_that_is_not_ready_is_refused_before_any_credentials_are_asked_for() {
    let fake = FakeRegistry::start().await;
    let version = r#"{"model_version": {"version": "7", "status": "PENDING_REGISTRATION"}}"#;
    says(
        &fake,
        "model-versions/get?name=ml.demo.llama&version=7",
        version,
    );
    let error = find(&fake, "ml.demo.llama", "7").await.unwrap_err();
    assert!(
        error.to_string().contains("PENDING_REGISTRATION"),
        "{error}"
    );
    assert_eq!(fake.requested("generate-temporary-credentials"), 0);
}

#[cfg(not(feature = "object-stores"))]
#[tokio::test]
async fn a_ready_version_lends_credentials_and_says_which_build_reads_its_store() {
    let fake = FakeRegistry::start().await;
    let asked = "?name=ml.demo.llama&version=7";
    let version = r#"{"model_version": {"version": "7", "status": "READY"}}"#;
    says(&fake, &format!("model-versions/get{asked}"), version);
    let uri = r#"{"artifact_uri": "s3://bucket/models/7"}"#;
    says(
        &fake,
        &format!("model-versions/get-download-uri{asked}"),
        uri,
    );
    let lent = r#"{"credentials": {"aws_temp_credentials": {"access_key_id": "a", "secret_access_key": "s",
                   "session_token": "t"}}}"#;
    says(&fake, "model-versions/generate-temporary-credentials", lent);
    let error = find(&fake, "ml.demo.llama", "7").await.unwrap_err();
    for part in ["s3://bucket/models/7", "--features object-stores"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(fake.requested("generate-temporary-credentials"), 1);
}
