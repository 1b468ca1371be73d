//! Tokens and the workers' secret: files made at the first start, readable by their owner alone, never overwritten.
//!
//! Secrets are not logged and not kept in cluster.toml; a caller's token is known here by its SHA-256 only.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use common::config::{AuthConfig, TokenSource};
use sha2::{Digest, Sha256};

use crate::api::Caller;

/// Longest secret that is read: a file that is longer is not one.
const SECRET_BYTES_MAX: u64 = 4096;

/// A caller's token, known by its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Whom it stands for.
    pub caller: Caller,
    /// SHA-256 of the token.
    pub digest: [u8; 32],
}

/// The digests of all callers' tokens; files that are missing are made. Blocks.
///
/// # Errors
/// Names the file that cannot be read or made, or holds what no client could send.
pub fn tokens(auth: &AuthConfig) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    for entry in &auth.tokens {
        let digest = match &entry.source {
            TokenSource::Sha256(digest) => *digest,
            TokenSource::File(path) => {
                let token = read_or_create(path)?;
                check_token(&token).with_context(|| path.display().to_string())?;
                Sha256::digest(token.as_bytes()).into()
            }
        };
        tokens.push(Token {
            caller: Caller {
                user: entry.user.clone(),
                admin: entry.admin,
                groups: entry.groups.clone(),
            },
            digest,
        });
    }
    Ok(tokens)
}

/// Clients send a token in a header, as one word.
fn check_token(token: &str) -> Result<()> {
    let place = token.chars().position(|c| !c.is_ascii_graphic());
    if let Some(place) = place {
        bail!(
            "is no token: character {} is a blank, a line break or not ASCII, and clients send a token as one word in a \
             header; write one token into the file, or delete it to have a new one made",
            place + 1
        );
    }
    Ok(())
}

/// The secret in the file, without the space around it; a missing file is made with 32 random bytes in hexadecimal.
/// Blocks.
///
/// # Errors
/// Names the file that cannot be read or made, or is empty.
pub fn read_or_create(path: &Path) -> Result<String> {
    match fs::metadata(path) {
        Ok(found) if found.len() > SECRET_BYTES_MAX => {
            bail!(
                "{}: is no secret, it is longer than {SECRET_BYTES_MAX} bytes",
                path.display()
            )
        }
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => create(path)?,
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let secret = text.trim();
    if secret.is_empty() {
        bail!(
            "{}: is empty; delete it to have a new one made",
            path.display()
        );
    }
    Ok(secret.to_owned())
}

/// Writes a new secret beside the file and links it to its name: readers see all of it or nothing, and of two makers
/// one wins.
fn create(path: &Path) -> Result<()> {
    let context = || format!("cannot make {}", path.display());
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(context)?;
    let secret = hex::encode(rand::random::<[u8; 32]>());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = folder.join(format!(".{name}.{:016x}", rand::random::<u64>()));
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)?;
        writeln!(file, "{secret}")?;
        file.sync_all()?;
        fs::hard_link(&draft, path)
    })();
    let _ = fs::remove_file(&draft);
    match written {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e).with_context(context),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_missing_secret_is_made_once_and_only_for_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("var/secret");
        let made = read_or_create(&path).unwrap();
        assert_eq!(hex::decode(&made).unwrap().len(), 32);
        assert_eq!(
            read_or_create(&path).unwrap(),
            made,
            "an existing secret is kept"
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no draft is left"
        );
    }

    #[test]
    fn makers_at_the_same_time_agree() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let made: Vec<String> = std::thread::scope(|scope| {
            let makers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| read_or_create(&path).unwrap()))
                .collect();
            makers
                .into_iter()
                .map(|maker| maker.join().unwrap())
                .collect()
        });
        assert!(made.iter().all(|secret| *secret == made[0]));
    }

    #[test]
    fn an_empty_file_and_a_huge_one_are_no_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        fs::write(&path, " \n").unwrap();
        assert!(
            read_or_create(&path)
                .unwrap_err()
                .to_string()
                .contains("is empty")
        );
        fs::write(&path, vec![b'x'; 5000]).unwrap();
        assert!(
            read_or_create(&path)
                .unwrap_err()
                .to_string()
                .contains("is no secret")
        );
    }

    #[test]
    fn what_no_client_can_send_is_refused_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("admin.token");
        for (text, place) in [
            ("two words", "character 4"),
            ("two\nlines\n", "character 4"),
            ("\tcafé", "character 4"),
            ("a\u{7}", "character 2"),
        ] {
            fs::write(&file, text).unwrap();
            let auth = AuthConfig {
                worker_secret_file: folder.path().join("w"),
                tokens: vec![common::config::TokenEntry {
                    user: "u".into(),
                    admin: true,
                    groups: vec![],
                    source: TokenSource::File(file.clone()),
                }],
            };
            let error = format!("{:#}", tokens(&auth).unwrap_err());
            assert!(
                error.contains("admin.token: is no token") && error.contains(place),
                "{error}"
            );
            assert!(!error.contains(text.trim()), "the token is not shown");
        }
    }

    #[test]
    fn tokens_are_known_by_their_digest() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        fs::write(&file, "secret\n").unwrap();
        let entry = |source| common::config::TokenEntry {
            user: "u".into(),
            admin: true,
            groups: vec![],
            source,
        };
        let auth = AuthConfig {
            worker_secret_file: folder.path().join("w"),
            tokens: vec![
                entry(TokenSource::File(file)),
                entry(TokenSource::Sha256(Sha256::digest("secret").into())),
            ],
        };
        let tokens = tokens(&auth).unwrap();
        assert_eq!(tokens[0], tokens[1]);
    }
}
