//! The workspace's own sources, read as text: for the tests that guard the architecture's walls.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A source file.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path from the workspace's root, with forward slashes.
    pub path: String,
    /// Its text.
    pub text: String,
    /// Its text without comments and without what stands in string and character literals; lines are kept.
    pub code: String,
}

impl Source {
    /// Lines of code (from 1) that hold `word` as a whole word, or as it is where it begins with other characters.
    pub fn lines_with(&self, word: &str) -> Vec<usize> {
        let lines = self.code.lines().enumerate();
        lines
            .filter(|(_, line)| has_word(line, word))
            .map(|(index, _)| index + 1)
            .collect()
    }

    /// The code before the file's own test module.
    pub fn product_code(&self) -> &str {
        let end = ["#[cfg(test)]\nmod ", "#[cfg(test)]\npub mod "]
            .iter()
            .filter_map(|mark| self.code.find(mark))
            .min();
        &self.code[..end.unwrap_or(self.code.len())]
    }

    /// Whether the file holds nothing but tests.
    pub fn is_test(&self) -> bool {
        self.path.starts_with("tests/")
            || self.path.ends_with("/tests.rs")
            || self.path.contains("/tests/")
    }
}

/// The workspace's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All Rust files of the workspace's members.
pub fn all() -> Vec<Source> {
    let mut found = Vec::new();
    for member in ["bench", "common", "coordinator", "worker", "tests"] {
        collect(&root(), member, &mut found);
    }
    assert!(
        found.len() > 50,
        "only {} source files were found below {}",
        found.len(),
        root().display()
    );
    found
}

fn collect(root: &Path, folder: &str, found: &mut Vec<Source>) {
    let mut entries: Vec<_> = fs::read_dir(root.join(folder))
        .unwrap_or_else(|e| panic!("{folder}: {e}"))
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path
            .file_name()
            .expect("an entry has a name")
            .to_string_lossy()
            .into_owned();
        let below = format!("{folder}/{name}");
        if path.is_dir() {
            if !matches!(name.as_str(), "target" | "models") || below.contains("/src/") {
                collect(root, &below, found);
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{below}: {e}"));
            let code = without_comments_and_literals(&text);
            found.push(Source {
                path: below,
                text,
                code,
            });
        }
    }
}

/// A member's manifest.
pub fn manifest(member: &str) -> toml::Table {
    let path = root().join(member).join("Cargo.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse()
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names of everything a member depends on, also for its tests and builds.
pub fn dependencies(member: &str) -> BTreeSet<String> {
    let manifest = manifest(member);
    let mut names = BTreeSet::new();
    let mut add = |table: &toml::Table| {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            names.extend(
                table
                    .get(kind)
                    .and_then(|t| t.as_table())
                    .into_iter()
                    .flat_map(|t| t.keys().cloned()),
            );
        }
    };
    add(&manifest);
    let targets = manifest.get("target").and_then(|t| t.as_table());
    targets
        .into_iter()
        .flat_map(|t| t.values())
        .filter_map(|t| t.as_table())
        .for_each(add);
    names
}

fn has_word(line: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let (opens, closes) = (word.starts_with(part_of_word), word.ends_with(part_of_word));
    line.match_indices(word).any(|(at, _)| {
        let longer_before = opens && line[..at].ends_with(part_of_word);
        let longer_after = closes && line[at + word.len()..].starts_with(part_of_word);
        !longer_before && !longer_after
    })
}

/// Blanks out comments, and what stands between the quotes of literals.
fn without_comments_and_literals(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut i = 0;
    let blank = |code: &mut String, from: usize, to: usize| {
        code.extend(
            chars[from..to]
                .iter()
                .map(|c| if *c == '\n' { '\n' } else { ' ' }),
        );
    };
    while i < chars.len() {
        let rest = &chars[i..];
        let end = match rest {
            ['/', '/', ..] => i + rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => i + block_comment(rest),
            ['"', ..] => i + quoted(rest, '"'),
            ['r', '"', ..] | ['r', '#', '"' | '#', ..] if !after_word(&chars, i) => {
                i + raw_string(rest)
            }
            // A character, not a lifetime: one character or an escape between two quotes.
            ['\'', '\\', ..] | ['\'', _, '\'', ..] => i + quoted(rest, '\''),
            _ => {
                code.push(chars[i]);
                i += 1;
                continue;
            }
        };
        blank(&mut code, i, end);
        i = end;
    }
    code
}

fn after_word(chars: &[char], i: usize) -> bool {
    i > 0 && (chars[i - 1].is_alphanumeric() || chars[i - 1] == '_')
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < rest.len() {
        match &rest[i..] {
            ['/', '*', ..] => (depth, i) = (depth + 1, i + 2),
            ['*', '/', ..] if depth == 1 => return i + 2,
            ['*', '/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
    }
    rest.len()
}

fn quoted(rest: &[char], quote: char) -> usize {
    let mut i = 1;
    while i < rest.len() {
        match rest[i] {
            '\\' => i += 2,
            c if c == quote => return i + 1,
            _ => i += 1,
        }
    }
    rest.len()
}

fn raw_string(rest: &[char]) -> usize {
    let hashes = rest[1..].iter().take_while(|c| **c == '#').count();
    let start = 2 + hashes;
    let closes = |i: usize| {
        rest[i] == '"'
            && rest[i + 1..]
                .iter()
                .take(hashes)
                .filter(|c| **c == '#')
                .count()
                == hashes
    };
    (start..rest.len())
        .find(|i| closes(*i))
        .map_or(rest.len(), |i| i + 1 + hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_lines_kept() {
        let text = "a // unsafe\nlet s = \"un\\\"safe\"; /* x /* y */ z */ b\nlet r = r#\"q\"uote\"#; let c = '\"'; fn f<'a>(x: &'a str)";
        let code = without_comments_and_literals(text);
        assert_eq!(code.lines().count(), 3);
        assert!(
            !code.contains("safe") && !code.contains("uote") && !code.contains('z'),
            "{code}"
        );
        assert!(
            code.contains("b\n") && code.contains("fn f<'a>(x: &'a str)"),
            "{code}"
        );
    }

    #[test]
    fn words_are_found_whole() {
        assert!(has_word("unsafe {", "unsafe"));
        assert!(!has_word("forbid(unsafe_code)", "unsafe"));
        assert!(!has_word("serde_json::x", "json"));
        assert!(has_word("Instant::now()", "::now") && !has_word("now: Instant", "::now"));
    }
}
