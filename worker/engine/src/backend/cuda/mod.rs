//! cuda
mod blas;
mod device;
pub(crate) mod driver;
mod error;
mod kernels;
mod library;
mod nvrtc;
mod pointer;
#[cfg(test)]
mod signature;
mod survey;

pub use device::{CudaDevice, DeviceFacts};
pub use error::CudaError;
pub use survey::{Survey, survey};
