//! JSON while it streams: a call's object character by character, strictly, and where its parts lie.
//!
//! Pure. What is no JSON is known at the first character that makes it so, so that nothing is held back in vain.

use std::ops::Range;

/// Deepest nesting of a call's arguments.
const DEPTH_MAX: usize = 128;

/// The text is no JSON, or no call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bad;

/// Where in the syntax the next character stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Value,
    FirstValue,
    Key,
    FirstKey,
    Colon,
    After,
    Text { key: bool },
    Escape { key: bool },
    Hex { key: bool, left: u8 },
    Number(Number),
    Word(&'static str),
}

/// How far a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// What a character of the outer object's own level was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Other,
    KeyEnd,
    ValueBegin,
    /// Of a text, an object or a list; other values end before the next character.
    ValueEnd,
    Done,
}

/// One object.
#[derive(Debug, Clone)]
struct ObjectScan {
    /// True for an object, false for a list.
    stack: Vec<bool>,
    at: At,
}

impl ObjectScan {
    fn new() -> ObjectScan {
        ObjectScan {
            stack: Vec::new(),
            at: At::Value,
        }
    }

    fn take(&mut self, c: char) -> Result<Event, Bad> {
        let outer = self.stack.len() == 1;
        match self.at {
            At::Text { key } => match c {
                '"' => {
                    self.at = if key { At::Colon } else { At::After };
                    return Ok(match (outer, key) {
                        (true, true) => Event::KeyEnd,
                        (true, false) => Event::ValueEnd,
                        _ => Event::Other,
                    });
                }
                '\\' => self.at = At::Escape { key },
                c if c < ' ' => return Err(Bad),
                _ => {}
            },
            At::Escape { key } => {
                self.at = match c {
                    'u' => At::Hex { key, left: 4 },
                    '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => At::Text { key },
                    _ => return Err(Bad),
                }
            }
            At::Hex { key, left } => {
                self.at = match (c.is_ascii_hexdigit(), left) {
                    (false, _) => return Err(Bad),
                    (true, 1) => At::Text { key },
                    (true, left) => At::Hex {
                        key,
                        left: left - 1,
                    },
                }
            }
            At::Word(rest) => {
                let rest = rest.strip_prefix(c).ok_or(Bad)?;
                self.at = if rest.is_empty() {
                    At::After
                } else {
                    At::Word(rest)
                };
            }
            At::Number(number) => match number_after(number, c) {
                Some(number) => self.at = At::Number(number),
                None if number_may_end(number) => {
                    self.at = At::After;
                    return self.take(c);
                }
                None => return Err(Bad),
            },
            _ if matches!(c, ' ' | '\n' | '\r' | '\t') => {}
            At::Colon => self.at = if c == ':' { At::Value } else { return Err(Bad) },
            At::Key | At::FirstKey if c == '"' => self.at = At::Text { key: true },
            At::FirstKey if c == '}' => return self.close(true),
            At::FirstValue if c == ']' => return self.close(false),
            At::Value | At::FirstValue => {
                self.begin(c)?;
                return Ok(if outer {
                    Event::ValueBegin
                } else {
                    Event::Other
                });
            }
            At::After => match (c, self.stack.last()) {
                (',', Some(true)) => self.at = At::Key,
                (',', Some(false)) => self.at = At::Value,
                ('}', Some(true)) => return self.close(true),
                (']', Some(false)) => return self.close(false),
                _ => return Err(Bad),
            },
            At::Key | At::FirstKey => return Err(Bad),
        }
        Ok(Event::Other)
    }

    fn begin(&mut self, c: char) -> Result<(), Bad> {
        self.at = match c {
            '{' | '[' if self.stack.len() >= DEPTH_MAX => return Err(Bad),
            '{' => {
                self.stack.push(true);
                At::FirstKey
            }
            // The outermost value is an object.
            _ if self.stack.is_empty() => return Err(Bad),
            '[' => {
                self.stack.push(false);
                At::FirstValue
            }
            '"' => At::Text { key: false },
            't' => At::Word("rue"),
            'f' => At::Word("alse"),
            'n' => At::Word("ull"),
            '-' => At::Number(Number::Minus),
            '0' => At::Number(Number::Zero),
            '1'..='9' => At::Number(Number::Whole),
            _ => return Err(Bad),
        };
        Ok(())
    }

    fn close(&mut self, object: bool) -> Result<Event, Bad> {
        if self.stack.pop() != Some(object) {
            return Err(Bad);
        }
        self.at = At::After;
        Ok(match self.stack.len() {
            0 => Event::Done,
            1 => Event::ValueEnd,
            _ => Event::Other,
        })
    }
}

fn number_after(number: Number, c: char) -> Option<Number> {
    let digit = c.is_ascii_digit();
    Some(match (number, c) {
        (Number::Minus, '0') => Number::Zero,
        (Number::Minus | Number::Whole, _) if digit => Number::Whole,
        (Number::Zero | Number::Whole, '.') => Number::Point,
        (Number::Point | Number::Fraction, _) if digit => Number::Fraction,
        (Number::Zero | Number::Whole | Number::Fraction, 'e' | 'E') => Number::Exponent,
        (Number::Exponent, '+' | '-') => Number::ExponentSign,
        (Number::Exponent | Number::ExponentSign | Number::ExponentDigits, _) if digit => {
            Number::ExponentDigits
        }
        _ => return None,
    })
}

fn number_may_end(number: Number) -> bool {
    matches!(
        number,
        Number::Zero | Number::Whole | Number::Fraction | Number::ExponentDigits
    )
}

/// Keys that a call's object may have. Their values but for name and arguments say nothing here.
const KEYS: [&str; 5] = ["name", "arguments", "parameters", "type", "id"];

/// A call's object as far as it has come.
#[derive(Debug, Clone)]
pub struct CallScan {
    json: ObjectScan,
    /// All of it.
    pub text: String,
    /// Where the key or value at hand begins.
    begin: usize,
    /// Index in [`KEYS`] of the value at hand.
    key: usize,
    seen: [bool; KEYS.len()],
    /// The function's name.
    pub name: Option<String>,
    arguments: Option<Range<usize>>,
    /// The arguments' value is being read.
    in_arguments: bool,
}

impl CallScan {
    /// A call that begins with a brace.
    pub fn begun() -> CallScan {
        let mut scan = CallScan {
            json: ObjectScan::new(),
            text: String::new(),
            begin: 0,
            key: 0,
            seen: [false; KEYS.len()],
            name: None,
            arguments: None,
            in_arguments: false,
        };
        let brace = scan.take('{');
        debug_assert_eq!(brace, Ok(false));
        scan
    }

    /// Takes a character, which is then part of the text; true when the object is complete and a call.
    ///
    /// # Errors
    /// [`Bad`]: whatever follows, this is no call.
    pub fn take(&mut self, c: char) -> Result<bool, Bad> {
        let at = self.text.len();
        self.text.push(c);
        let was_key = matches!(self.json.at, At::Key | At::FirstKey);
        match self.json.take(c)? {
            Event::Other if was_key && c == '"' && self.json.stack.len() == 1 => {
                self.begin = at + 1;
            }
            Event::Other => {}
            Event::KeyEnd => {
                let key = &self.text[self.begin..at];
                self.key = KEYS.iter().position(|known| *known == key).ok_or(Bad)?;
                if std::mem::replace(&mut self.seen[self.key], true) {
                    return Err(Bad);
                }
            }
            Event::ValueBegin => {
                self.begin = at;
                match (KEYS[self.key], c) {
                    ("name", '"') => {}
                    ("arguments" | "parameters", '{')
                        if !self.in_arguments && self.arguments.is_none() =>
                    {
                        self.in_arguments = true;
                    }
                    ("name" | "arguments" | "parameters", _) => return Err(Bad),
                    _ => {}
                }
            }
            Event::ValueEnd => match KEYS[self.key] {
                "name" => {
                    let name = serde_json::from_str(&self.text[self.begin..]).map_err(|_| Bad)?;
                    self.name = Some(name);
                }
                "arguments" | "parameters" => {
                    self.in_arguments = false;
                    self.arguments = Some(self.begin..self.text.len());
                }
                _ => {}
            },
            Event::Done => {
                return if self.name.is_some() {
                    Ok(true)
                } else {
                    Err(Bad)
                };
            }
        }
        Ok(false)
    }

    /// The arguments as far as they have come; `None` before they begin.
    pub fn arguments(&self) -> Option<&str> {
        match &self.arguments {
            Some(range) => Some(&self.text[range.clone()]),
            None if self.in_arguments => Some(&self.text[self.begin..]),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn scanned(text: &str) -> Result<Option<CallScan>, Bad> {
        let mut characters = text.chars();
        assert_eq!(characters.next(), Some('{'));
        let mut scan = CallScan::begun();
        for c in characters {
            if scan.take(c)? {
                return Ok(Some(scan));
            }
        }
        Ok(None)
    }

    #[test]
    fn a_call_has_a_name_and_its_arguments_as_they_were_written() {
        for text in [
            r#"{"name": "f", "arguments": {"a" : [1, {"b": "}\""}], "c":-1.5e+3}}"#,
            r#"{ "arguments": {"a" : [1, {"b": "}\""}], "c":-1.5e+3}, "id": 0 ,"name":"f" }"#,
            r#"{"type": "function", "name": "\u0066", "parameters": {"a" : [1, {"b": "}\""}], "c":-1.5e+3}}"#,
        ] {
            let scan = scanned(text).unwrap().unwrap();
            assert_eq!(scan.name.as_deref(), Some("f"));
            assert_eq!(
                scan.arguments(),
                Some(r#"{"a" : [1, {"b": "}\""}], "c":-1.5e+3}"#),
                "{text}"
            );
        }
        assert_eq!(
            scanned(r#"{"name": "f"}"#).unwrap().unwrap().arguments(),
            None
        );
    }

    #[test]
    fn what_is_no_call_is_known_at_once() {
        for text in [
            r#"{"name": 5"#,
            r#"{"name": "f", "arguments": "#,
            r#"{"answer""#,
            r#"{}"#,
            r#"{"arguments": {}}"#,
            r#"{"name": "f", "name""#,
            r#"{"name": "f", "arguments": {}, "parameters": {"#,
            r#"{"name": "f", "arguments": {"a": 01"#,
            r#"{"name": "f", "arguments": {"a": .5"#,
            r#"{"name": "f", "arguments": {a"#,
            r#"{"name": "f", "arguments": {"a": tru}"#,
            r#"{"name": "f", "arguments": ["#,
            "{\"name\": \"f\n",
            r#"{"name": "f",}"#,
            r#"{"name" "f""#,
        ] {
            let unfinished = text.ends_with(": ");
            assert_eq!(scanned(text).is_err(), !unfinished, "{text}");
        }
        let deep = format!(r#"{{"name": "f", "arguments": {{"a": {}"#, "[".repeat(200));
        assert!(scanned(&deep).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn what_is_complete_is_json_and_what_is_bad_is_not(arguments in r#"(\{|\}|\[|\]|,|:|"|"a"|1|-|0|\.5|e9|true|null| |\\n|\\u00e9|\\){0,12}"#) {
            let text = format!(r#"{{"name": "f", "arguments": {{{arguments}}}}}"#);
            let parsed = serde_json::from_str::<Value>(&text);
            match scanned(&text) {
                Ok(Some(scan)) => {
                    prop_assert!(serde_json::from_str::<Value>(&scan.text).is_ok(), "{}", scan.text);
                    if scan.text.len() == text.len() {
                        let expected = parsed.unwrap()["arguments"].clone();
                        prop_assert_eq!(serde_json::from_str::<Value>(scan.arguments().unwrap()).unwrap(), expected);
                    }
                }
                Ok(None) => prop_assert!(parsed.is_err(), "{text}"),
                Err(Bad) => {
                    let strange = parsed.is_ok_and(|value| value.as_object().is_some_and(|object| object.len() == 2));
                    prop_assert!(!strange, "{text}");
                }
            }
        }
    }
}
