//! Little-endian numbers and texts from a stream, with limits.

use crate::error::Error;
use std::io::{ErrorKind, Read};

/// Reads a header; knows how far it is.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    inner: R,
    at: u64,
    bytes_max: u64,
}

impl<R: Read> Reader<R> {
    /// Refuses to read more than `bytes_max`.
    pub(crate) fn new(inner: R, bytes_max: u64) -> Reader<R> {
        Reader {
            inner,
            at: 0,
            bytes_max,
        }
    }

    /// How many bytes were read.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        self.book(N as u64)?;
        let mut bytes = [0; N];
        match self.inner.read_exact(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Err(Error::Truncated { bytes: self.at })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Appends the next `len` bytes; memory grows with what arrives.
    pub(crate) fn append(&mut self, len: u64, to: &mut Vec<u8>) -> Result<(), Error> {
        self.book(len)?;
        let read = self.inner.by_ref().take(len).read_to_end(to)?;
        if (read as u64) < len {
            return Err(Error::Truncated { bytes: self.at });
        }
        Ok(())
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A text of at most `len_max` bytes; `what` names it in errors.
    pub(crate) fn text(&mut self, len_max: u64, what: &str) -> Result<String, Error> {
        let len = self.u64()?;
        if len > len_max {
            return Err(Error::Corrupt(format!(
                "{what} has {len} bytes, more than {len_max}"
            )));
        }
        let mut bytes = Vec::new();
        self.append(len, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| Error::Corrupt(format!("{what} is not UTF-8")))
    }

    fn book(&mut self, len: u64) -> Result<(), Error> {
        let at = self.at.saturating_add(len);
        if at > self.bytes_max {
            return Err(Error::Corrupt(format!(
                "its header is longer than {} bytes",
                self.bytes_max
            )));
        }
        self.at = at;
        Ok(())
    }
}
