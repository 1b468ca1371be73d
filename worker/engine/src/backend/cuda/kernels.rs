//! The kernels of one device: found in the embedded cubins, or compiled at start; and the launch of one.
//!
//! Owns the check that kernels and launchers fit together. The launchers themselves are written by the build script, from
//! the heads in `kernels/*.cu`.
#![allow(unsafe_code)]

use super::driver::{self, Context, Module, Stream};
use super::error::CudaError;
use super::pointer::{Ptr, PtrMut};
use super::{library, nvrtc};
use cudarc::driver::sys::CUfunction;
use half::bf16;
use std::ffi::{CString, c_void};
use std::sync::Arc;

include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));

/// A file of kernels.
pub(super) struct Source {
    /// Without ending.
    pub name: &'static str,
    /// As written.
    pub text: &'static str,
    /// By architecture: 80 is sm_80.
    pub cubins: &'static [(u32, &'static [u8])],
    /// In order.
    pub kernels: &'static [Head],
}

/// A kernel in a file.
pub(super) struct Head {
    name: &'static str,
    /// The bytes of its parameters.
    parameters: &'static [usize],
}

/// How one row of logits is drawn from; laid out as the struct of `device.cuh`.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Draw {
    pub row: i32,
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
    /// Eight bytes divide the next field's place.
    pub unused: u32,
    pub u: f64,
}

/// How a kernel is spread over the device.
#[derive(Clone, Copy)]
pub(super) struct Launch<'a> {
    pub stream: &'a Stream,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// A kernel, ready to launch.
pub(super) struct Function {
    name: &'static str,
    raw: CUfunction,
    /// Keeps the kernel loaded.
    _module: Arc<Module>,
}

// SAFETY: a handle that the driver lets all threads use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Lets launches take so many bytes of dynamic shared memory: more than 48 KiB must be asked for.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        driver::allow_shared(self.raw, bytes)
    }

    /// # Safety
    /// As of [`driver::launch`].
    unsafe fn launch(
        &self,
        launch: Launch<'_>,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let Launch {
            stream,
            grid,
            threads,
            shared,
        } = launch;
        // A step may have nothing for a kernel to do; the driver refuses an empty grid.
        if grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: the caller's.
        let result = unsafe { driver::launch(self.raw, stream, grid, threads, shared, arguments) }?;
        driver::check(self.name, result)
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernels")
    }
}

/// The place of an argument's value. The driver copies it before a launch returns.
fn argument<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Loads the kernels for a device of this compute capability.
///
/// # Errors
/// [`CudaError::Architecture`]: there is no cubin for it and none can be compiled; [`CudaError::Stale`].
pub(super) fn load(
    context: &Arc<Context>,
    (major, minor): (u32, u32),
) -> Result<Kernels, CudaError> {
    let mut modules = Vec::with_capacity(SOURCES.len());
    for source in SOURCES {
        let module = match embedded(source, major, minor) {
            Some(cubin) => Module::load(context, cubin),
            None => Module::load(context, &nvrtc::compile(source, HEADERS, (major, minor))?),
        };
        modules.push(Arc::new(module?));
    }
    let tells_parameters = library::driver()?.tells_parameters;
    Kernels::find(|file, head| {
        let name = CString::new(head.name).expect("a name in C++");
        let raw = modules[file]
            .kernel(&name)
            .map_err(|error| stale(head, &error.to_string()))?;
        if tells_parameters {
            let mut found = (0..).map_while(|i| driver::parameter_bytes(raw, i));
            let found: Vec<usize> = found.by_ref().take(head.parameters.len() + 1).collect();
            if found != head.parameters {
                return Err(stale(
                    head,
                    &format!(
                        "its parameters have {found:?} bytes, the launcher gives {:?}",
                        head.parameters
                    ),
                ));
            }
        }
        Ok(Function {
            name: head.name,
            raw,
            _module: Arc::clone(&modules[file]),
        })
    })
}

fn stale(head: &Head, reason: &str) -> CudaError {
    CudaError::Stale {
        kernel: head.name,
        reason: reason.to_owned(),
    }
}

/// The embedded cubin that runs on a device: of its own major version, and no newer in the minor one.
fn embedded(source: &Source, major: u32, minor: u32) -> Option<&'static [u8]> {
    let fits = |sm: &u32| sm / 10 == major && sm % 10 <= minor;
    let best = source
        .cubins
        .iter()
        .filter(|(sm, _)| fits(sm))
        .max_by_key(|(sm, _)| *sm);
    best.map(|(_, cubin)| *cubin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cubin_serves_later_devices_of_its_major_version_alone() {
        let source = Source {
            name: "x",
            text: "",
            cubins: &[(80, b"80"), (86, b"86"), (90, b"90")],
            kernels: &[],
        };
        for ((major, minor), expected) in [
            ((8, 0), Some(&b"80"[..])),
            ((8, 6), Some(b"86")),
            ((8, 9), Some(b"86")),
            ((9, 0), Some(b"90")),
            ((7, 5), None),
            ((10, 0), None),
            ((12, 0), None),
        ] {
            assert_eq!(embedded(&source, major, minor), expected, "{major}.{minor}");
        }
    }

    #[test]
    fn a_draw_is_laid_out_as_on_the_device() {
        assert_eq!((size_of::<Draw>(), std::mem::offset_of!(Draw, u)), (32, 24));
    }
}
