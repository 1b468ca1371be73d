//! Linear layers of one rank: some rows of a matrix (column-parallel) or some columns of it (row-parallel).
//!
//! Owns which part of the checkpoint a rank reads. Rows go straight from the mapped file into the backend's packing.

use super::{LoadError, Loader};
use crate::backend::{Backend, LinearShape, RowSource};
use crate::models::tensors::Stacked;
use crate::weights::{Tensor, Weights};
use std::ops::Range;

impl<B: Backend> Loader<'_, B> {
    /// Column-parallel: these rows of the matrix, one range after another, with their biases.
    pub fn rows(
        &mut self,
        matrix: &Stacked,
        ranges: &[Range<usize>],
    ) -> Result<B::Linear, LoadError> {
        let pieces = pieces_of(self.weights, matrix, ranges, "weight")?;
        let shape = LinearShape {
            n: ranges.iter().map(Range::len).sum(),
            k: matrix.columns,
            dtype: self.dtype,
        };
        let mut bias = Vec::new();
        if matrix.bias {
            bias.resize(shape.n, 0.0);
            let mut rest = bias.as_mut_slice();
            for (tensor, rows) in pieces_of(self.weights, matrix, ranges, "bias")? {
                let (part, after) = rest.split_at_mut(rows.len());
                tensor.read(rows.start, part);
                rest = after;
            }
        }
        let row = |mut row: usize, out: &mut [f32]| {
            for (tensor, rows) in &pieces {
                if row < rows.len() {
                    return tensor.read((rows.start + row) * shape.k, out);
                }
                row -= rows.len();
            }
        };
        self.pack(shape, &row, matrix.bias.then_some(&bias[..]))
    }

    /// Row-parallel: all rows, these columns. The results of all ranks are to be summed, so the bias is rank 0's alone.
    pub fn columns(
        &mut self,
        matrix: &Stacked,
        columns: Range<usize>,
    ) -> Result<B::Linear, LoadError> {
        let all = [matrix.rows()];
        let pieces = pieces_of(self.weights, matrix, &all, "weight")?;
        let shape = LinearShape {
            n: all[0].len(),
            k: columns.len(),
            dtype: self.dtype,
        };
        let mut bias = None;
        if matrix.bias && self.partition.rank == 0 {
            let parts = pieces_of(self.weights, matrix, &all, "bias")?;
            bias = Some(
                parts
                    .iter()
                    .flat_map(|(tensor, _)| tensor.to_vec())
                    .collect::<Vec<f32>>(),
            );
        }
        let row = |mut row: usize, out: &mut [f32]| {
            for (tensor, rows) in &pieces {
                if row < rows.len() {
                    return tensor.read(row * matrix.columns + columns.start, out);
                }
                row -= rows.len();
            }
        };
        self.pack(shape, &row, bias.as_deref())
    }

    fn pack(
        &mut self,
        shape: LinearShape,
        rows: &RowSource<'_>,
        bias: Option<&[f32]>,
    ) -> Result<B::Linear, LoadError> {
        let packed = self.backend.pack(shape, rows, bias)?;
        self.packed += B::linear_bytes(shape);
        (self.progress)(self.packed);
        Ok(packed)
    }
}

/// The file's tensors under these rows of a stacked matrix, in order, each with the rows taken of it.
fn pieces_of<'a>(
    weights: &'a Weights,
    matrix: &Stacked,
    ranges: &[Range<usize>],
    kind: &str,
) -> Result<Vec<(Tensor<'a>, Range<usize>)>, LoadError> {
    let mut pieces = Vec::new();
    for range in ranges {
        let mut top = 0;
        for part in &matrix.parts {
            let (start, end) = (range.start.max(top), range.end.min(top + part.rows));
            if start < end {
                pieces.push((
                    weights.tensor(&format!("{}.{kind}", part.name))?,
                    start - top..end - top,
                ));
            }
            top += part.rows;
        }
    }
    Ok(pieces)
}
