//! Conversations to prompts by the model's own chat template, in Jinja as transformers reads it.
//!
//! A template is the model's code: it runs with a bound on its steps and on its output, and sees neither the clock nor
//! files, so that a conversation always gives the same prompt. Steps bound neither memory nor the time of one step:
//! that is [`super::sandbox`]'s part.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use common::request::{Chat, ChatMessage, ToolChoice};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Render;
use super::tools::{CallForm, prompt};

/// Instructions a rendering may take: a long conversation takes some ten thousand.
const FUEL: u64 = 2_000_000;
/// Longest prompt a template may write: longer than any context, far from filling memory.
const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// The template's name in its environment and in error messages.
const NAME: &str = "chat_template";

/// Why a conversation did not become a prompt. All but [`ChatError::Sandbox`] are faults of the template or of the
/// conversation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ChatError {
    /// The model has no template.
    #[error("this model has no chat template; send a text prompt instead")]
    Missing,
    /// The template cannot be read at all.
    #[error("the model's chat template is not valid: {0}")]
    Invalid(String),
    /// It ran longer than allowed.
    #[error("the model's chat template did not end within {FUEL} steps")]
    Endless,
    /// It wrote more than allowed.
    #[error("the model's chat template wrote more than {OUTPUT_BYTES_MAX} bytes")]
    TooLong,
    /// It refused the conversation or failed on it.
    #[error("the model's chat template refused the conversation: {0}")]
    Refused(String),
    /// It computed or waited longer than allowed.
    #[error("the model's chat template did not end within {0} s")]
    Slow(u64),
    /// It took more memory than allowed.
    #[error("the model's chat template used more than {0} MiB of memory")]
    Memory(u64),
    /// It broke what renders it.
    #[error("the model's chat template broke the process that renders it: {0}")]
    Broke(String),
    /// There is nothing to render it with.
    #[error("cannot render the chat template: {0}")]
    Sandbox(String),
}

/// A model's chat template as its files have it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateSource {
    /// In Jinja. `None` for a model without a template.
    pub text: Option<String>,
    /// The one for conversations with tools, where the model has one of its own for them.
    pub tool_use: Option<String>,
    /// The name of the begin-of-text token.
    pub bos: Option<String>,
    /// The name of the end-of-text token.
    pub eos: Option<String>,
}

impl TemplateSource {
    /// Reads the template of a tokenizer's folder: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (a text, or a list of named ones, of which `default` is taken).
    ///
    /// # Errors
    /// When `tokenizer_config.json` is there and cannot be read.
    pub fn open(folder: &Path) -> Result<TemplateSource> {
        let config = match fs::read(folder.join("tokenizer_config.json")) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{}/tokenizer_config.json: not JSON", folder.display()))?,
            Err(_) => Json::Null,
        };
        let file = fs::read_to_string(folder.join("chat_template.jinja")).ok();
        Ok(TemplateSource {
            tool_use: named(&config["chat_template"], "tool_use").filter(|_| file.is_none()),
            text: file.or_else(|| template_of(&config["chat_template"])),
            bos: token_of(&config["bos_token"]),
            eos: token_of(&config["eos_token"]),
        })
    }
}

impl TemplateSource {
    /// How the model takes tools.
    pub fn call_form(&self) -> CallForm {
        CallForm::of(self.tool_use.as_deref().or(self.text.as_deref()))
    }
}

/// A model's chat template, compiled.
pub struct ChatTemplate {
    environment: Result<Environment<'static>, ChatError>,
    /// The one for conversations with tools, if there is one.
    tool_use: Option<Result<Environment<'static>, ChatError>>,
    form: CallForm,
    /// Whether it speaks of system messages.
    knows_system: bool,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// Compiles a template. One that does not compile fails conversations, not the model.
    pub fn new(source: TemplateSource) -> ChatTemplate {
        let form = source.call_form();
        let TemplateSource {
            text,
            tool_use,
            bos,
            eos,
        } = source;
        ChatTemplate {
            form,
            knows_system: text.as_ref().is_some_and(|text| text.contains("system")),
            tool_use: tool_use.map(environment),
            environment: text.ok_or(ChatError::Missing).and_then(environment),
            bos,
            eos,
        }
    }
}

impl Render for ChatTemplate {
    fn render(&self, chat: &Chat) -> Result<String, ChatError> {
        let tools = tools_of(chat)?;
        let environment = match &self.tool_use {
            Some(tool_use) if !tools.is_empty() => tool_use,
            _ => &self.environment,
        };
        let environment = environment.as_ref().map_err(Clone::clone)?;
        let with_tools = self.form.in_template;
        let messages: Vec<Value> = if with_tools {
            chat.messages.iter().map(turn).collect()
        } else {
            let plain = prompt::plain(&chat.messages, &tools, self.knows_system);
            plain.iter().map(turn).collect()
        };
        let tools = Some(tools).filter(|tools| with_tools && !tools.is_empty());
        let template = environment
            .get_template(NAME)
            .map_err(|e| ChatError::Invalid(message(&e)))?;
        let variables = context! {
            messages => messages,
            tools => tools.map_or_else(|| Value::from(()), |tools| Value::from(Serde(tools))),
            documents => Value::from(()),
            add_generation_prompt => true,
            bos_token => self.bos.as_deref(),
            eos_token => self.eos.as_deref(),
        };
        let mut output = Bounded(Vec::new());
        let rendered = template
            .render_captured_to(variables, &mut output)
            .map(drop);
        match rendered {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::OutOfFuel => return Err(ChatError::Endless),
            Err(e) if e.kind() == ErrorKind::WriteFailure => return Err(ChatError::TooLong),
            Err(e) => return Err(ChatError::Refused(message(&e))),
        }
        String::from_utf8(output.0).map_err(|e| ChatError::Refused(e.to_string()))
    }
}

/// The tools that the next turn may call.
fn tools_of(chat: &Chat) -> Result<Vec<Json>, ChatError> {
    match &chat.tools {
        Some(tools) if chat.tool_choice != ToolChoice::None => {
            serde_json::from_str(tools).map_err(|e| ChatError::Refused(format!("its tools: {e}")))
        }
        _ => Ok(Vec::new()),
    }
}

/// A turn as templates see it: transformers' form, in which a call's arguments are a value and not its text.
fn turn(message: &ChatMessage) -> Value {
    let mut turn = serde_json::json!({"role": message.role, "content": message.content});
    let calls = message.tool_calls.as_ref();
    if let Some(Json::Array(mut calls)) = calls.and_then(|calls| serde_json::from_str(calls).ok()) {
        for call in &mut calls {
            let arguments = &mut call["function"]["arguments"];
            let value = arguments
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok());
            if let Some(value @ Json::Object(_)) = value {
                *arguments = value;
            }
        }
        turn["tool_calls"] = Json::Array(calls);
    }
    for (key, text) in [
        ("tool_call_id", &message.tool_call_id),
        ("name", &message.name),
    ] {
        if let Some(text) = text {
            turn[key] = Json::from(text.as_str());
        }
    }
    Value::from(Serde(turn))
}

/// The text of `chat_template` in its two forms.
fn template_of(entry: &Json) -> Option<String> {
    if let Some(text) = entry.as_str() {
        return Some(text.to_owned());
    }
    let named = entry.as_array()?;
    let default = named
        .iter()
        .find(|one| one["name"] == "default")
        .or(named.first())?;
    default["template"].as_str().map(str::to_owned)
}

/// The text of one of several templates.
fn named(entry: &Json, name: &str) -> Option<String> {
    let found = entry.as_array()?.iter().find(|one| one["name"] == name)?;
    found["template"].as_str().map(str::to_owned)
}

/// A special token's name in its two forms.
fn token_of(entry: &Json) -> Option<String> {
    entry
        .as_str()
        .or_else(|| entry["content"].as_str())
        .map(str::to_owned)
}

/// Jinja with what transformers adds to it.
fn environment(source: String) -> Result<Environment<'static>, ChatError> {
    let invalid = |e: Error| ChatError::Invalid(message(&e));
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(invalid)?,
    );
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_function("raise_exception", |why: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, why))
    });
    environment.add_filter("tojson", to_json);
    environment
        .add_template_owned(NAME, source)
        .map_err(invalid)?;
    Ok(environment)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: blanks after `,` and `:`, nothing escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    // Accepted for the sake of templates that name it; it is how JSON comes out anyway.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            serde::Serialize::serialize(
                &value,
                &mut serde_json::Serializer::with_formatter(&mut out, pretty),
            )
        }
        None => serde::Serialize::serialize(
            &value,
            &mut serde_json::Serializer::with_formatter(&mut out, Spaced),
        ),
    }
    .map_err(failed)?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON on one line with a blank after each comma and colon.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The detail of an error, in one line and without the template's text.
fn message(error: &Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (line {line})"),
        None => detail,
    }
}

/// Takes [`OUTPUT_BYTES_MAX`] bytes and then fails.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MODELS, golden, model_folder};
    use super::*;

    fn said(role: &str, content: &str) -> ChatMessage {
        ChatMessage::said(role, content)
    }

    /// The folder of a template with the usual special tokens.
    fn with_template(entry: Json) -> ChatTemplate {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": entry});
        fs::write(
            folder.path().join("tokenizer_config.json"),
            config.to_string(),
        )
        .unwrap();
        opened(folder.path())
    }

    fn opened(folder: &Path) -> ChatTemplate {
        ChatTemplate::new(TemplateSource::open(folder).unwrap())
    }

    fn rendered(template: &str, messages: &[ChatMessage]) -> Result<String, ChatError> {
        let chat = Chat::from(messages.to_vec());
        with_template(template.into()).render(&chat)
    }

    #[test]
    fn rendered_conversations_equal_the_goldens() {
        for model in MODELS {
            let template = opened(&model_folder(model));
            let cases = golden(model, "tokenizer_golden.json");
            let case = cases
                .as_array()
                .unwrap()
                .iter()
                .find(|case| case.get("chat").is_some())
                .unwrap();
            let messages: Vec<ChatMessage> = serde_json::from_value(case["chat"].clone()).unwrap();
            let chat = Chat::from(messages);
            assert_eq!(
                template.render(&chat).unwrap(),
                case["rendered"].as_str().unwrap(),
                "{model}"
            );
        }
    }

    #[test]
    fn a_refusal_of_the_template_is_told_in_its_words() {
        let template = opened(&model_folder("tiny-llama"));
        let refused = template
            .render(&vec![said("wizard", "hi")].into())
            .unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("Only the roles user and assistant are known"),
            "{refused}"
        );
    }

    #[test]
    fn a_template_that_loops_or_floods_fails_its_request_alone() {
        let endless =
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        assert_eq!(rendered(endless, &[]), Err(ChatError::Endless));
        let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        assert!(rendered(recursion, &[]).is_err());
        let flood = "{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}";
        assert_eq!(rendered(flood, &[]), Err(ChatError::TooLong));
    }

    #[test]
    fn a_template_that_does_not_compile_says_where() {
        let error = rendered("ok\n{% for %}", &[]).unwrap_err();
        assert!(
            matches!(&error, ChatError::Invalid(why) if why.contains("line 2")),
            "{error}"
        );
    }

    fn with_call() -> Chat {
        let calls =
            r#"[{"id":"c1","type":"function","function":{"name":"f","arguments":"{\"a\": 1}"}}]"#;
        let called = ChatMessage {
            tool_calls: Some(calls.into()),
            ..said("assistant", "")
        };
        let result = ChatMessage {
            tool_call_id: Some("c1".into()),
            name: Some("f".into()),
            ..said("tool", "2")
        };
        Chat {
            messages: vec![said("user", "hi"), called, result],
            tools: Some(r#"[{"type":"function","function":{"name":"f","parameters":{}}}]"#.into()),
            ..Chat::default()
        }
    }

    #[test]
    fn a_template_that_knows_tools_gets_them_as_in_transformers() {
        let template = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}|{% for m in messages %}{% if 'tool_calls' in m %}{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}{% elif m.role == 'tool' %} {{ m.tool_call_id }} {{ m.name }} {{ m.content }}{% endif %}{% endfor %}";
        let template = with_template(template.into());
        let expected = r#"{"type": "function", "function": {"name": "f", "parameters": {}}}|<tool_call>f {"a": 1} c1 f 2"#;
        assert_eq!(template.render(&with_call()).unwrap(), expected);
        let none = Chat {
            tool_choice: ToolChoice::None,
            ..with_call()
        };
        assert!(template.render(&none).unwrap().starts_with("|<tool_call>f"));
    }

    #[test]
    fn a_template_that_knows_none_is_told_of_tools_in_its_own_words() {
        let template = opened(&model_folder("tiny-llama"));
        let rendered = template.render(&with_call()).unwrap();
        assert!(rendered.starts_with("<s>[INST] You may call"), "{rendered}");
        let turns = "\n\nhi [/INST] <tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call></s><s>[INST] <tool_response>\n2\n</tool_response> [/INST]";
        assert!(rendered.ends_with(turns), "{rendered}");
    }

    #[test]
    fn a_template_of_its_own_for_tools_is_taken_when_there_are_tools() {
        let list = serde_json::json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools <tool_call>"}]);
        let template = with_template(list);
        assert_eq!(
            template.render(&with_call()).unwrap(),
            "1 tools <tool_call>"
        );
        assert_eq!(template.render(&Chat::default()).unwrap(), "plain");
    }

    #[test]
    fn a_model_without_a_template_says_what_to_send() {
        let template = with_template(Json::Null);
        assert_eq!(
            template.render(&vec![said("user", "hi")].into()),
            Err(ChatError::Missing)
        );
    }

    #[test]
    fn a_list_of_templates_gives_its_default_and_a_file_wins_over_both() {
        let list = serde_json::json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]);
        assert_eq!(with_template(list).render(&Chat::default()).unwrap(), "yes");
        let folder = tempfile::tempdir().unwrap();
        fs::write(
            folder.path().join("chat_template.jinja"),
            "{{ messages[0].content }}!",
        )
        .unwrap();
        fs::write(
            folder.path().join("tokenizer_config.json"),
            r#"{"chat_template": "no"}"#,
        )
        .unwrap();
        let template = opened(folder.path());
        assert_eq!(
            template.render(&vec![said("user", "hi")].into()).unwrap(),
            "hi!"
        );
    }

    #[test]
    fn python_methods_loop_controls_and_block_trimming_work_as_in_transformers() {
        let template = "{%- for m in messages %}\n    {% if loop.first %}\n{{ m['content'].strip().upper() }}\n    {% continue %}\n    {% endif %}\n{{ m.role.startswith('u') }}{% endfor %}";
        assert_eq!(
            rendered(template, &[said("user", " a "), said("user", "b")]).unwrap(),
            "A\nTrue"
        );
        assert_eq!(
            rendered(
                "{% if tools is none %}{{ bos_token ~ eos_token }}{% endif %}",
                &[]
            )
            .unwrap(),
            "<s></s>"
        );
    }

    #[test]
    fn json_comes_out_as_python_writes_it() {
        let value = "{{ {'a': [1, 'é<b>'], 'c': none}|tojson }}";
        assert_eq!(
            rendered(value, &[]).unwrap(),
            r#"{"a": [1, "é<b>"], "c": null}"#
        );
        assert_eq!(
            rendered("{{ {'a': 1}|tojson(indent=2) }}", &[]).unwrap(),
            "{\n  \"a\": 1\n}"
        );
    }
}
