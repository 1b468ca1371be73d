//! Calls of tools: how a model is told of tools, how it spells a call, and how calls come out of its text.
//!
//! Owns the spelling of calls, which a model has learnt with its chat template ([`CallForm::of`] finds it there). A
//! template that knows no tools gets them as an instruction ([`prompt`]). [`parser`] finds calls in text that streams,
//! [`grammar`] writes down what an answer is that must call.

pub mod grammar;
mod json;
pub mod parser;
pub mod prompt;

use serde_json::Value;

/// How calls are spelt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`, one after the other: Hermes, Qwen 2.5 and
    /// 3, and every model whose template knows no tools.
    Hermes,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`.
    Mistral,
    /// The whole answer is `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`: Llama 3.1 to 3.3.
    Llama,
}

impl Family {
    /// What a call begins with; nothing for [`Family::Llama`], where it is the answer's beginning.
    fn mark(self) -> &'static str {
        match self {
            Family::Hermes => "<tool_call>",
            Family::Mistral => "[TOOL_CALLS]",
            Family::Llama => "",
        }
    }

    /// Names of tokens that are spelt out for the parser, although they may be special ones, which have no text.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Family::Hermes => &["<tool_call>", "</tool_call>"],
            Family::Mistral => &["[TOOL_CALLS]"],
            Family::Llama => &["<|python_tag|>"],
        }
    }

    /// The key of a call's arguments.
    fn arguments_key(self) -> &'static str {
        match self {
            Family::Hermes | Family::Mistral => "arguments",
            Family::Llama => "parameters",
        }
    }
}

/// How a model takes tools and spells calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallForm {
    /// How calls are spelt.
    pub family: Family,
    /// Its template writes tools, calls and their results itself.
    pub in_template: bool,
}

impl CallForm {
    /// The form that a chat template shows. One that has tools in a form not known here is told of them as if it had
    /// none.
    pub fn of(template: Option<&str>) -> CallForm {
        let template = template.unwrap_or_default();
        let has = |text: &str| template.contains(text);
        let family = if has("[TOOL_CALLS]") && !has("[ARGS]") {
            Some(Family::Mistral)
        } else if has("<tool_call>") {
            Some(Family::Hermes)
        } else if has("<|python_tag|>") || has("\"parameters\": dictionary") {
            Some(Family::Llama)
        } else {
            None
        };
        let family = family.filter(|_| has("tools"));
        CallForm {
            family: family.unwrap_or(Family::Hermes),
            in_template: family.is_some(),
        }
    }
}

/// A tool that a model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its function's name.
    pub name: String,
    /// The JSON schema of its arguments.
    pub parameters: Value,
}

impl Tool {
    /// The tools of a JSON array in OpenAI's form.
    ///
    /// # Errors
    /// What is wrong. (The coordinator's door has checked them.)
    pub fn all(json: &str) -> Result<Vec<Tool>, String> {
        let values: Vec<Value> = serde_json::from_str(json).map_err(|e| e.to_string())?;
        let tool = |value: &Value| {
            let function = &value["function"];
            let name = function["name"].as_str().ok_or("a tool has no name")?;
            let none = serde_json::json!({"type": "object", "properties": {}, "additionalProperties": false});
            let parameters = Some(&function["parameters"]).filter(|value| !value.is_null());
            Ok(Tool {
                name: name.to_owned(),
                parameters: parameters.cloned().unwrap_or(none),
            })
        };
        values.iter().map(tool).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_of_calls_is_found_in_the_template() {
        let qwen = "{%- if tools %}# Tools ... return a json object within <tool_call></tool_call>{% endif %}";
        let mistral = "{% if tools %}[AVAILABLE_TOOLS]{{ tools|tojson }}{% endif %}[TOOL_CALLS]";
        let llama = "{%- if tools is not none %}Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}.{% endif %}";
        let plain =
            "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}";
        let other = "{% if tools %}<|tool▁calls▁begin|>{% endif %}";
        let table = [
            (Some(qwen), Family::Hermes, true),
            (Some(mistral), Family::Mistral, true),
            (Some(llama), Family::Llama, true),
            (Some(plain), Family::Hermes, false),
            (Some(other), Family::Hermes, false),
            (None, Family::Hermes, false),
        ];
        for (template, family, in_template) in table {
            let expected = CallForm {
                family,
                in_template,
            };
            assert_eq!(CallForm::of(template), expected, "{template:?}");
        }
    }

    #[test]
    fn a_tool_without_parameters_takes_none() {
        let tools = Tool::all(r#"[{"type":"function","function":{"name":"f"}}]"#).unwrap();
        assert_eq!(tools[0].parameters["additionalProperties"], false);
        assert!(Tool::all("[{}]").is_err() && Tool::all("{").is_err());
    }
}
