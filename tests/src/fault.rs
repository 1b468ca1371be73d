//! Faults: strangers on the worker port, clients that do not read, and broken model folders.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::until::{PATIENCE, until};

/// Sends bytes to an address and waits until the other side closes.
///
/// # Panics
/// When it does not.
pub async fn throw(address: &str, bytes: &[u8]) {
    let mut socket = TcpStream::connect(address)
        .await
        .unwrap_or_else(|e| panic!("{address}: {e}"));
    // The other side may close before it has read everything.
    let _ = socket.write_all(bytes).await;
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await;
    assert!(
        closed.is_ok(),
        "the link was left open after {} bytes that are not the protocol",
        bytes.len()
    );
}

/// A client that sends a request and never reads, with the smallest buffer the system gives.
pub struct DeafClient {
    socket: TcpStream,
}

impl DeafClient {
    /// Sends a JSON body.
    pub async fn post(address: &str, token: &str, path: &str, body: &Value) -> DeafClient {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(1).expect("a small buffer");
        let address = address.parse().expect("an address");
        let mut socket = socket
            .connect(address)
            .await
            .expect("the API accepts connections");
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: cluster\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        socket
            .write_all(format!("{head}{body}").as_bytes())
            .await
            .expect("the request can be sent");
        DeafClient { socket }
    }

    /// Waits until the first byte of the answer has arrived, and leaves it there.
    pub async fn answered(&self) {
        let mut byte = [0];
        let peeked = tokio::time::timeout(PATIENCE, self.socket.peek(&mut byte)).await;
        assert!(matches!(peeked, Ok(Ok(1))), "no answer: {peeked:?}");
    }

    /// Leaves.
    pub fn hang_up(self) {}
}

/// A copy of a model folder that may be broken.
pub struct ModelCopy {
    folder: tempfile::TempDir,
}

impl ModelCopy {
    /// Copies a folder's files.
    pub fn of(model: &Path) -> ModelCopy {
        let folder = tempfile::tempdir().expect("a folder for the copy");
        for entry in fs::read_dir(model).unwrap_or_else(|e| panic!("{}: {e}", model.display())) {
            let path = entry.expect("a readable folder").path();
            let name = path.file_name().expect("an entry has a name");
            fs::copy(&path, folder.path().join(name)).expect("the file can be copied");
        }
        ModelCopy { folder }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Changes a file's bytes.
    pub fn edit(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path().join(file);
        let mut bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        change(&mut bytes);
        fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// Changes a JSON file.
    pub fn edit_json(&self, file: &str, change: impl FnOnce(&mut Value)) {
        self.edit(file, |bytes| {
            let mut value = serde_json::from_slice(bytes).unwrap_or_else(|e| panic!("{file}: {e}"));
            change(&mut value);
            *bytes = value.to_string().into_bytes();
        });
    }

    /// Cuts `model.safetensors` into two files with an index, as large checkpoints come: the first half of the tensors in
    /// file order, then the rest.
    pub fn shard(&self) {
        let bytes = fs::read(self.path().join("model.safetensors")).expect("weights");
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("a header");
        let data = &bytes[8 + header_bytes..];
        let mut tensors: Vec<(String, Value)> = header
            .as_object()
            .expect("an object")
            .iter()
            .filter(|(name, _)| *name != "__metadata__")
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        tensors.sort_by_key(|(_, tensor)| tensor["data_offsets"][0].as_u64());
        let half = tensors.len() / 2;
        let mut weight_map = serde_json::Map::new();
        for (number, part) in [(1, &tensors[..half]), (2, &tensors[half..])] {
            let file = format!("model-{number:05}-of-00002.safetensors");
            let (mut header, mut body) = (serde_json::Map::new(), Vec::new());
            for (name, tensor) in part {
                let offset =
                    |i: usize| tensor["data_offsets"][i].as_u64().expect("an offset") as usize;
                let start = body.len();
                body.extend_from_slice(&data[offset(0)..offset(1)]);
                let mut tensor = tensor.clone();
                tensor["data_offsets"] = Value::from(vec![start, body.len()]);
                header.insert(name.clone(), tensor);
                weight_map.insert(name.clone(), Value::from(file.clone()));
            }
            let header = Value::Object(header).to_string().into_bytes();
            let mut whole = (header.len() as u64).to_le_bytes().to_vec();
            whole.extend_from_slice(&header);
            whole.extend_from_slice(&body);
            fs::write(self.path().join(file), whole).expect("a shard can be written");
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        fs::write(
            self.path().join("model.safetensors.index.json"),
            index.to_string(),
        )
        .expect("an index");
        fs::remove_file(self.path().join("model.safetensors")).expect("the whole file can go");
    }
}

/// Waits until nothing listens on an address.
pub async fn wait_closed(address: &str) {
    until(
        &format!("{address} to be closed"),
        PATIENCE,
        async || match TcpStream::connect(address).await {
            Err(_) => Ok(()),
            Ok(_) => Err("still accepting".into()),
        },
    )
    .await;
}
