//! The form in which a checkpoint has a matrix that is quantised already, where it is one that backends may take.

use crate::backend::{QuantBits, QuantOffset, QuantShape};
use std::ops::Range;

/// The quantised form of a matrix in a checkpoint: groups of columns with a scale each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReadyForm {
    /// Bits of a number.
    pub bits: QuantBits,
    /// Columns of a group: 32, 64 or 128.
    pub group: usize,
    /// What stands for zero.
    pub offset: QuantOffset,
}

impl ReadyForm {
    /// The shape of `n` rows that have these columns of the whole matrix.
    #[must_use]
    pub const fn shape(self, n: usize, columns: &Range<usize>) -> QuantShape {
        QuantShape {
            n,
            k: columns.end - columns.start,
            bits: self.bits,
            group: self.group,
            lead: columns.start % self.group,
            offset: self.offset,
            head: false,
        }
    }
}
