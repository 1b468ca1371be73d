//! Devices of NVIDIA, through the driver's API: loaded when asked for, so that one program serves machines with and
//! without.
//!
//! Read `device` first (what is opened, what can be missing), then this file (the backend's state), then `ops`. Owns one
//! stream: all work of a backend is enqueued there in order, and the host waits only in [`Backend::read`] and
//! [`Backend::drawn`]. Kernels are in `kernels/*.cu`; their cubins are embedded.
//!
//! Numbers. The residual stream, products' results and logits are f32; what goes into a product is bf16, as are weights and
//! the cache. Products of bf16 are cuBLAS's, of quantised weights our own where rows are few. By default a row's result
//! may then depend on how many rows there are; with [`CudaOptions::batch_invariant`] it never does: all products and all
//! attention go through kernels of one fixed order, which are slower.
//!
//! [`Backend::read`]: crate::backend::Backend::read
//! [`Backend::drawn`]: crate::backend::Backend::drawn

mod arena;
mod attention;
mod blas;
mod buffer;
mod bytes;
mod device;
pub(crate) mod driver;
mod error;
mod graphs;
mod kernels;
mod lane;
mod library;
mod nvrtc;
mod ops;
mod pointer;
mod product;
mod sampling;
mod scratch;
#[cfg(test)]
mod signature;
mod staging;
mod step;
mod survey;
#[cfg(test)]
mod tests;
mod weights;

pub use buffer::CudaBuf;
pub use device::{CudaDevice, DeviceFacts};
pub use error::CudaError;
pub use graphs::GraphStore;
pub use lane::CudaLane;
pub use ops::CudaKv;
pub use pointer::{Ptr, PtrMut};
pub use survey::{Survey, survey};
pub use weights::CudaLinear;

use crate::backend::DeviceError;
use arena::Arena;
use blas::Blas;
use driver::Stream;
use graphs::Next;
use sampling::Draws;
use scratch::Scratch;
use staging::Staging;
use std::sync::Arc;
use step::StepArrays;

/// Counts changes of the kernels that change their bits.
const KERNELS_VERSION: u32 = 1;

/// What can be chosen about a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaOptions {
    /// Steps of decodes are recorded and replayed: the host then enqueues one thing, not hundreds.
    pub graphs: bool,
    /// A row's result does not depend on the other rows.
    pub batch_invariant: bool,
}

/// Computes on a device.
#[derive(Debug)]
pub struct CudaBackend {
    // Dropped in this order: what uses memory before the memory.
    graphs: Arc<GraphStore>,
    blas: Blas,
    staging: Staging,
    draws: Draws,
    scratch: Scratch,
    arena: Arena,
    stream: Arc<Stream>,
    device: Arc<CudaDevice>,
    step: StepArrays,
    options: CudaOptions,
    /// Rows of the largest step of decodes, once it is known.
    decodes_max: Option<usize>,
    /// Whether steps are recorded: as chosen, until one cannot be.
    records: bool,
    recording: Option<Recording>,
    /// Whether other ranks record the same steps.
    grouped: bool,
    /// The first that happened.
    fault: Option<DeviceError>,
    numerics: String,
}

/// A step whose ops are being recorded.
#[derive(Debug)]
struct Recording {
    rows: usize,
    /// Why it cannot be.
    failed: Option<CudaError>,
}

impl CudaBackend {
    /// A backend on a device.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn new(device: Arc<CudaDevice>, options: CudaOptions) -> Result<CudaBackend, DeviceError> {
        device.bind()?;
        attention::allow_shared(&device.kernels)?;
        product::allow_shared(&device.kernels)?;
        let stream = Arc::new(Stream::new(&device.context)?);
        Ok(CudaBackend {
            graphs: Arc::default(),
            blas: Blas::new(&device.blas, &stream)?,
            staging: Staging::new(&device.context)?,
            draws: Draws::new(&device.context)?,
            scratch: Scratch::default(),
            arena: Arena::new(&device.context),
            step: StepArrays::default(),
            records: options.graphs,
            options,
            decodes_max: None,
            recording: None,
            grouped: false,
            fault: None,
            numerics: numerics(&device, options),
            stream,
            device,
        })
    }

    /// Where it computes.
    #[must_use]
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// Its work, in order.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Its recorded steps, which whoever ends a group must destroy first.
    #[must_use]
    pub fn graphs(&self) -> Arc<GraphStore> {
        Arc::clone(&self.graphs)
    }

    /// Keeps the first fault. One that happens while a step is recorded is the recording's: nothing was computed.
    fn note(&mut self, result: Result<(), CudaError>) {
        let Err(error) = result else { return };
        match &mut self.recording {
            Some(recording) => drop(recording.failed.get_or_insert(error)),
            None => drop(self.fault.get_or_insert_with(|| error.into())),
        }
    }

    /// The fault, if there was one.
    fn sound(&self) -> Result<(), DeviceError> {
        self.fault.clone().map_or(Ok(()), Err)
    }

    /// Begins a step of decodes; true where it was replayed and nothing is to be called.
    fn begin_recorded(&mut self, rows: usize) -> bool {
        if !self.records || self.fault.is_some() {
            return false;
        }
        match self.graphs.begin(rows, &self.stream) {
            Ok(Next::Run) => false,
            Ok(Next::Replayed) => true,
            Ok(Next::Record) => {
                match self.stream.begin_capture() {
                    Ok(()) => self.recording = Some(Recording { rows, failed: None }),
                    Err(error) => self.record_no_more(&error),
                }
                false
            }
            // A device that refuses to replay has failed: what was enqueued before may be the reason.
            Err(error) => {
                self.note(Err(error));
                false
            }
        }
    }

    /// Ends a step of decodes; true where its ops are enqueued, false where they are to be called again. A step that was
    /// recorded and cannot be kept is this device's own trouble: in a group the other ranks replay it, and NCCL does not
    /// join a sum that is replayed with one that is not. So the group ends. That ops cannot be recorded at all is so on
    /// every rank.
    fn end_recorded(&mut self) -> bool {
        let Some(Recording { rows, failed }) = self.recording.take() else {
            return true;
        };
        let graph = match (failed, self.stream.end_capture()) {
            (None, Ok(graph)) => graph,
            (Some(error), _) | (None, Err(error)) => {
                self.record_no_more(&error);
                return false;
            }
        };
        match self.graphs.keep(rows, graph, &self.stream) {
            Ok(kept) => kept,
            Err(error) if self.grouped => {
                self.note(Err(error));
                true
            }
            Err(error) => {
                self.record_no_more(&error);
                false
            }
        }
    }

    /// Forgets a recording whose step was given up.
    fn abandon_recording(&mut self) {
        if self.recording.take().is_some() {
            let _ = self.stream.end_capture();
        }
    }

    /// Recorded steps hold the address of memory that has moved.
    fn forget_recorded(&self, moved: bool) {
        if moved {
            self.graphs.clear();
        }
    }

    fn record_no_more(&mut self, error: &CudaError) {
        tracing::warn!(%error, "steps cannot be recorded on this device, and run op by op from now on");
        self.records = false;
        self.graphs.clear();
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        self.abandon_recording();
        // Others hold the store too, and what is recorded names this backend's memory.
        self.graphs.destroy_all();
        // The driver would wait too, but for ever.
        let _ = self.staging.settle(&self.stream);
    }
}

/// Names all that the bits depend on. cuBLAS chooses its algorithms by version and device.
fn numerics(device: &CudaDevice, options: CudaOptions) -> String {
    let (major, minor) = device.facts().compute_capability;
    let kernels = format!("cuda-{KERNELS_VERSION}-sm_{major}{minor}");
    if options.batch_invariant {
        return format!("{kernels}-invariant");
    }
    let [major, minor, patch] = device.blas.version();
    format!("{kernels}-cublas-{major}.{minor}.{patch}")
}
