//! Typed reading of a `config.json`: every value is checked for kind and range where it is read.
//!
//! Owns no meaning: which keys there are is the families' business.

use super::spec::SpecError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// An object of a `config.json`, and the path by which its keys are named in errors.
#[derive(Debug, Clone)]
pub struct Config {
    path: String,
    values: Map<String, Value>,
}

impl Config {
    /// Parses the text of the file.
    ///
    /// # Errors
    /// [`SpecError::NotJson`].
    pub fn parse(json: &str) -> Result<Config, SpecError> {
        match serde_json::from_str(json) {
            Ok(Value::Object(values)) => Ok(Config {
                path: String::new(),
                values,
            }),
            Ok(_) => Err(SpecError::NotJson {
                reason: "it is not an object".to_owned(),
            }),
            Err(error) => Err(SpecError::NotJson {
                reason: error.to_string(),
            }),
        }
    }

    /// The one entry of `architectures`.
    ///
    /// # Errors
    /// [`SpecError`]: missing, or not a list of one name.
    pub fn architecture(&self) -> Result<&str, SpecError> {
        let value = self
            .get("architectures")
            .ok_or_else(|| self.missing("architectures"))?;
        match value.as_array().map(Vec::as_slice) {
            Some([Value::String(name)]) => Ok(name),
            _ => Err(self.odd("architectures", value, "a list of one name")),
        }
    }

    /// A whole number in a range; the default where the key is absent or null.
    ///
    /// # Errors
    /// [`SpecError::Field`]: another kind of value or out of range.
    pub fn count_or(
        &self,
        key: &str,
        range: RangeInclusive<usize>,
        default: usize,
    ) -> Result<usize, SpecError> {
        self.get(key)
            .map_or(Ok(default), |value| self.as_count(key, value, range))
    }

    /// A whole number in a range that must be there.
    ///
    /// # Errors
    /// [`SpecError`]: missing, another kind of value or out of range.
    pub fn count(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize, SpecError> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        self.as_count(key, value, range)
    }

    /// A number in a range, if there is one.
    ///
    /// # Errors
    /// [`SpecError::Field`]: another kind of value or out of range.
    pub fn real(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.odd(
                key,
                value,
                &format!("a number from {:e} to {:e}", range.start(), range.end()),
            )),
        }
    }

    /// A yes or no; the default where the key is absent or null.
    ///
    /// # Errors
    /// [`SpecError::Field`]: another kind of value.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, SpecError> {
        self.get(key).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.odd(key, value, "true or false"))
        })
    }

    /// A text, if there is one.
    ///
    /// # Errors
    /// [`SpecError::Field`]: another kind of value.
    pub fn text(&self, key: &str) -> Result<Option<&str>, SpecError> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| self.odd(key, value, "a text")))
            .transpose()
    }

    /// A text that, where it is given, must be one of these.
    ///
    /// # Errors
    /// [`SpecError::Field`] naming the supported ones.
    pub fn one_of(&self, key: &str, supported: &[&str]) -> Result<(), SpecError> {
        match self.get(key) {
            Some(value) if !value.as_str().is_some_and(|text| supported.contains(&text)) => {
                Err(self.odd(key, value, &supported.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    /// An object inside this one, if there is one.
    ///
    /// # Errors
    /// [`SpecError::Field`]: another kind of value.
    pub fn object(&self, key: &str) -> Result<Option<Config>, SpecError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let values = value
            .as_object()
            .ok_or_else(|| self.odd(key, value, "an object or null"))?
            .clone();
        Ok(Some(Config {
            path: format!("{}{key}.", self.path),
            values,
        }))
    }

    /// An object without keys, in place of one that is absent.
    #[must_use]
    pub fn empty(&self, key: &str) -> Config {
        Config {
            path: format!("{}{key}.", self.path),
            values: Map::new(),
        }
    }

    /// Features that must be off: absent, null or false.
    ///
    /// # Errors
    /// [`SpecError::Field`] naming the first one that is on.
    pub fn refuse_unless_off(&self, keys: &[&str]) -> Result<(), SpecError> {
        for key in keys {
            if let Some(value) = self.get(key).filter(|value| **value != Value::Bool(false)) {
                return Err(self.odd(key, value, "false"));
            }
        }
        Ok(())
    }

    /// Whether the key is there, be it null.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// The value of a key; null counts as absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// The error for a key that must be there.
    #[must_use]
    pub fn missing(&self, key: &str) -> SpecError {
        SpecError::Missing {
            field: format!("{}{key}", self.path),
        }
    }

    /// The error for a value that is not supported.
    #[must_use]
    pub fn odd(&self, key: &str, found: &Value, supported: &str) -> SpecError {
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(80) {
            found.truncate(end);
            found.push_str("...");
        }
        SpecError::Field {
            field: format!("{}{key}", self.path),
            found,
            supported: supported.to_owned(),
        }
    }

    fn as_count(
        &self,
        key: &str,
        value: &Value,
        range: RangeInclusive<usize>,
    ) -> Result<usize, SpecError> {
        let count = value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .filter(|count| range.contains(count));
        count.ok_or_else(|| {
            self.odd(
                key,
                value,
                &format!("a whole number from {} to {}", range.start(), range.end()),
            )
        })
    }
}
