//! Values of a header's metadata.
//!
//! Owns their reading. Arrays are kept as compact as they lie in the file: vocabularies have hundreds of thousands of texts.

use crate::error::Error;
use crate::reader::Reader;
use std::io::Read;

/// Longest text: chat templates have some hundred kilobytes at most.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// u8, u16, u32, u64.
    Unsigned(u64),
    /// i8, i16, i32, i64.
    Signed(i64),
    /// f32, f64.
    Real(f64),
    /// bool.
    Flag(bool),
    /// string.
    Text(String),
    /// array.
    Array(Array),
}

/// An array of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Of numbers, or of flags (0 and 1).
    Numbers(Numbers),
    /// Of texts.
    Texts(Texts),
}

/// Numbers of one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbers {
    number_type: NumberType,
    bytes: Vec<u8>,
}

/// Texts, one behind the other in one piece of memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Texts {
    text: String,
    ends: Vec<u32>,
}

/// Types of numbers, as the format counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum NumberType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

/// What the format calls a string and an array.
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;

impl NumberType {
    pub(crate) const ALL: [(u32, NumberType, usize); 11] = [
        (0, NumberType::U8, 1),
        (1, NumberType::I8, 1),
        (2, NumberType::U16, 2),
        (3, NumberType::I16, 2),
        (4, NumberType::U32, 4),
        (5, NumberType::I32, 4),
        (6, NumberType::F32, 4),
        (7, NumberType::Bool, 1),
        (10, NumberType::U64, 8),
        (11, NumberType::I64, 8),
        (12, NumberType::F64, 8),
    ];

    fn of(id: u32) -> Option<NumberType> {
        let found = NumberType::ALL.iter().find(|(known, ..)| *known == id);
        found.map(|(_, number_type, _)| *number_type)
    }

    /// Bytes of one number.
    #[must_use]
    pub fn bytes(self) -> usize {
        let found = NumberType::ALL.iter().find(|(_, known, _)| *known == self);
        found.map_or(1, |(.., bytes)| *bytes)
    }

    /// The number in these little-endian bytes.
    fn value(self, bytes: &[u8]) -> Value {
        let mut low = [0; 8];
        low[..bytes.len()].copy_from_slice(bytes);
        let number = u64::from_le_bytes(low);
        match self {
            NumberType::U8 | NumberType::U16 | NumberType::U32 | NumberType::U64 => {
                Value::Unsigned(number)
            }
            NumberType::I8 => Value::Signed(i64::from(number as i8)),
            NumberType::I16 => Value::Signed(i64::from(number as i16)),
            NumberType::I32 => Value::Signed(i64::from(number as i32)),
            NumberType::I64 => Value::Signed(number as i64),
            NumberType::F32 => Value::Real(f64::from(f32::from_bits(number as u32))),
            NumberType::F64 => Value::Real(f64::from_bits(number)),
            NumberType::Bool => Value::Flag(number != 0),
        }
    }
}

impl Value {
    /// Reads a value and its type before it; `key` names it in errors.
    pub(crate) fn read<R: Read>(reader: &mut Reader<R>, key: &str) -> Result<Value, Error> {
        let id = reader.u32()?;
        match id {
            STRING => Ok(Value::Text(
                reader.text(TEXT_BYTES_MAX, &format!("the value of {key}"))?,
            )),
            ARRAY => Ok(Value::Array(Array::read(reader, key)?)),
            id => {
                let number_type = NumberType::of(id).ok_or_else(|| unknown(key, id))?;
                let mut bytes = Vec::new();
                reader.append(number_type.bytes() as u64, &mut bytes)?;
                Ok(number_type.value(&bytes))
            }
        }
    }

    /// A whole number that is not negative, of whatever type.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Unsigned(number) => Some(number),
            Value::Signed(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// A number of whatever type.
    #[must_use]
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Unsigned(number) => Some(number as f64),
            Value::Signed(number) => Some(number as f64),
            Value::Real(number) => Some(number),
            _ => None,
        }
    }

    /// A yes or no.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Flag(flag) => Some(flag),
            _ => None,
        }
    }

    /// A text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// An array of texts.
    #[must_use]
    pub fn as_texts(&self) -> Option<&Texts> {
        match self {
            Value::Array(Array::Texts(texts)) => Some(texts),
            _ => None,
        }
    }

    /// An array of numbers.
    #[must_use]
    pub fn as_numbers(&self) -> Option<&Numbers> {
        match self {
            Value::Array(Array::Numbers(numbers)) => Some(numbers),
            _ => None,
        }
    }

    /// The value for an error's text: short, whatever it is.
    #[must_use]
    pub fn shown(&self) -> String {
        const CHARS_MAX: usize = 80;
        match self {
            Value::Unsigned(number) => number.to_string(),
            Value::Signed(number) => number.to_string(),
            Value::Real(number) => number.to_string(),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(text) if text.chars().nth(CHARS_MAX).is_none() => format!("{text:?}"),
            Value::Text(text) => {
                let start: String = text.chars().take(CHARS_MAX).collect();
                format!("{start:?}...")
            }
            Value::Array(array) => format!("an array of {}", array.len()),
        }
    }
}

impl Array {
    fn read<R: Read>(reader: &mut Reader<R>, key: &str) -> Result<Array, Error> {
        let (id, len) = (reader.u32()?, reader.u64()?);
        match id {
            STRING => Ok(Array::Texts(Texts::read(reader, len, key)?)),
            ARRAY => Err(Error::Form(format!(
                "its metadata: {key} is an array of arrays, which no known file has"
            ))),
            id => {
                let number_type = NumberType::of(id).ok_or_else(|| unknown(key, id))?;
                let mut bytes = Vec::new();
                let len = len.saturating_mul(number_type.bytes() as u64);
                reader.append(len, &mut bytes)?;
                Ok(Array::Numbers(Numbers { number_type, bytes }))
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Array::Numbers(numbers) => numbers.len(),
            Array::Texts(texts) => texts.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Numbers {
    /// Numbers of a type, each as its little-endian bytes.
    #[must_use]
    pub fn new(number_type: NumberType, bytes: Vec<u8>) -> Numbers {
        Numbers { number_type, bytes }
    }

    /// Their type.
    #[must_use]
    pub fn number_type(&self) -> NumberType {
        self.number_type
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.number_type.bytes()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The numbers, one by one, in order.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        let number_type = self.number_type;
        let numbers = self.bytes.chunks_exact(number_type.bytes());
        numbers.map(move |bytes| number_type.value(bytes))
    }

    #[cfg(feature = "write")]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Texts {
    fn read<R: Read>(reader: &mut Reader<R>, len: u64, key: &str) -> Result<Texts, Error> {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for _ in 0..len {
            let text_len = reader.u64()?;
            reader.append(text_len, &mut bytes)?;
            // The limit of a header's length is far below 4 GiB.
            ends.push(bytes.len() as u32);
        }
        let not_utf8 = || Error::Corrupt(format!("a text of {key} is not UTF-8"));
        let text = String::from_utf8(bytes).map_err(|_| not_utf8())?;
        if !ends.iter().all(|end| text.is_char_boundary(*end as usize)) {
            return Err(not_utf8());
        }
        Ok(Texts { text, ends })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)? as usize;
        let start = index
            .checked_sub(1)
            .map_or(0, |before| self.ends[before] as usize);
        self.text.get(start..end)
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).filter_map(|index| self.get(index))
    }
}

impl<T: AsRef<str>> FromIterator<T> for Texts {
    fn from_iter<I: IntoIterator<Item = T>>(all: I) -> Texts {
        let mut texts = Texts::default();
        for text in all {
            texts.text.push_str(text.as_ref());
            texts.ends.push(texts.text.len() as u32);
        }
        texts
    }
}

fn unknown(key: &str, id: u32) -> Error {
    Error::Corrupt(format!("{key} has a value of the unknown type {id}"))
}
