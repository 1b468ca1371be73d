//! Shared libraries that are there or not: the driver, cuBLAS, NVRTC.
//!
//! Owns where they are looked for and what is said when they are missing. cudarc loads the driver itself and panics where
//! a library or a function is not there: [`driver`] makes sure of both before anything else is called.
#![allow(unsafe_code)]

use super::error::CudaError;
use libloading::Library;
use std::sync::OnceLock;

/// The driver's functions that this backend calls. Loading checks that all are there, and a test that none is missing here.
pub(super) const DRIVER_FUNCTIONS: [&str; 40] = [
    "cuCtxSetCurrent",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
];

/// Tells a kernel's parameters; drivers before 12.4 lack it, and then nothing is compared.
pub(super) const PARAMETERS_FUNCTION: &str = "cuFuncGetParamInfo";

/// What a driver has beside what it must have.
#[derive(Debug, Clone, Copy)]
pub(super) struct DriverFacts {
    /// Whether it has [`PARAMETERS_FUNCTION`].
    pub tells_parameters: bool,
}

/// Makes sure that the driver is there and complete. Asked once per process: a driver does not appear while one runs.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::OldDriver`].
pub(super) fn driver() -> Result<DriverFacts, CudaError> {
    static FOUND: OnceLock<Result<DriverFacts, CudaError>> = OnceLock::new();
    FOUND
        .get_or_init(|| {
            // The names that cudarc tries, in its order.
            let names = cudarc::get_lib_name_candidates("cuda");
            let library = open(names.iter().map(String::as_str)).ok_or(CudaError::NoDriver)?;
            match DRIVER_FUNCTIONS.iter().find(|name| !has(&library, name)) {
                Some(missing) => Err(CudaError::OldDriver(missing)),
                None => Ok(DriverFacts {
                    tells_parameters: has(&library, PARAMETERS_FUNCTION),
                }),
            }
        })
        .clone()
}

/// The first of these libraries that the loader finds.
pub(super) fn open<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Library> {
    names.into_iter().find_map(|name| {
        // SAFETY: NVIDIA's libraries start no thread and change no state of the process when they are loaded.
        unsafe { Library::new(name) }.ok()
    })
}

fn has(library: &Library, function: &str) -> bool {
    // SAFETY: the symbol is looked for, not called.
    unsafe { library.get::<*const ()>(function.as_bytes()) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn every_function_of_the_driver_that_is_called_is_looked_for_first() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda");
        let mut called = std::collections::BTreeSet::new();
        for entry in std::fs::read_dir(folder).expect("the backend's sources") {
            let path = entry.expect("an entry").path();
            if path.extension().is_none_or(|kind| kind != "rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source");
            for (at, _) in text.match_indices(concat!("sys::", "cu")) {
                let name: String = text[at + "sys::".len()..]
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                called.insert(name);
            }
            assert!(
                !text.contains(concat!("driver::", "result")),
                "{}: calls the driver through sys alone",
                path.display()
            );
        }
        let looked_for: std::collections::BTreeSet<String> = DRIVER_FUNCTIONS
            .into_iter()
            .chain([PARAMETERS_FUNCTION])
            .map(str::to_owned)
            .collect();
        called.extend(["cuGetErrorName", "cuGetErrorString"].map(str::to_owned));
        assert_eq!(
            called, looked_for,
            "functions called, and functions looked for"
        );
    }
}
