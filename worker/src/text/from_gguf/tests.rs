use std::path::PathBuf;

use common::request::{Chat, ChatMessage, Constraint, Generate, Prompt};
use gguf::write::{Writer, set_tokenizer};
use gguf::{Texts, Value as Meta};

use proptest::prelude::*;

use super::super::TextModel;
use super::super::chat::ChatTemplate;
use super::super::tests::{MODELS, golden, model_folder, tokenizer};
use super::*;

/// The metadata of a tiny model's tokenizer.
fn writer(model: &str) -> Writer {
    let mut writer = Writer::default();
    set_tokenizer(&mut writer, &model_folder(model), "mpt");
    writer
}

fn read(writer: &Writer) -> Result<GgufText> {
    let bytes = writer.to_bytes();
    GgufText::of(&Gguf::read(&bytes[..], bytes.len() as u64)?)
}

/// What reading metadata with one key changed says.
fn refused(model: &str, key: &str, value: impl Into<Meta>) -> String {
    let mut writer = writer(model);
    writer.set(key, value);
    format!("{:#}", read(&writer).err().expect("it is refused"))
}

fn without(model: &str, key: &str) -> String {
    let mut writer = writer(model);
    writer.unset(key);
    format!("{:#}", read(&writer).err().expect("it is refused"))
}

/// A tiny model's file, and the folder that keeps it.
fn file(model: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, writer(model).to_bytes()).unwrap();
    (folder, path)
}

fn opened(tokenizer: &Path, weights: &Path) -> Result<TextModel> {
    TextModel::open(tokenizer, weights, |source| {
        Box::new(ChatTemplate::new(source))
    })
}

/// Texts that tokenizers stumble over.
const AWKWARD: [&str; 18] = [
    "",
    " ",
    "  ",
    "a  b   c    d",
    "\n\n\t \r\n",
    "I'm HE'LL we've 'S",
    "1234567 3.14 ½ ²",
    "naïve café Ünïcödé e\u{301}",
    "日本語のテキスト 中文 한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "\u{0}\u{1}\u{7f}\u{a0}\u{2003}",
    "<s>x</s> <unk> <|endoftext|>y<|padding|>",
    "<0x41> [PAD2040] ▁▁ Ġ Ċ",
    "fn main() { println!(\"{}\", 1 << 4); }",
    "a\u{fffd}b \u{feff}c",
    "................................",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " leading and trailing ",
];

#[test]
fn ids_equal_those_of_the_hugging_face_files_for_goldens_and_awkward_texts() {
    for model in MODELS {
        let ours = read(&writer(model)).unwrap().tokenizer;
        let theirs = tokenizer(model);
        let cases = golden(model, "tokenizer_golden.json");
        let cases = cases.as_array().unwrap().iter();
        let texts = cases.filter_map(|case| case["text"].as_str());
        for text in texts.chain(AWKWARD) {
            for special in [true, false] {
                let ids = ours.encode(text, special).unwrap();
                assert_eq!(
                    ids,
                    theirs.encode(text, special).unwrap(),
                    "{model}: {text:?}"
                );
                let texts = [&ours, theirs].map(|own| own.vocabulary().prompt_text(&ids).0);
                assert_eq!(texts[0], texts[1], "{model}: {text:?}");
            }
        }
    }
}

#[test]
fn the_vocabulary_is_that_of_the_hugging_face_files() {
    for model in MODELS {
        let ours = read(&writer(model)).unwrap().tokenizer;
        let (ours, theirs) = (ours.vocabulary(), tokenizer(model).vocabulary());
        assert_eq!(ours.len(), theirs.len());
        for id in 0..ours.len() as u32 {
            assert_eq!(ours.name(id), theirs.name(id), "{model} {id}");
            assert_eq!(ours.is_special(id), theirs.is_special(id), "{model} {id}");
        }
    }
}

#[test]
fn merges_made_from_scores_are_those_of_transformers() {
    let model = "tiny-llama";
    let bytes = writer(model).to_bytes();
    let gguf = Gguf::read(&bytes[..], bytes.len() as u64).unwrap();
    let ours = sentencepiece::tokenizer(&Facts::of(&gguf).unwrap()).unwrap();
    let theirs = std::fs::read(model_folder(model).join("tokenizer.json")).unwrap();
    let theirs: Value = serde_json::from_slice(&theirs).unwrap();
    assert_eq!(ours["model"]["merges"], theirs["model"]["merges"]);
}

#[test]
fn a_model_in_one_file_has_its_template_its_end_tokens_and_its_grammars() {
    let (_folder, path) = file("tiny-llama");
    let text = opened(&path, &path).unwrap();
    assert!(text.chat);
    assert_eq!(text.end_ids, [2]);
    let chat = Chat::from(vec![ChatMessage::said("user", "What is a token?")]);
    let ids = text.prompt_ids(&Prompt::Chat(chat), 1024, false).unwrap();
    let expected = text
        .tokenizer
        .encode("[INST] What is a token? [/INST]", true);
    assert_eq!(ids, expected.unwrap());
    let generate = Generate {
        constraint: Some(Constraint::Regex("[0-9]+".into())),
        ..Generate::new(Prompt::Text(String::new()))
    };
    assert!(text.binding(&generate).unwrap().grammar.is_some());
}

#[test]
fn a_tokenizers_folder_beside_the_file_is_read_in_its_place() {
    let (_folder, path) = file("tiny-llama");
    let text = opened(&model_folder("tiny-mpt"), &path).unwrap();
    assert_eq!(
        text.tokenizer.vocabulary().len(),
        tokenizer("tiny-mpt").vocabulary().len()
    );
    // What ends an answer is the file's still: a tokenizer beside it is the same model's, and names one end at most.
    assert_eq!(text.end_ids, [2]);
}

#[test]
fn the_ends_of_a_turn_and_of_a_message_end_an_answer_too() {
    let mut writer = writer("tiny-mpt");
    writer.set("tokenizer.ggml.eot_token_id", 1u32);
    writer.set("tokenizer.ggml.eom_token_id", 1u32);
    assert_eq!(read(&writer).unwrap().end_ids, [0, 1]);
}

#[test]
fn begin_and_end_tokens_are_put_where_the_file_says() {
    let mut writer = writer("tiny-llama");
    let ids = |writer: &Writer| read(writer).unwrap().tokenizer.encode("a", true).unwrap();
    let a = ids(&writer)[1];
    assert_eq!(ids(&writer), [1, a]);
    writer.set("tokenizer.ggml.add_eos_token", true);
    assert_eq!(ids(&writer), [1, a, 2]);
    writer.set("tokenizer.ggml.add_bos_token", false);
    assert_eq!(ids(&writer), [a, 2]);
    writer.unset("tokenizer.ggml.add_bos_token");
    assert_eq!(ids(&writer), [1, a, 2], "as sentencepiece models do");
}

#[test]
fn a_blank_in_front_is_left_out_where_the_file_says_so() {
    let mut writer = writer("tiny-llama");
    writer.set("tokenizer.ggml.add_space_prefix", false);
    let tokenizer = read(&writer).unwrap().tokenizer;
    let ids = tokenizer.encode(" a", false).unwrap();
    assert_eq!(tokenizer.vocabulary().prompt_text(&ids).0, " a");
    let with_blank = super::super::tests::tokenizer("tiny-llama");
    assert_eq!(ids, with_blank.encode("a", false).unwrap());
}

#[test]
fn every_known_pre_tokenizer_reads_texts_and_gives_them_back() {
    for name in [
        "gpt-2",
        "mpt",
        "smollm",
        "llama-bpe",
        "smaug-bpe",
        "tekken",
        "qwen2",
    ] {
        let mut writer = writer("tiny-mpt");
        writer.set("tokenizer.ggml.pre", name);
        let tokenizer = read(&writer).unwrap().tokenizer;
        for text in AWKWARD
            .iter()
            .filter(|text| !text.contains(['<', '\u{301}']))
        {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.vocabulary().prompt_text(&ids).0, *text, "{name}");
        }
    }
}

#[test]
fn digits_are_cut_as_the_pre_tokenizers_name_says() {
    let digits = |name: &str| {
        let json = pre::PreTokenizer::of(name).unwrap().json(false);
        let pre: tokenizers::PreTokenizerWrapper = serde_json::from_value(json).unwrap();
        let mut text = tokenizers::PreTokenizedString::from("12345 Don'T");
        tokenizers::PreTokenizer::pre_tokenize(&pre, &mut text).unwrap();
        let all = text.get_splits(
            tokenizers::OffsetReferential::Original,
            tokenizers::OffsetType::Byte,
        );
        all.into_iter()
            .map(|(split, ..)| split.to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(digits("gpt-2"), ["12345", "ĠDon", "'", "T"]);
    assert_eq!(
        digits("smollm"),
        ["1", "2", "3", "4", "5", "ĠDon", "'", "T"]
    );
    assert_eq!(digits("llama-bpe"), ["123", "45", "ĠDon", "'T"]);
    assert_eq!(digits("qwen2"), ["1", "2", "3", "4", "5", "ĠDon", "'T"]);
    assert_eq!(digits("tekken"), ["1", "2", "3", "4", "5", "ĠDon", "'T"]);
}

#[test]
fn what_is_not_known_is_refused_by_its_name() {
    let pre = refused("tiny-mpt", "tokenizer.ggml.pre", "klingon");
    assert!(
        pre.contains("pre-tokenizer \"klingon\" is not known; known are gpt-2"),
        "{pre}"
    );
    let missing = without("tiny-mpt", "tokenizer.ggml.pre");
    assert!(
        missing.contains("tokenizer.ggml.pre is missing"),
        "{missing}"
    );
    let model = refused("tiny-mpt", "tokenizer.ggml.model", "bert");
    assert!(
        model.contains("tokenizer.ggml.model is \"bert\""),
        "{model}"
    );
    let none = without("tiny-mpt", "tokenizer.ggml.model");
    assert!(none.contains("it has no tokenizer"), "{none}");
}

#[test]
fn ids_that_are_no_tokens_are_refused_by_key() {
    for key in ["bos", "eos", "unknown", "eot", "eom"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        for id in [2048u32, u32::MAX] {
            let error = refused("tiny-llama", &key, id);
            assert!(
                error.contains(&format!("{key} is {id}, and there are 2048 tokens")),
                "{error}"
            );
        }
    }
}

#[test]
fn lists_that_do_not_fit_the_tokens_are_refused_by_key() {
    let scores = refused("tiny-llama", "tokenizer.ggml.scores", &[0.5f32; 3][..]);
    assert!(
        scores.contains("tokenizer.ggml.scores is an array of 3"),
        "{scores}"
    );
    let nan = refused("tiny-llama", "tokenizer.ggml.scores", &[f32::NAN; 2048][..]);
    assert!(
        nan.contains("tokenizer.ggml.scores: that of token 0 is NaN"),
        "{nan}"
    );
    let missing = without("tiny-llama", "tokenizer.ggml.scores");
    assert!(
        missing.contains("it has no tokenizer.ggml.scores"),
        "{missing}"
    );
    let types = refused("tiny-llama", "tokenizer.ggml.token_type", "x");
    assert!(
        types.contains("tokenizer.ggml.token_type is \"x\""),
        "{types}"
    );
    let unknown = refused("tiny-llama", "tokenizer.ggml.token_type", &[7i32; 2048][..]);
    assert!(
        unknown.contains("token_type has 7, which is no type"),
        "{unknown}"
    );
    let none = without("tiny-llama", "tokenizer.ggml.token_type");
    assert!(
        none.contains("it has no tokenizer.ggml.token_type"),
        "{none}"
    );
    let tokens = refused("tiny-llama", "tokenizer.ggml.tokens", 7u32);
    assert!(
        tokens.contains("tokenizer.ggml.tokens is 7; it should be a list of texts"),
        "{tokens}"
    );
}

#[test]
fn merges_of_what_is_no_token_are_refused_by_entry() {
    let merges = |merge: &str| {
        refused(
            "tiny-mpt",
            "tokenizer.ggml.merges",
            Texts::from_iter(["Ġ t", merge]),
        )
    };
    let unknown = merges("Ġ nosuchtoken");
    assert!(
        unknown.contains("entry 1 is \"Ġ nosuchtoken\", and there is no token \"nosuchtoken\""),
        "{unknown}"
    );
    let whole = merges("Ġthe Ġthe");
    assert!(whole.contains("there is no token \"ĠtheĠthe\""), "{whole}");
    let single = merges("Ġt");
    assert!(
        single.contains("entry 1 is \"Ġt\" and not two tokens"),
        "{single}"
    );
    let none = without("tiny-mpt", "tokenizer.ggml.merges");
    assert!(none.contains("it has no tokenizer.ggml.merges"), "{none}");
}

#[test]
fn tokens_that_are_twice_there_empty_or_too_long_are_refused() {
    let tokens = |tokens: &[&str]| {
        let mut writer = writer("tiny-mpt");
        writer.set("tokenizer.ggml.tokens", Texts::from_iter(tokens));
        writer.set("tokenizer.ggml.token_type", &vec![1i32; tokens.len()][..]);
        format!("{:#}", read(&writer).err().expect("it is refused"))
    };
    assert!(tokens(&["a", "b", "a"]).contains("tokens 0 and 2 are both \"a\""));
    assert!(tokens(&["a", ""]).contains("token 1 is empty"));
    let long = "x".repeat(1025);
    assert!(tokens(&["a", &long]).contains("token 1 has 1025 bytes; at most 1024 are taken"));
    assert!(tokens(&[]).contains("there are 0 tokens"));
}

#[test]
fn a_template_that_is_too_long_is_refused_before_it_is_compiled() {
    let template = "x".repeat(TEMPLATE_BYTES_MAX + 1);
    let error = refused("tiny-llama", "tokenizer.chat_template", &*template);
    assert!(
        error.contains("tokenizer.chat_template has 1048577 bytes"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_no_gguf_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.GGUF");
    std::fs::write(&path, b"no").unwrap();
    let error = format!("{:#}", opened(&path, &path).err().unwrap());
    assert!(
        error.contains("model.GGUF: no tokenizer from it"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the metadata call a token: a refusal, or a tokenizer that takes any text.
    #[test]
    fn no_types_of_tokens_break_it(
        model in 0..MODELS.len(),
        types in prop::collection::vec((0usize..2048, 1i32..7), 0..40),
        unknown in 0u32..2048,
    ) {
        let mut writer = writer(MODELS[model]);
        let bytes = writer.to_bytes();
        let gguf = Gguf::read(&bytes[..], bytes.len() as u64).unwrap();
        let known = gguf.get("tokenizer.ggml.token_type").and_then(Meta::as_numbers).unwrap();
        let mut all: Vec<i32> = known.iter().filter_map(|kind| kind.as_u64()).map(|kind| kind as i32).collect();
        for (id, kind) in types {
            if let Some(known) = all.get_mut(id) {
                *known = kind;
            }
        }
        writer.set("tokenizer.ggml.token_type", &all[..]);
        writer.set("tokenizer.ggml.unknown_token_id", unknown);
        if let Ok(text) = read(&writer) {
            for awkward in AWKWARD {
                // A text without a token is an error of its request.
                let _ = text.tokenizer.encode(awkward, true);
            }
        }
    }
}
