//! Tensors of a file: names, shapes, types and places.

use crate::error::Error;
use crate::reader::Reader;
use std::fmt;
use std::io::Read;

/// Longest name of a tensor; ggml's own limit is 64.
const NAME_BYTES_MAX: u64 = 256;
/// Most dimensions, ggml's limit.
const DIMS_MAX: u32 = 4;
/// Greatest dimension and number of elements: keeps products far inside 64 bits.
const ELEMENTS_MAX: u64 = 1 << 48;

/// A tensor's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dimensions, the innermost first: a matrix `[n, k]` of Hugging Face's has the dimensions `k, n` here.
    pub dims: Vec<u64>,
    /// How its numbers lie.
    pub tensor_type: TensorType,
    /// Where it begins, from the start of the data.
    pub offset: u64,
}

/// How a tensor's numbers lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "ggml's own names")]
#[allow(missing_docs, reason = "ggml's own names")]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    /// One that is not supported, by ggml's number.
    Other(u32),
}

/// The supported types: ggml's number, name, elements of a block, bytes of a block.
const TYPES: [(u32, TensorType, &str, u64, u64); 8] = [
    (0, TensorType::F32, "F32", 1, 4),
    (1, TensorType::F16, "F16", 1, 2),
    (30, TensorType::Bf16, "BF16", 1, 2),
    (8, TensorType::Q8_0, "Q8_0", 32, 34),
    (2, TensorType::Q4_0, "Q4_0", 32, 18),
    (3, TensorType::Q4_1, "Q4_1", 32, 20),
    (12, TensorType::Q4_K, "Q4_K", 256, 144),
    (14, TensorType::Q6_K, "Q6_K", 256, 210),
];

/// The supported types, for errors.
pub const SUPPORTED: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K";

/// Names of the others, for errors.
const OTHERS: [(u32, &str); 25] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (13, "Q5_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl TensorType {
    /// By ggml's number.
    #[must_use]
    pub fn of(id: u32) -> TensorType {
        let found = TYPES.iter().find(|(known, ..)| *known == id);
        found.map_or(TensorType::Other(id), |(_, tensor_type, ..)| *tensor_type)
    }

    /// ggml's number.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            TensorType::Other(id) => id,
            supported => supported.row().map_or(0, |(id, ..)| *id),
        }
    }

    /// Elements of a block; none where the type is not supported.
    #[must_use]
    pub fn block_elements(self) -> Option<u64> {
        self.row().map(|(.., elements, _)| *elements)
    }

    /// Bytes of a block; none where the type is not supported.
    #[must_use]
    pub fn block_bytes(self) -> Option<u64> {
        self.row().map(|(.., bytes)| *bytes)
    }

    /// Bytes of a row of `elements`; none where they do not fill whole blocks, or the type is not supported.
    #[must_use]
    pub fn row_bytes(self, elements: u64) -> Option<u64> {
        let (.., block, bytes) = self.row()?;
        elements
            .is_multiple_of(*block)
            .then(|| elements / block * bytes)
    }

    fn row(self) -> Option<&'static (u32, TensorType, &'static str, u64, u64)> {
        TYPES.iter().find(|(_, known, ..)| *known == self)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            TensorType::Other(id) => match OTHERS.iter().find(|(known, _)| *known == id) {
                Some((_, name)) => f.write_str(name),
                None => write!(f, "of ggml's type {id}"),
            },
            supported => f.write_str(supported.row().map_or("", |(_, _, name, ..)| *name)),
        }
    }
}

impl TensorInfo {
    /// Reads one tensor's header.
    pub(crate) fn read<R: Read>(reader: &mut Reader<R>) -> Result<TensorInfo, Error> {
        let name = reader.text(NAME_BYTES_MAX, "a tensor's name")?;
        let dimensions = reader.u32()?;
        if !(1..=DIMS_MAX).contains(&dimensions) {
            return Err(Error::tensor(
                &name,
                format!("has {dimensions} dimensions; there may be 1 to {DIMS_MAX}"),
            ));
        }
        let mut dims = Vec::new();
        let mut elements = 1u64;
        for _ in 0..dimensions {
            let dim = reader.u64()?;
            elements = elements.saturating_mul(dim);
            dims.push(dim);
            if !(1..=ELEMENTS_MAX).contains(&elements) {
                return Err(Error::tensor(
                    &name,
                    format!("has impossible dimensions {dims:?}"),
                ));
            }
        }
        let tensor_type = TensorType::of(reader.u32()?);
        let info = TensorInfo {
            name,
            dims,
            tensor_type,
            offset: reader.u64()?,
        };
        if info.dims.len() == 1 && tensor_type.block_elements().is_some_and(|block| block > 1) {
            let reason =
                format!("is a vector of {tensor_type}; vectors should be F32, F16 or BF16");
            return Err(Error::tensor(&info.name, reason));
        }
        if tensor_type.block_elements().is_some() && info.bytes().is_none() {
            return Err(Error::tensor(
                &info.name,
                format!(
                    "is {tensor_type} with rows of {}, which do not fill whole blocks",
                    info.dims[0]
                ),
            ));
        }
        Ok(info)
    }

    /// Its shape with the innermost dimension last, as Hugging Face has it.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().rev().map(|dim| *dim as usize).collect()
    }

    /// Its elements.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Its bytes; none where its type is not supported.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        let row = self.tensor_type.row_bytes(*self.dims.first()?)?;
        let rows: u64 = self.dims[1..].iter().product();
        Some(row * rows)
    }

    /// Refuses a type that is not supported.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the supported ones.
    pub fn check_supported(&self) -> Result<(), Error> {
        match self.tensor_type {
            TensorType::Other(_) => Err(Error::tensor(
                &self.name,
                format!("is {}; supported are {SUPPORTED}", self.tensor_type),
            )),
            _ => Ok(()),
        }
    }
}
