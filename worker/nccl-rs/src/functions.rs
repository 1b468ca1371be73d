//! The functions of `nccl.h` that this crate calls, resolved all at once.
//!
//! Owns their C signatures, each the same in all releases since the one that is named beside it.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr;

use crate::data::Stream;
use crate::unique_id::RawUniqueId;
use crate::version::Version;

/// `ncclComm_t`: a communicator as NCCL knows it.
pub type RawCommunicator = *mut c_void;

/// `ncclConfig_t` as of 2.18 (its name is still `ncclConfig_v21700` there). Newer releases read `size` and take
/// defaults for what they added, older ones read less of it.
#[repr(C)]
pub struct RawConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl RawConfig {
    /// `NCCL_CONFIG_INITIALIZER` with `blocking = 0`.
    pub(crate) fn non_blocking() -> RawConfig {
        const UNDEFINED: c_int = c_int::MIN;
        RawConfig {
            size: size_of::<RawConfig>(),
            magic: 0xcafe_beef,
            version: 21700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// A function that a library lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Missing {
    pub(crate) symbol: &'static str,
    /// The first release that has it.
    pub(crate) since: Version,
}

macro_rules! functions {
    ($($field:ident = $symbol:literal since $major:literal . $minor:literal : $signature:ty;)*) => {
        /// One pointer per function. Valid as long as the library they came from stays loaded: for good.
        #[derive(Debug, Clone, Copy)]
        pub struct Functions {
            $(pub $field: $signature,)*
        }

        impl Functions {
            /// Finds all of them, or names the first that is not there.
            pub(crate) fn resolve(library: &libloading::Library) -> Result<Functions, Missing> {
                Ok(Functions {
                    $($field: {
                        // SAFETY: the symbol has this signature in every release of NCCL that has it.
                        let symbol = unsafe { library.get::<$signature>($symbol.as_bytes()) };
                        *symbol.map_err(|_| Missing {
                            symbol: $symbol,
                            since: Version::new($major, $minor, 0),
                        })?
                    },)*
                })
            }
        }
    };
}

functions! {
    get_unique_id = "ncclGetUniqueId" since 2 . 0: unsafe extern "C" fn(*mut RawUniqueId) -> c_uint;
    get_error_string = "ncclGetErrorString" since 2 . 0: unsafe extern "C" fn(c_uint) -> *const c_char;
    group_start = "ncclGroupStart" since 2 . 0: unsafe extern "C" fn() -> c_uint;
    group_end = "ncclGroupEnd" since 2 . 0: unsafe extern "C" fn() -> c_uint;
    all_reduce = "ncclAllReduce" since 2 . 0:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_uint;
    all_gather = "ncclAllGather" since 2 . 0:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, RawCommunicator, Stream) -> c_uint;
    broadcast = "ncclBroadcast" since 2 . 2:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_uint;
    get_async_error = "ncclCommGetAsyncError" since 2 . 4:
        unsafe extern "C" fn(RawCommunicator, *mut c_uint) -> c_uint;
    abort = "ncclCommAbort" since 2 . 4: unsafe extern "C" fn(RawCommunicator) -> c_uint;
    send = "ncclSend" since 2 . 7:
        unsafe extern "C" fn(*const c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_uint;
    recv = "ncclRecv" since 2 . 7:
        unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, RawCommunicator, Stream) -> c_uint;
    get_last_error = "ncclGetLastError" since 2 . 13: unsafe extern "C" fn(RawCommunicator) -> *const c_char;
    init_rank_config = "ncclCommInitRankConfig" since 2 . 14:
        unsafe extern "C" fn(*mut RawCommunicator, c_int, RawUniqueId, c_int, *mut RawConfig) -> c_uint;
    finalize = "ncclCommFinalize" since 2 . 14: unsafe extern "C" fn(RawCommunicator) -> c_uint;
    destroy = "ncclCommDestroy" since 2 . 0: unsafe extern "C" fn(RawCommunicator) -> c_uint;
}
