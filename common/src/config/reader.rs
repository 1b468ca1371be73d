//! A reader over the layered values that collects mistakes instead of stopping at the first.
//!
//! Owns layering (by the `config` crate), the lookup of a key's file and line, and the list of mistakes. Knows no key
//! of cluster.toml.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use config::{Config, Environment, File, FileFormat, Value, ValueKind};
use toml::de::{DeTable, DeValue};

/// One thing that is wrong in a configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// `file:line`, the file alone, or the environment variable.
    pub place: String,
    /// The key, as a path: `nodes[0].devices[1].memory`.
    pub key: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "{}: {}", self.place, self.message),
            key => write!(f, "{}: {key}: {}", self.place, self.message),
        }
    }
}

/// Every mistake of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError(pub Vec<Mistake>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(Mistake::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// The name of environment variables that override keys, before `__SECTION__KEY`.
const ENVIRONMENT_PREFIX: &str = "TANDEM";

/// The layers of a configuration: their merged values and their texts.
pub struct Layers {
    values: Value,
    files: Vec<(PathBuf, String)>,
    /// Names of the variables that override keys.
    variables: Vec<String>,
}

/// The process's environment, as far as it overrides keys.
pub(super) fn environment() -> Variables {
    let prefix = format!("{ENVIRONMENT_PREFIX}__");
    std::env::vars_os()
        .map(|(name, value)| (text(&name), text(&value)))
        .filter(|(name, _)| name.to_ascii_uppercase().starts_with(&prefix))
        .collect()
}

fn text(text: &std::ffi::OsStr) -> String {
    text.to_string_lossy().into_owned()
}

/// Environment variables by name.
pub(super) type Variables = config::Map<String, String>;

impl Layers {
    /// Reads `path` and the local override beside it; `variables` override both.
    pub fn read(path: &Path, variables: Variables) -> Result<Self, ConfigError> {
        let fail = |place: String, message: String| {
            ConfigError(vec![Mistake {
                place,
                key: String::new(),
                message,
            }])
        };
        let mut files = Vec::new();
        for (file, required) in [
            (path.to_owned(), true),
            (path.with_extension("local.toml"), false),
        ] {
            match fs::read_to_string(&file) {
                Ok(text) => files.push((file, text)),
                Err(e) if !required && e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => {
                    return Err(fail(
                        file.display().to_string(),
                        format!("cannot be read: {e}"),
                    ));
                }
            }
        }
        let mut builder = Config::builder();
        for (file, text) in &files {
            if let Err(e) = DeTable::parse(text) {
                let line = e.span().map(|span| line_at(text, span.start)).unwrap_or(1);
                return Err(fail(
                    format!("{}:{line}", file.display()),
                    format!("not TOML: {}", e.message()),
                ));
            }
            builder = builder.add_source(File::from_str(text, FileFormat::Toml));
        }
        let names = variables.keys().cloned().collect();
        let environment = Environment::with_prefix(ENVIRONMENT_PREFIX)
            .prefix_separator("__")
            .separator("__")
            .source(Some(variables));
        let merged = builder.add_source(environment.try_parsing(true)).build();
        let values = merged.and_then(Config::try_deserialize::<Value>);
        let values = values.map_err(|e| fail(path.display().to_string(), e.to_string()))?;
        Ok(Layers {
            values,
            files,
            variables: names,
        })
    }

    /// A reader at the root.
    pub fn reader(&self) -> Reader<'_> {
        Reader {
            layers: self,
            mistakes: Vec::new(),
        }
    }

    /// Where a key is written: the last layer that has it, or the file that should.
    fn place(&self, key: &str) -> String {
        // The environment is the last layer. What is in a list has no variable.
        if let Some(variable) = self.variable(key) {
            return variable.clone();
        }
        // Lists replace each other whole: what is in one is the matter of the last layer that has the list.
        let list = key.split('[').next().filter(|list| *list != key);
        for (file, text) in self.files.iter().rev() {
            let line = match list {
                Some(list) if line_of(text, list).is_some() => nearest_line(text, key),
                _ => line_of(text, key),
            };
            if let Some(line) = line {
                return format!("{}:{line}", file.display());
            }
        }
        // A key that is missing: name the nearest table that is there.
        match parent(key) {
            Some(parent) => self.place(parent),
            None => self
                .files
                .first()
                .map(|(file, _)| file.display().to_string())
                .unwrap_or_default(),
        }
    }

    /// The variable that sets a key, as it is spelt in the environment.
    fn variable(&self, key: &str) -> Option<&String> {
        let variable = format!("{ENVIRONMENT_PREFIX}__{}", key.replace('.', "__"));
        self.variables
            .iter()
            .find(|name| name.eq_ignore_ascii_case(&variable))
    }
}

/// What a key is in: `a[1]` of `a[1].b`, `a` of `a[1]`.
fn parent(key: &str) -> Option<&str> {
    key.rfind(['.', '[']).map(|end| &key[..end])
}

/// The line of a key, or of the nearest thing around it that is written.
fn nearest_line(text: &str, key: &str) -> Option<usize> {
    line_of(text, key).or_else(|| nearest_line(text, parent(key)?))
}

fn line_at(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())]
        .bytes()
        .filter(|b| *b == b'\n')
        .count()
        + 1
}

/// The line on which `key` (`a.b[2].c`) is written in `text`.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    let mut line = None;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        let (name, index) = match part.split_once('[') {
            Some((name, rest)) => (
                name,
                Some(rest.trim_end_matches(']').parse::<usize>().ok()?),
            ),
            None => (part, None),
        };
        let (found_key, mut value) = table.get_key_value(name)?;
        line = Some(line_at(text, found_key.span().start));
        if let Some(index) = index {
            value = value.get_ref().as_array()?.get(index)?;
            line = Some(line_at(text, value.span().start));
        }
        if parts.peek().is_some() {
            table = match value.get_ref() {
                DeValue::Table(table) => table,
                _ => return None,
            };
        }
    }
    line
}

/// Reads values by key and notes what is wrong.
pub struct Reader<'a> {
    layers: &'a Layers,
    mistakes: Vec<Mistake>,
}

impl<'a> Reader<'a> {
    /// The root table.
    pub fn root(&mut self) -> Table<'a> {
        table_of(&self.layers.values, String::new())
    }

    /// Notes a mistake at `key`.
    pub fn mistake(&mut self, key: &str, message: impl Into<String>) {
        let place = self.layers.place(key);
        self.mistakes.push(Mistake {
            place,
            key: key.to_owned(),
            message: message.into(),
        });
    }

    /// Whether a mistake at `key` is known already: what follows from it need not be told.
    pub fn noted(&self, key: &str) -> bool {
        self.mistakes.iter().any(|mistake| mistake.key == key)
    }

    /// The value if nothing was wrong, else all mistakes in the order of their places.
    pub fn finish<T>(mut self, value: T) -> Result<T, ConfigError> {
        if self.mistakes.is_empty() {
            return Ok(value);
        }
        self.mistakes
            .sort_by_cached_key(|mistake| file_and_line(&mistake.place));
        Err(ConfigError(self.mistakes))
    }
}

/// `file:12` in two, so that line 9 comes before line 10.
fn file_and_line(place: &str) -> (String, usize) {
    let parsed = place
        .rsplit_once(':')
        .and_then(|(file, line)| Some((file.to_owned(), line.parse().ok()?)));
    parsed.unwrap_or((place.to_owned(), 0))
}

/// A table being read. Keys not asked for are unknown keys.
pub struct Table<'a> {
    /// Where it is: `nodes[0]`; empty at the root.
    pub path: String,
    values: Option<&'a config::Map<String, Value>>,
    asked: BTreeSet<&'static str>,
}

fn table_of(value: &Value, path: String) -> Table<'_> {
    let values = match &value.kind {
        ValueKind::Table(table) => Some(table),
        _ => None,
    };
    Table {
        path,
        values,
        asked: BTreeSet::new(),
    }
}

impl<'a> Table<'a> {
    /// The path of a key in this table.
    pub fn at(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.asked.insert(key);
        self.values?
            .get(key)
            .filter(|value| value.kind != ValueKind::Nil)
    }

    /// A text, if the key is there.
    pub fn text(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Option<String> {
        let value = self.get(key)?;
        match &value.kind {
            ValueKind::String(text) => Some(text.clone()),
            // `version = 1` and an environment variable that looks like a number.
            ValueKind::I64(_) | ValueKind::U64(_) => Some(value.to_string()),
            other => {
                reader.mistake(
                    &self.at(key),
                    format!("must be a text, got {}", kind_name(other)),
                );
                None
            }
        }
    }

    /// A text that must be there.
    pub fn need(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Option<String> {
        if self.values.is_some_and(|values| !values.contains_key(key)) {
            self.asked.insert(key);
            reader.mistake(&self.at(key), "is missing");
            return None;
        }
        self.text(reader, key)
    }

    /// A whole number of at least 0, if the key is there.
    pub fn number(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Option<u64> {
        let value = self.get(key)?;
        match &value.kind {
            ValueKind::I64(number) if *number >= 0 => Some(*number as u64),
            ValueKind::U64(number) => Some(*number),
            ValueKind::I64(number) => {
                reader.mistake(
                    &self.at(key),
                    format!("must be a whole number of at least 0, got {number}"),
                );
                None
            }
            other => {
                reader.mistake(
                    &self.at(key),
                    format!("must be a whole number, got {}", kind_name(other)),
                );
                None
            }
        }
    }

    /// A number of bytes: `"80GiB"`, `"512MiB"` or a whole number.
    pub fn bytes(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Option<u64> {
        match &self.get(key)?.kind {
            ValueKind::String(text) => {
                let parsed = parse_bytes(text);
                if parsed.is_none() {
                    let message = format!(
                        "must be a size such as \"80GiB\", \"512MiB\" or a number of bytes, got \"{text}\""
                    );
                    reader.mistake(&self.at(key), message);
                }
                parsed
            }
            _ => self.number(reader, key),
        }
    }

    /// `true` or `false`, if the key is there.
    pub fn flag(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Option<bool> {
        match &self.get(key)?.kind {
            ValueKind::Boolean(flag) => Some(*flag),
            other => {
                reader.mistake(
                    &self.at(key),
                    format!("must be true or false, got {}", kind_name(other)),
                );
                None
            }
        }
    }

    /// A list of texts; empty when the key is not there.
    pub fn texts(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Vec<String> {
        let at = self.at(key);
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let ValueKind::Array(items) = &value.kind else {
            reader.mistake(
                &at,
                format!("must be a list of texts, got {}", kind_name(&value.kind)),
            );
            return Vec::new();
        };
        let mut texts = Vec::new();
        for (i, item) in items.iter().enumerate() {
            match &item.kind {
                ValueKind::String(text) => texts.push(text.clone()),
                other => reader.mistake(
                    &format!("{at}[{i}]"),
                    format!("must be a text, got {}", kind_name(other)),
                ),
            }
        }
        texts
    }

    /// A table; an empty one when the key is not there.
    pub fn table(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Option<Table<'a>> {
        let at = self.at(key);
        let value = self.get(key)?;
        let table = table_of(value, at.clone());
        if table.values.is_none() {
            reader.mistake(
                &at,
                format!("must be a table, got {}", kind_name(&value.kind)),
            );
            return None;
        }
        Some(table)
    }

    /// A list of tables; empty when the key is not there.
    pub fn tables(&mut self, reader: &mut Reader<'a>, key: &'static str) -> Vec<Table<'a>> {
        let at = self.at(key);
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let ValueKind::Array(items) = &value.kind else {
            reader.mistake(
                &at,
                format!(
                    "must be a list of tables ([[{at}]]), got {}",
                    kind_name(&value.kind)
                ),
            );
            return Vec::new();
        };
        let mut tables = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let table = table_of(item, format!("{at}[{i}]"));
            match table.values {
                Some(_) => tables.push(table),
                None => reader.mistake(
                    &table.path,
                    format!("must be a table, got {}", kind_name(&item.kind)),
                ),
            }
        }
        tables
    }

    /// Notes every key that was not asked for.
    pub fn close(self, reader: &mut Reader<'a>) {
        let Some(values) = self.values else { return };
        let mut unknown: Vec<&String> = values
            .keys()
            .filter(|key| !self.asked.contains(key.as_str()))
            .collect();
        unknown.sort();
        for key in unknown {
            let known: Vec<&str> = self.asked.iter().copied().collect();
            reader.mistake(
                &self.at(key),
                format!("unknown key; known here: {}", known.join(", ")),
            );
        }
    }
}

fn kind_name(kind: &ValueKind) -> &'static str {
    match kind {
        ValueKind::Nil => "nothing",
        ValueKind::Boolean(_) => "true or false",
        ValueKind::I64(_) | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_) => {
            "a whole number"
        }
        ValueKind::Float(_) => "a number with a fraction",
        ValueKind::String(_) => "a text",
        ValueKind::Table(_) => "a table",
        ValueKind::Array(_) => "a list",
    }
}

/// Bytes of `"16GiB"`, `"2 GB"`, `"512MiB"`, `"4096"`.
fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    number.checked_mul(unit)
}
