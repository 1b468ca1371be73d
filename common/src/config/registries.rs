//! `[[registries]]` of cluster.toml: where models come from, and how to sign in there.
//!
//! Whether a registry answers, and whether its secrets are there, is not asked here.

use std::path::Path;

use super::check::identifier;
use super::cluster::{Credentials, RegistryEntry, RegistryKind, SecretSource};
use super::models::{Said, serving};
use super::raw::RawRegistry;
use super::reader::Reader;

pub(super) fn registry(
    raw: RawRegistry,
    root: &Path,
    seen: &mut Vec<String>,
    r: &mut Reader<'_>,
) -> Option<RegistryEntry> {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let name = identifier(raw.name.clone(), seen, &at("name"), "registry", r);
    let kind = kind(&raw, root, r);
    if let Some(url) = &raw.url {
        check_url(url, &at("url"), r);
    }
    let said = Said {
        kv_dtype: raw.kv_dtype.as_deref(),
        quantization: raw.quantization.as_deref(),
        context_max: raw.context_max,
    };
    let serving = serving(said, &raw.path, r);
    let credentials = credentials(&raw, root, r);
    let kind = kind?;
    if matches!(kind, RegistryKind::Folder(_)) {
        let given = [
            ("url", raw.url.is_some()),
            ("ca_file", raw.ca_file.is_some()),
            ("insecure_tls", raw.insecure_tls.is_some()),
            ("token_file", raw.token_file.is_some()),
            ("token_env", raw.token_env.is_some()),
            ("username", raw.username.is_some()),
        ];
        for (key, _) in given.into_iter().filter(|(_, given)| *given) {
            r.mistake(&at(key), "means nothing for a folder");
        }
    }
    Some(RegistryEntry {
        name: name?,
        kind,
        url: raw.url,
        credentials,
        ca_file: raw.ca_file.map(|file| root.join(file)),
        insecure_tls: raw.insecure_tls.unwrap_or(false),
        serving,
    })
}

fn kind(raw: &RawRegistry, root: &Path, r: &mut Reader<'_>) -> Option<RegistryKind> {
    let folder_key = format!("{}.path", raw.path);
    let kind = match raw.kind.as_deref()? {
        "mlflow" => RegistryKind::Mlflow,
        "unity-catalog" => RegistryKind::UnityCatalog,
        "huggingface" => RegistryKind::HuggingFace,
        "folder" => match &raw.folder {
            Some(folder) => return Some(RegistryKind::Folder(root.join(folder))),
            None => {
                if !r.noted(&folder_key) {
                    r.mistake(
                        &folder_key,
                        "is missing: the folder that holds NAME/VERSION/",
                    );
                }
                return None;
            }
        },
        other => {
            r.mistake(
                &format!("{}.kind", raw.path),
                format!(
                    "must be \"mlflow\", \"unity-catalog\", \"huggingface\" or \"folder\", got \"{other}\""
                ),
            );
            return None;
        }
    };
    if raw.folder.is_some() {
        r.mistake(&folder_key, "belongs to kind = \"folder\"");
    }
    Some(kind)
}

fn check_url(url: &str, key: &str, r: &mut Reader<'_>) {
    let Some(rest) = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"))
    else {
        return r.mistake(
            key,
            format!("must begin with https:// or http://, got \"{url}\""),
        );
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        // The secret is not repeated.
        r.mistake(
            key,
            "must not hold a user or a password: give username and password_file, or token_file",
        );
    } else if authority.is_empty() {
        r.mistake(key, "names no host");
    }
}

fn credentials(raw: &RawRegistry, root: &Path, r: &mut Reader<'_>) -> Credentials {
    let at = |key: &str| format!("{}.{key}", raw.path);
    let mut secret = |name: &str, file: &Option<String>, variable: &Option<String>| {
        if file.is_some() && variable.is_some() {
            r.mistake(
                &at(&format!("{name}_env")),
                format!("is given beside {name}_file: one of them"),
            );
        }
        let file = file
            .as_ref()
            .map(|file| SecretSource::File(root.join(file)));
        file.or_else(|| variable.clone().map(SecretSource::Variable))
    };
    let token = secret("token", &raw.token_file, &raw.token_env);
    let password = secret("password", &raw.password_file, &raw.password_env);
    let basic = match (raw.username.clone(), password) {
        (Some(user), Some(password)) => Some((user, password)),
        (None, None) => None,
        _ => {
            r.mistake(
                &at("username"),
                "username and password_file (or password_env) belong together",
            );
            None
        }
    };
    Credentials { token, basic }
}
