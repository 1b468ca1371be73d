//! Typed reading of JSON bodies: every mistake names the field's path, what is allowed and what was given.
//!
//! Knows no field of the API; `null` means absent everywhere.

use std::ops::RangeInclusive;
use std::time::Duration;

use actix_web::dev::Payload;
use actix_web::error::PayloadError;
use actix_web::web::{Bytes, Data};
use actix_web::{FromRequest, HttpRequest};
use futures::future::LocalBoxFuture;
use serde_json::Value;

use super::HttpState;
use super::error::Fault;

/// Longest wait for a body once its head is here: a sender that drips holds a connection and memory.
const BODY_READ_MAX: Duration = Duration::from_secs(60);

/// Most values in a body. A value takes tens of bytes of memory for as few as two in the body; this is as many token
/// ids as fill the longest contexts many times over.
const VALUES_MAX: usize = 1 << 20;

/// A JSON object.
pub(super) type Object = serde_json::Map<String, Value>;

/// A body that is a JSON object, whatever its content type says: the seed's own client misspells that header.
pub(super) struct JsonBody(pub Object);

impl FromRequest for JsonBody {
    type Error = Fault;
    type Future = LocalBoxFuture<'static, Result<Self, Fault>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let bytes_max = request
            .app_data::<Data<HttpState>>()
            .map_or(0, |state| state.limits.body_bytes_max);
        let bytes = Bytes::from_request(request, payload);
        Box::pin(async move {
            let bytes = match tokio::time::timeout(BODY_READ_MAX, bytes).await {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(error)) => return Err(payload_fault(&error, bytes_max)),
                Err(_) => return Err(Fault::body_timeout(BODY_READ_MAX.as_secs())),
            };
            parse_object(&bytes).map(JsonBody)
        })
    }
}

fn payload_fault(error: &actix_web::Error, bytes_max: u64) -> Fault {
    match error.as_error::<PayloadError>() {
        Some(PayloadError::Overflow) => Fault::too_large(bytes_max),
        _ => Fault::malformed(format!("the body could not be read: {error}")),
    }
}

/// Reads an object out of a body's bytes; the error says where JSON ends to be JSON.
pub(super) fn parse_object(bytes: &[u8]) -> Result<Object, Fault> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(Fault::malformed(
            "the body is empty; it must be a JSON object",
        ));
    }
    if values_at_most(bytes) > VALUES_MAX {
        let message =
            format!("the body has more than {VALUES_MAX} JSON values: send several requests");
        return Err(Fault::bad_request(FieldError::whole(message)));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            let message = format!("the body must be a JSON object, got {}", shown(&other));
            Err(Fault::bad_request(FieldError::whole(message)))
        }
        Err(error) => Err(Fault::malformed(format!(
            "the body is not valid JSON: {error}"
        ))),
    }
}

/// An upper bound of the values in a JSON text, without parsing it: each follows a bracket, a brace or a comma.
fn values_at_most(bytes: &[u8]) -> usize {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' | b',' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}

/// A field that is missing or wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FieldError {
    /// The field's path, when it is about one.
    pub field: Option<String>,
    pub message: String,
}

impl FieldError {
    /// About one field; the message is `path why`.
    pub fn at(path: &str, why: impl std::fmt::Display) -> Self {
        FieldError {
            field: Some(path.to_owned()),
            message: format!("{path} {why}"),
        }
    }

    /// About the body as a whole.
    pub fn whole(message: impl Into<String>) -> Self {
        FieldError {
            field: None,
            message: message.into(),
        }
    }
}

/// An object's fields, or those of several objects of which the first that has a field wins.
pub(super) struct Fields<'a> {
    layers: Vec<(String, &'a Object)>,
}

impl<'a> Fields<'a> {
    /// The fields of the object at `path`; the body itself is at "".
    pub fn of(path: impl Into<String>, object: &'a Object) -> Self {
        Fields {
            layers: vec![(path.into(), object)],
        }
    }

    /// Takes from this object what the earlier ones do not have.
    pub fn or(mut self, path: impl Into<String>, object: &'a Object) -> Self {
        self.layers.push((path.into(), object));
        self
    }

    pub fn get(&self, key: &str) -> Option<Field<'a>> {
        self.layers.iter().find_map(|(path, object)| {
            let value = object.get(key).filter(|value| !value.is_null())?;
            Some(Field {
                path: join(path, key),
                value,
            })
        })
    }

    pub fn need(&self, key: &str) -> Result<Field<'a>, FieldError> {
        let missing = || {
            let path = self.layers.first().map_or("", |(path, _)| path);
            FieldError::at(&join(path, key), "is missing")
        };
        self.get(key).ok_or_else(missing)
    }

    /// The first of these keys that is there; the error names the first one.
    pub fn need_any(&self, keys: [&str; 2]) -> Result<Field<'a>, FieldError> {
        keys.iter()
            .find_map(|key| self.get(key))
            .map_or_else(|| self.need(keys[0]), Ok)
    }

    /// A flag, false when absent.
    pub fn flag(&self, key: &str) -> Result<bool, FieldError> {
        self.get(key).map_or(Ok(false), |field| field.flag())
    }
}

/// The path of a key in the object at `path`.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// A value and where it stands.
#[derive(Clone)]
pub(super) struct Field<'a> {
    pub path: String,
    pub value: &'a Value,
}

impl<'a> Field<'a> {
    pub fn text(&self) -> Result<&'a str, FieldError> {
        self.value.as_str().ok_or_else(|| self.wrong("a string"))
    }

    /// A boolean, or its name as old notebooks send it.
    pub fn flag(&self) -> Result<bool, FieldError> {
        match self.value {
            Value::Bool(flag) => Ok(*flag),
            Value::String(text) if text.eq_ignore_ascii_case("true") => Ok(true),
            Value::String(text) if text.eq_ignore_ascii_case("false") => Ok(false),
            _ => Err(self.wrong("true or false")),
        }
    }

    /// A number. One that f32 cannot hold becomes infinite, which no range allows.
    pub fn number(&self) -> Result<f32, FieldError> {
        let number = self.value.as_f64().ok_or_else(|| self.wrong("a number"))?;
        Ok(number as f32)
    }

    /// A whole number; `10.0` is one.
    pub fn whole(&self, allowed: RangeInclusive<i128>) -> Result<i128, FieldError> {
        match whole(self.value) {
            Some(number) if allowed.contains(&number) => Ok(number),
            Some(_) | None => {
                let (least, most) = (allowed.start(), allowed.end());
                Err(self.wrong(&format!("a whole number between {least} and {most}")))
            }
        }
    }

    pub fn list(&self) -> Result<&'a [Value], FieldError> {
        match self.value {
            Value::Array(values) => Ok(values),
            _ => Err(self.wrong("a list")),
        }
    }

    pub fn object(&self) -> Result<&'a Object, FieldError> {
        self.value
            .as_object()
            .ok_or_else(|| self.wrong("an object"))
    }

    /// The fields of the object that this is.
    pub fn fields(&self) -> Result<Fields<'a>, FieldError> {
        Ok(Fields::of(self.path.clone(), self.object()?))
    }

    /// The i-th value of the list that this is.
    pub fn item(&self, i: usize, value: &'a Value) -> Field<'a> {
        Field {
            path: format!("{}[{i}]", self.path),
            value,
        }
    }

    /// `path must be ..., got ...`.
    pub fn wrong(&self, allowed: &str) -> FieldError {
        self.refuse(format!("must be {allowed}, got {}", shown(self.value)))
    }

    /// `path why`.
    pub fn refuse(&self, why: impl std::fmt::Display) -> FieldError {
        FieldError::at(&self.path, why)
    }
}

/// The value as a whole number, if it is one.
pub(super) fn whole(value: &Value) -> Option<i128> {
    let Value::Number(number) = value else {
        return None;
    };
    if let Some(n) = number.as_u64() {
        return Some(i128::from(n));
    }
    if let Some(n) = number.as_i64() {
        return Some(i128::from(n));
    }
    // Beyond 2^53 a float no longer says which whole number was meant, but it still says "huge".
    number
        .as_f64()
        .filter(|n| n.fract() == 0.0)
        .map(|n| n as i128)
}

/// A value in an error message: short, whatever was sent.
pub(super) fn shown(value: &Value) -> String {
    const CHARS_MAX: usize = 40;
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.chars().count() > CHARS_MAX => {
            format!("{:?}...", text.chars().take(CHARS_MAX).collect::<String>())
        }
        Value::String(text) => format!("{text:?}"),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Object {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn malformed_json_is_told_with_its_position() {
        let table: [(&[u8], &str); 6] = [
            (b"{\"a\": 1,\n \"b\": nope}", "line 2 column 8"),
            (b"{\"a\": NaN}", "line 1 column 7"),
            (b"{\"a\": 1e999}", "number out of range"),
            (b"{\"a\": \"\xff\"}", "invalid unicode"),
            (b"  \n", "the body is empty"),
            (b"[1]", "must be a JSON object, got a list"),
        ];
        for (bytes, expected) in table {
            let error = parse_object(bytes).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        assert!(
            parse_object(&deep)
                .unwrap_err()
                .message
                .contains("recursion limit")
        );
    }

    #[test]
    fn a_body_of_too_many_values_is_refused_before_it_is_parsed() {
        for (text, values) in [
            ("{}", 2),
            (r#"{"a": [1, 2]}"#, 4),
            (r#"{"a,[": "\",[\\"}"#, 2),
        ] {
            assert_eq!(values_at_most(text.as_bytes()), values, "{text}");
        }
        let body = |count: usize| format!("{{\"prompt\":[{}1]}}", "1,".repeat(count));
        let fault = parse_object(body(VALUES_MAX).as_bytes()).unwrap_err();
        assert!(
            fault.message.contains("more than 1048576 JSON values"),
            "{fault}"
        );
        assert!(parse_object(body(VALUES_MAX - 4).as_bytes()).is_ok());
    }

    #[test]
    fn wrong_types_are_told_with_path_and_value() {
        let body = object(
            json!({"a": {"b": ["x", 5]}, "flag": "maybe", "n": 1.5, "long": "y".repeat(99)}),
        );
        let fields = Fields::of("", &body);
        let list = fields
            .need("a")
            .unwrap()
            .fields()
            .unwrap()
            .need("b")
            .unwrap();
        let item = list.item(1, &list.list().unwrap()[1]);
        assert_eq!(
            item.text().unwrap_err().message,
            "a.b[1] must be a string, got 5"
        );
        assert_eq!(item.text().unwrap_err().field.as_deref(), Some("a.b[1]"));
        let flag = fields.flag("flag").unwrap_err().message;
        assert_eq!(flag, "flag must be true or false, got \"maybe\"");
        let n = fields.need("n").unwrap().whole(0..=9).unwrap_err().message;
        assert_eq!(n, "n must be a whole number between 0 and 9, got 1.5");
        assert!(
            fields
                .need("long")
                .unwrap()
                .number()
                .unwrap_err()
                .message
                .len()
                < 100
        );
        assert_eq!(
            fields.need("none").err().unwrap().message,
            "none is missing"
        );
    }

    #[test]
    fn null_is_absent_and_the_first_layer_wins() {
        let (upper, lower) = (
            object(json!({"a": null, "b": 1})),
            object(json!({"a": 2, "b": 3})),
        );
        let fields = Fields::of("params", &upper).or("row", &lower);
        assert_eq!(fields.need("a").unwrap().path, "row.a");
        assert_eq!(fields.need("b").unwrap().path, "params.b");
    }

    #[test]
    fn whole_numbers_come_in_many_spellings() {
        for (value, expected) in [
            (json!(10.0), Some(10)),
            (json!(-3), Some(-3)),
            (json!(u64::MAX), Some(i128::from(u64::MAX))),
            (json!(1e30), Some(1e30 as i128)),
            (json!(1e300), Some(i128::MAX)),
            (json!(0.5), None),
            (json!("1"), None),
            (json!(true), None),
        ] {
            assert_eq!(whole(&value), expected, "{value}");
        }
    }
}
