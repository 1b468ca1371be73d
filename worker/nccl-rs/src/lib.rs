//! NCCL, found at run time: a machine without it, or without a GPU, builds and starts all the same.
//!
//! Owns finding the library and asking its version. Communicators, collectives, asynchronous errors and aborting are
//! not here yet: they come together with the CUDA backend, the only thing that can use them.

use std::ffi::{c_int, c_uint};
use std::fmt;

/// The names NCCL goes by, best first: the run-time package's, then the development package's.
const SONAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclResult_t` of a call that went well.
const SUCCESS: c_uint = 0;

/// `ncclResult_t ncclGetVersion(int *version)`
type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_uint;

/// A loaded NCCL. It stays loaded for the life of this value.
#[derive(Debug)]
pub struct Library {
    /// Keeps the code behind `get_version` mapped.
    _library: libloading::Library,
    get_version: GetVersion,
    soname: String,
}

/// NCCL is not on this machine, or is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "NCCL was not found; tried {}. Install NVIDIA's libnccl2, or put its folder into LD_LIBRARY_PATH",
    .tried.iter().map(Attempt::to_string).collect::<Vec<_>>().join(", ")
)]
pub struct NotFound {
    /// Every name that was tried, in order.
    pub tried: Vec<Attempt>,
}

/// One name and why it did not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The library's name, as given to the dynamic loader.
    pub soname: String,
    /// The loader's own words.
    pub reason: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.soname, self.reason)
    }
}

/// NCCL's version. Ordered as versions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2 of 2.27.3.
    pub major: u32,
    /// 27 of 2.27.3.
    pub minor: u32,
    /// 3 of 2.27.3.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A call that NCCL answered with an error: its `ncclResult_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("NCCL answered with ncclResult_t {0}")]
pub struct CallFailed(pub u32);

impl Library {
    /// Loads NCCL by its usual names.
    ///
    /// # Errors
    /// [`NotFound`] lists every name that was tried and why it did not do.
    pub fn load() -> Result<Library, NotFound> {
        Self::load_first(&SONAMES)
    }

    fn load_first(sonames: &[&str]) -> Result<Library, NotFound> {
        let mut tried = Vec::new();
        for soname in sonames {
            match Self::open(soname) {
                Ok(library) => return Ok(library),
                Err(e) => tried.push(Attempt {
                    soname: (*soname).to_owned(),
                    reason: e.to_string(),
                }),
            }
        }
        Err(NotFound { tried })
    }

    fn open(soname: &str) -> Result<Library, libloading::Error> {
        // SAFETY: loading runs the library's initialisers. The names are NCCL's own, and NCCL's initialisers ask nothing
        // of the caller.
        let library = unsafe { libloading::Library::new(soname) }?;
        // SAFETY: the signature is that of nccl.h, the same in all releases of NCCL 2. The pointer is kept beside the
        // library that it points into, and neither leaves this struct.
        let get_version = unsafe { *library.get::<GetVersion>(b"ncclGetVersion\0")? };
        Ok(Library {
            _library: library,
            get_version,
            soname: soname.to_owned(),
        })
    }

    /// The name under which it was found.
    pub fn soname(&self) -> &str {
        &self.soname
    }

    /// The version of the loaded library.
    ///
    /// # Errors
    /// [`CallFailed`] when NCCL does not tell it.
    pub fn version(&self) -> Result<Version, CallFailed> {
        let mut code: c_int = 0;
        // SAFETY: `get_version` comes from the library held by `self`; `code` lives through the call, which writes one
        // int to it and keeps no pointer.
        let result = unsafe { (self.get_version)(&mut code) };
        if result != SUCCESS {
            return Err(CallFailed(result));
        }
        Ok(decode_version(code.unsigned_abs()))
    }
}

/// NCCL's version number has two digits for the minor version since 2.9 (22703 is 2.27.3), one before (2804 is 2.8.4).
fn decode_version(code: u32) -> Version {
    let unit = if code < 10_000 { 1_000 } else { 10_000 };
    Version {
        major: code / unit,
        minor: code % unit / 100,
        patch: code % 100,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// Compiles C into a shared library: a stand-in, since the build machine has no NCCL.
    fn shared_library(folder: &tempfile::TempDir, c: &str) -> PathBuf {
        let (source, library) = (
            folder.path().join("stand_in.c"),
            folder.path().join("libstand_in.so"),
        );
        fs::write(&source, c).unwrap();
        let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let status = Command::new(cc)
            .args(["-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&source)
            .status();
        assert!(status.expect("a C compiler runs").success());
        library
    }

    #[test]
    fn what_is_nowhere_is_reported_with_every_name_that_was_tried() {
        let error = Library::load_first(&["libnccl-absent.so.2", "libnccl-absent.so"]).unwrap_err();
        let names: Vec<&str> = error.tried.iter().map(|a| a.soname.as_str()).collect();
        assert_eq!(names, ["libnccl-absent.so.2", "libnccl-absent.so"]);
        let message = error.to_string();
        assert!(
            message.starts_with("NCCL was not found; tried libnccl-absent.so.2 ("),
            "{message}"
        );
        assert!(message.contains("LD_LIBRARY_PATH"), "{message}");
    }

    #[test]
    fn a_library_without_nccls_functions_is_not_nccl() {
        let folder = tempfile::tempdir().unwrap();
        let library = shared_library(&folder, "int something_else(void) { return 0; }");
        let error = Library::load_first(&[library.to_str().unwrap()]).unwrap_err();
        assert!(error.tried[0].reason.contains("ncclGetVersion"), "{error}");
    }

    #[test]
    fn the_loaded_library_tells_its_version() {
        let folder = tempfile::tempdir().unwrap();
        let library = shared_library(
            &folder,
            "int ncclGetVersion(int *v) { *v = 22703; return 0; }",
        );
        let loaded =
            Library::load_first(&["libnccl-absent.so.2", library.to_str().unwrap()]).unwrap();
        assert_eq!(loaded.soname(), library.to_str().unwrap());
        assert_eq!(
            loaded.version(),
            Ok(Version {
                major: 2,
                minor: 27,
                patch: 3
            })
        );
    }

    #[test]
    fn an_error_of_the_library_is_passed_on() {
        let folder = tempfile::tempdir().unwrap();
        let library = shared_library(&folder, "int ncclGetVersion(int *v) { return 3; }");
        let loaded = Library::load_first(&[library.to_str().unwrap()]).unwrap();
        assert_eq!(loaded.version(), Err(CallFailed(3)));
    }

    #[test]
    fn version_numbers_of_both_kinds_are_read() {
        assert_eq!(
            decode_version(2804),
            Version {
                major: 2,
                minor: 8,
                patch: 4
            }
        );
        assert_eq!(decode_version(21212).to_string(), "2.12.12");
        assert!(decode_version(2708) < decode_version(22703));
    }
}
