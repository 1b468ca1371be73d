//! A file's bytes on their way.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use crate::Error;

/// A file's bytes, from `from` on. Dropping it ends the transfer.
pub struct Body {
    /// The first byte's place in the file: 0 when the source does not resume.
    pub from: u64,
    /// The whole file's length, when the source tells.
    pub bytes: Option<u64>,
    chunks: BoxStream<'static, Result<Bytes, Error>>,
}

impl Body {
    pub(crate) fn new(
        from: u64,
        bytes: Option<u64>,
        chunks: BoxStream<'static, Result<Bytes, Error>>,
    ) -> Body {
        Body {
            from,
            bytes,
            chunks,
        }
    }

    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        self.chunks.next().await
    }
}
