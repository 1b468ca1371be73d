//! What the operations work on: types of numbers, kinds of sums, streams.

use std::ffi::{c_int, c_void};

/// A CUDA stream: a `cudaStream_t` or, what is the same, a `CUstream`.
pub type Stream = *mut c_void;

/// Type of a number in device memory: `ncclDataType_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DataType {
    /// 8-bit signed integer.
    I8 = 0,
    /// 8-bit unsigned integer; also for bytes of any meaning.
    U8 = 1,
    /// 32-bit signed integer.
    I32 = 2,
    /// 32-bit unsigned integer.
    U32 = 3,
    /// 64-bit signed integer.
    I64 = 4,
    /// 64-bit unsigned integer.
    U64 = 5,
    /// IEEE half.
    F16 = 6,
    /// IEEE single.
    F32 = 7,
    /// IEEE double.
    F64 = 8,
    /// The upper half of a single.
    Bf16 = 9,
}

impl DataType {
    /// Bytes of one number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            DataType::I8 | DataType::U8 => 1,
            DataType::F16 | DataType::Bf16 => 2,
            DataType::I32 | DataType::U32 | DataType::F32 => 4,
            DataType::I64 | DataType::U64 | DataType::F64 => 8,
        }
    }

    pub(crate) fn raw(self) -> c_int {
        self as c_int
    }
}

/// How a reduction joins two numbers: `ncclRedOp_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum ReduceOp {
    /// Adds.
    Sum = 0,
    /// Multiplies.
    Product = 1,
    /// The larger.
    Max = 2,
    /// The smaller.
    Min = 3,
    /// Adds, and divides by the number of ranks.
    Average = 4,
}

impl ReduceOp {
    pub(crate) fn raw(self) -> c_int {
        self as c_int
    }
}
