//! Sizes and number formats that cross the [`Backend`](super::Backend) trait.
//!
//! Owns no behaviour but the arithmetic of widths and bytes.

/// The part of a buffer that an op works on: `[rows, width]` at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Rows: tokens, or rows of logits.
    pub rows: usize,
    /// Numbers per row.
    pub width: usize,
}

/// Shape and number format of a weight matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows: outputs.
    pub n: usize,
    /// Columns: inputs.
    pub k: usize,
    /// How the weights are kept. Values are rounded to it (to nearest, ties to even).
    pub dtype: FloatDtype,
}

/// Shape and number format of a quantised weight matrix: groups of columns share a scale and a zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantShape {
    /// Rows: outputs.
    pub n: usize,
    /// Columns: inputs.
    pub k: usize,
    /// Bits of a number.
    pub bits: QuantBits,
    /// Columns of a group: 32, 64 or 128, counted in the whole matrix. The last group may be shorter.
    pub group: usize,
    /// Column `j` is in group `(lead + j) / group`: a rank's columns may begin inside a group.
    pub lead: usize,
    /// What stands for zero.
    pub offset: QuantOffset,
    /// Whether it makes logits: what is off there no layer behind it makes good.
    pub head: bool,
}

impl QuantShape {
    /// Groups of a row.
    #[must_use]
    pub const fn groups(self) -> usize {
        (self.lead + self.k).div_ceil(self.group)
    }

    /// Minima of a row: as many as groups, or none.
    #[must_use]
    pub const fn mins(self) -> usize {
        match self.offset {
            QuantOffset::Mins => self.groups(),
            QuantOffset::Middle | QuantOffset::Zeros => 0,
        }
    }

    /// Bytes of numbers, scales (f32) and, for int4, zero points (one byte; minima have four), without padding.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        let (numbers, zero) = match self.bits {
            QuantBits::Int8 => (self.k, 0),
            QuantBits::Int4 => (self.k.div_ceil(2), 1),
        };
        let offset = match self.offset {
            QuantOffset::Middle | QuantOffset::Zeros => zero,
            QuantOffset::Mins => 4,
        };
        (self.n * (numbers + (4 + offset) * self.groups())) as u64
    }
}

/// What stands for zero in a group of quantised numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantOffset {
    /// The middle: 0 of int8, 8 of int4.
    Middle,
    /// A zero point per group, a whole number of steps: int4 as GPTQ and AWQ have it.
    Zeros,
    /// The number that zero steps stand for, per group: int4 as GGUF's Q4_1 has it.
    Mins,
}

/// How many bits a quantised number has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantBits {
    /// -128 to 127.
    Int8,
    /// 0 to 15.
    Int4,
}

impl QuantBits {
    /// Its name in configurations and the numerics id.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            QuantBits::Int8 => "int8",
            QuantBits::Int4 => "int4",
        }
    }
}

/// The largest step that a model's memory is sized for, as one rank sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Tokens.
    pub rows: usize,
    /// Sequences.
    pub spans: usize,
    /// Rows whose logits are computed together.
    pub logits_rows: usize,
    /// Numbers in the widest row that a matrix is multiplied with.
    pub width: usize,
    /// Numbers of the largest quantised matrix, 0 without any.
    pub quantised: usize,
    /// One rank's heads.
    pub heads: Heads,
    /// All ranks' vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub context_max: usize,
    /// KV blocks in the pool.
    pub blocks: usize,
}

/// How a model's weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// The layers' matrices in one byte a number, quantised when loaded; the embedding in bf16, and the head too unless
    /// the backend quantises it.
    Int8,
    /// As int8, in half a byte a number.
    Int4,
}

/// How a matrix that is not quantised is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
}

/// How K and V are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 4 bytes: equal to a reference without rounding.
    F32,
    /// 2 bytes.
    Bf16,
    /// 1 byte, and 4 for the scale of each key and of each value.
    Int8,
}

impl WeightDtype {
    /// Bits of the layers' matrices, if they are quantised.
    #[must_use]
    pub const fn quantised(self) -> Option<QuantBits> {
        match self {
            WeightDtype::F32 | WeightDtype::Bf16 => None,
            WeightDtype::Int8 => Some(QuantBits::Int8),
            WeightDtype::Int4 => Some(QuantBits::Int4),
        }
    }

    /// How the embedding is kept, and the head unless the backend quantises it: they are few bytes and every token meets
    /// them.
    #[must_use]
    pub const fn of_ends(self) -> WeightDtype {
        match self {
            WeightDtype::F32 => WeightDtype::F32,
            WeightDtype::Bf16 | WeightDtype::Int8 | WeightDtype::Int4 => WeightDtype::Bf16,
        }
    }

    /// How the matrix that gives the logits is kept, on a backend that quantises it to this.
    #[must_use]
    pub const fn of_head(self, quantised: Option<QuantBits>) -> WeightDtype {
        match (self.quantised(), quantised) {
            (Some(_), Some(QuantBits::Int8)) => WeightDtype::Int8,
            (Some(_), Some(QuantBits::Int4)) => WeightDtype::Int4,
            _ => self.of_ends(),
        }
    }

    /// How matrices that are not quantised are kept.
    #[must_use]
    pub const fn float(self) -> FloatDtype {
        match self {
            WeightDtype::F32 => FloatDtype::F32,
            WeightDtype::Bf16 | WeightDtype::Int8 | WeightDtype::Int4 => FloatDtype::Bf16,
        }
    }

    /// Its name in configurations and the numerics id.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            WeightDtype::F32 => "f32",
            WeightDtype::Bf16 => "bf16",
            WeightDtype::Int8 => QuantBits::Int8.name(),
            WeightDtype::Int4 => QuantBits::Int4.name(),
        }
    }
}

impl FloatDtype {
    /// Bytes of one number.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            FloatDtype::F32 => 4,
            FloatDtype::Bf16 => 2,
        }
    }
}

impl KvDtype {
    /// Bytes of one key or one value of so many numbers.
    #[must_use]
    pub const fn vector_bytes(self, head_width: usize) -> usize {
        match self {
            KvDtype::F32 => 4 * head_width,
            KvDtype::Bf16 => 2 * head_width,
            KvDtype::Int8 => head_width + 4,
        }
    }

    /// Its name in configurations and the numerics id.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::Int8 => "int8",
        }
    }
}

/// One rank's heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of `kv`.
    pub q: usize,
    /// KV heads. A row of qkv holds `q` query heads, then `kv` key heads, then `kv` value heads.
    pub kv: usize,
    /// Numbers per head ("d").
    pub width: usize,
}

impl Heads {
    /// Width of a row of queries, and of attention's output.
    #[must_use]
    pub const fn q_width(self) -> usize {
        self.q * self.width
    }

    /// Width of a row of keys, and of values.
    #[must_use]
    pub const fn kv_width(self) -> usize {
        self.kv * self.width
    }

    /// Width of a row of the fused qkv.
    #[must_use]
    pub const fn qkv_width(self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// The sizes of one rank's KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// Blocks, block 0 (never written or read) included.
    pub blocks: usize,
    /// KV heads of this rank.
    pub heads: usize,
    /// Numbers per head.
    pub head_width: usize,
    /// How K and V are kept.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of one block over all layers.
    #[must_use]
    pub const fn block_bytes(self) -> u64 {
        2 * (self.layers
            * crate::plan::BLOCK_TOKENS
            * self.heads
            * self.dtype.vector_bytes(self.head_width)) as u64
    }
}
