//! Packed matrices as bytes: what a backend gives away to be kept in a file, and takes back from one.
//!
//! Owns no layout. Bytes never change once a matrix is packed, so that a file, a mapping and the kernels share them.

use super::{Backend, LinearShape, QuantShape};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Where packed bytes lie: memory of the process, or a mapped file.
type Owner = dyn AsRef<[u8]> + Send + Sync;

/// Shape and form of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedShape {
    /// As floats.
    Float(LinearShape),
    /// As quantised numbers.
    Quantised(QuantShape),
}

impl PackedShape {
    /// Bytes that a backend takes for it, bias excluded.
    #[must_use]
    pub fn bytes<B: Backend>(self) -> u64 {
        match self {
            PackedShape::Float(shape) => B::linear_bytes(shape),
            PackedShape::Quantised(shape) => B::quantised_bytes(shape),
        }
    }
}

/// The bytes of a packed matrix. Cloning shares them.
#[derive(Clone)]
pub struct PackedBytes {
    owner: Arc<Owner>,
    range: Range<usize>,
}

/// The same without holding them: they go with the matrix.
#[derive(Clone)]
pub struct WeakBytes {
    owner: Weak<Owner>,
    range: Range<usize>,
}

impl PackedBytes {
    /// All bytes of an owner.
    pub fn whole<T: AsRef<[u8]> + Send + Sync + 'static>(owner: T) -> PackedBytes {
        let range = 0..owner.as_ref().len();
        PackedBytes {
            owner: Arc::new(owner),
            range,
        }
    }

    /// Some bytes of a shared owner; none where it has not as many.
    pub fn part<T: AsRef<[u8]> + Send + Sync + 'static>(
        owner: &Arc<T>,
        range: Range<usize>,
    ) -> Option<PackedBytes> {
        owner.as_ref().as_ref().get(range.clone())?;
        Some(PackedBytes {
            owner: owner.clone(),
            range,
        })
    }

    /// The bytes as long as somebody else holds them.
    #[must_use]
    pub fn downgrade(&self) -> WeakBytes {
        WeakBytes {
            owner: Arc::downgrade(&self.owner),
            range: self.range.clone(),
        }
    }
}

impl AsRef<[u8]> for PackedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.owner.as_ref().as_ref()[self.range.clone()]
    }
}

impl WeakBytes {
    /// The bytes, if the matrix is still there.
    #[must_use]
    pub fn upgrade(&self) -> Option<PackedBytes> {
        Some(PackedBytes {
            owner: self.owner.upgrade()?,
            range: self.range.clone(),
        })
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl std::fmt::Debug for PackedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PackedBytes").field(&self.range).finish()
    }
}

impl std::fmt::Debug for WeakBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WeakBytes").field(&self.range).finish()
    }
}
