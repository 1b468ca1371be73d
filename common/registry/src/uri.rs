//! What artifact URIs mean: a registry's own words for where files are, parsed once.

use std::path::PathBuf;

use crate::Error;

/// Where the files of a version are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Behind the tracking server's artifact proxy, or that of another host.
    Proxy { host: Option<String>, path: String },
    /// A run's artifacts, which the tracking server reads for its clients.
    Run { run: String, path: String },
    /// A registered version (`models:/NAME/3`) or an alias of one (`models:/NAME@champion`).
    Version { name: String, which: Which },
    /// An MLflow 3 logged model.
    Logged(String),
    /// A folder that every machine sees.
    Folder(PathBuf),
    /// A cloud's object store; the URI as it is.
    Objects(String),
}

/// Which version of a registered model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Which {
    Number(String),
    Alias(String),
}

/// Schemes of object stores.
pub(crate) const OBJECT_SCHEMES: [&str; 8] =
    ["s3", "s3a", "gs", "wasb", "wasbs", "abfs", "abfss", "az"];

impl Place {
    pub(crate) fn parse(uri: &str) -> Result<Place, Error> {
        let Some((scheme, rest)) = uri.split_once(':').filter(|(scheme, _)| is_scheme(scheme))
        else {
            return folder(uri, uri);
        };
        match scheme {
            "mlflow-artifacts" => {
                let (host, path) = match rest.strip_prefix("//") {
                    Some(rest) => {
                        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
                        (Some(host).filter(|host| !host.is_empty()), path)
                    }
                    None => (None, rest),
                };
                Ok(Place::Proxy {
                    host: host.map(str::to_owned),
                    path: path.trim_matches('/').to_owned(),
                })
            }
            "runs" => {
                let rest = rest.trim_matches('/');
                let (run, path) = rest.split_once('/').unwrap_or((rest, ""));
                Ok(Place::Run {
                    run: run.to_owned(),
                    path: path.to_owned(),
                })
            }
            "models" => models(rest.trim_matches('/'), uri),
            "file" => {
                // file:///path, file://localhost/path and file:/path.
                let path = match rest.strip_prefix("//") {
                    Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
                    None => rest,
                };
                let path = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
                folder(&path, uri)
            }
            scheme if OBJECT_SCHEMES.contains(&scheme) => Ok(Place::Objects(uri.to_owned())),
            _ => Err(Error::Unusable(format!(
                "artifacts at {uri} cannot be read: known are mlflow-artifacts:, runs:, models:, file: and object \
                 stores ({}); let the tracking server proxy them (mlflow server --artifacts-destination)",
                OBJECT_SCHEMES.join(", ")
            ))),
        }
    }
}

/// `scheme:` and not a path with a colon in it.
fn is_scheme(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

fn folder(path: &str, uri: &str) -> Result<Place, Error> {
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(Error::Unusable(format!(
            "artifacts at {uri} cannot be found: a folder must be given by its whole path"
        )));
    }
    Ok(Place::Folder(path))
}

fn models(rest: &str, uri: &str) -> Result<Place, Error> {
    if rest.starts_with("m-") && !rest.contains(['/', '@']) {
        return Ok(Place::Logged(rest.to_owned()));
    }
    let (name, which) = match (rest.split_once('@'), rest.rsplit_once('/')) {
        (Some((name, alias)), _) => (name, Which::Alias(alias.to_owned())),
        (None, Some((name, version))) if version.bytes().all(|b| b.is_ascii_digit()) => {
            (name, Which::Number(version.to_owned()))
        }
        _ => {
            return Err(Error::Unusable(format!(
                "{uri} names no version: write models:/NAME/3, models:/NAME@alias or models:/m-ID"
            )));
        }
    };
    Ok(Place::Version {
        name: name.to_owned(),
        which,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(host: Option<&str>, path: &str) -> Place {
        Place::Proxy {
            host: host.map(str::to_owned),
            path: path.to_owned(),
        }
    }

    #[test]
    fn every_form_that_mlflow_writes_is_understood() {
        let parsed = |uri| Place::parse(uri).unwrap();
        assert_eq!(
            parsed("mlflow-artifacts:/0/abc/artifacts/model"),
            proxy(None, "0/abc/artifacts/model")
        );
        assert_eq!(
            parsed("mlflow-artifacts://host:5000/0/a"),
            proxy(Some("host:5000"), "0/a")
        );
        assert_eq!(parsed("mlflow-artifacts:///0/a"), proxy(None, "0/a"));
        assert_eq!(
            parsed("runs:/abc/sub/model"),
            Place::Run {
                run: "abc".into(),
                path: "sub/model".into()
            }
        );
        assert_eq!(
            parsed("models:/ml.llm-catalog.llama/3"),
            Place::Version {
                name: "ml.llm-catalog.llama".into(),
                which: Which::Number("3".into())
            }
        );
        assert_eq!(
            parsed("models:/llama@champion"),
            Place::Version {
                name: "llama".into(),
                which: Which::Alias("champion".into())
            }
        );
        assert_eq!(parsed("models:/m-12ab"), Place::Logged("m-12ab".into()));
        let folder = |path: &str| Place::Folder(path.into());
        assert_eq!(parsed("file:///srv/a%20b"), folder("/srv/a b"));
        assert_eq!(parsed("file://localhost/srv/a"), folder("/srv/a"));
        assert_eq!(parsed("/srv/ml:runs/0"), folder("/srv/ml:runs/0"));
        assert_eq!(
            parsed("s3://bucket/p"),
            Place::Objects("s3://bucket/p".into())
        );
    }

    #[test]
    fn what_is_not_understood_says_what_would_be() {
        let message = |uri| Place::parse(uri).unwrap_err().to_string();
        assert!(message("dbfs:/models/x").contains("known are mlflow-artifacts:"));
        assert!(message("relative/path").contains("by its whole path"));
        assert!(message("file:relative").contains("by its whole path"));
        assert!(message("models:/llama").contains("names no version"));
        assert!(message("models:/llama/latest").contains("names no version"));
    }
}
