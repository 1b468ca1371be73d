//! Bytes to text while they stream: whole characters only.
//!
//! Owns the bytes of an unfinished character between tokens. Knows no tokenizer: which bytes a token has is told by
//! [`super::tokenizer::Vocabulary`].

/// A UTF-8 stream that is cut anywhere. Gives the same text whatever the cuts are.
///
/// Bytes that can never become a character turn into U+FFFD (one per broken sequence, as
/// [`String::from_utf8_lossy`] does) as soon as that is certain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Utf8Stream {
    /// The start of a character, at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Takes bytes and appends the characters that are complete now.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest: &[u8] = &self.pending;
        let unfinished = loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    break 0;
                }
                Err(error) => {
                    let (valid, broken) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    let Some(skip) = error.error_len() else {
                        break broken.len();
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &broken[skip..];
                }
            }
        };
        self.pending.drain(..self.pending.len() - unfinished);
    }

    /// Whether a character has begun and is not complete.
    pub fn unfinished(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Ends the stream: a character that has begun becomes one U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if self.unfinished() {
            self.pending.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{MODELS, tokenizer};
    use super::*;

    fn in_pieces<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> String {
        let (mut stream, mut text) = (Utf8Stream::default(), String::new());
        pieces.for_each(|piece| stream.push(piece, &mut text));
        stream.finish(&mut text);
        text
    }

    #[test]
    fn a_character_appears_when_its_last_byte_comes() {
        let (mut stream, mut text) = (Utf8Stream::default(), String::new());
        for &byte in &"é🚀".as_bytes()[..5] {
            stream.push(&[byte], &mut text);
        }
        assert_eq!((text.as_str(), stream.unfinished()), ("é", true));
        stream.push(&"🚀".as_bytes()[3..], &mut text);
        assert_eq!((text.as_str(), stream.unfinished()), ("é🚀", false));
    }

    #[test]
    fn an_unfinished_character_at_the_end_is_one_replacement() {
        assert_eq!(
            in_pieces(["a".as_bytes(), &"🚀".as_bytes()[..3]].into_iter()),
            "a\u{fffd}"
        );
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_gives_the_text_of_the_whole(bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0xc0u8..0xf8, 0x80u8..0xc0, 97u8..100], 0..60), cut in 1usize..7) {
            prop_assert_eq!(in_pieces(bytes.chunks(cut)), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn streamed_tokens_give_the_text_decoded_at_once(model in 0..MODELS.len(), ids in prop::collection::vec(0u32..2048, 0..60), at in 0usize..60) {
            let vocabulary = tokenizer(MODELS[model]).vocabulary();
            let at = at.min(ids.len());
            let (prompt, mut stream) = vocabulary.prompt_text(&ids[..at]);
            let mut streamed = prompt;
            for &id in &ids[at..] {
                stream.push(vocabulary.text(id), &mut streamed);
            }
            stream.finish(&mut streamed);
            let (mut whole, mut rest) = vocabulary.prompt_text(&ids);
            rest.finish(&mut whole);
            // Only what begins a text is stripped: an empty prompt leaves the blank to its continuation.
            let blank = streamed.strip_prefix(' ').is_some_and(|stripped| stripped == whole);
            prop_assert!(streamed == whole || blank, "{streamed:?} is not {whole:?}");
        }
    }
}
