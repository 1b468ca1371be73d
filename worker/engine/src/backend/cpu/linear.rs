//! Weight matrices: packed into panels when loaded, multiplied with the rows of a step.
//!
//! Owns the forms of packed matrices and the choice of the product that goes with each.

use super::dot_tile::QuantLayout;
use super::isa::Isa;
use super::memory::Memory;
use super::pool::Pool;
use crate::backend::{
    DeviceError, FloatDtype, LinearShape, PackedBytes, PackedShape, QuantShape, QuantSource,
    RowSource,
};

mod activations;
mod float;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod quantised;
#[cfg(test)]
mod tests;
mod walk;

/// A weight matrix `[n, k]` in panels, the last one filled up with zeros, and its bias.
#[derive(Debug)]
pub struct CpuLinear {
    /// Rows: outputs.
    pub(super) n: usize,
    /// Columns: inputs.
    pub(super) k: usize,
    form: Form,
    panels: PackedBytes,
    /// Filled up with zeros to whole panels.
    bias: Option<Memory<f32>>,
}

/// What the panels hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    F32,
    Bf16,
    Quantised(QuantLayout),
}

/// `y[m, n] = x[m, k] W^T + bias`; gated, `y[m, n / 2]` is what [`Backend::silu_mul`] makes of that.
///
/// [`Backend::silu_mul`]: crate::backend::Backend::silu_mul
struct Product<'a> {
    isa: Isa,
    gated: bool,
    n: usize,
    k: usize,
    m: usize,
    x: &'a [f32],
    /// As long as whole panels.
    bias: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl CpuLinear {
    /// Packs a matrix, see [`crate::backend::Backend::pack`].
    pub(super) fn pack(
        pool: &Pool,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        let LinearShape { n, k, dtype } = shape;
        let mut panels = Memory::<u8>::new(CpuLinear::bytes(shape) as usize)?;
        let bytes = panels.as_mut();
        match dtype {
            FloatDtype::F32 => {
                float::pack::<f32>(pool, (n, k), rows, bytemuck::cast_slice_mut(bytes));
            }
            FloatDtype::Bf16 => {
                float::pack::<u16>(pool, (n, k), rows, bytemuck::cast_slice_mut(bytes));
            }
        }
        CpuLinear::map(PackedShape::Float(shape), PackedBytes::whole(panels), bias)
    }

    /// Packs a quantised matrix, see [`crate::backend::Backend::pack_quantised`].
    pub(super) fn pack_quantised(
        pool: &Pool,
        shape: QuantShape,
        rows: &QuantSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        let mut panels = Memory::<u8>::new(CpuLinear::quantised_bytes(shape) as usize)?;
        quantised::pack(pool, shape, rows, panels.as_mut());
        CpuLinear::map(
            PackedShape::Quantised(shape),
            PackedBytes::whole(panels),
            bias,
        )
    }

    /// A matrix of bytes that were packed before, see [`crate::backend::Backend::map`].
    pub(super) fn map(
        shape: PackedShape,
        panels: PackedBytes,
        bias: Option<&[f32]>,
    ) -> Result<CpuLinear, DeviceError> {
        let (n, k, form) = match shape {
            PackedShape::Float(LinearShape { n, k, dtype }) => match dtype {
                FloatDtype::F32 => (n, k, Form::F32),
                FloatDtype::Bf16 => (n, k, Form::Bf16),
            },
            PackedShape::Quantised(shape) => {
                let layout = QuantLayout::new(shape);
                (shape.n, shape.k, Form::Quantised(layout))
            }
        };
        let bias = bias.map(|bias| padded(bias, n)).transpose()?;
        Ok(CpuLinear {
            n,
            k,
            form,
            panels,
            bias,
        })
    }

    /// The bytes of the panels.
    pub(super) fn packed(&self) -> PackedBytes {
        self.panels.clone()
    }

    /// Bytes of the panels of floats.
    pub(super) fn bytes(shape: LinearShape) -> u64 {
        let LinearShape { n, k, dtype } = shape;
        let bytes = match dtype {
            FloatDtype::F32 => float::bytes::<f32>(n, k),
            FloatDtype::Bf16 => float::bytes::<u16>(n, k),
        };
        bytes as u64
    }

    /// Bytes of the panels of a quantised matrix.
    pub(super) fn quantised_bytes(shape: QuantShape) -> u64 {
        quantised::bytes(shape) as u64
    }

    /// Copies row `row`, widened.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let panels = self.panels.as_ref();
        match &self.form {
            Form::F32 => float::row::<f32>(bytemuck::cast_slice(panels), self.k, row, out),
            Form::Bf16 => float::row::<u16>(bytemuck::cast_slice(panels), self.k, row, out),
            Form::Quantised(layout) => quantised::row(layout, panels, row, &mut out[..self.k]),
        }
    }

    /// `y[m, n] = x[m, k] W^T + bias`. `scratch` holds copies of the activations and grows when it must.
    ///
    /// # Errors
    /// The scratch memory cannot grow; `y` is then not written.
    pub(super) fn multiply(
        &self,
        on: (Isa, &Pool),
        m: usize,
        x: &[f32],
        y: &mut [f32],
        scratch: &mut Memory<f32>,
    ) -> Result<(), DeviceError> {
        self.product(on, m, x, (y, false), scratch)
    }

    /// Whether [`CpuLinear::multiply_gated`] is for so many rows: no panel holds gates and ups, and the weights stay near for
    /// several blocks of rows. Weights read once come fastest in the order in which they lie.
    pub(super) fn is_gated(&self, m: usize) -> bool {
        self.n.is_multiple_of(2 * super::dot_tile::PANEL) && m > super::float_tile::ROWS_MAX
    }

    /// As [`CpuLinear::multiply`], of gates upon as many ups: `y[m, n / 2]` is `silu(gates) * ups`.
    ///
    /// # Errors
    /// As there.
    pub(super) fn multiply_gated(
        &self,
        on: (Isa, &Pool),
        m: usize,
        x: &[f32],
        y: &mut [f32],
        scratch: &mut Memory<f32>,
    ) -> Result<(), DeviceError> {
        assert!(self.is_gated(m));
        self.product(on, m, x, (y, true), scratch)
    }

    fn product(
        &self,
        (isa, pool): (Isa, &Pool),
        m: usize,
        x: &[f32],
        (y, gated): (&mut [f32], bool),
        scratch: &mut Memory<f32>,
    ) -> Result<(), DeviceError> {
        let (n, k) = (self.n, self.k);
        let width = if gated { n / 2 } else { n };
        assert!(x.len() >= m * k && y.len() >= m * width);
        if m == 0 || n == 0 {
            return Ok(());
        }
        let bias = self.bias.as_ref().map(AsRef::as_ref);
        let product = Product {
            isa,
            gated,
            n,
            k,
            m,
            x: &x[..m * k],
            bias,
            y: &mut y[..m * width],
        };
        let panels = self.panels.as_ref();
        match &self.form {
            Form::F32 => float::multiply::<f32>(pool, product, panels, scratch),
            #[cfg(target_arch = "x86_64")]
            Form::Bf16 if isa.multiplies_pairs() => pairs::multiply(pool, product, panels, scratch),
            Form::Bf16 => float::multiply::<u16>(pool, product, panels, scratch),
            Form::Quantised(layout) => quantised::multiply(pool, product, layout, panels, scratch),
        }
    }
}

fn padded(values: &[f32], n: usize) -> Result<Memory<f32>, DeviceError> {
    let mut memory = Memory::new(n.next_multiple_of(super::dot_tile::PANEL))?;
    memory.as_mut()[..n].copy_from_slice(&values[..n]);
    Ok(memory)
}

/// Bytes that copies of `m` rows of `k` activations take. Quantised ones take less, but in very narrow matrices.
pub(super) fn scratch_bytes(m: usize, k: usize) -> u64 {
    (m * k * size_of::<f32>()) as u64
}

/// Room for `len` numbers in the scratch memory, which grows when it must.
fn room(scratch: &mut Memory<f32>, len: usize) -> Result<&mut [f32], DeviceError> {
    if scratch.as_ref().len() < len {
        *scratch = Memory::new(len.next_power_of_two())?;
    }
    Ok(&mut scratch.as_mut()[..len])
}
