//! Certificates of a cluster's own authority, made for one test.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// An authority: certificates of two authorities do not trust each other.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority.
    pub fn new() -> Authority {
        let mut parameters = CertificateParams::new(Vec::new()).expect("no names are good names");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = parameters.self_signed(&key).expect("a certificate").pem();
        Authority {
            pem,
            issuer: Issuer::new(parameters, key),
        }
    }

    /// Writes the authority, and a certificate with key for 127.0.0.1, into a folder; gives cluster.toml's `[tls]`.
    pub fn write(&self, folder: &Path) -> String {
        let key = KeyPair::generate().expect("a key");
        let parameters =
            CertificateParams::new(vec!["127.0.0.1".into()]).expect("an address is a good name");
        let certificate = parameters
            .signed_by(&key, &self.issuer)
            .expect("a certificate");
        let file = |name: &str, pem: String| -> PathBuf {
            let path = folder.join(name);
            fs::write(&path, pem).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            path
        };
        let (ca, cert) = (
            file("ca.pem", self.pem.clone()),
            file("cert.pem", certificate.pem()),
        );
        let key = file("key.pem", key.serialize_pem());
        format!("[tls]\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\n")
    }
}

impl Default for Authority {
    fn default() -> Self {
        Authority::new()
    }
}
