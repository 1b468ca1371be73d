//! Buffers of activations: room for f32 numbers, that may hold bf16 ones instead.
//!
//! Owns the word for what a buffer holds. An op whose result only a product reads leaves bf16, packed from the start: the
//! product would round it anyway. Every address that an op gets is asked for with the numbers that it will touch, and is
//! refused where the buffer has fewer or holds the other kind: then the layers are at fault.

use super::arena::Place;
use super::driver::Stream;
use super::error::CudaError;
use super::pointer::{Ptr, PtrMut};
use half::bf16;
use std::sync::Arc;

/// A buffer on a device.
#[derive(Debug)]
pub struct CudaBuf {
    place: Place,
    /// f32 numbers that it has room for.
    len: usize,
    form: Form,
    stream: Arc<Stream>,
}

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    Bf16,
}

impl CudaBuf {
    pub(super) fn new(place: Place, len: usize, stream: &Arc<Stream>) -> CudaBuf {
        CudaBuf {
            place,
            len,
            form: Form::F32,
            stream: Arc::clone(stream),
        }
    }

    /// f32 numbers that it has room for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has room for none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn start(&self) -> u64 {
        self.place.start
    }

    /// Its first `len` f32 numbers, to read.
    #[must_use]
    pub fn floats(&self, len: usize) -> Ptr<f32> {
        self.expect(Form::F32, len);
        Ptr::new(self.place.start)
    }

    /// The same, to change where they are.
    pub fn change_floats(&mut self, len: usize) -> PtrMut<f32> {
        self.expect(Form::F32, len);
        PtrMut::new(self.place.start)
    }

    /// Room for `len` f32 numbers, whatever it holds now.
    pub(super) fn fill_floats(&mut self, len: usize) -> PtrMut<f32> {
        self.form = Form::F32;
        self.change_floats(len)
    }

    /// Its first `len` bf16 numbers, to read.
    pub(super) fn halves(&self, len: usize) -> Ptr<bf16> {
        self.expect(Form::Bf16, len);
        Ptr::new(self.place.start)
    }

    /// Room for `len` bf16 numbers, whatever it holds now.
    pub(super) fn fill_halves(&mut self, len: usize) -> PtrMut<bf16> {
        self.form = Form::Bf16;
        self.expect(Form::Bf16, len);
        PtrMut::new(self.place.start)
    }

    /// Enqueues a copy of another buffer's first `len` f32 numbers.
    pub(crate) fn copy_from(&mut self, other: &CudaBuf, len: usize) -> Result<(), CudaError> {
        let (from, to) = (other.floats(len), self.fill_floats(len));
        self.stream.copy(from.address(), to.address(), 4 * len)
    }

    fn expect(&self, form: Form, len: usize) {
        assert!(
            self.form == form,
            "a buffer of {:?} was to be used as {form:?}",
            self.form
        );
        assert!(
            len <= self.len,
            "a buffer of {} numbers was to be used for {len}",
            self.len
        );
    }
}
