//! One device, opened: its context, the kernels for it, and cuBLAS.
//!
//! Owns the order in which things are found missing, each with an error of its own. Computes nothing.
#![allow(unsafe_code)]

use super::blas::BlasLibrary;
use super::driver::{self, Context};
use super::error::CudaError;
use super::kernels::{self, Kernels};
use super::library;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use std::ffi::{CStr, c_char, c_int};
use std::sync::Arc;

/// What is known of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its place among the devices that the driver shows: `cuda:N`.
    pub ordinal: u32,
    /// As its maker calls it.
    pub name: String,
    /// All its memory, in bytes.
    pub memory_bytes: u64,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Domain, bus, device and function: `0000:3b:00.0`.
    pub pci: String,
}

/// A device that kernels can run on.
#[derive(Debug)]
pub struct CudaDevice {
    facts: DeviceFacts,
    pub(super) kernels: Kernels,
    pub(super) blas: Arc<BlasLibrary>,
    pub(super) context: Arc<Context>,
}

impl CudaDevice {
    /// Opens device `ordinal` and loads the kernels.
    ///
    /// # Errors
    /// [`CudaError`]: no driver, no such device, no cuBLAS, no kernels for it, or the device failed.
    pub fn open(ordinal: u32) -> Result<Arc<CudaDevice>, CudaError> {
        let devices = count()?;
        if devices == 0 {
            return Err(CudaError::NoDevice);
        }
        if ordinal >= devices {
            return Err(CudaError::Ordinal { ordinal, devices });
        }
        let facts = facts(ordinal)?;
        let blas = BlasLibrary::load()?;
        let context = Arc::new(Context::retain(handle(ordinal)?)?);
        let kernels = kernels::load(&context, facts.compute_capability)?;
        Ok(Arc::new(CudaDevice {
            facts,
            kernels,
            blas,
            context,
        }))
    }

    /// What it is.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Free bytes now, and all.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.context.memory()
    }

    /// Makes this the calling thread's device. NCCL makes a communicator on it.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn bind(&self) -> Result<(), CudaError> {
        self.context.bind()
    }
}

/// How many devices the driver shows.
pub(super) fn count() -> Result<u32, CudaError> {
    library::driver()?;
    // SAFETY: the driver is there; it may be initialised again.
    let initialised = driver::check("cuInit", unsafe { sys::cuInit(0) });
    let mut count: c_int = 0;
    match initialised {
        // A driver without devices says so here.
        Err(_) if is_no_device() => return Ok(0),
        other => other?,
    }
    // SAFETY: a number is written.
    driver::check("cuDeviceGetCount", unsafe {
        sys::cuDeviceGetCount(&mut count)
    })?;
    Ok(count as u32)
}

fn is_no_device() -> bool {
    // SAFETY: the driver is there.
    unsafe { sys::cuInit(0) == sys::CUresult::CUDA_ERROR_NO_DEVICE }
}

pub(super) fn handle(ordinal: u32) -> Result<sys::CUdevice, CudaError> {
    let mut device = 0;
    // SAFETY: a number is written.
    driver::check("cuDeviceGet", unsafe {
        sys::cuDeviceGet(&mut device, ordinal as c_int)
    })?;
    Ok(device)
}

/// What a device is. Opens no context.
pub(super) fn facts(ordinal: u32) -> Result<DeviceFacts, CudaError> {
    let device = handle(ordinal)?;
    let mut name = [0 as c_char; 256];
    // SAFETY: a text of at most so many bytes is written, its end included.
    driver::check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr(), 256, device)
    })?;
    let mut pci = [0 as c_char; 32];
    // SAFETY: as above.
    driver::check("cuDeviceGetPCIBusId", unsafe {
        sys::cuDeviceGetPCIBusId(pci.as_mut_ptr(), 32, device)
    })?;
    let mut memory = 0;
    // SAFETY: a number is written.
    driver::check("cuDeviceTotalMem", unsafe {
        sys::cuDeviceTotalMem_v2(&mut memory, device)
    })?;
    Ok(DeviceFacts {
        ordinal,
        name: text(&name),
        memory_bytes: memory as u64,
        compute_capability: (
            attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            attribute(
                device,
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
        ),
        pci: text(&pci).to_lowercase(),
    })
}

fn attribute(device: sys::CUdevice, which: Attribute) -> Result<u32, CudaError> {
    let mut value = 0;
    // SAFETY: a number is written.
    driver::check("cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&mut value, which, device)
    })?;
    Ok(value as u32)
}

fn text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| *byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(
        |_| String::new(),
        |text| text.to_string_lossy().into_owned(),
    )
}
