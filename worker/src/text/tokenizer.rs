//! Text to token ids by a Hugging Face `tokenizer.json`, and each token's own bytes.
//!
//! Owns the reading of the tokenizer's files. How bytes become text again while tokens stream is [`super::detokenize`]'s
//! part; templates are [`super::chat`]'s.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::detokenize::Utf8Stream;

/// A model's tokenizer.
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    vocabulary: Vocabulary,
    token_bytes_max: usize,
}

/// A normalizer may fold a character of this many bytes into one (full-width letters, to ASCII).
const FOLDED_BYTES_MAX: usize = 3;
/// The longest character: the least that any token may stand for, since an unknown one is a token too.
const CHARACTER_BYTES_MAX: usize = 4;

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder.
    ///
    /// # Errors
    /// Names the file that is missing or wrong, and a decoder that this build does not know.
    pub fn open(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            let sentencepiece = folder.join("tokenizer.model").is_file();
            let hint = if sentencepiece {
                "; there is only tokenizer.model: save it as a fast tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            } else {
                ""
            };
            bail!("no tokenizer.json in {}{hint}", folder.display());
        }
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&bytes)
            .with_context(|| format!("{}: not usable as a tokenizer", path.display()))
    }

    /// The tokenizer that a `tokenizer.json` of these words is.
    ///
    /// # Errors
    /// Not a tokenizer, or a decoder that this build does not know.
    pub fn parse(bytes: &[u8]) -> Result<Tokenizer> {
        #[derive(Deserialize)]
        struct DecoderOnly {
            decoder: Option<Value>,
        }
        let mut encoder =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| anyhow::anyhow!("{e}"))?;
        // Serving neither cuts nor pads prompts, whatever the training run had set.
        encoder
            .with_truncation(None)
            .map_err(|e| anyhow::anyhow!("{e}"))?;
        encoder.with_padding(None);
        let decoder = serde_json::from_slice::<DecoderOnly>(bytes)?.decoder;
        let spelling = Spelling::of(decoder.as_ref())?;
        let vocabulary = Vocabulary::new(&encoder, spelling);
        let folded = encoder.get_normalizer().map_or(1, |_| FOLDED_BYTES_MAX);
        let token_bytes_max = vocabulary.longest().max(CHARACTER_BYTES_MAX) * folded;
        Ok(Tokenizer {
            encoder,
            vocabulary,
            token_bytes_max,
        })
    }

    /// The ids of a text. With `special`, the tokenizer adds its own special tokens (BOS, ...); names of special
    /// tokens inside the text are taken as those tokens either way, as transformers does.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .encoder
            .encode_fast(text, special)
            .map_err(|e| anyhow::anyhow!("{e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The id of a token by its name.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.encoder.token_to_id(name)
    }

    /// Most bytes of a text that one token stands for. Tokenizers that drop characters, or join unknown ones, can do
    /// with fewer tokens than this tells.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// The tokens' bytes.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

/// What each token contributes to a text, in bytes: a text is the concatenation of its tokens' bytes.
///
/// This is exact for byte-level BPE and for sentencepiece with byte fallback, where one token may be part of a
/// character. It costs a table look-up per token, however long the text has become.
pub struct Vocabulary {
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]` is token `id`.
    ends: Vec<u32>,
    special: Vec<bool>,
    leading: Option<Leading>,
}

/// Characters that decoding removes from the start of a whole text (sentencepiece puts a blank there).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leading {
    content: char,
    most: usize,
}

impl Vocabulary {
    fn new(encoder: &tokenizers::Tokenizer, spelling: Spelling) -> Vocabulary {
        let added = encoder.get_added_tokens_decoder();
        let ids = encoder
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id + 1);
        let mut vocabulary = Vocabulary {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            leading: spelling.leading,
        };
        for id in 0..ids {
            if let Some(token) = encoder.id_to_token(id) {
                spelling.append(&token, &mut vocabulary.bytes);
            }
            vocabulary.ends.push(vocabulary.bytes.len() as u32);
            vocabulary
                .special
                .push(added.get(&id).is_some_and(|token| token.special));
        }
        vocabulary
    }

    /// The bytes of a token's name: also special tokens have one. Empty for ids without a token.
    pub fn name(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Ids that have a place, with or without a token.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of the longest name.
    fn longest(&self) -> usize {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let lengths = self.ends.iter().zip(starts).map(|(end, start)| end - start);
        lengths.max().unwrap_or(0) as usize
    }

    /// Whether a token is one of the special ones; ids without a token are none.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// What a token adds to a text: its bytes, and nothing for special tokens.
    pub fn text(&self, id: u32) -> &[u8] {
        if self.is_special(id) {
            &[]
        } else {
            self.name(id)
        }
    }

    /// The text of a whole prompt and the stream in which its continuation goes on. The prompt may end inside a
    /// character: that character then belongs to the continuation.
    pub fn prompt_text(&self, ids: &[u32]) -> (String, Utf8Stream) {
        let mut stream = Utf8Stream::default();
        let mut text = String::new();
        ids.iter()
            .for_each(|&id| stream.push(self.text(id), &mut text));
        if let Some(Leading { content, most }) = self.leading {
            let cut: usize = text
                .chars()
                .take(most)
                .take_while(|&c| c == content)
                .map(char::len_utf8)
                .sum();
            text.drain(..cut);
        }
        (text, stream)
    }
}

/// How a tokenizer writes bytes into its tokens' names, read from the `decoder` of `tokenizer.json`.
#[derive(Debug, Default)]
struct Spelling {
    byte_level: bool,
    byte_fallback: bool,
    replace: Vec<(String, String)>,
    leading: Option<Leading>,
}

impl Spelling {
    fn of(decoder: Option<&Value>) -> Result<Spelling> {
        let Some(decoder) = decoder else {
            bail!("it has no decoder, so tokens cannot be turned into text")
        };
        let mut spelling = Spelling::default();
        spelling.read(decoder)?;
        Ok(spelling)
    }

    fn read(&mut self, decoder: &Value) -> Result<()> {
        let text = |key: &str| decoder.get(key).and_then(Value::as_str);
        let kind = text("type").unwrap_or("none");
        match kind {
            "Sequence" => {
                let parts = decoder.get("decoders").and_then(Value::as_array);
                parts
                    .into_iter()
                    .flatten()
                    .try_for_each(|part| self.read(part))?;
            }
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Replace" => {
                let pattern = decoder
                    .get("pattern")
                    .and_then(|p| p.get("String"))
                    .and_then(Value::as_str);
                let (Some(pattern), Some(content)) = (pattern, text("content")) else {
                    bail!("its decoder replaces by a regular expression, which is not supported");
                };
                self.replace.push((pattern.to_owned(), content.to_owned()));
            }
            "Strip" => {
                let count =
                    |key: &str| decoder.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
                ensure!(
                    count("stop") == 0,
                    "its decoder strips the end of texts, which cannot be streamed"
                );
                let content = text("content")
                    .and_then(|c| c.chars().next())
                    .unwrap_or(' ');
                self.leading = Some(Leading {
                    content,
                    most: count("start"),
                });
            }
            "Metaspace" => {
                self.replace.push((
                    text("replacement").unwrap_or("▁").to_owned(),
                    " ".to_owned(),
                ));
                if text("prepend_scheme") != Some("never") {
                    self.leading = Some(Leading {
                        content: ' ',
                        most: 1,
                    });
                }
            }
            other => bail!(
                "its decoder {other} is not supported (byte-level and sentencepiece decoders are)"
            ),
        }
        Ok(())
    }

    fn append(&self, token: &str, out: &mut Vec<u8>) {
        if self.byte_level {
            let start = out.len();
            for c in token.chars() {
                let Some(byte) = byte_of(c) else {
                    // An added token, spelled as it is.
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    return;
                };
                out.push(byte);
            }
            return;
        }
        let hex = token
            .strip_prefix("<0x")
            .and_then(|rest| rest.strip_suffix('>'))
            .filter(|hex| hex.len() == 2);
        if self.byte_fallback
            && let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())
        {
            out.push(byte);
            return;
        }
        let mut name = token.to_owned();
        self.replace
            .iter()
            .for_each(|(from, to)| name = name.replace(from, to));
        out.extend_from_slice(name.as_bytes());
    }
}

/// The byte that a character of a byte-level token stands for (GPT-2's table): printable bytes stand for themselves,
/// the others are moved to U+0100 and up, in order.
fn byte_of(c: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ 0..=0xff => u8::try_from(code).ok().filter(|&byte| printable(byte)),
        code => (0..=0xff)
            .filter(|&byte| !printable(byte))
            .nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{MODELS, golden, model_folder};
    use super::*;

    #[test]
    fn ids_and_texts_equal_the_goldens() {
        for model in MODELS {
            let tokenizer = Tokenizer::open(&model_folder(model)).unwrap();
            let cases = golden(model, "tokenizer_golden.json");
            let mut seen = 0;
            for case in cases
                .as_array()
                .unwrap()
                .iter()
                .filter(|case| case.get("text").is_some())
            {
                let text = case["text"].as_str().unwrap();
                let ids =
                    |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
                assert_eq!(
                    tokenizer.encode(text, true).unwrap(),
                    ids("ids"),
                    "{model}: {text:?}"
                );
                assert_eq!(
                    tokenizer.encode(text, false).unwrap(),
                    ids("ids_no_special"),
                    "{model}: {text:?}"
                );
                let (decoded, _) = tokenizer.vocabulary().prompt_text(&ids("ids"));
                assert_eq!(
                    decoded,
                    case["decoded_skip"].as_str().unwrap(),
                    "{model}: {text:?}"
                );
                seen += 1;
            }
            assert!(seen > 20, "{model}: only {seen} cases");
        }
    }

    #[test]
    fn the_whole_of_special_tokens_names_is_known() {
        for model in MODELS {
            let tokenizer = Tokenizer::open(&model_folder(model)).unwrap();
            for case in golden(model, "tokenizer_golden.json").as_array().unwrap() {
                let Some(ids) = case.get("ids_no_special") else {
                    continue;
                };
                let ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
                let named: Vec<u8> = ids
                    .iter()
                    .flat_map(|&id| tokenizer.vocabulary().name(id))
                    .copied()
                    .collect();
                let named = String::from_utf8(named).unwrap();
                let decoded = case["decoded"].as_str().unwrap();
                assert!(
                    named == decoded || named.strip_prefix(' ') == Some(decoded),
                    "{model}: {named:?} {decoded:?}"
                );
            }
        }
    }

    #[test]
    fn no_golden_text_has_more_bytes_than_its_tokens_may_stand_for() {
        for model in MODELS {
            let tokenizer = Tokenizer::open(&model_folder(model)).unwrap();
            let name = |id| tokenizer.vocabulary().name(id).len();
            let longest = (0..2048).map(name).max().unwrap();
            assert_eq!(tokenizer.vocabulary().longest(), longest);
            for case in golden(model, "tokenizer_golden.json").as_array().unwrap() {
                let (Some(text), Some(ids)) = (case["text"].as_str(), case["ids"].as_array())
                else {
                    continue;
                };
                assert!(
                    text.len() <= ids.len() * tokenizer.token_bytes_max(),
                    "{model}: {text:?}"
                );
            }
        }
    }

    #[test]
    fn ids_beyond_the_vocabulary_have_no_bytes() {
        for model in MODELS {
            let tokenizer = Tokenizer::open(&model_folder(model)).unwrap();
            assert_eq!(tokenizer.vocabulary().name(u32::MAX), b"");
            assert_eq!(tokenizer.vocabulary().text(2048), b"");
        }
    }

    #[test]
    fn a_missing_tokenizer_says_what_would_help() {
        let folder = tempfile::tempdir().unwrap();
        let error = |folder: &Path| format!("{:#}", Tokenizer::open(folder).err().unwrap());
        assert!(error(folder.path()).starts_with("no tokenizer.json in "));
        fs::write(folder.path().join("tokenizer.model"), b"x").unwrap();
        assert!(error(folder.path()).contains("save it as a fast tokenizer"));
        fs::write(folder.path().join("tokenizer.json"), b"{\"version\": 3").unwrap();
        assert!(error(folder.path()).contains("not usable as a tokenizer"));
    }

    #[test]
    fn a_decoder_that_cannot_be_streamed_is_refused_by_name() {
        let refused = |json: Value| format!("{:#}", Spelling::of(Some(&json)).unwrap_err());
        assert!(refused(serde_json::json!({"type": "WordPiece"})).contains("decoder WordPiece"));
        assert!(
            refused(serde_json::json!({"type": "Strip", "content": " ", "start": 0, "stop": 1}))
                .contains("strips")
        );
        let regex =
            serde_json::json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""});
        assert!(refused(regex).contains("regular expression"));
        assert!(Spelling::of(None).is_err());
    }

    proptest! {
        /// The library's decoder and the table agree on any ids, up to how many replacement characters stand for an
        /// invalid run of bytes under byte fallback.
        #[test]
        fn the_table_agrees_with_the_librarys_decoder(model in 0..MODELS.len(), ids in prop::collection::vec(0u32..2048, 0..40)) {
            let tokenizer = super::super::tests::tokenizer(MODELS[model]);
            let expected = tokenizer.encoder.decode(&ids, true).unwrap();
            let (mut text, mut stream) = tokenizer.vocabulary().prompt_text(&ids);
            stream.finish(&mut text);
            if tokenizer.vocabulary().leading.is_none() || !expected.contains('\u{fffd}') {
                prop_assert_eq!(text, expected);
            }
        }

        #[test]
        fn encoding_any_text_and_decoding_it_gives_it_back(model in 0..2usize, text in "\\PC{0,40}") {
            let tokenizer = super::super::tests::tokenizer(MODELS[model]);
            let ids = tokenizer.encode(&text, true).unwrap();
            // Names of special tokens inside the text become tokens and vanish; the generator does not write them.
            prop_assert_eq!(tokenizer.vocabulary().prompt_text(&ids).0, text);
        }
    }
}
