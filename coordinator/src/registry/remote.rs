//! Files in a registry, read where they are: a header is streamed and the rest is not fetched.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use common::wire::message::{ModelSource, RemoteFile, RemoteModel};
use registry::{Body, Error, Listing, Registry};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use super::RegistryError;
use super::files::{Files, Opened, within};

/// All headers of a model are read within this time, or the registry counts as not answering.
const HEADERS_MAX: Duration = Duration::from_secs(120);

/// The files of a version in a registry.
pub struct Remote {
    registry: Arc<Registry>,
    listing: Arc<Listing>,
    runtime: Handle,
    deadline: Instant,
}

impl Remote {
    /// The files of a listing. To be read on a thread that may block; `runtime` does the work.
    pub fn new(registry: Arc<Registry>, listing: Arc<Listing>, runtime: Handle) -> Remote {
        Remote {
            registry,
            listing,
            runtime,
            deadline: Instant::now() + HEADERS_MAX,
        }
    }

    fn wait<T>(&self, what: impl Future<Output = Result<T, Error>>) -> Result<T, RegistryError> {
        wait(&self.runtime, self.deadline, what).map_err(super::error)
    }
}

fn wait<T>(
    runtime: &Handle,
    deadline: Instant,
    what: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let late = |_| {
        Error::Unavailable(format!(
            "the registry took more than {} s to give a model's headers",
            HEADERS_MAX.as_secs()
        ))
    };
    runtime.block_on(async { timeout_at(deadline, what).await.map_err(late)? })
}

impl Files for Remote {
    fn name(&self, path: &str) -> String {
        let (registry, uri) = (&self.registry.name, &self.listing.uri);
        match path {
            "" => format!("{uri} in registry {registry}"),
            path => format!("{uri}/{path} in registry {registry}"),
        }
    }

    fn has(&self, path: &str) -> bool {
        self.listing.file(path).is_some()
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let folder = within(folder, "");
        let paths = self.listing.files.iter().map(|file| file.path.as_str());
        let inside = paths.filter_map(|path| path.strip_prefix(&folder));
        inside
            .filter(|name| !name.contains('/'))
            .map(str::to_owned)
            .collect()
    }

    fn open(&self, path: &str) -> Result<Opened, RegistryError> {
        let Some(file) = self.listing.file(path) else {
            return Err(self.broken(path, "is not among the version's files"));
        };
        let body = self.wait(self.registry.read(&self.listing.uri, path, 0))?;
        if let (Some(listed), Some(got)) = (file.bytes, body.bytes)
            && listed != got
        {
            let reason = format!("has {got} bytes, and {listed} in the registry's listing");
            return Err(self.broken(path, &reason));
        }
        Ok(Opened {
            bytes: file.bytes.or(body.bytes),
            reader: Box::new(Reader {
                body,
                chunk: Bytes::new(),
                runtime: self.runtime.clone(),
                deadline: self.deadline,
            }),
        })
    }
}

/// A body as a blocking reader. Dropping it ends the transfer.
struct Reader {
    body: Body,
    chunk: Bytes,
    runtime: Handle,
    deadline: Instant,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            let next = async { self.body.next().await.transpose() };
            match wait(&self.runtime, self.deadline, next) {
                Ok(Some(chunk)) => self.chunk = chunk,
                Ok(None) => return Ok(0),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        let count = buffer.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

/// What workers are told to fetch: of the listing, only these files.
pub fn source(registry: &str, listing: &Listing, needed: &[String]) -> ModelSource {
    let files: Vec<RemoteFile> = needed
        .iter()
        .filter_map(|path| listing.file(path).cloned())
        .collect();
    ModelSource::Remote(RemoteModel {
        registry: registry.to_owned(),
        uri: listing.uri.clone(),
        identity: listing.identity.clone(),
        files,
    })
}
