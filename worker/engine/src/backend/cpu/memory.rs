//! Memory for weights, caches and activations: zeroed, aligned to cache lines, in huge pages where it is large.
//!
//! Owns nothing but the mapping. Pages are taken from the system when first touched.

use std::marker::PhantomData;

use bytemuck::Pod;
use memmap2::{Advice, MmapMut};

use crate::backend::DeviceError;

const HUGE_PAGE: usize = 2 << 20;

/// `len` plain numbers at an address that is a multiple of 64, of 2 MiB if there are that many bytes.
pub struct Memory<T> {
    map: MmapMut,
    offset: usize,
    bytes: usize,
    of: PhantomData<T>,
}

/// A buffer of activations.
pub type CpuBuf = Memory<f32>;

impl<T: Pod> Memory<T> {
    /// Zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn new(len: usize) -> Result<Memory<T>, DeviceError> {
        let refused = || DeviceError::OutOfMemory {
            bytes: (len as u64).saturating_mul(size_of::<T>() as u64),
        };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(refused)?;
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let mapped = bytes.max(1).checked_add(slack).ok_or_else(refused)?;
        let map = MmapMut::map_anon(mapped).map_err(|_| refused())?;
        let offset = if slack == 0 {
            0
        } else {
            map.as_ptr().align_offset(HUGE_PAGE)
        };
        if slack != 0 {
            // Advice only: systems without huge pages refuse it.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(Memory {
            map,
            offset,
            bytes,
            of: PhantomData,
        })
    }
}

impl<T: Pod> AsRef<[T]> for Memory<T> {
    fn as_ref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[self.offset..][..self.bytes])
    }
}

impl<T: Pod> AsMut<[T]> for Memory<T> {
    fn as_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[self.offset..][..self.bytes])
    }
}

impl<T> std::fmt::Debug for Memory<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("bytes", &self.bytes)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_and_aligned() {
        for len in [0, 1, 1000, 1 << 20] {
            let memory = Memory::<f32>::new(len).unwrap();
            assert_eq!(memory.as_ref().len(), len);
            assert!(memory.as_ref().iter().all(|x| *x == 0.0));
            let alignment = if len == 1 << 20 { HUGE_PAGE } else { 64 };
            assert_eq!(memory.as_ref().as_ptr().align_offset(alignment), 0);
        }
    }

    #[test]
    fn too_much_memory_is_an_error() {
        assert_eq!(
            Memory::<f32>::new(usize::MAX / 2).unwrap_err(),
            DeviceError::OutOfMemory { bytes: u64::MAX }
        );
        assert!(Memory::<f32>::new(1 << 58).is_err());
    }
}
