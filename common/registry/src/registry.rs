//! One configured registry, of any kind.

use std::path::PathBuf;
use std::time::Duration;

use common::config::{RegistryEntry, RegistryKind};
use common::model_ref::ModelRef;

use crate::auth::{Auth, Variables};
use crate::http::Http;
use crate::hub::{self, Hub};
use crate::mlflow::Mlflow;
use crate::unity::Unity;
use crate::{Body, Environment, Error, Listing, folder};

/// Finding a version takes no longer, however many answers that needs.
const FIND_MAX: Duration = Duration::from_secs(120);

const MLFLOW: Variables = Variables {
    token: "MLFLOW_TRACKING_TOKEN",
    basic: Some(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")),
};
const DATABRICKS: Variables = Variables {
    token: "DATABRICKS_TOKEN",
    basic: None,
};
const HUGGING_FACE: Variables = Variables {
    token: "HF_TOKEN",
    basic: None,
};

/// What was found of a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A folder that every machine sees.
    Folder(PathBuf),
    /// Files to fetch.
    Remote(Listing),
}

/// A registry that models come from.
#[derive(Debug)]
pub struct Registry {
    /// Its name in cluster.toml.
    pub name: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Mlflow(Mlflow),
    Unity(Unity),
    Hub(Hub),
    Folder(PathBuf),
}

impl Registry {
    /// A registry of cluster.toml. Asks nothing yet.
    ///
    /// # Errors
    /// [`Error::Unusable`]: no address, a certificate that cannot be read, a variable that is not set.
    pub fn open(entry: &RegistryEntry, environment: Environment<'_>) -> Result<Registry, Error> {
        let http = |variable: &str, default: Option<&str>, signing: &Variables| {
            let url = entry
                .url
                .clone()
                .or_else(|| environment(variable))
                .or_else(|| default.map(str::to_owned));
            let url = url.ok_or_else(|| {
                Error::Unusable(format!(
                    "registry {} has no url, and {variable} is not set",
                    entry.name
                ))
            })?;
            let auth = Auth::new(&entry.credentials, signing, environment)?;
            let (mut ca_file, mut insecure_tls) = (entry.ca_file.clone(), entry.insecure_tls);
            if entry.kind == RegistryKind::Mlflow {
                ca_file = ca_file
                    .or_else(|| environment("MLFLOW_TRACKING_SERVER_CERT_PATH").map(PathBuf::from));
                insecure_tls |= environment("MLFLOW_TRACKING_INSECURE_TLS")
                    .is_some_and(|value| matches!(value.to_lowercase().as_str(), "1" | "true"));
            }
            Http::new(&entry.name, &url, auth, ca_file, insecure_tls)
        };
        let kind = match &entry.kind {
            RegistryKind::Mlflow => Kind::Mlflow(Mlflow {
                http: http("MLFLOW_TRACKING_URI", None, &MLFLOW)?,
            }),
            RegistryKind::UnityCatalog => Kind::Unity(Unity {
                http: http("DATABRICKS_HOST", None, &DATABRICKS)?,
            }),
            RegistryKind::HuggingFace => Kind::Hub(Hub {
                http: http("HF_ENDPOINT", Some(hub::ADDRESS), &HUGGING_FACE)?,
            }),
            RegistryKind::Folder(path) => Kind::Folder(path.clone()),
        };
        Ok(Registry {
            name: entry.name.clone(),
            kind,
        })
    }

    /// Where it is, for messages.
    pub fn address(&self) -> String {
        match &self.kind {
            Kind::Mlflow(Mlflow { http })
            | Kind::Unity(Unity { http })
            | Kind::Hub(Hub { http }) => http.base.to_string(),
            Kind::Folder(path) => path.display().to_string(),
        }
    }

    /// Finds the files of a registered version.
    ///
    /// # Errors
    /// [`Error`]; the hub knows no models by such names.
    pub async fn find(&self, model: &ModelRef) -> Result<Found, Error> {
        self.in_time(async {
            match &self.kind {
                Kind::Mlflow(mlflow) => mlflow.find(model).await,
                Kind::Unity(unity) => unity.find(model).await,
                Kind::Hub(_) => Err(Error::NoModel(model.name.clone())),
                Kind::Folder(root) => folder::find(root, model),
            }
        })
        .await
    }

    /// Finds the files that a URI of this registry names.
    ///
    /// # Errors
    /// [`Error`]; catalogs and folders know models by name and version alone.
    pub async fn locate(&self, uri: &str) -> Result<Found, Error> {
        self.in_time(async {
            match &self.kind {
                Kind::Mlflow(mlflow) => mlflow.locate(uri).await,
                Kind::Hub(hub) => hub.locate(uri).await,
                Kind::Unity(_) | Kind::Folder(_) => Err(Error::Unusable(format!(
                    "registry {} knows models by name and version, not by {uri}",
                    self.name
                ))),
            }
        })
        .await
    }

    /// Opens a file of a [`Listing`], from the byte `from` on where the source resumes, else from its start.
    ///
    /// # Errors
    /// [`Error`] names the file's address.
    pub async fn read(&self, uri: &str, path: &str, from: u64) -> Result<Body, Error> {
        match &self.kind {
            Kind::Mlflow(mlflow) => mlflow.open(uri, path, from).await,
            Kind::Unity(unity) => unity.open(uri, path, from).await,
            Kind::Hub(hub) => hub.open(uri, path, from).await,
            Kind::Folder(_) => Err(Error::Unusable(format!(
                "registry {} is a folder: nothing is fetched from it",
                self.name
            ))),
        }
    }

    async fn in_time(
        &self,
        finding: impl Future<Output = Result<Found, Error>>,
    ) -> Result<Found, Error> {
        let late = |_| {
            Error::Unavailable(format!(
                "registry {} at {} did not list the model within {} s",
                self.name,
                self.address(),
                FIND_MAX.as_secs()
            ))
        };
        tokio::time::timeout(FIND_MAX, finding)
            .await
            .map_err(late)?
    }
}
