//! The four input formats of Databricks' model serving as checked requests, one per prompt and in order.
//!
//! Pure. Parameters come from `params`, and from columns of the same names beside `prompt`; `params` wins.

use common::request::{Generate, Prompt};
use serde_json::Value;

use super::json::{Field, FieldError, Fields, Object};
use super::sampling::{NAMES, Options, PREDICTIONS, check_size};

/// Names that a message shows of those that were sent.
const NAMES_SHOWN: usize = 8;
/// The column that holds prompts.
const PROMPT: &str = "prompt";

/// A prompt and the parameters beside it.
struct Row {
    path: String,
    prompt: String,
    beside: Object,
}

/// The requests of a body in the format of `key`.
pub(super) fn predictions(
    body: &Object,
    key: &str,
    draw_seed: &mut dyn FnMut() -> u64,
) -> Result<Vec<Generate>, FieldError> {
    let fields = Fields::of("", body);
    if fields.flag("stream")? {
        let why = format!("needs 'messages' or 'prompt': answers to '{key}' come whole");
        return Err(FieldError::at("stream", why));
    }
    let input = fields.need(key)?;
    let rows = match key {
        "dataframe_split" => split(&input)?,
        "dataframe_records" => records(&input)?,
        _ => free(&input)?,
    };
    let none = Object::new();
    let params = fields
        .get("params")
        .map_or(Ok(&none), |field| field.object())?;
    let mut prompts = Vec::with_capacity(rows.len());
    for row in rows {
        let fields = Fields::of("params", params).or(row.path, &row.beside);
        let options = Options::read(&fields, &PREDICTIONS)?;
        prompts.push(options.generate(Prompt::Text(row.prompt), draw_seed));
    }
    let choices = prompts
        .iter()
        .map(|prompt| prompt.candidates as usize)
        .sum();
    check_size(prompts.len(), choices, key)?;
    Ok(prompts)
}

/// `{"columns": [...], "data": [[...], ...]}`, as pandas writes it; `index` says nothing here.
fn split(input: &Field<'_>) -> Result<Vec<Row>, FieldError> {
    let fields = input.fields()?;
    let columns = fields.need("columns")?;
    let mut names = Vec::new();
    for (i, value) in columns.list()?.iter().enumerate() {
        // Unnamed columns are numbers.
        names.push(match value {
            Value::Number(number) => number.to_string(),
            _ => columns.item(i, value).text()?.to_owned(),
        });
    }
    let Some(prompt_at) = names.iter().position(|name| name == PROMPT) else {
        let shown = &names[..names.len().min(NAMES_SHOWN)];
        let more = if shown.len() < names.len() {
            " and more"
        } else {
            ""
        };
        let why = format!("must have a column named \"{PROMPT}\", got {shown:?}{more}");
        return Err(columns.refuse(why));
    };
    // Which of two such columns counts would be a guess.
    let means = |name: &String| name == PROMPT || is_parameter(name);
    if let Some((_, twice)) = names
        .iter()
        .enumerate()
        .find(|(i, name)| means(name) && names[..*i].contains(name))
    {
        return Err(columns.refuse(format!("has more than one column named \"{twice}\"")));
    }
    let data = fields.need("data")?;
    let mut rows = Vec::new();
    for (i, value) in bounded(&data)?.iter().enumerate() {
        let row = data.item(i, value);
        let cells = row.list()?;
        if cells.len() != names.len() {
            let why = format!(
                "must have {} values, one per column, got {}",
                names.len(),
                cells.len()
            );
            return Err(row.refuse(why));
        }
        let prompt = row.item(prompt_at, &cells[prompt_at]).text()?.to_owned();
        let beside = names.iter().cloned().zip(cells.iter().cloned());
        let beside = beside.filter(|(name, _)| is_parameter(name)).collect();
        rows.push(Row {
            path: row.path,
            prompt,
            beside,
        });
    }
    Ok(rows)
}

/// `[{"prompt": ...}, ...]`.
fn records(input: &Field<'_>) -> Result<Vec<Row>, FieldError> {
    let record = |(i, value)| record(input.item(i, value));
    bounded(input)?.iter().enumerate().map(record).collect()
}

/// One `{"prompt": ...}`.
fn record(field: Field<'_>) -> Result<Row, FieldError> {
    let prompt = field.fields()?.need(PROMPT)?.text()?.to_owned();
    let beside = field
        .object()?
        .iter()
        .filter(|(name, _)| is_parameter(name));
    let beside = beside
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    Ok(Row {
        path: field.path,
        prompt,
        beside,
    })
}

/// `instances` and `inputs`: a prompt, a list of prompts or records, or one record whose values may be columns.
fn free(input: &Field<'_>) -> Result<Vec<Row>, FieldError> {
    match input.value {
        Value::String(_) => Ok(vec![plain(input.clone())?]),
        Value::Array(_) => {
            let row = |(i, value): (usize, &Value)| {
                let item = input.item(i, value);
                if value.is_object() {
                    record(item)
                } else {
                    plain(item)
                }
            };
            bounded(input)?.iter().enumerate().map(row).collect()
        }
        Value::Object(_) => columns(input),
        _ => Err(input.wrong("a prompt, a list of prompts, or an object with a prompt")),
    }
}

/// One prompt without anything beside it.
fn plain(field: Field<'_>) -> Result<Row, FieldError> {
    let prompt = field.text()?.to_owned();
    Ok(Row {
        path: field.path,
        prompt,
        beside: Object::new(),
    })
}

/// `{"prompt": "..."}` or `{"prompt": ["...", ...]}`. Beside a list of prompts a list is one value per prompt, and
/// anything else holds for all of them, as does a plain list of stop strings.
fn columns(input: &Field<'_>) -> Result<Vec<Row>, FieldError> {
    let fields = input.fields()?;
    let prompt = fields.need(PROMPT)?;
    if !prompt.value.is_array() {
        return record(input.clone()).map(|row| vec![row]);
    }
    let prompts = bounded(&prompt)?;
    let mut rows = Vec::with_capacity(prompts.len());
    for (i, value) in prompts.iter().enumerate() {
        let path = format!("{}[{i}]", input.path);
        rows.push(Row {
            path,
            ..plain(prompt.item(i, value))?
        });
    }
    for (name, value) in input
        .object()?
        .iter()
        .filter(|(name, _)| is_parameter(name))
    {
        let column = value
            .as_array()
            .filter(|values| name != "stop" || !values.iter().all(Value::is_string));
        if let Some(values) = column.filter(|values| values.len() != rows.len()) {
            let why = format!("has {} values for {} prompts", values.len(), rows.len());
            return Err(fields.need(name)?.refuse(why));
        }
        for (i, row) in rows.iter_mut().enumerate() {
            let value = column.map_or(value, |values| &values[i]);
            row.beside.insert(name.clone(), value.clone());
        }
    }
    Ok(rows)
}

/// A list of prompts; too long a one is refused before anything is copied out of it.
fn bounded<'a>(field: &Field<'a>) -> Result<&'a [Value], FieldError> {
    let values = field.list()?;
    check_size(values.len(), 0, &field.path)?;
    Ok(values)
}

fn is_parameter(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Which single key of `known` the body has; the error names all that were found.
pub(super) fn only_key<'k>(body: &Object, known: &[&'k str]) -> Result<&'k str, FieldError> {
    let found: Vec<&str> = known
        .iter()
        .copied()
        .filter(|key| body.get(*key).is_some_and(|value| !value.is_null()))
        .collect();
    match found[..] {
        [only] => Ok(only),
        [] => {
            if let Some(null) = known.iter().find(|key| body.contains_key(**key)) {
                return Err(FieldError::at(
                    null,
                    "is null, which is the same as missing: give it a value",
                ));
            }
            let keys: Vec<&String> = body.keys().take(8).collect();
            let got = if keys.is_empty() {
                "an empty object".into()
            } else {
                format!("{keys:?}")
            };
            let known = known.join(", ");
            Err(FieldError::whole(format!(
                "the body must have exactly one of {known}; got {got}"
            )))
        }
        [_, second, ..] => {
            let why = format!(
                "cannot stand beside another input: the body has {}, give one",
                found.join(", ")
            );
            Err(FieldError::at(second, why))
        }
    }
}

#[cfg(test)]
mod tests;
