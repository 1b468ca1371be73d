//! Tools for a chat template that knows none: as an instruction, and calls and their results as plain turns.
//!
//! Pure. The words are those that Hermes and Qwen models were trained with.

use common::request::ChatMessage;
use serde_json::Value;

/// The conversation in words that every template knows. `tools` are told of if there are any. A template that does not
/// speak of system messages gets the instruction in front of the first user's turn.
pub fn plain(messages: &[ChatMessage], tools: &[Value], knows_system: bool) -> Vec<ChatMessage> {
    let mut plain: Vec<ChatMessage> = Vec::with_capacity(messages.len() + 1);
    let mut after_result = false;
    for message in messages {
        let result = message.role == "tool";
        match plain.last_mut() {
            // Results of calls made together are one turn: templates want turns to alternate.
            Some(last) if result && after_result => {
                last.content.push('\n');
                last.content.push_str(&result_text(message));
            }
            _ if result => plain.push(ChatMessage::said("user", result_text(message))),
            _ => plain.push(ChatMessage::said(message.role.clone(), turn_text(message))),
        }
        after_result = result;
    }
    if !tools.is_empty() {
        instruct(&mut plain, &instruction(tools), knows_system);
    }
    plain
}

/// Puts the instruction where the template shows it.
fn instruct(messages: &mut Vec<ChatMessage>, instruction: &str, knows_system: bool) {
    let wanted = if knows_system { "system" } else { "user" };
    let first = if knows_system {
        messages.first_mut().filter(|first| first.role == wanted)
    } else {
        messages.iter_mut().find(|message| message.role == wanted)
    };
    match first {
        Some(system) if knows_system => {
            system.content = format!("{}\n\n{instruction}", system.content)
        }
        Some(user) => user.content = format!("{instruction}\n\n{}", user.content),
        None => messages.insert(0, ChatMessage::said(wanted, instruction)),
    }
}

fn instruction(tools: &[Value]) -> String {
    let lines: Vec<String> = tools.iter().map(Value::to_string).collect();
    format!(
        "You may call one or more functions to assist with the user query. You are provided with function signatures \
         within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json object with \
         function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{{\"name\": \
         <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
        lines.join("\n")
    )
}

fn result_text(message: &ChatMessage) -> String {
    format!("<tool_response>\n{}\n</tool_response>", message.content)
}

/// A turn's text with its calls spelt out.
fn turn_text(message: &ChatMessage) -> String {
    let calls: Vec<Value> = message
        .tool_calls
        .as_ref()
        .and_then(|calls| serde_json::from_str(calls).ok())
        .unwrap_or_default();
    let mut text = message.content.clone();
    for call in &calls {
        let function = &call["function"];
        let arguments = function["arguments"].as_str().unwrap_or("{}");
        if !text.is_empty() {
            text.push('\n');
        }
        text += &format!(
            "<tool_call>\n{{\"name\": {}, \"arguments\": {arguments}}}\n</tool_call>",
            function["name"]
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conversation() -> Vec<ChatMessage> {
        let calls = json!([
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]);
        let result = |id: &str, text: &str| ChatMessage {
            tool_call_id: Some(id.into()),
            ..ChatMessage::said("tool", text)
        };
        vec![
            ChatMessage::said("user", "What is a?"),
            ChatMessage {
                tool_calls: Some(calls.to_string()),
                ..ChatMessage::said("assistant", "")
            },
            result("c1", "one"),
            result("c2", "two"),
            ChatMessage::said("assistant", "It is one."),
        ]
    }

    #[test]
    fn calls_and_results_become_turns_that_alternate() {
        let plain = plain(&conversation(), &[], false);
        let roles: Vec<&str> = plain.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
        assert_eq!(
            plain[1].content,
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>"
        );
        assert_eq!(
            plain[2].content,
            "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
        );
        assert_eq!(plain[0].content, "What is a?");
    }

    #[test]
    fn the_instruction_stands_where_the_template_shows_it() {
        let tools = [json!({"type": "function", "function": {"name": "f"}})];
        let told = |messages: &[ChatMessage], knows_system| {
            let told = plain(messages, &tools, knows_system);
            assert!(told[0].content.contains(
                "<tools>\n{\"type\":\"function\",\"function\":{\"name\":\"f\"}}\n</tools>"
            ));
            (told.len(), told[0].role.clone(), told[0].content.clone())
        };
        let user = [ChatMessage::said("user", "Hi")];
        let system = [ChatMessage::said("system", "Be brief."), user[0].clone()];
        let (turns, role, text) = told(&user, false);
        assert!(
            turns == 1 && role == "user" && text.ends_with("</tool_call>\n\nHi"),
            "{text}"
        );
        let (turns, role, _) = told(&user, true);
        assert!(turns == 2 && role == "system");
        let (turns, role, text) = told(&system, true);
        assert!(
            turns == 2 && role == "system" && text.starts_with("Be brief.\n\nYou may call"),
            "{text}"
        );
    }
}
