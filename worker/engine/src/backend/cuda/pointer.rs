//! Device addresses with the type of what lies there.
//!
//! Owns no memory: [`CudaBuf`](super::buffer::CudaBuf), weights and cache hand these out for places that they keep.

use std::marker::PhantomData;

/// Where a kernel reads numbers of type `T`; null where it may have none.
#[derive(Debug)]
pub struct Ptr<T> {
    address: u64,
    of: PhantomData<*const T>,
}

/// Where a kernel writes numbers of type `T`.
#[derive(Debug)]
pub struct PtrMut<T> {
    address: u64,
    of: PhantomData<*mut T>,
}

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

impl<T> Clone for PtrMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for PtrMut<T> {}

impl<T> Ptr<T> {
    /// For a kernel that can do without.
    pub const NULL: Ptr<T> = Ptr {
        address: 0,
        of: PhantomData,
    };

    pub(super) const fn new(address: u64) -> Ptr<T> {
        Ptr {
            address,
            of: PhantomData,
        }
    }

    /// The address.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.address
    }
}

impl<T> PtrMut<T> {
    pub(super) const fn new(address: u64) -> PtrMut<T> {
        PtrMut {
            address,
            of: PhantomData,
        }
    }

    /// The address.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.address
    }

    /// The same place, `count` numbers on.
    pub(super) const fn add(self, count: usize) -> PtrMut<T> {
        PtrMut::new(self.address + (count * size_of::<T>()) as u64)
    }

    /// The same place, read.
    #[must_use]
    pub const fn read(self) -> Ptr<T> {
        Ptr::new(self.address)
    }
}
