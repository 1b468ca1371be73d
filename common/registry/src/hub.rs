//! The Hugging Face hub: a revision's files with their sizes and digests.

use common::wire::message::RemoteFile;
use serde::Deserialize;

use crate::http::{Http, Refusal};
use crate::{Body, Error, Found, Listing};

/// The hub's address unless told.
pub(crate) const ADDRESS: &str = "https://huggingface.co";
const SCHEME: &str = "hf://";

/// The hub, or a mirror of it.
#[derive(Debug)]
pub(crate) struct Hub {
    pub http: Http,
}

#[derive(Deserialize)]
struct Revision {
    /// The commit.
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    #[serde(default)]
    sha256: Option<String>,
    #[serde(default)]
    size: Option<u64>,
}

impl Hub {
    /// Finds the files of `hf://ID@REVISION`; the listing names the commit, which does not change any more.
    pub(crate) async fn locate(&self, uri: &str) -> Result<Found, Error> {
        let (id, revision) = parse(uri)?;
        // A branch's name may have slashes, which the hub wants encoded.
        let url = self
            .http
            .url_with(&["api/models", id, "revision"], revision);
        let answer: Result<Revision, _> = self.http.get_url(url, &[("blobs", "true")]).await;
        let found = answer.map_err(|refusal| match refusal {
            Refusal::NotFound(message) => Error::Unusable(format!(
                "{message}; the hub has no such model or revision, or does not show it without a token (HF_TOKEN)"
            )),
            refusal => refusal.error(),
        })?;
        if found.sha.is_empty() || !found.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(Error::Unusable(format!(
                "the hub names no commit for {uri}"
            )));
        }
        let file = |sibling: Sibling| RemoteFile {
            path: sibling.rfilename,
            bytes: sibling
                .lfs
                .as_ref()
                .and_then(|lfs| lfs.size)
                .or(sibling.size),
            sha256: sibling.lfs.and_then(|lfs| lfs.sha256),
        };
        let files = found.siblings.into_iter().map(file).collect();
        let uri = format!("{SCHEME}{id}@{}", found.sha);
        Ok(Found::Remote(Listing::new(uri.clone(), &uri, files)?))
    }

    /// Opens a file of a listing.
    pub(crate) async fn open(&self, uri: &str, path: &str, from: u64) -> Result<Body, Error> {
        let (id, commit) = parse(uri)?;
        let url = self.http.url(&[id, "resolve", commit, path]);
        self.http.open(url, from).await
    }
}

fn parse(uri: &str) -> Result<(&str, &str), Error> {
    let parsed = uri
        .strip_prefix(SCHEME)
        .and_then(|rest| rest.rsplit_once('@'))
        .filter(|(id, revision)| !id.is_empty() && !revision.is_empty());
    parsed.ok_or_else(|| Error::Unusable(format!("{uri} is not {SCHEME}ORG/NAME@REVISION")))
}
