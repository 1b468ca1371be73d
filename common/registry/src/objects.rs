//! Object stores of clouds: files under a prefix of a bucket. In builds with the feature `object-stores`; others say so.

use serde::Deserialize;

/// Credentials that a catalog lends, as Databricks writes them.
#[derive(Deserialize)]
#[cfg_attr(
    not(feature = "object-stores"),
    expect(dead_code, reason = "used with object stores")
)]
pub(crate) struct Lent {
    #[serde(default)]
    pub aws_temp_credentials: Option<Aws>,
    #[serde(default)]
    pub azure_user_delegation_sas: Option<Azure>,
    #[serde(default)]
    pub gcp_oauth_token: Option<Gcp>,
}

#[derive(Deserialize)]
#[cfg_attr(
    not(feature = "object-stores"),
    expect(dead_code, reason = "used with object stores")
)]
pub(crate) struct Aws {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: String,
}

#[derive(Deserialize)]
#[cfg_attr(
    not(feature = "object-stores"),
    expect(dead_code, reason = "used with object stores")
)]
pub(crate) struct Azure {
    pub sas_token: String,
}

#[derive(Deserialize)]
#[cfg_attr(
    not(feature = "object-stores"),
    expect(dead_code, reason = "used with object stores")
)]
pub(crate) struct Gcp {
    pub oauth_token: String,
}

#[cfg(not(feature = "object-stores"))]
pub(crate) use without::Store;

#[cfg(not(feature = "object-stores"))]
mod without {
    use common::wire::message::RemoteFile;

    use super::Lent;
    use crate::{Body, Error};

    /// Cannot be opened in this build.
    pub(crate) enum Store {}

    impl Store {
        pub(crate) fn open(uri: &str, _: Option<Lent>) -> Result<Store, Error> {
            Err(Error::Unusable(format!(
                "the artifacts are at {uri}, and this build reads no object stores: build coordinator and worker with \
                 --features object-stores, or let the tracking server proxy artifacts (mlflow server \
                 --artifacts-destination)"
            )))
        }

        pub(crate) async fn list(&self) -> Result<Vec<RemoteFile>, Error> {
            match *self {}
        }

        pub(crate) async fn read(&self, _: &str, _: u64) -> Result<Body, Error> {
            match *self {}
        }
    }
}

#[cfg(feature = "object-stores")]
pub(crate) use with::Store;

#[cfg(feature = "object-stores")]
mod with {
    use std::sync::Arc;

    use common::wire::message::RemoteFile;
    use futures::{StreamExt, TryStreamExt};
    use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder};
    use object_store::path::Path;
    use object_store::{GetOptions, GetRange, ObjectStore, StaticCredentialProvider};
    use url::Url;

    use super::Lent;
    use crate::listing::ENTRIES_MAX;
    use crate::{Body, Error};

    /// A prefix of a bucket.
    pub(crate) struct Store {
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        uri: String,
    }

    impl Store {
        /// Opens a bucket, with lent credentials or those of the environment.
        pub(crate) fn open(uri: &str, lent: Option<Lent>) -> Result<Store, Error> {
            crate::http::install_provider();
            let url = url(uri)?;
            let failed = |e| failed(uri, &e);
            let environment = || std::env::vars().collect::<Vec<_>>();
            let options = match &lent {
                Some(lent) => options(lent),
                None => environment(),
            };
            let (store, prefix) = object_store::parse_url_opts(&url, options).map_err(failed)?;
            let mut store: Arc<dyn ObjectStore> = Arc::from(store);
            if let Some(token) = lent.and_then(|lent| lent.gcp_oauth_token) {
                let bearer = token.oauth_token;
                let credentials = StaticCredentialProvider::new(GcpCredential { bearer });
                let google = GoogleCloudStorageBuilder::new()
                    .with_url(url.to_string())
                    .with_credentials(Arc::new(credentials));
                store = Arc::new(google.build().map_err(failed)?);
            }
            Ok(Store {
                store,
                prefix,
                uri: uri.to_owned(),
            })
        }

        /// All files under the prefix.
        pub(crate) async fn list(&self) -> Result<Vec<RemoteFile>, Error> {
            let mut files = Vec::new();
            let mut found = self.store.list(Some(&self.prefix));
            while let Some(meta) = found.try_next().await.map_err(|e| failed(&self.uri, &e))? {
                let Some(parts) = meta.location.prefix_match(&self.prefix) else {
                    continue;
                };
                let path: Vec<_> = parts.map(|part| part.as_ref().to_owned()).collect();
                files.push(RemoteFile {
                    path: path.join("/"),
                    bytes: Some(meta.size),
                    sha256: None,
                });
                if files.len() > ENTRIES_MAX {
                    return Err(Error::Unusable(format!(
                        "{} has more than {ENTRIES_MAX} files",
                        self.uri
                    )));
                }
            }
            Ok(files)
        }

        /// A file, from the byte `from` on.
        pub(crate) async fn read(&self, path: &str, from: u64) -> Result<Body, Error> {
            let uri = format!("{}/{path}", self.uri);
            let location = path
                .split('/')
                .fold(self.prefix.clone(), |path, part| path.join(part));
            let options = GetOptions {
                range: (from > 0).then_some(GetRange::Offset(from)),
                ..GetOptions::default()
            };
            let found = self.store.get_opts(&location, options).await;
            let found = found.map_err(|e| failed(&uri, &e))?;
            let (from, bytes) = (found.range.start, found.meta.size);
            let chunks = found
                .into_stream()
                .map(move |chunk| chunk.map_err(|e| failed(&uri, &e)));
            Ok(Body::new(from, Some(bytes), chunks.boxed()))
        }
    }

    fn failed(uri: &str, error: &object_store::Error) -> Error {
        use object_store::Error as Cause;
        let message = format!("{uri}: {error}");
        match error {
            Cause::Generic { .. } | Cause::JoinError { .. } => Error::Unavailable(message),
            _ => Error::Unusable(message),
        }
    }

    /// The address as the stores' own clients write it. Hadoop's words for Azure's stores stand for others.
    fn url(uri: &str) -> Result<Url, Error> {
        let azure = |rest: &str| {
            let rest = rest.replacen(".blob.core.windows.net", ".dfs.core.windows.net", 1);
            format!("abfss://{rest}")
        };
        let text = match uri.split_once("://") {
            Some(("wasb" | "wasbs", rest)) => azure(rest),
            _ => uri.to_owned(),
        };
        Url::parse(&text).map_err(|e| Error::Unusable(format!("{uri} is no address: {e}")))
    }

    fn options(lent: &Lent) -> Vec<(String, String)> {
        let mut options = Vec::new();
        let mut add = |key: &str, value: &str| options.push((key.to_owned(), value.to_owned()));
        if let Some(aws) = &lent.aws_temp_credentials {
            add("aws_access_key_id", &aws.access_key_id);
            add("aws_secret_access_key", &aws.secret_access_key);
            add("aws_session_token", &aws.session_token);
        }
        if let Some(azure) = &lent.azure_user_delegation_sas {
            add("azure_storage_sas_token", &azure.sas_token);
        }
        // Where a bucket is is no secret: the machine's own word.
        for name in ["AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"] {
            if let Some(value) = crate::environment(name) {
                add(name, &value);
            }
        }
        options
    }

    #[cfg(test)]
    mod tests {
        use object_store::ObjectStoreExt;
        use object_store::memory::InMemory;

        use super::*;

        #[tokio::test]
        async fn files_below_the_prefix_are_listed_and_read_from_any_byte() {
            let store = InMemory::new();
            for path in ["m/1/MLmodel", "m/1/model/w", "m/10/other"] {
                store
                    .put(&Path::from(path), vec![1, 2, 3].into())
                    .await
                    .unwrap();
            }
            let store = Store {
                store: Arc::new(store),
                prefix: Path::from("m/1"),
                uri: "memory:///m/1".into(),
            };
            let mut paths: Vec<_> = store
                .list()
                .await
                .unwrap()
                .into_iter()
                .map(|f| f.path)
                .collect();
            paths.sort();
            assert_eq!(paths, ["MLmodel", "model/w"]);
            let mut body = store.read("model/w", 1).await.unwrap();
            assert_eq!((body.from, body.bytes), (1, Some(3)));
            assert_eq!(body.next().await.unwrap().unwrap()[..], [2, 3]);
            let gone = store.read("gone", 0).await.err().unwrap();
            assert!(
                matches!(&gone, Error::Unusable(m) if m.contains("m/1/gone")),
                "{gone}"
            );
        }

        #[test]
        fn azures_older_words_are_understood() {
            let url = url("wasbs://box@account.blob.core.windows.net/a/b").unwrap();
            assert_eq!(url.as_str(), "abfss://box@account.dfs.core.windows.net/a/b");
            assert!(Store::open("s3://bucket/a", None).is_ok());
        }
    }
}
