//! TLS between machines: both sides show a certificate of the cluster's own authority.
//!
//! Owns the reading of certificate files and the two configurations; links and HTTP use them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsFiles;

/// The accepting side: shows its certificate and demands one of the same authority.
///
/// # Errors
/// Names the file that is missing or wrong.
pub fn server(files: &TlsFiles) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(authority(&files.ca)?),
        provider.clone(),
    )
    .build()
    .with_context(|| format!("{}: not usable as an authority", files.ca.display()))?;
    let (chain, key) = identity(files)?;
    let configuration = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .with_context(|| {
            format!(
                "{}: does not match {}",
                files.key.display(),
                files.cert.display()
            )
        })?;
    Ok(Arc::new(configuration))
}

/// The dialling side.
///
/// # Errors
/// As [`server`].
pub fn client(files: &TlsFiles) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let (chain, key) = identity(files)?;
    let configuration = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(authority(&files.ca)?)
        .with_client_auth_cert(chain, key)
        .with_context(|| {
            format!(
                "{}: does not match {}",
                files.key.display(),
                files.cert.display()
            )
        })?;
    Ok(Arc::new(configuration))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{}: not PEM certificates", path.display()))?;
    if found.is_empty() {
        bail!("{}: holds no PEM certificate", path.display());
    }
    Ok(found)
}

fn authority(path: &Path) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store
            .add(certificate)
            .with_context(|| format!("{}: not an authority's certificate", path.display()))?;
    }
    Ok(store)
}

fn identity(files: &TlsFiles) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .with_context(|| format!("{}: holds no PEM private key", files.key.display()))?;
    Ok((certificates(&files.cert)?, key))
}
