//! Makes GGUF files, for tests: small models whose numbers are known.

mod blocks;
mod folder;
mod tokenizer;

pub use blocks::encode;
pub use folder::from_folder;
pub use tokenizer::set_tokenizer;

use crate::header::ALIGNMENT;
use crate::tensor::TensorType;
use crate::value::{ARRAY, Array, NumberType, Numbers, STRING, Texts, Value};

/// A file in the making.
#[derive(Debug, Clone)]
pub struct Writer {
    /// The format's version.
    pub version: u32,
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, TensorType, Vec<u8>)>,
}

impl Default for Writer {
    fn default() -> Writer {
        Writer {
            version: 3,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

impl Writer {
    /// Sets a key, in place of an earlier value of it.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.to_owned(), value.into()));
    }

    /// Takes a key away.
    pub fn unset(&mut self, key: &str) {
        self.metadata.retain(|(known, _)| known != key);
    }

    /// Adds a tensor; its dimensions with the innermost first, its bytes as they are to lie in the file.
    pub fn tensor(
        &mut self,
        name: &str,
        dims: &[u64],
        tensor_type: TensorType,
        bytes: impl Into<Vec<u8>>,
    ) {
        let tensor = (name.to_owned(), dims.to_vec(), tensor_type, bytes.into());
        self.tensors.push(tensor);
    }

    /// The file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let named = self
            .metadata
            .iter()
            .find(|(key, _)| key == "general.alignment");
        let alignment = named
            .and_then(|(_, value)| value.as_u64())
            .unwrap_or(ALIGNMENT) as usize;
        let mut data = Vec::new();
        for (name, dims, tensor_type, bytes) in &self.tensors {
            put_text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor_type.id().to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(alignment), 0);
        }
        out.resize(out.len().next_multiple_of(alignment), 0);
        out.extend(data);
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn id_of(number_type: NumberType) -> u32 {
    let found = NumberType::ALL
        .iter()
        .find(|(_, known, _)| *known == number_type);
    found.map_or(0, |(id, ..)| *id)
}

/// A value with its type before it: numbers in the types that readers ask for, four bytes where they do.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |number_type: NumberType, bytes: &[u8]| {
        out.extend(id_of(number_type).to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::Unsigned(number) => match u32::try_from(*number) {
            Ok(number) => put(NumberType::U32, &number.to_le_bytes()),
            Err(_) => put(NumberType::U64, &number.to_le_bytes()),
        },
        Value::Signed(number) => match i32::try_from(*number) {
            Ok(number) => put(NumberType::I32, &number.to_le_bytes()),
            Err(_) => put(NumberType::I64, &number.to_le_bytes()),
        },
        Value::Real(number) => put(NumberType::F32, &(*number as f32).to_le_bytes()),
        Value::Flag(flag) => put(NumberType::Bool, &[u8::from(*flag)]),
        Value::Text(text) => {
            out.extend(STRING.to_le_bytes());
            put_text(out, text);
        }
        Value::Array(array) => {
            out.extend(ARRAY.to_le_bytes());
            let element = match array {
                Array::Numbers(numbers) => id_of(numbers.number_type()),
                Array::Texts(_) => STRING,
            };
            out.extend(element.to_le_bytes());
            out.extend((array.len() as u64).to_le_bytes());
            match array {
                Array::Numbers(numbers) => out.extend(numbers.bytes()),
                Array::Texts(texts) => texts.iter().for_each(|text| put_text(out, text)),
            }
        }
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Value {
        Value::Unsigned(u64::from(number))
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::Unsigned(number)
    }
}

impl From<i32> for Value {
    fn from(number: i32) -> Value {
        Value::Signed(i64::from(number))
    }
}

impl From<f32> for Value {
    fn from(number: f32) -> Value {
        Value::Real(f64::from(number))
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Flag(flag)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<Texts> for Value {
    fn from(texts: Texts) -> Value {
        Value::Array(Array::Texts(texts))
    }
}

impl From<&[f32]> for Value {
    fn from(numbers: &[f32]) -> Value {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Value::Array(Array::Numbers(Numbers::new(NumberType::F32, bytes)))
    }
}

impl From<&[i32]> for Value {
    fn from(numbers: &[i32]) -> Value {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Value::Array(Array::Numbers(Numbers::new(NumberType::I32, bytes)))
    }
}
