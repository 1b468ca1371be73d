//! A version's files as its registry lists them, believed only within bounds.

use common::wire::message::RemoteFile;
use sha2::{Digest, Sha256};

use crate::Error;

/// Most files and folders of one version. Real ones have some dozens.
pub(crate) const ENTRIES_MAX: usize = 10_000;
/// Deepest nesting of folders.
pub(crate) const DEPTH_MAX: usize = 8;
/// Longest path.
const PATH_BYTES_MAX: usize = 512;
/// Most of a wrong path that a message repeats.
const SHOWN_CHARS_MAX: usize = 80;

/// The files of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Where they are, in words that the same registry understands again.
    pub uri: String,
    /// Tells this content from any other.
    pub identity: String,
    /// The files, by path.
    pub files: Vec<RemoteFile>,
}

impl Listing {
    /// A listing of these files. `stamp` is what the registry itself says to tell versions apart.
    ///
    /// # Errors
    /// [`Error::Unusable`]: too many files, a path that leads out of the model, or the same path twice.
    pub(crate) fn new(
        uri: String,
        stamp: &str,
        mut files: Vec<RemoteFile>,
    ) -> Result<Listing, Error> {
        let refuse = |reason: String| Error::Unusable(format!("the listing of {uri} {reason}"));
        if files.len() > ENTRIES_MAX {
            return Err(refuse(format!(
                "has {} files; at most {ENTRIES_MAX} are taken",
                files.len()
            )));
        }
        for file in &files {
            check_path(&file.path).map_err(&refuse)?;
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        if let Some(pair) = files.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return Err(refuse(format!("has the file {} twice", pair[0].path)));
        }
        let mut digest = Sha256::new();
        let mut field = |text: &str| {
            digest.update((text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        };
        field(stamp);
        for file in &files {
            field(&file.path);
            field(
                &file
                    .bytes
                    .map(|bytes| bytes.to_string())
                    .unwrap_or_default(),
            );
            field(file.sha256.as_deref().unwrap_or_default());
        }
        Ok(Listing {
            uri,
            identity: hex::encode(digest.finalize()),
            files,
        })
    }

    /// A file by its path.
    pub fn file(&self, path: &str) -> Option<&RemoteFile> {
        let found = self
            .files
            .binary_search_by(|file| file.path.as_str().cmp(path));
        found.ok().map(|index| &self.files[index])
    }
}

/// Checks that a stranger's path stays inside the folder that it is relative to.
///
/// # Errors
/// Says what is wrong with it, after "the listing".
pub fn check_path(path: &str) -> Result<(), String> {
    let ok = !path.is_empty()
        && path.len() <= PATH_BYTES_MAX
        && path.split('/').count() <= DEPTH_MAX + 1
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !path.contains('\\')
        && !path.chars().any(char::is_control);
    if ok {
        return Ok(());
    }
    let shown: String = path.escape_debug().take(SHOWN_CHARS_MAX).collect();
    Err(format!(
        "names the file '{shown}', which is not a plain path inside the model"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, bytes: u64) -> RemoteFile {
        RemoteFile {
            path: path.into(),
            bytes: Some(bytes),
            sha256: None,
        }
    }

    fn listing(files: Vec<RemoteFile>) -> Result<Listing, String> {
        Listing::new("x:/y".into(), "1", files).map_err(|e| e.to_string())
    }

    #[test]
    fn paths_that_lead_out_of_the_model_are_refused_by_name() {
        let long = "x".repeat(PATH_BYTES_MAX + 1);
        let deep = ["a"; DEPTH_MAX + 2].join("/");
        for path in [
            "../up",
            "a/../b",
            "/etc/passwd",
            "",
            ".",
            "a//b",
            "a/",
            "a\\b",
            "a\0b",
            "a\nb",
            &long,
            &deep,
        ] {
            let message = listing(vec![file("config.json", 1), file(path, 1)]).unwrap_err();
            assert!(
                message.starts_with("the listing of x:/y names the file"),
                "{path:?}: {message}"
            );
            assert!(message.len() < 300, "{message}");
        }
        for path in ["a", "model/config.json", "..a/b..", "a b", "ä"] {
            assert!(listing(vec![file(path, 1)]).is_ok(), "{path}");
        }
    }

    #[test]
    fn too_many_files_and_the_same_one_twice_are_refused() {
        let many = (0..=ENTRIES_MAX).map(|i| file(&i.to_string(), 1)).collect();
        assert!(listing(many).unwrap_err().contains("has 10001 files"));
        let twice = listing(vec![file("a", 1), file("a", 2)]);
        assert!(twice.unwrap_err().contains("has the file a twice"));
    }

    #[test]
    fn the_identity_depends_on_content_and_not_on_order() {
        let identity = |files| listing(files).unwrap().identity;
        let (a, b) = (file("a", 1), file("b", 2));
        let both = identity(vec![a.clone(), b.clone()]);
        assert_eq!(both, identity(vec![b.clone(), a.clone()]));
        assert_ne!(both, identity(vec![a.clone(), file("b", 3)]));
        let digest = RemoteFile {
            sha256: Some("00".into()),
            ..b
        };
        assert_ne!(both, identity(vec![a, digest]));
    }

    #[test]
    fn files_are_found_by_path() {
        let listing = listing(vec![file("b", 2), file("a/c", 1)]).unwrap();
        assert_eq!(listing.file("a/c").unwrap().bytes, Some(1));
        assert_eq!(listing.file("a"), None);
    }
}
