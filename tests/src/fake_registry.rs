//! A registry that is played by the test: MLflow's REST and the hub's, on loopback, with the faults that a test wants.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 64 << 10;
const PROXY: &str = "/api/2.0/mlflow-artifacts/artifacts";
const MLFLOW: &str = "/api/2.0/mlflow/";

/// A running registry. It ends when it is dropped.
pub struct FakeRegistry {
    /// Where it listens, `http://127.0.0.1:PORT`.
    pub url: String,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

/// What it has and how it behaves.
#[derive(Default)]
pub struct State {
    /// By name and version.
    pub versions: BTreeMap<(String, String), Version>,
    /// The token it asks for, if any.
    pub token: Option<String>,
    /// Whether it goes on in the middle of a file.
    pub resumes: bool,
    /// Answers that are not what they should be, first come first served.
    pub faults: Vec<Fault>,
    /// Every request: its method and its decoded address, with `from N` when it asked for a part.
    pub requests: Vec<String>,
}

/// A version of a model.
#[derive(Clone, Default)]
pub struct Version {
    /// Paths and contents.
    pub files: BTreeMap<String, Vec<u8>>,
    /// SHA-256 of files, as the hub tells them.
    pub sha256: BTreeMap<String, String>,
    /// Its status, READY unless told.
    pub status: Option<String>,
    /// Where its files are, unless behind the proxy.
    pub artifact_uri: Option<String>,
}

/// What is wrong with some answers.
#[derive(Clone)]
pub struct Fault {
    /// Requests whose address ends so.
    pub at: String,
    /// Of so many answers.
    pub times: usize,
    /// What is wrong.
    pub what: Wrong,
}

/// Kinds of [`Fault`].
#[derive(Clone)]
pub enum Wrong {
    /// The connection breaks after so many bytes of the body.
    BreaksAfter(usize),
    /// Another status, with this body.
    Status(u16, String),
    /// Another body.
    Body(Vec<u8>),
}

struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// So much of the body is sent.
    sent: usize,
}

impl FakeRegistry {
    /// Starts an empty registry.
    pub async fn start() -> FakeRegistry {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(State {
            resumes: true,
            ..State::default()
        }));
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, shared.clone()));
            }
        });
        FakeRegistry {
            url: format!("http://{address}"),
            state,
            task,
        }
    }

    /// What it has; to be looked at and changed.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with it")
    }

    /// Registers a version with these files.
    pub fn register(&self, name: &str, version: u32, files: BTreeMap<String, Vec<u8>>) {
        let registered = Version {
            files,
            ..Version::default()
        };
        let key = (name.to_owned(), version.to_string());
        self.state().versions.insert(key, registered);
    }

    /// Makes some answers wrong.
    pub fn fault(&self, at: &str, times: usize, what: Wrong) {
        let at = at.to_owned();
        self.state().faults.push(Fault { at, times, what });
    }

    /// How many requests had an address that ends so.
    pub fn requested(&self, end: &str) -> usize {
        let state = self.state();
        state.requests.iter().filter(|r| r.ends_with(end)).count()
    }

    /// The lines of cluster.toml that make it a registry of this kind.
    pub fn toml(&self, kind: &str) -> String {
        let url = &self.url;
        format!("[[registries]]\nname = \"fake\"\nkind = \"{kind}\"\nurl = \"{url}\"\n")
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A plain Hugging Face folder as MLflow logs it today.
pub fn logged(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mlmodel = "flavors:\n  transformers:\n    task: text-generation\n    inference_task: llm/v1/completions\n    \
                   model_binary: model\n    components:\n    - tokenizer\n    pipeline_model_type: LlamaForCausalLM\n\
                   metadata:\n  task: llm/v1/completions\n";
    let mut files = BTreeMap::from([
        ("MLmodel".to_owned(), mlmodel.as_bytes().to_vec()),
        ("conda.yaml".to_owned(), b"name: x\n".to_vec()),
        ("model/pytorch_model.bin".to_owned(), vec![0; 1000]),
    ]);
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("a readable folder").path();
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.expect("a name of UTF-8").to_owned();
        let part = match name.contains("token") {
            true => "components/tokenizer",
            false => "model",
        };
        if path.is_file() {
            let bytes = std::fs::read(&path).expect("a readable file");
            files.insert(format!("{part}/{name}"), bytes);
        }
    }
    files
}

async fn serve(mut socket: TcpStream, state: Arc<Mutex<State>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match socket.read(&mut byte).await {
            Ok(1) if head.len() < HEAD_BYTES_MAX => head.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    // A body is read and not looked at: closing over unread bytes would break the answer.
    let length = header(&head, "content-length").and_then(|length| length.parse().ok());
    let mut body = vec![0; length.unwrap_or(0usize).min(HEAD_BYTES_MAX)];
    if socket.read_exact(&mut body).await.is_err() {
        return;
    }
    let answer = {
        let mut state = state.lock().expect("no test panics with it");
        state.answer(&head)
    };
    let (status, length) = (answer.status, answer.body.len());
    let start = format!(
        "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{}\r\n",
        answer.headers
    );
    // The other side may have gone.
    let _ = socket.write_all(start.as_bytes()).await;
    let _ = socket.write_all(&answer.body[..answer.sent]).await;
    let _ = socket.shutdown().await;
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name)
            .then(|| value.trim().to_owned())
    })
}

impl State {
    fn answer(&mut self, head: &str) -> Answer {
        let mut words = head.split_whitespace();
        let (method, address) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let address = decoded(address);
        let header = |name: &str| header(head, name);
        let from = header("range")
            .and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse()
                    .ok()
            })
            .unwrap_or(0usize);
        let part = match from {
            0 => String::new(),
            from => format!(" from {from}"),
        };
        self.requests.push(format!("{method} {address}{part}"));
        let expected = self.token.as_ref().map(|token| format!("Bearer {token}"));
        if expected.is_some() && header("authorization") != expected {
            return error(401, "UNAUTHENTICATED", "no valid token");
        }
        let mut answer = match self.found(&address) {
            Some(Content::File(bytes)) if from > 0 && self.resumes => part_of(&bytes, from),
            Some(Content::File(bytes)) => whole(bytes),
            Some(Content::Json(value)) => whole(value.to_string().into_bytes()),
            None => error(
                404,
                "RESOURCE_DOES_NOT_EXIST",
                &format!("no {address} here"),
            ),
        };
        let fault = self
            .faults
            .iter_mut()
            .find(|fault| fault.times > 0 && address.ends_with(&fault.at));
        if let Some(fault) = fault {
            fault.times -= 1;
            match &fault.what {
                Wrong::BreaksAfter(bytes) => answer.sent = answer.sent.min(*bytes),
                Wrong::Status(status, body) => {
                    answer = whole(body.clone().into_bytes());
                    answer.status = *status;
                }
                Wrong::Body(body) => answer = whole(body.clone()),
            }
        }
        answer
    }

    fn found(&self, address: &str) -> Option<Content> {
        let (path, query) = address.split_once('?').unwrap_or((address, ""));
        let value = |key: &str| {
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs
                .filter(|(name, _)| *name == key)
                .map(|(_, v)| v)
                .next()
        };
        if let Some(file) = path.strip_prefix(PROXY) {
            return match file.trim_matches('/') {
                "" => self.listing(value("path")?),
                file => self.file(file),
            };
        }
        if let Some(verb) = path.strip_prefix(MLFLOW) {
            let filter = || value("filter")?.strip_prefix("name='")?.strip_suffix('\'');
            let name = value("name").or_else(filter)?;
            return self.verb(verb, name, value("version"), value("alias"));
        }
        if let Some(rest) = path.strip_prefix("/api/models/") {
            return self.revision(rest.split_once("/revision/")?.0);
        }
        let (id, rest) = path.trim_matches('/').split_once("/resolve/")?;
        let (_, file) = rest.split_once('/')?;
        let bytes = self.version(id, "1")?.files.get(file)?;
        Some(Content::File(bytes.clone()))
    }

    fn version(&self, name: &str, version: &str) -> Option<&Version> {
        self.versions.get(&(name.to_owned(), version.to_owned()))
    }

    /// MLflow's registry. An alias is a version's number with an `a` before it.
    fn verb(
        &self,
        verb: &str,
        name: &str,
        version: Option<&str>,
        alias: Option<&str>,
    ) -> Option<Content> {
        let named = self.versions.keys().filter(|(known, _)| known == name);
        let described = |number: &str| {
            let status = self.version(name, number)?.status.as_deref();
            Some(json!({
                "name": name, "version": number, "status": status.unwrap_or("READY"), "run_id": "run",
                "creation_timestamp": 1_700_000_000_000u64, "source": root(name, number)
            }))
        };
        Some(Content::Json(match verb {
            "model-versions/get" => json!({"model_version": described(version?)?}),
            "registered-models/alias" => {
                json!({"model_version": described(alias?.strip_prefix('a')?)?})
            }
            "model-versions/get-download-uri" => {
                let uri = self.version(name, version?)?.artifact_uri.clone();
                json!({"artifact_uri": uri.unwrap_or_else(|| root(name, version.unwrap_or_default()))})
            }
            "model-versions/search" => {
                let known: Option<Vec<Value>> = named.map(|(_, v)| described(v)).collect();
                json!({"model_versions": known?})
            }
            "registered-models/get" => {
                named.clone().next()?;
                json!({"registered_model": {"name": name}})
            }
            _ => return None,
        }))
    }

    /// One level of the proxy's listing.
    fn listing(&self, path: &str) -> Option<Content> {
        let mut entries: BTreeMap<String, Option<usize>> = BTreeMap::new();
        for ((name, number), version) in &self.versions {
            for (file, bytes) in &version.files {
                let full = format!("{}/{file}", folder(name, number));
                let Some(rest) = full.strip_prefix(&format!("{path}/")) else {
                    continue;
                };
                match rest.split_once('/') {
                    Some((inner, _)) => entries.insert(inner.to_owned(), None),
                    None => entries.insert(rest.to_owned(), Some(bytes.len())),
                };
            }
        }
        let files = entries.into_iter().map(|(path, bytes)| match bytes {
            Some(bytes) => json!({"path": path, "is_dir": false, "file_size": bytes}),
            None => json!({"path": path, "is_dir": true}),
        });
        Some(Content::Json(json!({"files": files.collect::<Vec<_>>()})))
    }

    fn file(&self, path: &str) -> Option<Content> {
        let found = self.versions.iter().find_map(|((name, number), version)| {
            let file = path.strip_prefix(&format!("{}/", folder(name, number)))?;
            version.files.get(file)
        });
        found.map(|bytes| Content::File(bytes.clone()))
    }

    /// The hub's word on a model, which is version 1 of the name that is its id.
    fn revision(&self, id: &str) -> Option<Content> {
        let version = self.version(id, "1")?;
        let sibling = |(path, bytes): (&String, &Vec<u8>)| match version.sha256.get(path) {
            Some(sha256) => json!({"rfilename": path, "size": bytes.len(),
                "lfs": {"sha256": sha256, "size": bytes.len()}}),
            None => json!({"rfilename": path, "size": bytes.len()}),
        };
        let siblings: Vec<Value> = version.files.iter().map(sibling).collect();
        Some(Content::Json(
            json!({"id": id, "sha": "c0ffee", "siblings": siblings}),
        ))
    }
}

enum Content {
    File(Vec<u8>),
    Json(Value),
}

fn folder(name: &str, version: &str) -> String {
    format!("0/{name}-{version}/artifacts/model")
}

fn root(name: &str, version: &str) -> String {
    format!("mlflow-artifacts:/{}", folder(name, version))
}

fn whole(body: Vec<u8>) -> Answer {
    Answer {
        status: 200,
        headers: String::new(),
        sent: body.len(),
        body,
    }
}

fn part_of(bytes: &[u8], from: usize) -> Answer {
    let length = bytes.len();
    if from >= length {
        return error(416, "INVALID_PARAMETER_VALUE", "no such range");
    }
    Answer {
        status: 206,
        headers: format!("Content-Range: bytes {from}-{}/{length}\r\n", length - 1),
        ..whole(bytes[from..].to_vec())
    }
}

fn error(status: u16, code: &str, message: &str) -> Answer {
    let body = json!({"error_code": code, "message": message});
    Answer {
        status,
        ..whole(body.to_string().into_bytes())
    }
}

/// An address without its percent signs.
fn decoded(address: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = address.as_bytes();
    while let [first, more @ ..] = rest {
        let hex = more.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let byte = hex.and_then(|two| u8::from_str_radix(two, 16).ok());
        (rest, _) = match (first, byte) {
            (b'%', Some(byte)) => (&more[2..], bytes.push(byte)),
            (other, _) => (more, bytes.push(*other)),
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
