//! Databricks' Unity Catalog: the same verbs as MLflow's under another path; files come from the cloud's storage with
//! credentials that the catalog lends for an hour.

use common::model_ref::ModelRef;
use serde::Deserialize;
use serde_json::json;

use crate::http::{Http, Refusal};
use crate::mlflow::{DownloadUri, VersionAnswer, ready};
use crate::objects::{Lent, Store};
use crate::uri::{Place, Which};
use crate::{Body, Error, Found, Listing};

const API: &str = "api/2.0/mlflow/unity-catalog";

/// A workspace's catalog.
#[derive(Debug)]
pub(crate) struct Unity {
    pub http: Http,
}

impl Unity {
    /// Finds a registered version's files.
    pub(crate) async fn find(&self, model: &ModelRef) -> Result<Found, Error> {
        if model.name.split('.').count() != 3 {
            return Err(Error::NoModel(model.name.clone()));
        }
        let query = [("name", model.name.as_str()), ("version", &model.version)];
        let answer: Result<VersionAnswer, _> =
            self.http.get(&[API, "model-versions/get"], &query).await;
        let version = match answer {
            Ok(answer) => answer.model_version,
            Err(Refusal::NotFound(_)) => return Err(self.missing(model).await),
            Err(refusal) => return Err(refusal.error()),
        };
        ready(&model.name, &version)?;
        let store = self.store(&model.name, &model.version).await?;
        let files = store.list().await?;
        let uri = format!("models:/{}/{}", model.name, model.version);
        let stamp = format!("{uri} {}", version.creation_timestamp);
        Ok(Found::Remote(Listing::new(uri, &stamp, files)?))
    }

    /// Opens a file of a listing.
    pub(crate) async fn open(&self, uri: &str, path: &str, from: u64) -> Result<Body, Error> {
        let Place::Version {
            name,
            which: Which::Number(version),
        } = Place::parse(uri)?
        else {
            return Err(Error::Unusable(format!(
                "{uri} is not models:/NAME/VERSION"
            )));
        };
        self.store(&name, &version).await?.read(path, from).await
    }

    async fn missing(&self, model: &ModelRef) -> Error {
        let query = [("name", model.name.as_str())];
        let known: Result<serde_json::Value, _> =
            self.http.get(&[API, "registered-models/get"], &query).await;
        match known {
            Ok(_) => Error::NoVersion {
                name: model.name.clone(),
                version: model.version.clone(),
                known: Vec::new(),
            },
            Err(Refusal::NotFound(_)) => Error::NoModel(model.name.clone()),
            Err(refusal) => refusal.error(),
        }
    }

    /// The storage of a version, with credentials lent for it.
    async fn store(&self, name: &str, version: &str) -> Result<Store, Error> {
        #[derive(Deserialize)]
        struct Answer {
            credentials: Lent,
        }
        let query = [("name", name), ("version", version)];
        let uri: Result<DownloadUri, _> = self
            .http
            .get(&[API, "model-versions/get-download-uri"], &query)
            .await;
        let uri = uri.map_err(Refusal::error)?.artifact_uri;
        let body =
            json!({"name": name, "version": version, "operation": "MODEL_VERSION_OPERATION_READ"});
        let lent: Result<Answer, _> = self
            .http
            .post(
                &[API, "model-versions/generate-temporary-credentials"],
                &body,
            )
            .await;
        let lent = lent.map_err(Refusal::error)?.credentials;
        Store::open(&uri, Some(lent))
    }
}
