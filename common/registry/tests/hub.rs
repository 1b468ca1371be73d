//! The Hugging Face hub, played by the test.

use std::collections::BTreeMap;

use cluster_tests::fake_registry::FakeRegistry;
use common::config::{RegistryEntry, RegistryKind};
use common::model_ref::ModelRef;
use registry::{Error, Found, Registry};

fn open(fake: &FakeRegistry) -> Registry {
    let entry = RegistryEntry::new("huggingface", RegistryKind::HuggingFace);
    let url = fake.url.clone();
    let environment = move |name: &str| match name {
        "HF_ENDPOINT" => Some(url.clone()),
        "HF_TOKEN" => Some("hush".to_owned()),
        _ => None,
    };
    Registry::open(&entry, &environment).unwrap()
}

#[tokio::test]
async fn a_revision_is_listed_with_its_commit_sizes_and_digests() {
    let fake = FakeRegistry::start().await;
    fake.state().token = Some("hush".into());
    let files = BTreeMap::from([
        ("config.json".to_owned(), vec![1; 5]),
        ("w".into(), vec![2; 9]),
    ]);
    fake.register("org/name", 1, files);
    let key = ("org/name".to_owned(), "1".to_owned());
    let sha256 = "ab".repeat(32);
    let digests = BTreeMap::from([("w".to_owned(), sha256.clone())]);
    fake.state().versions.get_mut(&key).unwrap().sha256 = digests;
    let registry = open(&fake);
    let Ok(Found::Remote(listing)) = registry.locate("hf://org/name@feature/x").await else {
        panic!("files to fetch");
    };
    assert!(fake.state().requests[0].ends_with("/revision/feature/x?blobs=true"));
    assert_eq!(listing.uri, "hf://org/name@c0ffee");
    assert_eq!(listing.file("w").unwrap().sha256, Some(sha256));
    assert_eq!(listing.file("config.json").unwrap().bytes, Some(5));
    let mut body = registry.read(&listing.uri, "w", 4).await.unwrap();
    assert_eq!((body.from, body.bytes), (4, Some(9)));
    assert_eq!(body.next().await.unwrap().unwrap(), vec![2; 5]);
}

#[tokio::test]
async fn what_the_hub_does_not_show_says_why_that_may_be() {
    let fake = FakeRegistry::start().await;
    let registry = open(&fake);
    let error = registry.locate("hf://org/gone@main").await.unwrap_err();
    assert!(
        error.to_string().contains("without a token (HF_TOKEN)"),
        "{error}"
    );
    let by_name = registry.find(&ModelRef::new("m", "1").unwrap()).await;
    assert_eq!(by_name, Err(Error::NoModel("m".into())));
}
