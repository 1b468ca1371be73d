//! The driver's objects, each freed on drop: context, stream, event, device memory, pinned memory, module, graph.
//!
//! Owns every call of the driver but those of the survey. Knows no kernel and no model. Nothing here waits for the device:
//! [`Event::done`] is asked again and again instead, so that a stuck device can be given up.
#![allow(unsafe_code)]

use super::error::CudaError;
use cudarc::driver::sys::{self, CUresult};
use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

/// A call's result as an error that names it.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(CudaError::of(call, failed)),
    }
}

thread_local! {
    /// The context that this code last bound to this thread.
    static BOUND: Cell<usize> = const { Cell::new(0) };
}

/// A device's primary context.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: a context is a handle that the driver lets all threads use.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(device: sys::CUdevice) -> Result<Context, CudaError> {
        let mut raw = null_mut();
        // SAFETY: `device` came from the driver; the result is written to `raw`.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut raw, device)
        })?;
        let context = Context { device, raw };
        context.bind()?;
        Ok(context)
    }

    /// Makes this the calling thread's context.
    pub fn bind(&self) -> Result<(), CudaError> {
        if BOUND.get() == self.raw as usize {
            return Ok(());
        }
        // SAFETY: the context lives until this value is dropped.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })?;
        BOUND.set(self.raw as usize);
        Ok(())
    }

    /// Free bytes and all bytes of the device.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two numbers are written.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&mut free, &mut total)
        })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if BOUND.get() == self.raw as usize {
            BOUND.set(0);
        }
        // SAFETY: retained once, released once; all that lives in it holds the context and is gone.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Work in order.
#[derive(Debug)]
pub(crate) struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: the driver lets all threads use a stream.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream, CudaError> {
        context.bind()?;
        let mut raw = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the handle is written to `raw`.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&mut raw, flags)
        })?;
        Ok(Stream {
            raw,
            context: Arc::clone(context),
        })
    }

    /// The handle, for libraries that enqueue on it.
    pub fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Enqueues a copy of pinned memory to the device.
    pub(super) fn upload(&self, from: &Pinned, bytes: usize, to: u64) -> Result<(), CudaError> {
        self.context.bind()?;
        assert!(
            bytes <= from.bytes,
            "a copy of {bytes} bytes from {}",
            from.bytes
        );
        // SAFETY: `from` holds so many bytes; who owns it leaves it alone until an event behind the copy is done.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.start.cast(), bytes, self.raw)
        })
    }

    /// Enqueues a copy from the device to pinned memory, `at` bytes into it.
    pub(super) fn download(
        &self,
        from: u64,
        to: &Pinned,
        at: usize,
        bytes: usize,
    ) -> Result<(), CudaError> {
        self.context.bind()?;
        assert!(
            at + bytes <= to.bytes,
            "a copy of {bytes} bytes to {at} of {}",
            to.bytes
        );
        // SAFETY: `to` holds so many bytes; who owns it leaves it alone until an event behind the copy is done.
        let result =
            unsafe { sys::cuMemcpyDtoHAsync_v2(to.start.add(at).cast(), from, bytes, self.raw) };
        check("cuMemcpyDtoHAsync", result)
    }

    /// Enqueues a copy within the device.
    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), CudaError> {
        self.context.bind()?;
        // SAFETY: the device's memory alone is touched.
        check("cuMemcpyDtoDAsync", unsafe {
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw)
        })
    }

    /// Enqueues zeros.
    pub(super) fn clear(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        self.context.bind()?;
        // SAFETY: the device's memory alone is touched.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(at, 0, bytes, self.raw)
        })
    }

    /// From now on work is recorded, not done. Other threads' calls are no part of it.
    pub(super) fn begin_capture(&self) -> Result<(), CudaError> {
        self.context.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe {
            sys::cuStreamBeginCapture_v2(self.raw, mode)
        })
    }

    /// Ends the recording; an error where any of it was refused, and then it is gone.
    pub(super) fn end_capture(&self) -> Result<Graph, CudaError> {
        self.context.bind()?;
        let mut graph = null_mut();
        // SAFETY: the handle is written to `graph`.
        check("cuStreamEndCapture", unsafe {
            sys::cuStreamEndCapture(self.raw, &mut graph)
        })?;
        if graph.is_null() {
            return Err(CudaError::Call {
                call: "cuStreamEndCapture",
                error: "it gave no graph".into(),
            });
        }
        let mut raw = null_mut();
        // SAFETY: `graph` came from the driver; the handle is written to `raw`.
        let result = check("cuGraphInstantiateWithFlags", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0)
        });
        // SAFETY: what was instantiated does not need it.
        let _ = unsafe { sys::cuGraphDestroy(graph) };
        result.map(|()| Graph {
            raw,
            context: Arc::clone(&self.context),
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: nobody holds the stream any more; the driver finishes its work first.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// Recorded work that can be enqueued again.
#[derive(Debug)]
pub(super) struct Graph {
    raw: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a handle; its calls are ordered by who owns it.
unsafe impl Send for Graph {}

impl Graph {
    pub fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        stream.context.bind()?;
        // SAFETY: both live; the memory that the graph names is the backend's and outlives it.
        check("cuGraphLaunch", unsafe {
            sys::cuGraphLaunch(self.raw, stream.raw)
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: destroyed once; a graph that runs is freed by the driver when it is done.
        let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
    }
}

/// A place in a stream that can be asked about.
#[derive(Debug)]
pub(crate) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: the driver lets all threads use an event.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub fn new(context: &Arc<Context>) -> Result<Event, CudaError> {
        context.bind()?;
        let mut raw = null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the handle is written to `raw`.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut raw, flags)
        })?;
        Ok(Event {
            raw,
            context: Arc::clone(context),
        })
    }

    /// Stands for all work that the stream holds now.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        self.context.bind()?;
        // SAFETY: both live.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.raw, stream.raw)
        })
    }

    /// Whether that work is done; an error where the device failed. Never recorded is done.
    pub fn done(&self) -> Result<bool, CudaError> {
        self.context.bind()?;
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            failed => Err(CudaError::of("cuEventQuery", failed)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: destroyed once; the driver keeps what is still under way.
        let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

/// Memory of the device.
#[derive(Debug)]
pub(super) struct Memory {
    /// Its address; 256 bytes divide it.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
    context: Arc<Context>,
}

impl Memory {
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<Memory, CudaError> {
        context.bind()?;
        let mut start = 0;
        // Zero bytes are refused by the driver.
        // SAFETY: the address is written to `start`.
        match unsafe { sys::cuMemAlloc_v2(&mut start, bytes.max(1) as usize) } {
            CUresult::CUDA_SUCCESS => Ok(Memory {
                start,
                bytes,
                context: Arc::clone(context),
            }),
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(CudaError::OutOfMemory { bytes }),
            failed => Err(CudaError::of("cuMemAlloc", failed)),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: freed once; the driver waits for work that uses it.
        let _ = unsafe { sys::cuMemFree_v2(self.start) };
    }
}

/// Memory of the host that copies read and write while the host goes on. Who owns it keeps host and copies apart.
#[derive(Debug)]
pub(super) struct Pinned {
    start: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: plain memory, reached through `&self` and `&mut self` as any other.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Pinned, CudaError> {
        context.bind()?;
        let mut start = null_mut();
        // SAFETY: the address is written to `start`.
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&mut start, bytes, sys::CU_MEMHOSTALLOC_PORTABLE)
        })?;
        // SAFETY: so many bytes lie there; they become defined, so that slices of them may be made.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, bytes) };
        Ok(Pinned {
            start: start.cast(),
            bytes,
            context: Arc::clone(context),
        })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the memory lives as long as `self`; no copy writes it now, says who owns it.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory lives as long as `self` and is borrowed whole; no copy uses it now, says who owns it.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: freed once; the driver waits for copies that use it.
        let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
    }
}

/// A loaded file of kernels.
#[derive(Debug)]
pub(super) struct Module {
    raw: sys::CUmodule,
    context: Arc<Context>,
}

// SAFETY: a handle that the driver lets all threads use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin.
    pub fn load(context: &Arc<Context>, image: &[u8]) -> Result<Module, CudaError> {
        context.bind()?;
        let mut raw = null_mut();
        // SAFETY: a cubin tells its own length; ours are whole.
        check("cuModuleLoadData", unsafe {
            sys::cuModuleLoadData(&mut raw, image.as_ptr().cast())
        })?;
        Ok(Module {
            raw,
            context: Arc::clone(context),
        })
    }

    /// A kernel of it.
    pub fn kernel(&self, name: &CStr) -> Result<sys::CUfunction, CudaError> {
        let mut raw = null_mut();
        // SAFETY: the handle is written to `raw`.
        check("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut raw, self.raw, name.as_ptr())
        })?;
        Ok(raw)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: unloaded once, when no kernel of it is held.
        let _ = unsafe { sys::cuModuleUnload(self.raw) };
    }
}

/// Lets a kernel take so many bytes of dynamic shared memory.
pub(super) fn allow_shared(kernel: sys::CUfunction, bytes: u32) -> Result<(), CudaError> {
    let what = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the kernel's module is loaded.
    check("cuFuncSetAttribute", unsafe {
        sys::cuFuncSetAttribute(kernel, what, bytes as c_int)
    })
}

/// The bytes of a kernel's parameter, `None` past the last.
pub(super) fn parameter_bytes(kernel: sys::CUfunction, index: usize) -> Option<usize> {
    let (mut offset, mut bytes) = (0, 0);
    // SAFETY: two numbers are written.
    let result = unsafe { sys::cuFuncGetParamInfo(kernel, index, &mut offset, &mut bytes) };
    (result == CUresult::CUDA_SUCCESS).then_some(bytes)
}

/// Enqueues a kernel.
///
/// # Safety
/// `arguments` point to the kernel's parameters, in number, order and size; device addresses among them are of memory that
/// holds what the kernel reads and writes there.
pub(super) unsafe fn launch(
    kernel: sys::CUfunction,
    stream: &Stream,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    arguments: &mut [*mut c_void],
) -> Result<CUresult, CudaError> {
    stream.context.bind()?;
    let [x, y, z] = grid;
    // SAFETY: the caller's; the driver copies the parameters before it returns.
    Ok(unsafe {
        sys::cuLaunchKernel(
            kernel,
            x,
            y,
            z,
            threads,
            1,
            1,
            shared,
            stream.raw,
            arguments.as_mut_ptr(),
            null_mut(),
        )
    })
}
