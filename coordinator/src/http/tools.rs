//! Tools of a chat: what may be called, whether it must be, and the calls that earlier turns made.
//!
//! Pure. What is checked here goes on as JSON in OpenAI's form, in the order that the client chose.

use common::request::ToolChoice;
use serde_json::{Value, json};

use super::format::{NAME_RULE, is_name};
use super::json::{Field, FieldError, Fields};

/// Most tools of a chat, and most calls of a turn.
const TOOLS_MAX: usize = 128;
/// Longest list of tools, in bytes of JSON.
const TOOLS_BYTES_MAX: usize = 256 << 10;
/// Longest id of a call. OpenAI's have 29 characters.
const CALL_ID_BYTES_MAX: usize = 256;

/// What a chat's next turn may call.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tools {
    /// A JSON array; `None` for none.
    pub json: Option<String>,
    pub choice: ToolChoice,
    /// At most one call in the turn.
    pub single: bool,
}

/// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
pub(super) fn tools(fields: &Fields<'_>) -> Result<Tools, FieldError> {
    for (old, new) in [("functions", "tools"), ("function_call", "tool_choice")] {
        if let Some(field) = fields.get(old) {
            return Err(field.refuse(format!("is the old form of {new}: use that")));
        }
    }
    let field = fields.get("tools");
    let values = field.as_ref().map_or(Ok(&[][..]), Field::list)?;
    let single = fields
        .get("parallel_tool_calls")
        .map_or(Ok(false), |parallel| Ok(!parallel.flag()?))?;
    let mut names = Vec::with_capacity(values.len().min(TOOLS_MAX));
    let mut checked = Vec::with_capacity(values.len().min(TOOLS_MAX));
    for (i, value) in values.iter().enumerate() {
        let Some(field) = field.as_ref().filter(|_| i < TOOLS_MAX) else {
            let got = values.len();
            return Err(FieldError::at(
                "tools",
                format!("must have at most {TOOLS_MAX} entries, got {got}"),
            ));
        };
        let item = field.item(i, value);
        let (name, tool) = tool(&item)?;
        if names.contains(&name) {
            return Err(item.refuse(format!("is a second tool of the name {name:?}")));
        }
        names.push(name);
        checked.push(tool);
    }
    let choice = match fields.get("tool_choice") {
        Some(field) => choice(&field, &names)?,
        None => ToolChoice::Auto,
    };
    let json = (!checked.is_empty()).then(|| Value::Array(checked).to_string());
    if let Some(json) = json.as_ref().filter(|json| json.len() > TOOLS_BYTES_MAX) {
        let why = format!(
            "must be at most {TOOLS_BYTES_MAX} bytes long, got {}",
            json.len()
        );
        return Err(FieldError::at("tools", why));
    }
    Ok(Tools {
        json,
        choice,
        single,
    })
}

/// A tool's name, and the tool with what templates read of it.
fn tool<'a>(field: &Field<'a>) -> Result<(&'a str, Value), FieldError> {
    let fields = field.fields()?;
    let kind = fields.need("type")?;
    if kind.text()? != "function" {
        return Err(kind.wrong("\"function\", the only kind of tool this server knows"));
    }
    let function = fields.need("function")?.fields()?;
    let name = function.need("name")?;
    if !is_name(name.text()?) {
        return Err(name.refuse(NAME_RULE));
    }
    function.flag("strict")?;
    let mut checked = serde_json::Map::new();
    checked.insert("name".into(), name.value.clone());
    if let Some(description) = function.get("description") {
        checked.insert("description".into(), description.text()?.into());
    }
    if let Some(parameters) = function.get("parameters") {
        checked.insert("parameters".into(), parameters.object()?.clone().into());
    }
    let tool = json!({"type": "function", "function": checked});
    Ok((name.text()?, tool))
}

/// A word, or `{"type": "function", "function": {"name": ...}}`.
fn choice(field: &Field<'_>, names: &[&str]) -> Result<ToolChoice, FieldError> {
    let allowed = "\"none\", \"auto\", \"required\" or a function";
    let choice = match field.value {
        Value::String(word) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" | "any" => ToolChoice::Required,
            _ => return Err(field.wrong(allowed)),
        },
        Value::Object(_) => {
            let fields = field.fields()?;
            let kind = fields.need("type")?;
            if kind.text()? != "function" {
                return Err(kind.wrong("\"function\""));
            }
            let name = fields.need("function")?.fields()?.need("name")?;
            if !names.contains(&name.text()?) {
                return Err(name.wrong("the name of one of the tools"));
            }
            ToolChoice::Function(name.text()?.to_owned())
        }
        _ => return Err(field.wrong(allowed)),
    };
    if names.is_empty() && matches!(choice, ToolChoice::Required) {
        return Err(field.refuse("asks for a call, and there are no tools: give some in tools"));
    }
    Ok(choice)
}

/// The calls that an assistant's turn made, as JSON.
pub(super) fn calls(field: &Field<'_>) -> Result<Option<String>, FieldError> {
    let values = field.list()?;
    if values.len() > TOOLS_MAX {
        return Err(field.refuse(format!(
            "must have at most {TOOLS_MAX} entries, got {}",
            values.len()
        )));
    }
    let call = |(i, value)| call(&field.item(i, value).fields()?);
    let calls: Vec<Value> = values
        .iter()
        .enumerate()
        .map(call)
        .collect::<Result<_, _>>()?;
    Ok((!calls.is_empty()).then(|| Value::Array(calls).to_string()))
}

fn call(fields: &Fields<'_>) -> Result<Value, FieldError> {
    if let Some(kind) = fields.get("type")
        && kind.text()? != "function"
    {
        return Err(kind.wrong("\"function\""));
    }
    let id = call_id(&fields.need("id")?)?;
    let function = fields.need("function")?.fields()?;
    let name = function.need("name")?;
    if !is_name(name.text()?) {
        return Err(name.refuse(NAME_RULE));
    }
    let arguments = function.need("arguments")?;
    let arguments = match arguments.value {
        Value::String(text) => text.clone(),
        Value::Object(_) => arguments.value.to_string(),
        _ => return Err(arguments.wrong("the text of a JSON object")),
    };
    let function = json!({"name": name.value, "arguments": arguments});
    Ok(json!({"id": id, "type": "function", "function": function}))
}

/// The id of a call.
pub(super) fn call_id(field: &Field<'_>) -> Result<String, FieldError> {
    let id = field.text()?;
    if id.is_empty() || id.len() > CALL_ID_BYTES_MAX {
        let got = id.len();
        return Err(field.refuse(format!(
            "must be 1 to {CALL_ID_BYTES_MAX} bytes long, got {got}"
        )));
    }
    Ok(id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Tools, FieldError> {
        tools(&Fields::of("", body.as_object().unwrap()))
    }

    fn f(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "description": "d", "strict": true,
               "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}})
    }

    #[test]
    fn tools_go_on_in_the_clients_order_without_what_nobody_reads() {
        let read = read(json!({"tools": [f("b"), f("a")], "parallel_tool_calls": false})).unwrap();
        let parameters = r#"{"type":"object","properties":{"b":{},"a":{}}}"#;
        let tool = |name: &str| {
            format!(
                r#"{{"type":"function","function":{{"name":"{name}","description":"d","parameters":{parameters}}}}}"#
            )
        };
        assert_eq!(read.json, Some(format!("[{},{}]", tool("b"), tool("a"))));
        assert_eq!((read.choice, read.single), (ToolChoice::Auto, true));
        assert_eq!(
            self::read(json!({"tools": [], "tool_choice": "none"}))
                .unwrap()
                .json,
            None
        );
    }

    #[test]
    fn a_choice_is_a_word_or_a_function() {
        let chosen = |choice: Value| {
            read(json!({"tools": [f("a")], "tool_choice": choice}))
                .unwrap()
                .choice
        };
        assert_eq!(chosen(json!("none")), ToolChoice::None);
        assert_eq!(chosen(json!("auto")), ToolChoice::Auto);
        assert_eq!(chosen(json!("required")), ToolChoice::Required);
        let function = json!({"type": "function", "function": {"name": "a"}});
        assert_eq!(chosen(function), ToolChoice::Function("a".into()));
    }

    #[test]
    fn every_mistake_is_told_with_its_field() {
        let one = |tool: Value| json!({"tools": [tool]});
        let choice = |choice: Value| json!({"tools": [f("a")], "tool_choice": choice});
        let table = [
            (json!({"tools": {}}), "tools must be a list, got an object"),
            (one(json!(5)), "tools[0] must be an object"),
            (one(json!({})), "tools[0].type is missing"),
            (
                one(json!({"type": "retrieval"})),
                "tools[0].type must be \"function\"",
            ),
            (
                one(json!({"type": "function"})),
                "tools[0].function is missing",
            ),
            (
                one(json!({"type": "function", "function": {}})),
                "tools[0].function.name is missing",
            ),
            (
                one(f("a b")),
                "tools[0].function.name must be 1 to 64 letters",
            ),
            (
                one(json!({"type": "function", "function": {"name": "a", "parameters": "x"}})),
                "tools[0].function.parameters must be an object",
            ),
            (
                json!({"tools": [f("a"), f("a")]}),
                "tools[1] is a second tool of the name \"a\"",
            ),
            (json!({"tools": vec![f("a"); 129]}), "tools[1] is a second"),
            (
                json!({"tools": (0..129).map(|i| f(&format!("f{i}"))).collect::<Vec<_>>()}),
                "tools must have at most 128 entries, got 129",
            ),
            (
                choice(json!("sometimes")),
                "tool_choice must be \"none\", \"auto\", \"required\"",
            ),
            (
                choice(json!({"type": "function"})),
                "tool_choice.function is missing",
            ),
            (
                choice(json!({"type": "function", "function": {"name": "z"}})),
                "tool_choice.function.name must be the name of one of the tools, got \"z\"",
            ),
            (
                json!({"tool_choice": "required"}),
                "tool_choice asks for a call",
            ),
            (
                json!({"functions": [{}]}),
                "functions is the old form of tools",
            ),
            (
                json!({"function_call": "auto"}),
                "function_call is the old form of tool_choice",
            ),
            (
                json!({"parallel_tool_calls": 1}),
                "parallel_tool_calls must be true or false",
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
