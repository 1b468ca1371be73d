//! Finding NCCL, and what it tells without a communicator.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ResultCode, SUCCESS};
use crate::functions::{Functions, RawCommunicator};
use crate::unique_id::{RawUniqueId, UNIQUE_ID_BYTES, UniqueId};
use crate::version::Version;

/// The names NCCL goes by, best first: the run-time package's, then the development package's.
const SONAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclResult_t ncclGetVersion(int *version)`
type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_uint;

/// A loaded NCCL. It stays loaded as long as the process lives: threads of its own may run longer than what started them.
#[derive(Debug)]
pub struct Library {
    functions: Functions,
    version: Version,
    name: String,
}

/// NCCL is not on this machine, or is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// No file of NCCL's names can be loaded.
    #[error(
        "NCCL was not found; tried {}. Install NVIDIA's libnccl2, or put its folder into LD_LIBRARY_PATH",
        .tried.iter().map(Attempt::to_string).collect::<Vec<_>>().join(", ")
    )]
    NotFound {
        /// Every name that was tried, in order.
        tried: Vec<Attempt>,
    },
    /// It lacks a function.
    #[error(
        "{name} is NCCL {found}, which is too old: it has no {symbol}; NCCL {needed} or newer is needed"
    )]
    TooOld {
        /// The library's name.
        name: String,
        /// Its version.
        found: Version,
        /// What it lacks.
        symbol: &'static str,
        /// The first release that has all that this crate calls.
        needed: Version,
    },
}

/// One name and why it did not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The library's name, as given to the dynamic loader.
    pub name: String,
    /// The loader's own words.
    pub reason: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.reason)
    }
}

impl Library {
    /// The oldest release that has every function this crate calls.
    pub const OLDEST: Version = Version::new(2, 14, 0);

    /// Loads NCCL by its usual names.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load() -> Result<Arc<Library>, LoadError> {
        Self::load_first(&SONAMES)
    }

    /// Loads NCCL from the first of these names or paths that can be loaded.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load_first(names: &[&str]) -> Result<Arc<Library>, LoadError> {
        let mut tried = Vec::new();
        for name in names {
            match Self::open(name) {
                Ok((library, version)) => {
                    return Self::resolve(library, version, name).map(Arc::new);
                }
                Err(reason) => tried.push(Attempt {
                    name: (*name).to_owned(),
                    reason,
                }),
            }
        }
        Err(LoadError::NotFound { tried })
    }

    fn open(name: &str) -> Result<(libloading::Library, Version), String> {
        // SAFETY: loading runs the library's initialisers. The names are NCCL's own, or the caller's word for it, and
        // NCCL's initialisers ask nothing of the caller.
        let library = unsafe { libloading::Library::new(name) }.map_err(|e| in_full(&e))?;
        let mut code: c_int = 0;
        let result = {
            // SAFETY: the signature is that of nccl.h, the same in all releases of NCCL 2.
            let get_version = unsafe { library.get::<GetVersion>(b"ncclGetVersion\0") }
                .map_err(|e| in_full(&e))?;
            // SAFETY: `code` lives through the call, which writes one int to it and keeps no pointer.
            unsafe { get_version(&mut code) }
        };
        if result != SUCCESS {
            return Err(format!("ncclGetVersion: {}", ResultCode::from_raw(result)));
        }
        Ok((library, Version::from_code(code.unsigned_abs())))
    }

    fn resolve(
        library: libloading::Library,
        version: Version,
        name: &str,
    ) -> Result<Library, LoadError> {
        match Functions::resolve(&library) {
            Ok(functions) => {
                std::mem::forget(library);
                Ok(Library {
                    functions,
                    version,
                    name: name.to_owned(),
                })
            }
            Err(missing) => Err(LoadError::TooOld {
                name: name.to_owned(),
                found: version,
                symbol: missing.symbol,
                needed: missing.since.max(Self::OLDEST),
            }),
        }
    }

    /// The name under which it was found.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version of the loaded library.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// A new id, for rank 0 to give to the other ranks. It opens a port on which they meet: `NCCL_SOCKET_IFNAME` chooses
    /// the network.
    ///
    /// # Errors
    /// [`Error::Failed`].
    pub fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut raw = RawUniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: `raw` is an ncclUniqueId that outlives the call.
        let code = unsafe { (self.functions.get_unique_id)(&mut raw) };
        if code != SUCCESS {
            return Err(self.failed("ncclGetUniqueId", code, std::ptr::null_mut()));
        }
        Ok(UniqueId::from_raw(raw))
    }

    pub(crate) fn functions(&self) -> &Functions {
        &self.functions
    }

    /// The error of a call that answered `code`, with what NCCL has to say about it. `communicator` may be null.
    pub(crate) fn failed(
        &self,
        call: &'static str,
        code: c_uint,
        communicator: RawCommunicator,
    ) -> Error {
        // SAFETY: the answer is a string constant for every code.
        let general = unsafe { text((self.functions.get_error_string)(code)) };
        // SAFETY: the answer is a buffer of NCCL's that is never freed and always ends with a zero. The communicator is
        // null or alive: NCCL does not look at it today, and might.
        let last = unsafe { text((self.functions.get_last_error)(communicator)) };
        let words = match (general.as_str(), last.trim()) {
            (general, "") => general.to_owned(),
            (general, last) => format!("{general}; {last}"),
        };
        Error::Failed {
            call,
            code: ResultCode::from_raw(code),
            words,
        }
    }
}

/// An error with all that is behind it: the dynamic loader's own words are there.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    words
}

/// A string of NCCL's; nothing for null.
///
/// # Safety
/// `pointer` is null or a string that ends with a zero.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    let string = unsafe { CStr::from_ptr(pointer) };
    string.to_string_lossy().into_owned()
}
