//! OpenAI's completions and chat requests as checked types.
//!
//! Pure. Unknown fields are ignored, as all servers do; fields that ask for what this server cannot do are refused.

use common::request::{Chat, ChatMessage, Constraint, Generate, Prompt, ToolChoice};
use serde_json::Value;

use super::format::constraint;
use super::json::{Field, FieldError, Fields, Object};
use super::sampling::{CHAT, COMPLETIONS, Options, check_size, token_ids};
use super::tools::{Tools, call_id, calls, tools};

/// Most messages of a conversation.
pub(super) const MESSAGES_MAX: usize = 4096;
/// Longest `suffix` in bytes.
pub(super) const SUFFIX_BYTES_MAX: usize = 64 << 10;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Completion,
    Chat,
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct OpenAiRequest {
    pub style: Style,
    /// One generation each; all have the same number of candidates.
    pub prompts: Vec<Generate>,
    /// How many of a prompt's candidates are answers, the best ones.
    pub n: usize,
    /// Show log-probabilities.
    pub logprobs: bool,
    /// Answer as a stream of events.
    pub stream: bool,
    /// Say the usage at the stream's end.
    pub include_usage: bool,
    /// Stands behind every completion.
    pub suffix: String,
    /// When time is up give what there is, instead of an error.
    pub partial_on_deadline: bool,
}

/// Reads the body of a completion.
pub(super) fn completion(
    body: &Object,
    draw_seed: &mut dyn FnMut() -> u64,
) -> Result<OpenAiRequest, FieldError> {
    let extra = extra_params(body)?;
    let fields = Fields::of("", body).or("extra_params", &extra);
    for key in ["tools", "functions"] {
        refuse_tools(&fields, key)?;
    }
    let constraint = constraint(&fields)?;
    let mut options = Options::read(&fields, &COMPLETIONS)?;
    let n = options.candidates;
    let (stream, include_usage) = stream(&fields)?;
    options.candidates = best_of(&fields, n, stream)?;
    // No template stands around a completion's prompt, so a raw prompt is what it always is.
    fields.flag("use_raw_prompt")?;
    let echo = fields.flag("echo")?;
    let logprobs = fields
        .get("logprobs")
        .map(|field| logprobs_count(&field))
        .transpose()?;
    let field = fields.need("prompt")?;
    let texts = prompts(&field)?;
    check_size(
        texts.len(),
        texts.len() * options.candidates as usize,
        &field.path,
    )?;
    let truncates = truncates(&fields)?;
    // The best ones are known by their log-probabilities.
    let needed = (options.candidates > n).then_some(0);
    let generate = |prompt| Generate {
        echo,
        logprobs: logprobs.or(needed),
        prompt_logprobs: logprobs.filter(|_| echo),
        truncate_prompt: truncates,
        constraint: constraint.clone(),
        ..options.generate(prompt, draw_seed)
    };
    let prompts = texts.into_iter().map(generate).collect();
    Ok(OpenAiRequest {
        style: Style::Completion,
        prompts,
        n: n as usize,
        logprobs: logprobs.is_some(),
        stream,
        include_usage,
        suffix: suffix(&fields)?,
        partial_on_deadline: truncates,
    })
}

/// Reads the body of a chat.
pub(super) fn chat(
    body: &Object,
    draw_seed: &mut dyn FnMut() -> u64,
) -> Result<OpenAiRequest, FieldError> {
    let extra = extra_params(body)?;
    let fields = Fields::of("", body).or("extra_params", &extra);
    let constraint = constraint(&fields)?;
    let Tools {
        json,
        choice,
        single,
    } = tools(&fields)?;
    if json.is_some()
        && choice != ToolChoice::None
        && matches!(
            constraint,
            Some(Constraint::Regex(_) | Constraint::Grammar(_))
        )
    {
        let why = "cannot stand beside a regular expression or a grammar: leave one of them out";
        return Err(FieldError::at("tools", why));
    }
    let options = Options::read(&fields, &CHAT)?;
    let logprobs = chat_logprobs(&fields)?;
    let chat = Chat {
        messages: messages(&fields.need("messages")?)?,
        tools: json,
        tool_choice: choice,
        single_call: single,
    };
    let truncates = truncates(&fields)?;
    let generate = Generate {
        logprobs,
        constraint,
        truncate_prompt: truncates,
        ..options.generate(Prompt::Chat(chat), draw_seed)
    };
    let (stream, include_usage) = stream(&fields)?;
    Ok(OpenAiRequest {
        style: Style::Chat,
        prompts: vec![generate],
        n: options.candidates as usize,
        logprobs: logprobs.is_some(),
        stream,
        include_usage,
        suffix: String::new(),
        partial_on_deadline: truncates,
    })
}

/// The endpoint's name, which OpenAI's clients give as the model.
pub(super) fn model(body: &Object) -> Result<String, FieldError> {
    Fields::of("", body)
        .need("model")?
        .text()
        .map(str::to_owned)
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
pub(super) fn prompts(field: &Field<'_>) -> Result<Vec<Prompt>, FieldError> {
    let allowed = "a string, a list of strings, a list of token ids or a list of such lists";
    let values = match field.value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(values) => values,
        _ => return Err(field.wrong(allowed)),
    };
    if values.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(token_ids(field, usize::MAX)?)]);
    }
    // Before the values are copied, so that no body costs more than its size.
    check_size(values.len(), 0, &field.path)?;
    let prompt = |(i, value): (usize, &Value)| {
        let item = field.item(i, value);
        match value {
            Value::String(text) => Ok(Prompt::Text(text.clone())),
            Value::Array(ids) if ids.is_empty() => {
                Err(item.refuse("is empty: a prompt needs at least one token"))
            }
            Value::Array(_) => token_ids(&item, usize::MAX).map(Prompt::Tokens),
            _ => Err(item.wrong("a string or a list of token ids")),
        }
    };
    values.iter().enumerate().map(prompt).collect()
}

fn messages(field: &Field<'_>) -> Result<Vec<ChatMessage>, FieldError> {
    let values = field.list()?;
    if values.is_empty() || values.len() > MESSAGES_MAX {
        return Err(field.refuse(format!(
            "must have 1 to {MESSAGES_MAX} entries, got {}",
            values.len()
        )));
    }
    let message = |(i, value)| message(&field.item(i, value).fields()?);
    values.iter().enumerate().map(message).collect()
}

fn message(fields: &Fields<'_>) -> Result<ChatMessage, FieldError> {
    let role = fields.need("role")?;
    let mut message = ChatMessage::default();
    let mut need_content = true;
    message.role = match role.text()? {
        // Templates know the older word.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => {
            if let Some(field) = fields.get("function_call") {
                return Err(field.refuse("is the old form of tool_calls: use that"));
            }
            message.tool_calls = match fields.get("tool_calls") {
                Some(field) => calls(&field)?,
                None => None,
            };
            need_content = message.tool_calls.is_none();
            "assistant"
        }
        "tool" => {
            message.tool_call_id = Some(call_id(&fields.need("tool_call_id")?)?);
            message.name = match fields.get("name") {
                Some(field) => Some(field.text()?.to_owned()),
                None => None,
            };
            "tool"
        }
        "function" => {
            return Err(role.refuse("is the old form of \"tool\": use that, with tool_call_id"));
        }
        _ => return Err(role.wrong("system, developer, user, assistant or tool")),
    }
    .to_owned();
    message.content = match fields.get("content") {
        Some(field) => content(&field)?,
        None if need_content => content(&fields.need("content")?)?,
        None => String::new(),
    };
    Ok(message)
}

/// A string, or text parts that stand on lines of their own.
fn content(field: &Field<'_>) -> Result<String, FieldError> {
    if let Value::String(text) = field.value {
        return Ok(text.clone());
    }
    let Value::Array(parts) = field.value else {
        return Err(field.wrong("a string or a list of text parts"));
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let part = field.item(i, part).fields()?;
        let kind = part.need("type")?;
        if kind.text()? != "text" {
            return Err(kind.wrong("\"text\", the only kind of content this server reads"));
        }
        texts.push(part.need("text")?.text()?);
    }
    Ok(texts.join("\n"))
}

/// `stream` and `stream_options.include_usage`.
fn stream(fields: &Fields<'_>) -> Result<(bool, bool), FieldError> {
    let stream = fields.flag("stream")?;
    let Some(options) = fields.get("stream_options") else {
        return Ok((stream, false));
    };
    let include_usage = options.fields()?.flag("include_usage")?;
    Ok((stream, include_usage))
}

/// How many candidates are made for the `n` best of them. A stream cannot wait for the best.
fn best_of(fields: &Fields<'_>, n: u32, stream: bool) -> Result<u32, FieldError> {
    let Some(field) = fields.get("best_of") else {
        return Ok(n);
    };
    let best_of = field.whole(1..=i128::from(Generate::CANDIDATES_MAX))? as u32;
    if best_of < n {
        return Err(field.refuse(format!("must be at least n, which is {n}, got {best_of}")));
    }
    if stream && best_of > n {
        let why = format!("must equal n, which is {n}, when the answer is a stream");
        return Err(field.refuse(why));
    }
    Ok(best_of)
}

fn logprobs_count(field: &Field<'_>) -> Result<u32, FieldError> {
    Ok(field.whole(0..=i128::from(Generate::LOGPROBS_MAX))? as u32)
}

/// `logprobs` is a flag here and `top_logprobs` the count.
fn chat_logprobs(fields: &Fields<'_>) -> Result<Option<u32>, FieldError> {
    let wanted = fields.flag("logprobs")?;
    let count = fields.get("top_logprobs");
    match count {
        Some(field) if !wanted && logprobs_count(&field)? > 0 => {
            Err(field.refuse("needs logprobs: true beside it"))
        }
        Some(field) if wanted => logprobs_count(&field).map(Some),
        _ => Ok(wanted.then_some(0)),
    }
}

fn suffix(fields: &Fields<'_>) -> Result<String, FieldError> {
    let Some(field) = fields.get("suffix") else {
        return Ok(String::new());
    };
    let text = field.text()?;
    if text.len() > SUFFIX_BYTES_MAX {
        return Err(field.refuse(format!(
            "must be at most {SUFFIX_BYTES_MAX} bytes long, got {}",
            text.len()
        )));
    }
    Ok(text.to_owned())
}

/// `error_behavior`: whether a prompt that does not fit loses its beginning, and an answer that its deadline cuts is
/// given as far as it came. An answer that fills the context ends with `length` in any case.
pub(super) fn truncates(fields: &Fields<'_>) -> Result<bool, FieldError> {
    let Some(field) = fields.get("error_behavior") else {
        return Ok(false);
    };
    match field.text()? {
        "truncate" => Ok(true),
        "error" => Ok(false),
        _ => Err(field.wrong("\"error\" or \"truncate\"")),
    }
}

/// The SDK's `extra_params`: strings that hold the values of other fields.
pub(super) fn extra_params(body: &Object) -> Result<Object, FieldError> {
    let fields = Fields::of("", body);
    let Some(field) = fields.get("extra_params") else {
        return Ok(Object::new());
    };
    let mut extra = Object::new();
    for (key, value) in field.object()? {
        let value = match value {
            Value::String(text) => value_of(key, text),
            other => other.clone(),
        };
        extra.insert(key.clone(), value);
    }
    Ok(extra)
}

/// `"1"` is the number 1, unless the field is a text itself.
fn value_of(key: &str, text: &str) -> Value {
    const TEXTS: [&str; 8] = [
        "suffix",
        "error_behavior",
        "user",
        "regex",
        "guided_regex",
        "grammar",
        "guided_grammar",
        "encoding_format",
    ];
    let is_text = TEXTS.contains(&key) || (key == "stop" && !text.starts_with('['));
    let parsed = if is_text {
        None
    } else {
        serde_json::from_str(text).ok()
    };
    parsed.unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Only a chat has turns that could call tools.
fn refuse_tools(fields: &Fields<'_>, key: &str) -> Result<(), FieldError> {
    match fields.get(key) {
        Some(field) if !matches!(field.value, Value::Array(values) if values.is_empty()) => {
            Err(field.refuse("needs messages: a completion calls no tools"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
