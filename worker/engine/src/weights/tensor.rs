//! Reading a tensor's numbers: as f32, or as the quantised rows that they are.
//!
//! Rows are counted as the model has them. Where a file has the rows of each head in another order, they are put back here.

use super::form::ReadyForm;
use super::{Numbers, blocks};
use crate::backend::QuantRow;
use safetensors::Dtype;
use std::ops::Range;

/// A tensor in a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// All its numbers.
    len: usize,
    /// Numbers of a row.
    width: usize,
    numbers: Numbers<&'a [u8]>,
    rotary: Option<usize>,
}

impl<'a> Tensor<'a> {
    pub(super) fn new(
        shape: &[usize],
        numbers: Numbers<&'a [u8]>,
        rotary: Option<usize>,
    ) -> Tensor<'a> {
        Tensor {
            len: shape.iter().product(),
            width: shape.get(1..).unwrap_or_default().iter().product(),
            numbers,
            rotary,
        }
    }

    /// The form in which it is quantised, if that is one which backends may take as it is.
    #[must_use]
    pub fn form(&self) -> Option<ReadyForm> {
        match &self.numbers {
            Numbers::Plain(..) => None,
            Numbers::Blocks(tensor_type, _) => blocks::form(*tensor_type),
            Numbers::Words(words) => words.format.form(),
        }
    }

    /// Whether its numbers are fewer bits than those of a float, in whatever form.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        match &self.numbers {
            Numbers::Plain(..) => false,
            Numbers::Blocks(..) | Numbers::Words(_) => true,
        }
    }

    /// What the file calls its form: a dtype, ggml's type, or the quantiser's name.
    #[must_use]
    pub fn form_name(&self) -> String {
        match &self.numbers {
            Numbers::Plain(dtype, _) => format!("{dtype:?}"),
            Numbers::Blocks(tensor_type, _) => tensor_type.to_string(),
            Numbers::Words(words) => words.format.to_string(),
        }
    }

    /// Widens `out.len()` numbers from the flat index `start` on.
    ///
    /// # Panics
    /// Past the tensor's end; the shapes were checked by [`Weights::check`](super::Weights::check).
    pub fn read(&self, start: usize, out: &mut [f32]) {
        if let (Numbers::Plain(dtype, bytes), None) = (&self.numbers, self.rotary) {
            return widen(*dtype, bytes, start, out);
        }
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let (row, column) = (at / self.width, at % self.width);
            let (part, after) = rest.split_at_mut(rest.len().min(self.width - column));
            self.read_row(self.row_in_file(row), column, part);
            at += part.len();
            rest = after;
        }
    }

    /// Writes the columns `columns` of row `row` as they are quantised.
    ///
    /// # Panics
    /// Where the tensor has no [`Tensor::form`], or `out` is not of that form's shape.
    pub fn read_quantised(&self, row: usize, columns: &Range<usize>, out: QuantRow<'_>) {
        let row = self.row_in_file(row);
        match &self.numbers {
            Numbers::Plain(..) => panic!("floats have no quantised rows"),
            Numbers::Blocks(tensor_type, bytes) => {
                let bytes = row_of(bytes, row, self.len / self.width);
                blocks::read_quantised(*tensor_type, bytes, columns, out);
            }
            Numbers::Words(words) => words.read_quantised(row, columns, out),
        }
    }

    /// The whole tensor, widened.
    #[must_use]
    pub fn to_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len];
        self.read(0, &mut out);
        out
    }

    fn read_row(&self, row: usize, first: usize, out: &mut [f32]) {
        match &self.numbers {
            Numbers::Plain(dtype, bytes) => widen(*dtype, bytes, row * self.width + first, out),
            Numbers::Blocks(tensor_type, bytes) => {
                let bytes = row_of(bytes, row, self.len / self.width);
                blocks::dequantise(*tensor_type, bytes, first, out);
            }
            Numbers::Words(words) => words.dequantise(row, first, out),
        }
    }

    /// Where the file has a row: number `i` and `i + d/2` of a head, which are rotated together, lie side by side there.
    fn row_in_file(&self, row: usize) -> usize {
        let Some(head) = self.rotary else {
            return row;
        };
        let (inside, half) = (row % head, head / 2);
        row - inside + 2 * (inside % half) + inside / half
    }
}

/// Row `row` of `rows` equal ones.
fn row_of(bytes: &[u8], row: usize, rows: usize) -> &[u8] {
    let len = bytes.len() / rows;
    &bytes[row * len..][..len]
}

fn widen(dtype: Dtype, bytes: &[u8], start: usize, out: &mut [f32]) {
    fn each<const N: usize>(
        bytes: &[u8],
        start: usize,
        out: &mut [f32],
        widen: impl Fn([u8; N]) -> f32,
    ) {
        let (numbers, _) = bytes.as_chunks::<N>();
        let numbers = &numbers[start..][..out.len()];
        for (out, number) in out.iter_mut().zip(numbers) {
            *out = widen(*number);
        }
    }
    match dtype {
        Dtype::BF16 => each(bytes, start, out, |number| {
            half::bf16::from_le_bytes(number).to_f32()
        }),
        Dtype::F16 => each(bytes, start, out, |number| {
            half::f16::from_le_bytes(number).to_f32()
        }),
        // `Weights::tensor` gives no other.
        _ => each(bytes, start, out, f32::from_le_bytes),
    }
}
