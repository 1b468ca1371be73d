//! Where tokens stand in the text that is shown: `text_offset`, in characters.
//!
//! A token's bytes and the text are not always the same: special tokens have names but no text, some tokenizers drop the
//! blank in front of a text, and bytes that are no UTF-8 are shown as U+FFFD. So each token is looked for where the one
//! before it ended, and what is not there takes no place.

use common::request::TokenLogprob;

/// What stands for bytes that are no UTF-8.
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();

/// A walk through one choice's text, which may come in pieces: a token never before its text.
#[derive(Debug, Clone, Default)]
pub(super) struct Offsets {
    /// Text that no token has taken yet.
    rest: Vec<u8>,
    /// Characters that begin before `rest`.
    chars: usize,
    /// Something other than blanks was taken.
    begun: bool,
}

impl Offsets {
    /// Where each of the tokens stands, counted from the beginning of the choice's text. `text` is what came since the
    /// last call.
    pub fn take(&mut self, text: &str, tokens: &[TokenLogprob]) -> Vec<usize> {
        self.rest.extend_from_slice(text.as_bytes());
        let mut at = 0;
        let mut offsets = Vec::with_capacity(tokens.len());
        for token in tokens {
            let (skipped, taken) = found(&self.rest[at..], &token.bytes, !self.begun);
            self.chars += chars_begun(&self.rest[at..at + skipped]);
            at += skipped;
            // A token that goes on with a character belongs to the place where that character began.
            let inside = self.rest.get(at).is_some_and(|byte| !begins_char(*byte));
            offsets.push(self.chars.saturating_sub(usize::from(inside)));
            let taken = &self.rest[at..at + taken];
            self.chars += chars_begun(taken);
            self.begun |= taken.iter().any(|byte| *byte != b' ');
            at += taken.len();
        }
        self.rest.drain(..at);
        offsets
    }
}

/// How many bytes of the text lie in front of the token, and how many are the token's. `leading` says that a blank may
/// have been dropped in front.
fn found(text: &[u8], token: &[u8], leading: bool) -> (usize, usize) {
    if text.starts_with(token) {
        return (0, token.len());
    }
    if let Some(token) = token.strip_prefix(b" ").filter(|_| leading)
        && text.starts_with(token)
    {
        return (0, token.len());
    }
    // The rest of a character whose first bytes are a token that was shown before there was a character.
    if std::str::from_utf8(token).is_err() {
        let char_len = 1 + continuation(text.get(1..).unwrap_or_default());
        let within = (1..char_len).find(|&skip| text[skip..].starts_with(token));
        return within.map_or((0, 0), |skip| (skip, token.len()));
    }
    // What stands for bytes of tokens before this one.
    let mut skip = continuation(text);
    while text[skip..].starts_with(REPLACEMENT) {
        skip += REPLACEMENT.len();
    }
    if text[skip..].starts_with(token) {
        (skip, token.len())
    } else {
        (0, 0)
    }
}

/// How many bytes at the front go on with a character.
fn continuation(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| !begins_char(**byte)).count()
}

/// How many characters begin in these bytes of UTF-8.
fn chars_begun(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| begins_char(**byte)).count()
}

fn begins_char(byte: u8) -> bool {
    byte & 0xC0 != 0x80
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(tokens: &[&[u8]]) -> Vec<TokenLogprob> {
        let token = |bytes: &&[u8]| TokenLogprob {
            id: 1,
            bytes: bytes.to_vec(),
            logprob: None,
            top: vec![],
        };
        tokens.iter().map(token).collect()
    }

    fn offsets(text: &str, list: &[&[u8]]) -> Vec<usize> {
        Offsets::default().take(text, &tokens(list))
    }

    #[test]
    fn special_tokens_and_the_dropped_blank_take_no_place() {
        let list: [&[u8]; 6] = [b"<s>", b" Apache", b" Spark", b" is", b" an", b"</s>"];
        assert_eq!(offsets("Apache Spark is an", &list), [0, 0, 6, 12, 15, 18]);
        assert_eq!(
            offsets(" Apache Spark is an", &list),
            [0, 0, 7, 13, 16, 19],
            "a blank that is shown counts"
        );
        let blanks: [&[u8]; 3] = [b" ", b" x", b"y"];
        assert_eq!(offsets(" xy", &blanks), [0, 1, 2]);
    }

    #[test]
    fn parts_of_characters_stand_where_the_character_begins() {
        let list: [&[u8]; 5] = ["é".as_bytes(), b"a", b"\xe2", b"\x82\xac", b"b"];
        assert_eq!(offsets("éa€b", &list), [0, 1, 2, 2, 3]);
    }

    #[test]
    fn bytes_that_are_no_text_do_not_lose_the_place() {
        let list: [&[u8]; 4] = [b"a", b"\xe2", b"\xef", b"b"];
        assert_eq!(offsets("a\u{FFFD}\u{FFFD}b", &list), [0, 1, 1, 3]);
        let list: [&[u8]; 3] = [b"\xef", b"\xff", b"b"];
        assert_eq!(offsets("\u{FFFD}\u{FFFD}b", &list), [0, 0, 2]);
    }

    #[test]
    fn a_character_that_the_prompt_began_and_the_answer_ended_is_found() {
        let mut walk = Offsets::default();
        assert_eq!(walk.take("a", &tokens(&[b"a", b"\xe2"])), [0, 1]);
        assert_eq!(walk.take("€", &tokens(&[b"\x82\xac"])), [1]);
        assert_eq!(walk.take("b", &tokens(&[b"b"])), [2]);
    }

    proptest! {
        #[test]
        fn every_token_that_is_shown_stands_at_its_offset(
            words in proptest::collection::vec("[ a-dé€😀]{1,4}", 1..20),
            special in proptest::collection::vec(any::<bool>(), 20),
            pieces in proptest::collection::vec(1usize..4, 1..20),
            dropped in any::<bool>(),
        ) {
            let mut list: Vec<&[u8]> = Vec::new();
            for (word, special) in words.iter().zip(&special) {
                if *special {
                    list.push(b"<|special|>");
                }
                list.push(word.as_bytes());
            }
            let joined = words.concat();
            let text = joined.strip_prefix(' ').filter(|_| dropped).unwrap_or(&joined);
            let tokens = tokens(&list);
            let whole = Offsets::default().take(text, &tokens);
            for (token, &offset) in list.iter().zip(&whole) {
                let here: String = text.chars().skip(offset).collect();
                let shown = std::str::from_utf8(token).unwrap();
                let stripped = shown.strip_prefix(' ').unwrap_or(shown);
                prop_assert!(
                    *token == b"<|special|>" || here.starts_with(shown) || here.starts_with(stripped),
                    "{shown:?} at {offset} of {text:?}"
                );
                prop_assert!(offset <= text.chars().count());
            }
            prop_assert!(whole.is_sorted());

            // In pieces, with text that comes earlier than its tokens.
            let mut walk = Offsets::default();
            let mut streamed = walk.take(text, &[]);
            let mut rest = &tokens[..];
            for piece in pieces.iter().cycle() {
                let (now, later) = rest.split_at((*piece).min(rest.len()));
                streamed.extend(walk.take("", now));
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(streamed, whole);
        }
    }
}
