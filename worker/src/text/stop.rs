//! Stop strings in a stream of text: found across token borders, never shown.
//!
//! Pure. Owns the text held back because it may begin a stop string.

/// Finds the first of several strings in a text that comes in pieces.
///
/// The string that is complete first wins; of several complete at the same character, the longest. So the result does
/// not depend on how the text is cut, and is known without looking ahead.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    strings: Vec<String>,
    held: String,
    found: bool,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are ignored.
    pub fn new(strings: &[String]) -> StopMatcher {
        let strings = strings.iter().filter(|s| !s.is_empty()).cloned().collect();
        StopMatcher {
            strings,
            held: String::new(),
            found: false,
        }
    }

    /// Takes more text and appends what is safe to show. True when a stop string is complete: what came before it has
    /// been released, and nothing is released any more.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.found {
            return true;
        }
        let new = self.held.len();
        self.held.push_str(text);
        if let Some(start) = self.first_match(new) {
            out.push_str(&self.held[..start]);
            self.held.clear();
            self.found = true;
            return true;
        }
        let keep = self.open_start();
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        false
    }

    /// The text ended without a stop string: releases what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Where the first stop string that ends after `new` starts.
    fn first_match(&self, new: usize) -> Option<usize> {
        let ends = self.held[new..]
            .char_indices()
            .map(|(at, c)| new + at + c.len_utf8());
        ends.filter_map(|end| {
            let before = &self.held[..end];
            self.strings
                .iter()
                .filter(|s| before.ends_with(s.as_str()))
                .map(|s| end - s.len())
                .min()
        })
        .next()
    }

    /// Where the longest end of the text that begins a stop string starts.
    fn open_start(&self) -> usize {
        let begins = |tail: &str| self.strings.iter().any(|s| s.starts_with(tail));
        let starts = self.held.char_indices().map(|(at, _)| at);
        starts
            .into_iter()
            .find(|&at| begins(&self.held[at..]))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn strings(of: &[&str]) -> Vec<String> {
        of.iter().map(|s| (*s).to_owned()).collect()
    }

    /// All at once: the shown text and whether a stop string was found.
    fn naive(text: &str, stops: &[String]) -> (String, bool) {
        for (at, c) in text.char_indices() {
            let before = &text[..at + c.len_utf8()];
            let longest = stops
                .iter()
                .filter(|s| !s.is_empty() && before.ends_with(s.as_str()))
                .map(String::len)
                .max();
            if let Some(longest) = longest {
                return (before[..before.len() - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn in_pieces(text: &str, cut: usize, stops: &[String]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops);
        let mut out = String::new();
        let characters: Vec<char> = text.chars().collect();
        for piece in characters.chunks(cut) {
            if matcher.push(&piece.iter().collect::<String>(), &mut out) {
                return (out, true);
            }
        }
        matcher.finish(&mut out);
        (out, false)
    }

    #[test]
    fn text_that_may_begin_a_stop_string_waits_until_that_is_decided() {
        let mut matcher = StopMatcher::new(&strings(&["\n\nUser:"]));
        let mut out = String::new();
        assert!(!matcher.push("hello\n", &mut out));
        assert_eq!(out, "hello");
        assert!(!matcher.push("\nUs", &mut out));
        assert_eq!(out, "hello");
        assert!(!matcher.push("ual", &mut out));
        assert_eq!(out, "hello\n\nUsual");
        assert!(!matcher.push("\n\nUser", &mut out));
        assert!(matcher.push(": hi", &mut out));
        assert!(matcher.push("more", &mut out));
        assert_eq!(out, "hello\n\nUsual");
    }

    #[test]
    fn the_string_that_is_complete_first_wins_and_the_longest_of_those() {
        assert_eq!(
            in_pieces("xabcd", 5, &strings(&["abcd", "bc"])),
            ("xa".into(), true)
        );
        assert_eq!(
            in_pieces("xabc", 1, &strings(&["bc", "abc"])),
            ("x".into(), true)
        );
    }

    #[test]
    fn the_end_of_the_text_releases_what_was_held() {
        assert_eq!(
            in_pieces("say sto", 1, &strings(&["stop"])),
            ("say sto".into(), false)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_cut_equals_a_naive_search_of_the_whole(text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{0,4}", 0..4), cut in 1usize..6) {
            prop_assert_eq!(in_pieces(&text, cut, &stops), naive(&text, &stops));
        }

        #[test]
        fn no_more_is_held_than_the_longest_stop_string_less_one_byte(text in "[ab]{0,30}", stops in prop::collection::vec("[ab]{1,5}", 0..4)) {
            let mut matcher = StopMatcher::new(&stops);
            let mut out = String::new();
            for c in text.chars() {
                if matcher.push(&c.to_string(), &mut out) { break; }
                let longest = stops.iter().map(String::len).max().unwrap_or(1);
                prop_assert!(matcher.held.len() < longest);
            }
        }
    }
}
