//! A device as a group sees it.

use std::ffi::c_void;
use std::sync::Arc;

use nccl_rs::Stream;

/// Room for what rank 0 gathers, in numbers; more goes through in pieces.
pub const LANDING: usize = 1 << 20;

/// The device that a group's numbers are on, with the stream that its collectives are enqueued on.
///
/// # Safety
/// Addresses are of that device's memory and valid for as many numbers as is said. They stay so until the stream has passed
/// all work that was enqueued before the buffer's, or the lane's, end.
pub unsafe trait Lane: Send + 'static {
    /// f32 numbers on the device.
    type Buf: Send;

    /// Makes the device the calling thread's current one.
    ///
    /// # Errors
    /// What the device's library says.
    fn bind(&self) -> Result<(), String>;

    /// The stream.
    fn stream(&self) -> Stream;

    /// How many numbers a buffer has room for.
    fn len(&self, buf: &Self::Buf) -> usize;

    /// The address of a buffer's first number.
    fn address(&self, buf: &Self::Buf) -> *mut c_void;

    /// The address of [`LANDING`] numbers that only the group uses, on rank 0.
    fn landing(&self) -> *mut c_void;

    /// Enqueues a copy of rows to columns of wider rows.
    ///
    /// # Errors
    /// What the device's library says.
    ///
    /// # Safety
    /// Both addresses are valid for what is read and written, as those of this trait are.
    unsafe fn place(&mut self, placement: Placement) -> Result<(), String>;

    /// Destroys all recordings that hold collectives, for good. Called from any thread, more than once, and also while the
    /// thread that uses the device waits for the stream: it must not wait for that.
    fn recordings(&self) -> Arc<dyn Fn() + Send + Sync>;
}

/// Copies `from [rows, width]` to columns `column ..` of `to [rows, whole]`. `from` lies at a multiple of 16 bytes where
/// `width` is a multiple of 4, `to` where `whole` is, if the buffers and the landing do.
#[derive(Debug, Clone, Copy)]
pub struct Placement {
    /// First number to read.
    pub from: *const c_void,
    /// First number of the rows to write to.
    pub to: *mut c_void,
    /// How many.
    pub rows: usize,
    /// Numbers per row of `from`.
    pub width: usize,
    /// Numbers per row of `to`.
    pub whole: usize,
    /// The first column to write.
    pub column: usize,
}
