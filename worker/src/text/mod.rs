//! Text on this side of the engine: what turns prompts into token ids and tokens back into text.
//!
//! Owns the files of a tokenizer's folder, and what a GGUF file says of its tokenizer. Knows no wire and no engine.

pub mod chat;
pub mod constraint;
pub mod detokenize;
pub mod from_gguf;
pub mod helper;
pub mod sandbox;
pub mod stop;
pub mod tokenizer;
pub mod tools;
pub mod trial;

use std::path::Path;

use anyhow::{Context, Result};
use common::request::{Chat, Constraint, Generate, Prompt, ToolChoice};
use serde_json::Value;

use chat::{ChatError, TemplateSource};
use constraint::{ConstraintError, Grammar, Grammars};
use from_gguf::{GgufText, is_gguf};
use tokenizer::Tokenizer;
use tools::grammar::Calls;
use tools::parser::CallParser;
use tools::{CallForm, Tool};
use trial::Trial;

/// Bytes of a prompt that are tokenized whatever the context is: for tokenizers that drop or join characters.
const PROMPT_BYTES_MIN: usize = 64 << 10;

/// Conversations to text.
pub trait Render: Send + Sync {
    /// The prompt of a conversation, open for the assistant's next turn.
    ///
    /// # Errors
    /// [`ChatError`].
    fn render(&self, chat: &Chat) -> Result<String, ChatError>;
}

/// Everything a model's text needs.
pub struct TextModel {
    /// Text to ids and ids to bytes.
    pub tokenizer: Tokenizer,
    /// Whether conversations become text.
    pub chat: bool,
    template: Box<dyn Render>,
    grammars: Grammars,
    call_form: CallForm,
    /// Ids that end an answer, unless a request ignores them.
    pub end_ids: Vec<u32>,
}

/// What stands between a model's tokens and an answer.
#[derive(Default)]
pub struct Binding {
    /// What the answer is bound to.
    pub grammar: Option<Grammar>,
    /// What finds its calls.
    pub calls: Option<CallParser>,
}

/// Why a prompt has no token ids.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The conversation does not become text.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The text does not become tokens.
    #[error("the prompt cannot be tokenized: {0:#}")]
    Tokenizer(anyhow::Error),
    /// No tokens of this tokenizer could hold so much text in the context.
    #[error(
        "the prompt has {bytes} bytes; for this model's context of {context_max} tokens, at most {most} bytes are \
         taken; shorten the prompt"
    )]
    TooLong {
        /// The prompt's length.
        bytes: usize,
        /// What was allowed.
        most: usize,
        /// The context in tokens.
        context_max: u32,
    },
}

impl TextModel {
    /// Reads a tokenizer's folder, and the end tokens from the weights' folder (`generation_config.json`, else
    /// `config.json`, else the tokenizer's own end token). Of weights in a GGUF file, that file says all of it; where the
    /// tokenizer's folder has a `tokenizer.json`, the end tokens alone. `renderer` makes the chat template into what renders it.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn open(
        tokenizer_folder: &Path,
        weights: &Path,
        renderer: impl FnOnce(TemplateSource) -> Box<dyn Render>,
    ) -> Result<TextModel> {
        let of_file = is_gguf(weights) && !tokenizer_folder.join("tokenizer.json").is_file();
        let (tokenizer, template, mut end_ids) = if of_file {
            let text = GgufText::open(weights)?;
            (text.tokenizer, text.template, text.end_ids)
        } else {
            let tokenizer = Tokenizer::open(tokenizer_folder)?;
            let template = TemplateSource::open(tokenizer_folder)?;
            let ends = if is_gguf(weights) {
                from_gguf::end_ids(weights)?
            } else {
                end_ids_beside(weights)?
            };
            (tokenizer, template, ends)
        };
        if end_ids.is_empty() {
            let eos = template.eos.as_deref();
            end_ids.extend(eos.and_then(|name| tokenizer.token_id(name)));
        }
        Ok(TextModel {
            tokenizer,
            chat: template.text.is_some(),
            call_form: template.call_form(),
            template: renderer(template),
            grammars: Grammars::default(),
            end_ids,
        })
    }

    /// The ids of a prompt. Plain text gets the tokenizer's special tokens; a conversation has those its template
    /// wrote, and no second ones. A text that cannot fit `context_max` tokens is refused before the work of tokenizing
    /// it, or with `cut` loses its beginning; one that is given may still have more.
    ///
    /// # Errors
    /// [`PromptError`].
    pub fn prompt_ids(
        &self,
        prompt: &Prompt,
        context_max: u32,
        cut: bool,
    ) -> Result<Vec<u32>, PromptError> {
        match prompt {
            Prompt::Text(text) if cut => {
                let most = self.bytes_max(context_max);
                let first = text.ceil_char_boundary(text.len().saturating_sub(most));
                self.encode(&text[first..], true, context_max)
            }
            Prompt::Text(text) => self.encode(text, true, context_max),
            Prompt::Tokens(ids) => Ok(ids.clone()),
            Prompt::Chat(chat) => {
                let text = self.template.render(chat)?;
                self.encode(&text, false, context_max)
            }
        }
    }

    /// Most bytes of a text that is tokenized.
    fn bytes_max(&self, context_max: u32) -> usize {
        (context_max as usize)
            .saturating_mul(self.tokenizer.token_bytes_max())
            .max(PROMPT_BYTES_MIN)
    }

    /// What the request's answers are bound to, if they are; what finds their calls of tools, if they may call any.
    ///
    /// # Errors
    /// [`ConstraintError`].
    pub fn binding(&self, generate: &Generate) -> Result<Binding, ConstraintError> {
        let tools = match &generate.prompt {
            Prompt::Chat(chat) if chat.tool_choice != ToolChoice::None => {
                chat.tools.as_ref().map(|tools| (chat, Tool::all(tools)))
            }
            _ => None,
        };
        let Some((chat, tools)) = tools else {
            return Ok(Binding {
                grammar: self.grammar(generate.constraint.as_ref())?,
                calls: None,
            });
        };
        let what = "tools";
        let tools = tools.map_err(|why| ConstraintError::Refused { what, why })?;
        let family = self.call_form.family;
        let single = chat.single_call || matches!(chat.tool_choice, ToolChoice::Function(_));
        let names = tools.iter().map(|tool| tool.name.clone());
        let calls = CallParser::new(family, names, single);
        let or = generate
            .constraint
            .as_ref()
            .filter(|_| chat.tool_choice == ToolChoice::Auto);
        if chat.tool_choice == ToolChoice::Auto && or.is_none() {
            // The model may say what it likes; what looks like a call and is none is text.
            return Ok(Binding {
                grammar: None,
                calls: Some(calls),
            });
        }
        or.map_or(Ok(()), constraint::check)?;
        let wanted = Calls {
            family,
            tools: &tools,
            choice: &chat.tool_choice,
            single,
            or,
        };
        // Tried with marks as texts: the ids of their tokens are this vocabulary's own.
        let lark = |special: &dyn Fn(&str) -> Option<u32>| {
            let lark = wanted.lark(special).map(Constraint::Grammar);
            let why = |e: serde_json::Error| e.to_string();
            lark.map_err(|e| ConstraintError::Refused { what, why: why(e) })
        };
        let (tried, lark) = (lark(&|_| None)?, lark(&|mark| self.special_id(mark))?);
        let vocabulary = self.tokenizer.vocabulary();
        let grammar = self
            .grammars
            .compile(&lark, &tried, vocabulary, &self.end_ids);
        Ok(Binding {
            grammar: Some(grammar.map_err(|error| error.about(what))?),
            calls: Some(calls.trusting()),
        })
    }

    fn grammar(&self, constraint: Option<&Constraint>) -> Result<Option<Grammar>, ConstraintError> {
        let vocabulary = self.tokenizer.vocabulary();
        let compile = |constraint| {
            self.grammars
                .of_request(constraint, vocabulary, &self.end_ids)
        };
        constraint.map(compile).transpose()
    }

    /// The same model, whose grammars are tried in another process before they are compiled in this one.
    #[must_use]
    pub fn with_trial(self, trial: Trial) -> TextModel {
        TextModel {
            grammars: self.grammars.with_trial(trial),
            ..self
        }
    }

    /// The id of a token that has a name and no text.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        let id = self.tokenizer.token_id(name)?;
        self.tokenizer.vocabulary().is_special(id).then_some(id)
    }

    fn encode(&self, text: &str, special: bool, context_max: u32) -> Result<Vec<u32>, PromptError> {
        let bytes = text.len();
        let most = self.bytes_max(context_max);
        if bytes > most {
            return Err(PromptError::TooLong {
                bytes,
                most,
                context_max,
            });
        }
        self.tokenizer
            .encode(text, special)
            .map_err(PromptError::Tokenizer)
    }
}

/// The end tokens that a weights' folder names.
fn end_ids_beside(weights: &Path) -> Result<Vec<u32>> {
    let ids = end_ids_of(&weights.join("generation_config.json"))?;
    if ids.is_empty() {
        return end_ids_of(&weights.join("config.json"));
    }
    Ok(ids)
}

/// `eos_token_id` of a file: a number or a list. A missing file has none.
fn end_ids_of(path: &Path) -> Result<Vec<u32>> {
    let Ok(bytes) = std::fs::read(path) else {
        return Ok(Vec::new());
    };
    let config: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("{}: not JSON", path.display()))?;
    let entry = &config["eos_token_id"];
    let listed = entry
        .as_array()
        .cloned()
        .unwrap_or_else(|| vec![entry.clone()]);
    Ok(listed
        .iter()
        .filter_map(Value::as_u64)
        .filter_map(|id| u32::try_from(id).ok())
        .collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::sync::{Arc, LazyLock, Mutex};

    use common::request::ChatMessage;

    use super::chat::ChatTemplate;
    use super::*;

    pub(crate) const MODELS: [&str; 3] = ["tiny-llama", "tiny-mistral", "tiny-mpt"];

    static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
        MODELS
            .iter()
            .map(|model| Tokenizer::open(&model_folder(model)).unwrap())
            .collect()
    });

    pub(crate) fn model_folder(model: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/models")
            .join(model)
    }

    pub(crate) fn golden(model: &str, file: &str) -> Value {
        let path = model_folder("golden").join(model).join(file);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    pub(crate) fn tokenizer(model: &str) -> &'static Tokenizer {
        let index = MODELS.iter().position(|name| *name == model).unwrap();
        &TOKENIZERS[index]
    }

    /// A model whose conversations are rendered in this process.
    fn opened(model: &str, weights: &Path) -> TextModel {
        TextModel::open(&model_folder(model), weights, |source| {
            Box::new(ChatTemplate::new(source))
        })
        .unwrap()
    }

    pub(crate) fn text_model(model: &str) -> Arc<TextModel> {
        static OPEN: Mutex<BTreeMap<String, Arc<TextModel>>> = Mutex::new(BTreeMap::new());
        let open = || Arc::new(opened(model, &model_folder(model)));
        OPEN.lock()
            .unwrap()
            .entry(model.to_owned())
            .or_insert_with(open)
            .clone()
    }

    #[test]
    fn end_ids_come_from_the_generation_config_first() {
        let open = |model: &str| opened(model, &model_folder(model)).end_ids;
        assert_eq!([open("tiny-llama"), open("tiny-mpt")], [vec![2], vec![0]]);
        let weights = tempfile::tempdir().unwrap();
        let ends = || opened("tiny-llama", weights.path()).end_ids;
        assert_eq!(ends(), [2], "the tokenizer's own");
        std::fs::write(weights.path().join("config.json"), r#"{"eos_token_id": 7}"#).unwrap();
        assert_eq!(ends(), [7]);
        std::fs::write(
            weights.path().join("generation_config.json"),
            r#"{"eos_token_id": [8, 9]}"#,
        )
        .unwrap();
        assert_eq!(ends(), [8, 9]);
    }

    #[test]
    fn a_conversation_gets_one_begin_token() {
        let text = text_model("tiny-llama");
        let turns = vec![ChatMessage::said("user", "What is a token?")];
        let chat = Prompt::Chat(turns.into());
        let ids = text.prompt_ids(&chat, 1024, false).unwrap();
        assert_eq!(
            ids,
            text.tokenizer
                .encode("[INST] What is a token? [/INST]", true)
                .unwrap()
        );
        assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1);
    }

    #[test]
    fn a_prompt_that_no_tokens_of_the_context_could_hold_is_refused_untokenized() {
        let text = text_model("tiny-mpt");
        let prompt = |bytes: usize| Prompt::Text("a".repeat(bytes));
        let longest = text.tokenizer.token_bytes_max();
        // The two limits: the one of the context, and what is tokenized in any case.
        for (context_max, most) in [(100_000, 100_000 * longest), (8, PROMPT_BYTES_MIN)] {
            let refused = text
                .prompt_ids(&prompt(most + 1), context_max, false)
                .unwrap_err()
                .to_string();
            let named = [most + 1, most, context_max as usize];
            assert!(
                named.iter().all(|n| refused.contains(&n.to_string())),
                "{refused}"
            );
        }
        assert!(text.prompt_ids(&prompt(PROMPT_BYTES_MIN), 8, false).is_ok());
        let ids = Prompt::Tokens(vec![1; PROMPT_BYTES_MIN + 1]);
        assert!(text.prompt_ids(&ids, 8, false).is_ok(), "ids cost nothing");
    }

    #[test]
    fn goldens_texts_are_the_bytes_of_their_output_ids() {
        for model in MODELS {
            let golden = golden(model, "golden.json");
            let end = golden["eos_token_id"].as_u64().unwrap();
            for case in golden["float32"].as_array().unwrap() {
                let ids =
                    |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
                let vocabulary = tokenizer(model).vocabulary();
                let (_, mut stream) = vocabulary.prompt_text(&ids("input_ids"));
                let mut text = String::new();
                ids("output_ids")
                    .iter()
                    .for_each(|&id| stream.push(vocabulary.text(id), &mut text));
                stream.finish(&mut text);
                assert_eq!(
                    text,
                    case["text"].as_str().unwrap(),
                    "{model} {}, end {end}",
                    case["name"]
                );
            }
        }
    }
}
