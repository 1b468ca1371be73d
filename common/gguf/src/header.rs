//! A file's header: metadata, tensors, and where the data start.

use crate::error::Error;
use crate::reader::Reader;
use crate::tensor::TensorInfo;
use crate::value::Value;
use std::collections::BTreeMap;
use std::io::Read;

/// Longest header. Vocabularies of a quarter of a million tokens with their merges take about 16 MB.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// The first bytes of every file.
const MAGIC: [u8; 4] = *b"GGUF";
/// Longest key, the format's own limit.
const KEY_BYTES_MAX: u64 = (1 << 16) - 1;
/// Alignment of the data where the metadata name none.
pub(crate) const ALIGNMENT: u64 = 32;
/// Greatest alignment that is believed.
const ALIGNMENT_MAX: u64 = 1 << 20;

/// The header of a file, checked against its length.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    data_start: u64,
}

impl Gguf {
    /// Reads a header from the start of a file of `file_bytes`. Nothing behind the header is read: `stream` may end there.
    ///
    /// # Errors
    /// [`Error::Truncated`]: the stream ended before the header did. Else the first thing that is wrong, by name.
    pub fn read(stream: impl Read, file_bytes: u64) -> Result<Gguf, Error> {
        let mut reader = Reader::new(stream, HEADER_BYTES_MAX);
        let (tensor_count, key_count) = read_start(&mut reader)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = reader.text(KEY_BYTES_MAX, "a key of the metadata")?;
            let value = Value::read(&mut reader, &key)?;
            if let Some(_first) = metadata.insert(key.clone(), value) {
                return Err(Error::Corrupt(format!(
                    "the key {key} is in its metadata twice"
                )));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let info = TensorInfo::read(&mut reader)?;
            let name = info.name.clone();
            if tensors.insert(name.clone(), info).is_some() {
                return Err(Error::tensor(&name, "is there twice"));
            }
        }
        let mut gguf = Gguf {
            metadata,
            tensors,
            data_start: reader.at(),
        };
        let alignment = gguf.alignment()?;
        gguf.data_start = gguf.data_start.next_multiple_of(alignment);
        gguf.check_places(alignment, file_bytes)?;
        gguf.refuse_parts()?;
        Ok(gguf)
    }

    /// Where the data start, from the start of the file: a tensor's bytes are at this plus its offset.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// A value of the metadata.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All keys of the metadata and their values.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// A tensor, by its name in the file.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// What kind of model it is: `llama`, `mpt`, ...
    ///
    /// # Errors
    /// [`Error::Key`]: missing, or not a text.
    pub fn architecture(&self) -> Result<&str, Error> {
        self.text("general.architecture")?
            .ok_or_else(|| Error::key("general.architecture", "missing", "every model names it"))
    }

    /// A text, if the key is there.
    ///
    /// # Errors
    /// [`Error::Key`]: another kind of value.
    pub fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A whole number that is not negative, if the key is there.
    ///
    /// # Errors
    /// [`Error::Key`]: another kind of value.
    pub fn count(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a whole number, not negative", Value::as_u64)
    }

    /// A number, if the key is there.
    ///
    /// # Errors
    /// [`Error::Key`]: another kind of value.
    pub fn real(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A yes or no, if the key is there.
    ///
    /// # Errors
    /// [`Error::Key`]: another kind of value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(found) => Ok(Some(found)),
            None => Err(Error::key(
                key,
                value.shown(),
                format!("it should be {wanted}"),
            )),
        }
    }

    fn alignment(&self) -> Result<u64, Error> {
        const KEY: &str = "general.alignment";
        let alignment = self.count(KEY)?.unwrap_or(ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
            let wanted = format!("it should be a power of two, at most {ALIGNMENT_MAX}");
            return Err(Error::key(KEY, alignment.to_string(), wanted));
        }
        Ok(alignment)
    }

    /// Every tensor that can be read lies in the file. Of one of a type that is not supported the length is not known.
    fn check_places(&self, alignment: u64, file_bytes: u64) -> Result<(), Error> {
        for tensor in self.tensors() {
            let TensorInfo { name, offset, .. } = tensor;
            if !offset.is_multiple_of(alignment) {
                let reason = format!("begins at {offset}, which is not a multiple of {alignment}");
                return Err(Error::tensor(name, reason));
            }
            let bytes = tensor.bytes().unwrap_or(0);
            let start = self.data_start.checked_add(*offset);
            let end = start.and_then(|start| start.checked_add(bytes));
            if end.is_none_or(|end| end > file_bytes) {
                return Err(Error::tensor(
                    name,
                    format!(
                        "has {bytes} bytes at {offset} after {} bytes of header, past the end of the file of {file_bytes} bytes",
                        self.data_start
                    ),
                ));
            }
        }
        Ok(())
    }

    /// A file that is one of several has not all tensors.
    fn refuse_parts(&self) -> Result<(), Error> {
        const KEY: &str = "split.count";
        match self.count(KEY)? {
            None | Some(0 | 1) => Ok(()),
            Some(parts) => Err(Error::key(
                KEY,
                parts.to_string(),
                "a model must be one file: join its parts with llama-gguf-split --merge",
            )),
        }
    }
}

/// Magic, version and counts.
fn read_start<R: Read>(reader: &mut Reader<R>) -> Result<(u64, u64), Error> {
    if reader.array()? != MAGIC {
        return Err(Error::Form("it is not a GGUF file".to_owned()));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= u32::from(u16::MAX) => {
            return Err(Error::Form(
                "it is a big-endian GGUF file; only little-endian ones are read".to_owned(),
            ));
        }
        version => {
            return Err(Error::Form(format!(
                "it is a GGUF file of version {version}; supported are 2 and 3"
            )));
        }
    }
    Ok((reader.u64()?, reader.u64()?))
}
