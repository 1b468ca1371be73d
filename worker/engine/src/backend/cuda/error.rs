//! Why a device cannot be used, or failed.

use crate::backend::DeviceError;
use cudarc::driver::sys::CUresult;

/// What can go wrong with CUDA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The driver's library is not there.
    #[error(
        "no CUDA driver: libcuda.so.1 is not on the loader's path; install NVIDIA's driver, or start the container with its devices (docker: --gpus all)"
    )]
    NoDriver,
    /// The driver lacks a function.
    #[error("the CUDA driver is too old: it has no {0}; driver 525 (CUDA 12.0) or newer is needed")]
    OldDriver(&'static str),
    /// The driver sees no device.
    #[error("the CUDA driver sees no device (CUDA_VISIBLE_DEVICES hides devices from it)")]
    NoDevice,
    /// There are not so many devices.
    #[error("there is no device cuda:{ordinal}; the CUDA driver sees {devices}, cuda:0 to cuda:{}", devices - 1)]
    Ordinal {
        /// What was asked for.
        ordinal: u32,
        /// How many there are.
        devices: u32,
    },
    /// A library beside the driver is missing.
    #[error("{what} is not there: tried {tried}; {help}")]
    Library {
        /// Its name.
        what: &'static str,
        /// The files that were looked for.
        tried: String,
        /// How to get it.
        help: &'static str,
    },
    /// No kernels for a device.
    #[error("no kernels for a device of compute capability {major}.{minor}: {reason}")]
    Architecture {
        /// Of the compute capability.
        major: u32,
        /// Of the compute capability.
        minor: u32,
        /// Why none could be made.
        reason: String,
    },
    /// The kernels and their launchers do not fit together.
    #[error(
        "kernel {kernel}: {reason}; the compiled kernels are older than their sources: run scripts/build-kernels"
    )]
    Stale {
        /// Which.
        kernel: &'static str,
        /// What differs.
        reason: String,
    },
    /// The device has not the memory.
    #[error("out of memory: the device refused {bytes} bytes")]
    OutOfMemory {
        /// How many were asked for.
        bytes: u64,
    },
    /// A call failed.
    #[error("{call}: {error}")]
    Call {
        /// The function.
        call: &'static str,
        /// What it said.
        error: String,
    },
}

impl CudaError {
    /// The error of a driver's call.
    pub(super) fn of(call: &'static str, result: CUresult) -> CudaError {
        let text = match cudarc::driver::DriverError(result).error_string() {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => "no text".to_owned(),
        };
        // The enum's own name says CUDA_ERROR_...; the number is what manuals list.
        CudaError::Call {
            call,
            error: format!("{result:?} ({}), {text}", result as u32),
        }
    }
}

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> DeviceError {
        match error {
            CudaError::OutOfMemory { bytes } => DeviceError::OutOfMemory { bytes },
            other => DeviceError::Failed(other.to_string()),
        }
    }
}
