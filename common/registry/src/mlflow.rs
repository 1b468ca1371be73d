//! An MLflow tracking server: registered versions, aliases, runs, logged models, and the files behind its proxy.
//!
//! Files come through the artifact proxy where the server has one. Where it has none, and the folder or object store is
//! not reachable from here, the server is asked to read them itself, as its own web page does.

use common::model_ref::ModelRef;
use common::wire::message::RemoteFile;
use serde::Deserialize;
use serde_json::Value;

use crate::http::{Http, Refusal};
use crate::listing::{DEPTH_MAX, ENTRIES_MAX};
use crate::uri::{Place, Which};
use crate::{Body, Error, Found, Listing, check_path, folder, objects};

const API: &str = "api/2.0/mlflow";
const PROXY: &str = "api/2.0/mlflow-artifacts/artifacts";
/// Most folders of one version.
const FOLDERS_MAX: usize = 256;
/// Most pages of one folder's listing.
const PAGES_MAX: usize = 100;
/// Most versions that a message names.
const VERSIONS_SHOWN: &str = "50";
/// URIs that lead to URIs: an alias to a version to a run to its artifacts.
const HOPS_MAX: usize = 4;

/// A tracking server.
#[derive(Debug)]
pub(crate) struct Mlflow {
    pub http: Http,
}

/// A registered version as the server describes it.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Version {
    #[serde(default, deserialize_with = "text")]
    pub version: String,
    #[serde(default)]
    pub status: Option<String>,
    #[serde(default)]
    pub status_message: Option<String>,
    #[serde(default)]
    source: Option<String>,
    #[serde(default)]
    run_id: Option<String>,
    #[serde(default)]
    model_id: Option<String>,
    #[serde(default, deserialize_with = "text")]
    pub creation_timestamp: String,
}

#[derive(Deserialize)]
pub(crate) struct VersionAnswer {
    #[serde(default)]
    pub model_version: Version,
}

#[derive(Deserialize)]
pub(crate) struct DownloadUri {
    #[serde(default)]
    pub artifact_uri: String,
}

/// Numbers stand as numbers or as texts, by the server's age.
fn text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    })
}

/// How the server is asked for one folder's listing.
struct Level<'a> {
    segments: &'a [&'a str],
    query: Vec<(&'a str, &'a str)>,
    /// The query's key for the folder.
    key: &'a str,
    /// The folder that the whole listing is of.
    root: &'a str,
    /// The proxy lists paths relative to the listed folder, everybody else relative to the store's root.
    relative: bool,
}

impl Mlflow {
    /// Finds a registered version's files.
    pub(crate) async fn find(&self, model: &ModelRef) -> Result<Found, Error> {
        let version = self.version(&model.name, &model.version).await?;
        self.registered(&model.name, version).await
    }

    /// Finds the files that a URI names.
    pub(crate) async fn locate(&self, uri: &str) -> Result<Found, Error> {
        match Place::parse(uri)? {
            Place::Version { name, which } => {
                let version = match which {
                    Which::Number(number) => self.version(&name, &number).await?,
                    Which::Alias(alias) => self.alias(&name, &alias).await?,
                };
                self.registered(&name, version).await
            }
            place => self.place(place, uri, "", None).await,
        }
    }

    /// Opens a file of a listing.
    pub(crate) async fn open(&self, uri: &str, path: &str, from: u64) -> Result<Body, Error> {
        let mut http = self.http.clone();
        let url = match Place::parse(uri)? {
            Place::Proxy { host, path: root } => {
                http = self.proxy(host.as_deref())?;
                http.url(&[PROXY, &join(&root, path)])
            }
            Place::Run { run, path: root } => {
                let mut url = self.http.url(&["get-artifact"]);
                url.query_pairs_mut()
                    .append_pair("run_uuid", &run)
                    .append_pair("path", &join(&root, path));
                url
            }
            Place::Logged(id) => {
                let mut url =
                    self.http
                        .url(&["ajax-api/2.0/mlflow/logged-models", &id, "artifacts/files"]);
                url.query_pairs_mut()
                    .append_pair("artifact_file_path", path);
                url
            }
            Place::Objects(uri) => {
                return objects::Store::open(&uri, None)?.read(path, from).await;
            }
            Place::Folder(_) | Place::Version { .. } => {
                return Err(Error::Unusable(format!("{uri} is not where files are")));
            }
        };
        http.open(url, from).await
    }

    async fn version(&self, name: &str, number: &str) -> Result<Version, Error> {
        let query = [("name", name), ("version", number)];
        let answer: Result<VersionAnswer, _> =
            self.http.get(&[API, "model-versions/get"], &query).await;
        match answer {
            Ok(answer) => Ok(answer.model_version),
            Err(Refusal::NotFound(_)) => Err(self.missing(name, number).await),
            Err(refusal) => Err(refusal.error()),
        }
    }

    /// What a 404 on a version means: no such model, or no such version of it.
    async fn missing(&self, name: &str, number: &str) -> Error {
        #[derive(Deserialize)]
        struct Versions {
            #[serde(default)]
            model_versions: Vec<Version>,
        }
        let known: Result<Value, _> = self
            .http
            .get(&[API, "registered-models/get"], &[("name", name)])
            .await;
        match known {
            Err(Refusal::NotFound(_)) => return Error::NoModel(name.to_owned()),
            Err(refusal) => return refusal.error(),
            Ok(_) => {}
        }
        // A model's name has no quotes.
        let filter = format!("name='{name}'");
        let query = [("filter", filter.as_str()), ("max_results", VERSIONS_SHOWN)];
        let versions: Result<Versions, _> =
            self.http.get(&[API, "model-versions/search"], &query).await;
        let mut known: Vec<String> = match versions {
            Ok(versions) => versions
                .model_versions
                .into_iter()
                .map(|v| v.version)
                .collect(),
            Err(_) => Vec::new(),
        };
        known.sort_by_key(|version| version.parse::<u64>().unwrap_or(u64::MAX));
        Error::NoVersion {
            name: name.to_owned(),
            version: number.to_owned(),
            known,
        }
    }

    async fn alias(&self, name: &str, alias: &str) -> Result<Version, Error> {
        let query = [("name", name), ("alias", alias)];
        let answer: Result<VersionAnswer, _> = self
            .http
            .get(&[API, "registered-models/alias"], &query)
            .await;
        answer
            .map(|answer| answer.model_version)
            .map_err(Refusal::error)
    }

    async fn registered(&self, name: &str, version: Version) -> Result<Found, Error> {
        ready(name, &version)?;
        let query = [("name", name), ("version", version.version.as_str())];
        let answer: Result<DownloadUri, _> = self
            .http
            .get(&[API, "model-versions/get-download-uri"], &query)
            .await;
        let uri = answer.map_err(Refusal::error)?.artifact_uri;
        let stamp = format!("{name} {} {}", version.version, version.creation_timestamp);
        let place = Place::parse(&uri)?;
        self.place(place, &uri, &stamp, Some(&version)).await
    }

    /// Lists what is at a place, following it to where the files are.
    async fn place(
        &self,
        mut place: Place,
        uri: &str,
        stamp: &str,
        version: Option<&Version>,
    ) -> Result<Found, Error> {
        let mut uri = uri.to_owned();
        // Where the server itself can read them, when nobody else can.
        let mut through = version.and_then(through_the_server);
        for _ in 0..HOPS_MAX {
            match &place {
                Place::Proxy { host, path } => {
                    let listed = self.list_proxy(host.as_deref(), path).await;
                    let files = match (listed, through.take()) {
                        // The server does not proxy artifacts.
                        (Err(Refusal::NotFound(_)), Some(other)) => {
                            return self.list_through(&other, stamp).await;
                        }
                        (listed, _) => listed.map_err(Refusal::error)?,
                    };
                    return not_empty(Listing::new(uri, stamp, files)?);
                }
                Place::Folder(path) => {
                    return match (folder::model_at(path), through) {
                        (Ok(found), _) => Ok(found),
                        (Err(_), Some(other)) => self.list_through(&other, stamp).await,
                        (Err(error), None) => Err(error),
                    };
                }
                Place::Objects(_) => {
                    let listed = match objects::Store::open(&uri, None) {
                        Ok(store) => store.list().await,
                        Err(error) => Err(error),
                    };
                    return match (listed, through) {
                        (Ok(files), _) => not_empty(Listing::new(uri, stamp, files)?),
                        (Err(_), Some(other)) => self.list_through(&other, stamp).await,
                        (Err(error), None) => Err(error),
                    };
                }
                Place::Run { run, path } => {
                    through.get_or_insert_with(|| place.clone());
                    uri = join(&self.run_root(run).await?, path);
                }
                Place::Logged(id) => {
                    through.get_or_insert_with(|| place.clone());
                    uri = self.logged_root(id).await?;
                }
                Place::Version { name, which } => {
                    let version = match which {
                        Which::Number(number) => self.version(name, number).await?,
                        Which::Alias(alias) => self.alias(name, alias).await?,
                    };
                    through = through.or_else(|| through_the_server(&version));
                    uri = version.source.unwrap_or_default();
                }
            }
            place = Place::parse(&uri)?;
        }
        Err(Error::Unusable(format!(
            "the registry leads from one URI to the next and to no files; the last was {uri}"
        )))
    }

    async fn list_through(&self, place: &Place, stamp: &str) -> Result<Found, Error> {
        let (uri, files) = match place {
            Place::Run { run, path } => (format!("runs:/{run}/{path}"), self.list_run(run, path)),
            Place::Logged(id) => return self.list_logged(id, stamp).await,
            _ => return Err(Error::Unusable("the server reads no such artifacts".into())),
        };
        let files = files.await.map_err(Refusal::error)?;
        not_empty(Listing::new(uri, stamp, files)?)
    }

    async fn list_proxy(&self, host: Option<&str>, path: &str) -> Result<Vec<RemoteFile>, Refusal> {
        let level = Level {
            segments: &[PROXY],
            query: Vec::new(),
            key: "path",
            root: path,
            relative: true,
        };
        self.walk(&self.proxy(host)?, level).await
    }

    async fn list_run(&self, run: &str, path: &str) -> Result<Vec<RemoteFile>, Refusal> {
        let level = Level {
            segments: &[API, "artifacts/list"],
            query: vec![("run_id", run)],
            key: "path",
            root: path,
            relative: false,
        };
        self.walk(&self.http, level).await
    }

    async fn list_logged(&self, id: &str, stamp: &str) -> Result<Found, Error> {
        let level = Level {
            segments: &[API, "logged-models", id, "artifacts/directories"],
            query: Vec::new(),
            key: "artifact_directory_path",
            root: "",
            relative: false,
        };
        let files = self.walk(&self.http, level).await.map_err(Refusal::error)?;
        not_empty(Listing::new(format!("models:/{id}"), stamp, files)?)
    }

    /// Lists a folder and those in it, level by level.
    async fn walk(&self, http: &Http, level: Level<'_>) -> Result<Vec<RemoteFile>, Refusal> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            path: String,
            #[serde(default)]
            is_dir: bool,
            #[serde(default, deserialize_with = "text")]
            file_size: String,
        }
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            files: Vec<Entry>,
            #[serde(default)]
            next_page_token: Option<String>,
        }
        let hostile = |reason: String| {
            let url = http.url(level.segments);
            Error::Unusable(format!("the listing of {} at {url} {reason}", level.root))
        };
        let (mut files, mut folders) = (Vec::new(), vec![String::new()]);
        let mut next = 0;
        while let Some(folder) = folders.get(next).cloned() {
            next += 1;
            let asked = join(level.root, &folder);
            let mut token: Option<String> = None;
            for page in 0.. {
                if page >= PAGES_MAX {
                    return Err(hostile(format!("has more than {PAGES_MAX} pages")).into());
                }
                let mut query = level.query.clone();
                if !asked.is_empty() {
                    query.push((level.key, &asked));
                }
                query.extend(token.as_deref().map(|token| ("page_token", token)));
                let answer: Page = http.get(level.segments, &query).await?;
                for entry in answer.files {
                    let inside = if level.relative {
                        Some(join(&folder, &entry.path))
                    } else {
                        below(level.root, &entry.path).map(str::to_owned)
                    };
                    let path = inside.unwrap_or_else(|| entry.path.clone());
                    check_path(&path).map_err(&hostile)?;
                    if below(&folder, &path).is_none() {
                        let reason = format!("of {folder} names {path}, which is not in it");
                        return Err(hostile(reason).into());
                    }
                    if entry.is_dir {
                        folders.push(path);
                    } else {
                        files.push(RemoteFile {
                            path,
                            bytes: entry.file_size.parse().ok(),
                            sha256: None,
                        });
                    }
                    if folders.len() > FOLDERS_MAX || files.len() > ENTRIES_MAX {
                        let reason = format!(
                            "has more than {FOLDERS_MAX} folders of depth {DEPTH_MAX} or {ENTRIES_MAX} files"
                        );
                        return Err(hostile(reason).into());
                    }
                }
                token = answer.next_page_token.filter(|token| !token.is_empty());
                if token.is_none() {
                    break;
                }
            }
        }
        Ok(files)
    }

    /// The proxy at the server itself or at another host, which gets no secrets.
    fn proxy(&self, host: Option<&str>) -> Result<Http, Error> {
        match host {
            None => Ok(self.http.clone()),
            Some(host) => self.http.at_host(host),
        }
    }

    async fn run_root(&self, run: &str) -> Result<String, Error> {
        let answer: Result<Value, _> = self.http.get(&[API, "runs/get"], &[("run_id", run)]).await;
        let answer = answer.map_err(Refusal::error)?;
        let uri = answer.pointer("/run/info/artifact_uri");
        artifact_uri(uri, "run", run)
    }

    async fn logged_root(&self, id: &str) -> Result<String, Error> {
        let answer: Result<Value, _> = self.http.get(&[API, "logged-models", id], &[]).await;
        let answer = answer.map_err(Refusal::error)?;
        artifact_uri(
            answer.pointer("/model/info/artifact_uri"),
            "logged model",
            id,
        )
    }
}

fn artifact_uri(uri: Option<&Value>, what: &str, id: &str) -> Result<String, Error> {
    let uri = uri.and_then(Value::as_str).filter(|uri| !uri.is_empty());
    uri.map(str::to_owned).ok_or_else(|| {
        Error::Unusable(format!(
            "the registry does not say where {what} {id} has its artifacts"
        ))
    })
}

/// The version can be read.
pub(crate) fn ready(name: &str, version: &Version) -> Result<(), Error> {
    let status = version.status.as_deref().unwrap_or("READY");
    if status == "READY" {
        return Ok(());
    }
    let said = version
        .status_message
        .as_deref()
        .filter(|said| !said.is_empty())
        .map(|said| format!(" ({said})"))
        .unwrap_or_default();
    let help = match status {
        "PENDING_REGISTRATION" => "wait until the registry says READY",
        _ => "register the model again, and serve that version",
    };
    Err(Error::Unusable(format!(
        "version {} of registered model '{name}' is {status}{said}; {help}",
        version.version
    )))
}

/// Where the server can read a version's files for its clients.
fn through_the_server(version: &Version) -> Option<Place> {
    let source = version.source.as_deref().unwrap_or_default();
    if let Ok(place @ (Place::Logged(_) | Place::Run { .. })) = Place::parse(source) {
        return Some(place);
    }
    if let Some(id) = version.model_id.as_deref().filter(|id| !id.is_empty()) {
        return Some(Place::Logged(id.to_owned()));
    }
    // A run's artifacts are at .../RUN/artifacts/PATH.
    let run = version.run_id.as_deref().filter(|run| !run.is_empty())?;
    let (_, path) = source.split_once(&format!("/{run}/artifacts/"))?;
    Some(Place::Run {
        run: run.to_owned(),
        path: path.trim_matches('/').to_owned(),
    })
}

fn not_empty(listing: Listing) -> Result<Found, Error> {
    if listing.files.is_empty() {
        return Err(Error::Unusable(format!(
            "there are no files at {}; log the model again",
            listing.uri
        )));
    }
    Ok(Found::Remote(listing))
}

/// `a/b`, where either may be empty.
fn join(a: &str, b: &str) -> String {
    match (a, b) {
        ("", path) | (path, "") => path.to_owned(),
        (a, b) => format!("{}/{b}", a.trim_end_matches('/')),
    }
}

/// The rest of a path below a folder.
fn below<'a>(folder: &str, path: &'a str) -> Option<&'a str> {
    if folder.is_empty() {
        return Some(path);
    }
    path.strip_prefix(folder)?.strip_prefix('/')
}
