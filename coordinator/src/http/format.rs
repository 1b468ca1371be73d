//! What an answer must be: `response_format`, and the fields that other servers have for the same.
//!
//! Pure. Whether a schema, an expression or a grammar can be enforced is the worker's to say, who has the vocabulary.

use common::request::Constraint;
use serde_json::Value;

use super::json::{Field, FieldError, Fields};

/// Longest schema, expression or grammar, in bytes.
const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Most texts to choose from.
const CHOICES_MAX: usize = 1024;

/// What a body says of its answers' form; once at most.
pub(super) fn constraint(fields: &Fields<'_>) -> Result<Option<Constraint>, FieldError> {
    let mut found: Option<(String, Constraint)> = None;
    let mut take = |field: &Field<'_>, constraint| match &found {
        Some((first, _)) => Err(field.refuse(format!(
            "cannot stand beside {first}: an answer has one form"
        ))),
        None => {
            found = Some((field.path.clone(), constraint));
            Ok(())
        }
    };
    if let Some(field) = fields.get("response_format")
        && let Some(constraint) = response_format(&field)?
    {
        take(&field, constraint)?;
    }
    // vLLM's names, old and new, and the plain ones.
    let ways: [(&str, Way); 7] = [
        ("guided_json", json),
        ("guided_regex", regex),
        ("regex", regex),
        ("guided_choice", choice),
        ("guided_grammar", grammar),
        ("grammar", grammar),
        ("structured_outputs", structured_outputs),
    ];
    for (key, way) in ways {
        if let Some(field) = fields.get(key) {
            take(&field, way(&field)?)?;
        }
    }
    Ok(found.map(|(_, constraint)| constraint))
}

/// How a field is read.
type Way = fn(&Field<'_>) -> Result<Constraint, FieldError>;

/// OpenAI's.
fn response_format(field: &Field<'_>) -> Result<Option<Constraint>, FieldError> {
    let fields = field.fields()?;
    let kind = fields.need("type")?;
    match kind.text()? {
        "text" => Ok(None),
        "json_object" => Ok(Some(Constraint::JsonObject)),
        "json_schema" => {
            let schema = fields.need("json_schema")?.fields()?;
            let name = schema.need("name")?;
            if !is_name(name.text()?) {
                return Err(name.refuse(NAME_RULE));
            }
            // Enforced in any case.
            schema.flag("strict")?;
            json(&schema.need("schema")?).map(Some)
        }
        _ => Err(kind.wrong("\"text\", \"json_object\" or \"json_schema\"")),
    }
}

/// vLLM's object of one of these keys.
fn structured_outputs(field: &Field<'_>) -> Result<Constraint, FieldError> {
    let fields = field.fields()?;
    let ways: [(&str, Way); 5] = [
        ("json", json),
        ("regex", regex),
        ("choice", choice),
        ("grammar", grammar),
        ("json_object", json_object),
    ];
    let mut given = ways
        .iter()
        .filter_map(|(key, way)| Some((fields.get(key)?, way)));
    let keys = "json, regex, choice, grammar or json_object";
    let (first, way) = given
        .next()
        .ok_or_else(|| field.refuse(format!("must have one of {keys}")))?;
    match given.next() {
        Some((second, _)) => Err(second.refuse(format!(
            "cannot stand beside {}: give one of {keys}",
            first.path
        ))),
        None => way(&first),
    }
}

/// A schema, as an object or as its text.
fn json(field: &Field<'_>) -> Result<Constraint, FieldError> {
    let text = match field.value {
        Value::Object(_) => field.value.to_string(),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Object(_)) => text.clone(),
            _ => return Err(field.refuse("is not the text of a JSON schema: it must be an object")),
        },
        _ => return Err(field.wrong("a JSON schema")),
    };
    bounded(field, text).map(Constraint::JsonSchema)
}

fn json_object(field: &Field<'_>) -> Result<Constraint, FieldError> {
    if field.flag()? {
        Ok(Constraint::JsonObject)
    } else {
        Err(field.refuse("must be true, or left out"))
    }
}

fn regex(field: &Field<'_>) -> Result<Constraint, FieldError> {
    bounded(field, field.text()?.to_owned()).map(Constraint::Regex)
}

fn grammar(field: &Field<'_>) -> Result<Constraint, FieldError> {
    bounded(field, field.text()?.to_owned()).map(Constraint::Grammar)
}

/// One of several texts: a grammar of their literals.
fn choice(field: &Field<'_>) -> Result<Constraint, FieldError> {
    let values = field.list()?;
    if values.is_empty() || values.len() > CHOICES_MAX {
        return Err(field.refuse(format!(
            "must have 1 to {CHOICES_MAX} texts, got {}",
            values.len()
        )));
    }
    let mut literals = Vec::with_capacity(values.len());
    for (i, value) in values.iter().enumerate() {
        let item = field.item(i, value);
        if item.text()?.is_empty() {
            return Err(item.refuse("is empty: an answer has at least one character"));
        }
        literals.push(value.to_string());
    }
    bounded(field, format!("start: {}", literals.join(" | "))).map(Constraint::Grammar)
}

fn bounded(field: &Field<'_>, text: String) -> Result<String, FieldError> {
    if text.len() > SOURCE_BYTES_MAX {
        return Err(field.refuse(format!(
            "must be at most {SOURCE_BYTES_MAX} bytes long, got {}",
            text.len()
        )));
    }
    Ok(text)
}

/// What is said of a name that is none.
pub(super) const NAME_RULE: &str = "must be 1 to 64 letters, digits, '_' or '-'";

/// Whether a schema or a function may be called so.
pub(super) fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    (1..=64).contains(&text.len()) && text.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<Option<Constraint>, FieldError> {
        constraint(&Fields::of("", body.as_object().unwrap()))
    }

    #[test]
    fn each_spelling_says_the_same() {
        let schema = || Constraint::JsonSchema(r#"{"type":"object","b":1,"a":2}"#.into());
        let value = json!({"type": "object", "b": 1, "a": 2});
        let regex = || Constraint::Regex("a+".into());
        let choice = || Constraint::Grammar(r#"start: "a" | "\"é""#.into());
        let lark = || Constraint::Grammar("start: \"x\"".into());
        let table = [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (
                json!({"response_format": {"type": "json_object"}}),
                Some(Constraint::JsonObject),
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": true, "schema": value}}}),
                Some(schema()),
            ),
            (json!({"guided_json": value}), Some(schema())),
            (json!({"guided_json": value.to_string()}), Some(schema())),
            (json!({"regex": "a+"}), Some(regex())),
            (json!({"guided_regex": "a+"}), Some(regex())),
            (json!({"guided_choice": ["a", "\"é"]}), Some(choice())),
            (json!({"grammar": "start: \"x\""}), Some(lark())),
            (json!({"guided_grammar": "start: \"x\""}), Some(lark())),
            (
                json!({"structured_outputs": {"json": value}}),
                Some(schema()),
            ),
            (
                json!({"structured_outputs": {"regex": "a+"}}),
                Some(regex()),
            ),
            (
                json!({"structured_outputs": {"choice": ["a", "\"é"]}}),
                Some(choice()),
            ),
            (
                json!({"structured_outputs": {"json_object": true}}),
                Some(Constraint::JsonObject),
            ),
        ];
        for (body, expected) in table {
            assert_eq!(read(body.clone()).unwrap(), expected, "{body}");
        }
    }

    #[test]
    fn every_mistake_is_told_with_its_field() {
        let of_schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": schema}});
        let table = [
            (
                json!({"response_format": "json"}),
                "response_format must be an object",
            ),
            (
                json!({"response_format": {}}),
                "response_format.type is missing",
            ),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type must be \"text\", \"json_object\" or \"json_schema\", got \"xml\"",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema is missing",
            ),
            (
                of_schema(json!({"schema": {}})),
                "response_format.json_schema.name is missing",
            ),
            (
                of_schema(json!({"name": "a b", "schema": {}})),
                "response_format.json_schema.name must be 1 to 64 letters",
            ),
            (
                of_schema(json!({"name": "a"})),
                "response_format.json_schema.schema is missing",
            ),
            (
                of_schema(json!({"name": "a", "schema": [1]})),
                "response_format.json_schema.schema must be a JSON schema, got a list",
            ),
            (
                json!({"guided_json": "{"}),
                "guided_json is not the text of a JSON schema",
            ),
            (json!({"regex": 5}), "regex must be a string"),
            (
                json!({"guided_choice": []}),
                "guided_choice must have 1 to 1024 texts, got 0",
            ),
            (
                json!({"guided_choice": ["a", ""]}),
                "guided_choice[1] is empty",
            ),
            (
                json!({"grammar": "x".repeat(65537)}),
                "grammar must be at most 65536 bytes long",
            ),
            (
                json!({"structured_outputs": {}}),
                "structured_outputs must have one of json, regex",
            ),
            (
                json!({"structured_outputs": {"json": {}, "regex": "a"}}),
                "structured_outputs.regex cannot stand beside structured_outputs.json",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
                "guided_regex cannot stand beside response_format: an answer has one form",
            ),
        ];
        for (body, expected) in table {
            let error = read(body).expect_err(expected);
            assert!(
                error.message.contains(expected),
                "expected {expected:?}, got {:?}",
                error.message
            );
        }
    }
}
