//! `[[auth.tokens]]` of cluster.toml: where each caller's token comes from, who is an admin, who is in which group.

use std::path::Path;

use super::cluster::{TokenEntry, TokenSource};
use super::raw::RawToken;
use super::reader::Reader;

/// Groups that nobody is put into by name.
const BUILT_IN_GROUPS: [&str; 2] = ["users", "admins"];

/// The callers. The first is an admin unless it says otherwise, the others are not unless they do: a cluster with one
/// token needs no word about it.
pub(super) fn tokens(raw: Vec<RawToken>, root: &Path, r: &mut Reader<'_>) -> Vec<TokenEntry> {
    let admins = |(i, token): (usize, &RawToken)| token.admin.unwrap_or(i == 0);
    if !raw.is_empty() && !raw.iter().enumerate().any(admins) {
        r.mistake(
            "auth.tokens",
            "none is an admin: set admin = true for at least one, or nobody may manage the endpoints of cluster.toml",
        );
    }
    let tokens = raw.into_iter().enumerate();
    tokens
        .filter_map(|(i, raw)| {
            let admin = raw.admin.unwrap_or(i == 0);
            token(raw, admin, root, r)
        })
        .collect()
}

fn token(raw: RawToken, admin: bool, root: &Path, r: &mut Reader<'_>) -> Option<TokenEntry> {
    for (i, group) in raw.groups.iter().enumerate() {
        let key = format!("{}.groups[{i}]", raw.path);
        if group.trim().is_empty() {
            r.mistake(&key, "must be a group's name, got none");
        }
        if BUILT_IN_GROUPS.contains(&group.as_str()) {
            r.mistake(
                &key,
                format!("\"{group}\" is built in: every caller is in users, and admin = true is in admins"),
            );
        }
    }
    let source = match (raw.file, raw.sha256) {
        (Some(file), None) => TokenSource::File(root.join(file)),
        (None, Some(digest)) => {
            let mut bytes = [0; 32];
            if hex::decode_to_slice(&digest, &mut bytes).is_err() {
                r.mistake(
                    &format!("{}.sha256", raw.path),
                    "must be 64 hexadecimal digits: the token's SHA-256",
                );
                return None;
            }
            TokenSource::Sha256(bytes)
        }
        _ => {
            r.mistake(
                &raw.path,
                "needs either file (a file that holds the token) or sha256 (the token's digest)",
            );
            return None;
        }
    };
    Some(TokenEntry {
        user: raw.user?,
        admin,
        groups: raw.groups,
        source,
    })
}
