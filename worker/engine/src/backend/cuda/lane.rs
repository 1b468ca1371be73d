//! What a shard group gets of a device: its stream, its buffers' addresses, and the copies of a gather.
//!
//! Owns where rank 0 gathers, beside the arena: it comes with the group and goes with it. Forms no group.
#![allow(unsafe_code)]

use super::CudaBackend;
use super::buffer::CudaBuf;
use super::device::CudaDevice;
use super::driver::{Memory, Stream};
use super::error::CudaError;
use super::graphs::GraphStore;
use super::kernels::Launch;
use super::pointer::{Ptr, PtrMut};
use crate::collective::nccl::{LANDING, Lane, Placement};
use std::ffi::c_void;
use std::sync::Arc;

/// Threads of a block of a copy, and the numbers that each takes at a time.
const THREADS: u32 = 256;
const VECTOR: usize = 4;

/// A backend's device, as a shard group uses it.
#[derive(Debug)]
pub struct CudaLane {
    /// Before the stream, whose work may use it.
    landing: Memory,
    graphs: Arc<GraphStore>,
    stream: Arc<Stream>,
    device: Arc<CudaDevice>,
}

impl CudaLane {
    /// Of a backend that is new, or renewed: what it has recorded holds no other group. From now on it records as one of
    /// several. `gathers`: this is rank 0.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub(crate) fn new(backend: &mut CudaBackend, gathers: bool) -> Result<CudaLane, CudaError> {
        backend.grouped = true;
        let (device, stream, graphs) = (backend.device(), backend.stream(), backend.graphs());
        let numbers = if gathers { LANDING } else { 0 };
        let landing = Memory::new(&device.context, (numbers * size_of::<f32>()) as u64)?;
        Ok(CudaLane {
            landing,
            graphs,
            stream: Arc::clone(stream),
            device: Arc::clone(device),
        })
    }
}

// SAFETY: a buffer's address is asked for as that of f32 numbers, with as many as it has room for; buffers and landing are
// memory of `device`, and all work on it is enqueued on `stream`. Memory is freed by the driver once its work is done.
unsafe impl Lane for CudaLane {
    type Buf = CudaBuf;

    fn bind(&self) -> Result<(), String> {
        self.device.bind().map_err(|error| error.to_string())
    }

    fn stream(&self) -> *mut c_void {
        self.stream.raw()
    }

    fn len(&self, buf: &CudaBuf) -> usize {
        buf.len()
    }

    fn address(&self, buf: &CudaBuf) -> *mut c_void {
        buf.floats(buf.len()).address() as *mut c_void
    }

    fn landing(&self) -> *mut c_void {
        self.landing.start as *mut c_void
    }

    unsafe fn place(&mut self, placement: Placement) -> Result<(), String> {
        let Placement {
            from,
            to,
            rows,
            width,
            whole,
            column,
        } = placement;
        let launch = Launch {
            stream: &self.stream,
            grid: [
                rows as u32,
                width.div_ceil(VECTOR * THREADS as usize) as u32,
                1,
            ],
            threads: THREADS,
            shared: 0,
        };
        let (to, from) = (PtrMut::new(to as u64), Ptr::new(from as u64));
        let (whole, column, width) = (whole as i32, column as i32, width as i32);
        self.device
            .kernels
            .copy_columns(launch, to, whole, column, from, width, 0, width)
            .map_err(|error| error.to_string())
    }

    fn recordings(&self) -> Arc<dyn Fn() + Send + Sync> {
        let graphs = Arc::clone(&self.graphs);
        Arc::new(move || graphs.destroy_all())
    }
}
