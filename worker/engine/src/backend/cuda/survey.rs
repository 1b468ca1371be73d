//! What of CUDA a machine has: asked for a report, never in the way of work.
//!
//! Owns no judgement: what is missing is an error that says how to get it. Opens no context, so that a busy device is not
//! disturbed. NCCL is asked by its own crate.
#![allow(unsafe_code)]

use super::blas::BlasLibrary;
use super::device::{self, DeviceFacts};
use super::driver::check;
use super::error::CudaError;
use super::{library, nvrtc};
use cudarc::driver::sys;

/// What is there.
#[derive(Debug, Clone)]
pub struct Survey {
    /// The newest CUDA that the driver serves, major and minor.
    pub driver: Result<(u32, u32), CudaError>,
    /// All devices that the driver shows, in order; or why it shows none.
    pub devices: Result<Vec<DeviceFacts>, CudaError>,
    /// `peers[a][b]`: device `a` reads the memory of `b` directly.
    pub peers: Vec<Vec<bool>>,
    /// cuBLAS: major, minor, patch.
    pub cublas: Result<[u32; 3], CudaError>,
    /// NVRTC, which only devices without embedded kernels need.
    pub nvrtc: Option<(u32, u32)>,
}

/// Looks at this machine. What fails is told in the survey.
#[must_use]
pub fn survey() -> Survey {
    let devices = devices();
    Survey {
        driver: driver_version(),
        peers: devices
            .as_ref()
            .map(|devices| peers(devices))
            .unwrap_or_default(),
        devices,
        cublas: BlasLibrary::load().map(|library| library.version()),
        nvrtc: nvrtc::version(),
    }
}

fn driver_version() -> Result<(u32, u32), CudaError> {
    library::driver()?;
    let mut version = 0;
    // SAFETY: the driver is there; a number is written.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    let version = version as u32;
    Ok((version / 1000, version % 1000 / 10))
}

fn devices() -> Result<Vec<DeviceFacts>, CudaError> {
    match device::count()? {
        0 => Err(CudaError::NoDevice),
        count => (0..count).map(device::facts).collect(),
    }
}

fn peers(devices: &[DeviceFacts]) -> Vec<Vec<bool>> {
    let reaches = |a: &DeviceFacts, b: &DeviceFacts| -> Result<bool, CudaError> {
        let (from, to) = (device::handle(a.ordinal)?, device::handle(b.ordinal)?);
        let mut can = 0;
        // SAFETY: a number is written.
        check("cuDeviceCanAccessPeer", unsafe {
            sys::cuDeviceCanAccessPeer(&mut can, from, to)
        })?;
        Ok(can != 0)
    };
    let row = |a: &DeviceFacts| {
        devices
            .iter()
            .map(|b| a.ordinal != b.ordinal && reaches(a, b).unwrap_or(false))
            .collect()
    };
    devices.iter().map(row).collect()
}
