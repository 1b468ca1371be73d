//! What an answer is that must call tools, as a grammar in Lark's notation, in the model's own spelling of calls.

use common::request::{Constraint, ToolChoice};
use serde_json::Value;

use super::{Family, Tool};
use crate::text::constraint::plain_json;

/// Which calls an answer must make.
#[derive(Debug, Clone)]
pub struct Calls<'a> {
    /// How they are spelt.
    pub family: Family,
    /// The tools.
    pub tools: &'a [Tool],
    /// Which of them.
    pub choice: &'a ToolChoice,
    /// One call only.
    pub single: bool,
    /// JSON that the answer may be instead.
    pub or: Option<&'a Constraint>,
}

impl Calls<'_> {
    /// The grammar. `special` gives the id of a mark that is a token without text.
    ///
    /// # Errors
    /// When the other answer's schema is no JSON.
    pub fn lark(&self, special: impl Fn(&str) -> Option<u32>) -> Result<String, serde_json::Error> {
        let mark = |name: &str| match special(name) {
            Some(id) => format!("<[{id}]>"),
            None => quoted(name),
        };
        let calls = match (self.family, self.single) {
            (Family::Hermes, single) => {
                let call = format!(
                    "{} \"\\n\" call \"\\n\" {}",
                    mark("<tool_call>"),
                    mark("</tool_call>")
                );
                if single {
                    call
                } else {
                    format!("{call} (\"\\n\" {call})*")
                }
            }
            (Family::Mistral, true) => format!("{} \"[\" call \"]\"", mark("[TOOL_CALLS]")),
            (Family::Mistral, false) => {
                format!("{} \"[\" call (\", \" call)* \"]\"", mark("[TOOL_CALLS]"))
            }
            // These models make one call at a time.
            (Family::Llama, _) => "call".to_owned(),
        };
        let mut lark = match self.or {
            None => format!("start: {calls}\n"),
            Some(answer) => format!(
                "start: answer | calls\ncalls: {calls}\nanswer: %json {}\n",
                schema(answer)?
            ),
        };
        let chosen = |tool: &&Tool| match self.choice {
            ToolChoice::Function(name) => tool.name == *name,
            ToolChoice::Auto | ToolChoice::None | ToolChoice::Required => true,
        };
        let mut names = Vec::new();
        for (i, tool) in self.tools.iter().filter(chosen).enumerate() {
            let name = Value::from(tool.name.as_str());
            let head = format!("{{\"name\": {name}, \"{}\": ", self.family.arguments_key());
            let parameters = plain_json(tool.parameters.clone());
            lark += &format!(
                "call_{i}: {} arguments_{i} \"}}\"\narguments_{i}: %json {parameters}\n",
                quoted(&head)
            );
            names.push(format!("call_{i}"));
        }
        lark += &format!("call: {}\n", names.join(" | "));
        Ok(lark)
    }
}

/// The schema of an answer that is no call.
fn schema(answer: &Constraint) -> Result<Value, serde_json::Error> {
    let schema = match answer {
        Constraint::JsonSchema(schema) => serde_json::from_str(schema)?,
        // The door lets no other constraint stand beside tools.
        Constraint::JsonObject | Constraint::Regex(_) | Constraint::Grammar(_) => {
            serde_json::json!({"type": "object"})
        }
    };
    Ok(plain_json(schema))
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_grammar_spells_calls_as_the_family_does() {
        let tools = [
            Tool {
                name: "f".into(),
                parameters: json!({"type": "object"}),
            },
            Tool {
                name: "g".into(),
                parameters: json!({"type": "object"}),
            },
        ];
        let lark = |family, choice: &ToolChoice, single| {
            let calls = Calls {
                family,
                tools: &tools,
                choice,
                single,
                or: None,
            };
            calls
                .lark(|name| (name == "[TOOL_CALLS]").then_some(5))
                .unwrap()
        };
        let one = lark(Family::Hermes, &ToolChoice::Function("g".into()), true);
        let expected = r#"start: "<tool_call>" "\n" call "\n" "</tool_call>"
call_0: "{\"name\": \"g\", \"arguments\": " arguments_0 "}"
arguments_0: %json {"type":"object","x-guidance":{"whitespace_pattern":" |\\n {0,16}"}}
call: call_0
"#;
        assert_eq!(one, expected);
        let many = lark(Family::Mistral, &ToolChoice::Required, false);
        assert!(
            many.starts_with("start: <[5]> \"[\" call (\", \" call)* \"]\"\n"),
            "{many}"
        );
        assert!(many.ends_with("call: call_0 | call_1\n"), "{many}");
        let llama = lark(Family::Llama, &ToolChoice::Required, false);
        assert!(llama.contains(r#"\"parameters\": "#), "{llama}");
    }
}
