//! How to sign in at a registry: what cluster.toml says, else what the registry's own clients read.
//!
//! Secrets in files are read anew for each request, so that they may be changed while the cluster runs. No secret is
//! ever shown: neither here nor in an error.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use common::config::{Credentials, SecretSource};

use crate::{Environment, Error};

/// Longest secret: tokens of some identity providers have several kilobytes.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// What requests are signed with.
#[derive(Clone, Debug, Default)]
pub(crate) enum Auth {
    #[default]
    None,
    Bearer(Secret),
    Basic(String, Secret),
}

#[derive(Clone)]
pub(crate) enum Secret {
    Text(String),
    File(PathBuf),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::Text(_) => f.write_str("(secret)"),
            Secret::File(path) => write!(f, "(secret in {})", path.display()),
        }
    }
}

/// Environment variables that a kind of registry signs in with.
pub(crate) struct Variables {
    pub token: &'static str,
    /// User and password; MLflow lets them win over a token.
    pub basic: Option<(&'static str, &'static str)>,
}

impl Auth {
    /// What was configured, or found in the environment.
    pub(crate) fn new(
        credentials: &Credentials,
        variables: &Variables,
        environment: Environment<'_>,
    ) -> Result<Auth, Error> {
        if let Some((user, password)) = &credentials.basic {
            return Ok(Auth::Basic(user.clone(), secret(password, environment)?));
        }
        if let Some(token) = &credentials.token {
            return Ok(Auth::Bearer(secret(token, environment)?));
        }
        if let Some((user, password)) = variables.basic
            && let (Some(user), Some(password)) = (environment(user), environment(password))
        {
            return Ok(Auth::Basic(user, Secret::Text(password)));
        }
        Ok(match environment(variables.token) {
            Some(token) => Auth::Bearer(Secret::Text(token)),
            None => Auth::None,
        })
    }

    /// Signs a request.
    pub(crate) fn sign(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<reqwest::RequestBuilder, Error> {
        Ok(match self {
            Auth::None => request,
            Auth::Bearer(token) => request.bearer_auth(token.read()?),
            Auth::Basic(user, password) => request.basic_auth(user, Some(password.read()?)),
        })
    }

    /// What was signed with, for the message of a refusal.
    pub(crate) fn words(&self) -> &'static str {
        match self {
            Auth::None => "no credentials were given",
            Auth::Bearer(_) => "a token was given",
            Auth::Basic(..) => "a user and a password were given",
        }
    }
}

impl Secret {
    fn read(&self) -> Result<String, Error> {
        let path = match self {
            Secret::Text(text) => return Ok(text.clone()),
            Secret::File(path) => path,
        };
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(SECRET_BYTES_MAX).read_to_string(&mut text))
            .map_err(|e| {
                Error::Unusable(format!(
                    "cannot read the registry's secret in {}: {e}",
                    path.display()
                ))
            })?;
        Ok(text.trim().to_owned())
    }
}

fn secret(source: &SecretSource, environment: Environment<'_>) -> Result<Secret, Error> {
    match source {
        SecretSource::File(path) => Ok(Secret::File(path.clone())),
        SecretSource::Variable(name) => environment(name).map(Secret::Text).ok_or_else(|| {
            Error::Unusable(format!(
                "the environment variable {name}, which cluster.toml names for a registry, is not set"
            ))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MLFLOW: Variables = Variables {
        token: "TOKEN",
        basic: Some(("USER", "PASSWORD")),
    };

    fn header(auth: &Auth) -> Option<String> {
        let request = auth
            .sign(reqwest::Client::new().get("http://h/"))
            .unwrap()
            .build()
            .unwrap();
        let value = request.headers().get("authorization")?;
        assert!(value.is_sensitive());
        Some(value.to_str().unwrap().to_owned())
    }

    fn auth(credentials: &Credentials, variables: &[(&str, &str)]) -> Result<Auth, Error> {
        crate::http::install_provider();
        let environment = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name)?;
            Some(found.1.to_owned())
        };
        Auth::new(credentials, &MLFLOW, &environment)
    }

    #[test]
    fn a_password_wins_over_a_token_and_cluster_toml_over_the_environment() {
        let none = Credentials::default();
        let both = [("TOKEN", "t"), ("USER", "u"), ("PASSWORD", "p")];
        let basic = Some("Basic dTpw".to_owned());
        assert_eq!(header(&auth(&none, &both).unwrap()), basic);
        let token = header(&auth(&none, &both[..1]).unwrap());
        assert_eq!(token, Some("Bearer t".to_owned()));
        assert_eq!(header(&auth(&none, &[]).unwrap()), None);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "from-file\n").unwrap();
        let configured = Credentials {
            token: Some(SecretSource::File(file.clone())),
            basic: None,
        };
        let configured = auth(&configured, &both).unwrap();
        assert_eq!(header(&configured), Some("Bearer from-file".to_owned()));
        std::fs::write(&file, "changed").unwrap();
        assert_eq!(header(&configured), Some("Bearer changed".to_owned()));
    }

    #[test]
    fn what_is_missing_is_named_and_no_secret_is_shown() {
        let variable = Credentials {
            token: Some(SecretSource::Variable("MY_TOKEN".into())),
            basic: None,
        };
        let message = auth(&variable, &[]).unwrap_err().to_string();
        assert!(message.contains("MY_TOKEN"), "{message}");
        let found = auth(&variable, &[("MY_TOKEN", "hush")]).unwrap();
        assert!(!format!("{found:?}").contains("hush"));
        let gone = Auth::Bearer(Secret::File("/no/such/token".into()));
        let error = gone.sign(reqwest::Client::new().get("http://h/"));
        assert!(error.unwrap_err().to_string().contains("/no/such/token"));
    }
}
