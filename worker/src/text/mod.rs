//! Text on this side of the engine: what turns prompts into token ids and tokens back into text.
//!
//! Owns the files of a tokenizer's folder. Knows no wire and no engine.

pub mod chat;
pub mod detokenize;
pub mod stop;
pub mod tokenizer;

use std::path::Path;

use anyhow::{Context, Result};
use common::request::Prompt;
use serde_json::Value;

use chat::{ChatError, ChatTemplate};
use tokenizer::Tokenizer;

/// Everything a model's text needs.
pub struct TextModel {
    /// Text to ids and ids to bytes.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub template: ChatTemplate,
    /// Ids that end an answer, unless a request ignores them.
    pub end_ids: Vec<u32>,
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
}

impl TextModel {
    /// Reads a tokenizer's folder, and the end tokens from the weights' folder (`generation_config.json`, else
    /// `config.json`, else the tokenizer's own end token).
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn open(tokenizer_folder: &Path, weights_folder: &Path) -> Result<TextModel> {
        let tokenizer = Tokenizer::open(tokenizer_folder)?;
        let template = ChatTemplate::open(tokenizer_folder)?;
        let mut end_ids = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            if end_ids.is_empty() {
                end_ids = end_ids_of(&weights_folder.join(file))?;
            }
        }
        if end_ids.is_empty() {
            end_ids.extend(template.eos().and_then(|name| tokenizer.token_id(name)));
        }
        Ok(TextModel {
            tokenizer,
            template,
            end_ids,
        })
    }

    /// The ids of a prompt. Plain text gets the tokenizer's special tokens; a conversation has those its template
    /// wrote, and no second ones.
    ///
    /// # Errors
    /// [`PromptError`].
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<u32>, PromptError> {
        match prompt {
            Prompt::Text(text) => self
                .tokenizer
                .encode(text, true)
                .map_err(PromptError::Tokenizer),
            Prompt::Tokens(ids) => Ok(ids.clone()),
            Prompt::Chat(messages) => {
                let text = self.template.render(messages)?;
                self.tokenizer
                    .encode(&text, false)
                    .map_err(PromptError::Tokenizer)
            }
        }
    }
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

    pub(crate) fn text_model(model: &str) -> Arc<TextModel> {
        static OPEN: Mutex<BTreeMap<String, Arc<TextModel>>> = Mutex::new(BTreeMap::new());
        let open =
            || Arc::new(TextModel::open(&model_folder(model), &model_folder(model)).unwrap());
        OPEN.lock()
            .unwrap()
            .entry(model.to_owned())
            .or_insert_with(open)
            .clone()
    }

    #[test]
    fn end_ids_come_from_the_generation_config_first() {
        let open = |model: &str| {
            TextModel::open(&model_folder(model), &model_folder(model))
                .unwrap()
                .end_ids
        };
        assert_eq!([open("tiny-llama"), open("tiny-mpt")], [vec![2], vec![0]]);
        let weights = tempfile::tempdir().unwrap();
        let ends = || {
            TextModel::open(&model_folder("tiny-llama"), weights.path())
                .unwrap()
                .end_ids
        };
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
        let text =
            TextModel::open(&model_folder("tiny-llama"), &model_folder("tiny-llama")).unwrap();
        let chat = Prompt::Chat(vec![ChatMessage {
            role: "user".into(),
            content: "What is a token?".into(),
        }]);
        let ids = text.prompt_ids(&chat).unwrap();
        assert_eq!(
            ids,
            text.tokenizer
                .encode("[INST] What is a token? [/INST]", true)
                .unwrap()
        );
        assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1);
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
