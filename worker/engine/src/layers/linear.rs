//! Linear layers of one rank: some rows of a matrix (column-parallel) or some columns of it (row-parallel).
//!
//! Owns which part of the checkpoint a rank reads, and whether it is packed as floats or quantised. Rows go straight from
//! the mapped file into the backend's packing, unless they lie packed in the cache.

use super::{LoadError, Loader, attention, mlp};
use crate::backend::{Backend, LinearShape, PackedShape, QuantRow, QuantShape, WeightDtype};
use crate::models::forms::{self, Forms, LayerForms};
use crate::models::partition::Partition;
use crate::models::spec::ModelSpec;
use crate::models::tensors::Stacked;
use crate::weights::form::ReadyForm;
use crate::weights::packed::MatrixName;
use crate::weights::{Tensor, Weights, quant};
use std::ops::Range;

/// One rank's part of a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    /// How many rows.
    pub rows: usize,
    /// Which columns of the whole matrix.
    pub columns: Range<usize>,
    /// Whether it makes logits.
    pub head: bool,
}

impl Slice {
    /// Bytes of it as packed, bias excluded; `ready` is its form in the checkpoint.
    pub fn bytes<B: Backend>(&self, dtype: WeightDtype, ready: Option<ReadyForm>) -> u64 {
        self.packed_shape::<B>(dtype, ready).bytes::<B>()
    }

    fn packed_shape<B: Backend>(
        &self,
        dtype: WeightDtype,
        ready: Option<ReadyForm>,
    ) -> PackedShape {
        match self.quantised::<B>(dtype, ready) {
            None => PackedShape::Float(self.shape(dtype)),
            Some(shape) => PackedShape::Quantised(shape),
        }
    }

    /// Its shape if it is packed quantised: kept so, or made so while it is loaded.
    pub fn quantised<B: Backend>(
        &self,
        dtype: WeightDtype,
        ready: Option<ReadyForm>,
    ) -> Option<QuantShape> {
        let made = |bits| QuantShape {
            head: self.head,
            ..quant::shape(bits, self.rows, &self.columns)
        };
        self.kept::<B>(dtype, ready)
            .or_else(|| dtype.quantised().map(made))
    }

    /// Its shape if it stays as the checkpoint has it. f32 is asked for where floats are wanted whatever the checkpoint has.
    fn kept<B: Backend>(&self, dtype: WeightDtype, ready: Option<ReadyForm>) -> Option<QuantShape> {
        let shape = ready?.shape(self.rows, &self.columns);
        (dtype != WeightDtype::F32 && B::takes_quantised(shape)).then_some(shape)
    }

    /// Its numbers.
    pub fn numbers(&self) -> usize {
        self.rows * self.columns.len()
    }

    fn shape(&self, dtype: WeightDtype) -> LinearShape {
        LinearShape {
            n: self.rows,
            k: self.columns.len(),
            dtype: dtype.float(),
        }
    }
}

impl<B: Backend> Loader<'_, B> {
    /// Column-parallel: these rows of a layer's matrix, one range after another, with their biases.
    pub fn rows(
        &mut self,
        matrix: &Stacked,
        ranges: &[Range<usize>],
    ) -> Result<B::Linear, LoadError> {
        let ready = forms::form(matrix, self.weights);
        self.rows_as((self.dtype, ready), matrix, ranges, false)
    }

    /// These rows of the embedding or the head.
    pub fn end(
        &mut self,
        end: End,
        matrix: &Stacked,
        rows: Range<usize>,
    ) -> Result<B::Linear, LoadError> {
        let dtype = end.dtype::<B>(self.dtype, self.forms);
        self.rows_as((dtype, None), matrix, &[rows], end == End::Head)
    }

    fn rows_as(
        &mut self,
        form: (WeightDtype, Option<ReadyForm>),
        matrix: &Stacked,
        ranges: &[Range<usize>],
        head: bool,
    ) -> Result<B::Linear, LoadError> {
        let slice = Slice {
            rows: ranges.iter().map(Range::len).sum(),
            columns: 0..matrix.columns,
            head,
        };
        let mut bias = Vec::new();
        if matrix.bias {
            bias.resize(slice.rows, 0.0);
            let mut rest = bias.as_mut_slice();
            for (tensor, rows) in pieces_of(self.weights, matrix, ranges, "bias")? {
                let (part, after) = rest.split_at_mut(rows.len());
                tensor.read(rows.start, part);
                rest = after;
            }
        }
        let rows = Rows {
            pieces: pieces_of(self.weights, matrix, ranges, "weight")?,
            width: matrix.columns,
        };
        let bias = matrix.bias.then_some(&bias[..]);
        self.packed(form, matrix, &slice, &rows, bias)
    }

    /// Row-parallel: all rows of a layer's matrix, these columns. The results of all ranks are to be summed, so the bias is
    /// rank 0's alone.
    pub fn columns(
        &mut self,
        matrix: &Stacked,
        columns: Range<usize>,
    ) -> Result<B::Linear, LoadError> {
        let all = [matrix.rows()];
        let slice = Slice {
            rows: all[0].len(),
            columns,
            head: false,
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
        let rows = Rows {
            pieces: pieces_of(self.weights, matrix, &all, "weight")?,
            width: matrix.columns,
        };
        let ready = forms::form(matrix, self.weights);
        self.packed((self.dtype, ready), matrix, &slice, &rows, bias.as_deref())
    }

    /// The matrix as it lies in the cache, or packed.
    fn packed(
        &mut self,
        (dtype, ready): (WeightDtype, Option<ReadyForm>),
        matrix: &Stacked,
        slice: &Slice,
        rows: &Rows<'_>,
        bias: Option<&[f32]>,
    ) -> Result<B::Linear, LoadError> {
        let shape = slice.packed_shape::<B>(dtype, ready);
        let names: Vec<&str> = matrix.parts.iter().map(|part| part.name.as_str()).collect();
        let name = MatrixName::new(names.join("+"), shape);
        if let Some(bytes) = self.packing.take(&name, shape.bytes::<B>()) {
            return Ok(self.backend.map(shape, bytes, bias)?);
        }
        let packed = self.pack(dtype, ready, slice, rows, bias)?;
        self.packing.leave(name, B::packed(&packed));
        Ok(packed)
    }

    fn pack(
        &mut self,
        dtype: WeightDtype,
        ready: Option<ReadyForm>,
        slice: &Slice,
        rows: &Rows<'_>,
        bias: Option<&[f32]>,
    ) -> Result<B::Linear, LoadError> {
        let columns = &slice.columns;
        let kept = slice.kept::<B>(dtype, ready).is_some();
        let packed = match slice.quantised::<B>(dtype, ready) {
            None => {
                let row = |i: usize, out: &mut [f32]| rows.read(i, columns.start, out);
                self.backend.pack(slice.shape(dtype), &row, bias)
            }
            Some(shape) => {
                let row = |i: usize, out: QuantRow<'_>| match kept {
                    true => rows.read_quantised(i, columns, out),
                    false => {
                        let read = |first: usize, values: &mut [f32]| rows.read(i, first, values);
                        quant::quantise_row(shape.bits, rows.width, columns, read, out);
                    }
                };
                self.backend.pack_quantised(shape, &row, bias)
            }
        }?;
        self.packed += slice.bytes::<B>(dtype, ready);
        (self.progress)(self.packed);
        Ok(packed)
    }
}

/// A matrix at one end of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It gives the rows of tokens and nothing else.
    Embedding,
    /// It gives the logits; a tied one is the embedding too.
    Head,
}

impl End {
    /// How it is kept in a model of `dtype`: a head that the checkpoint has quantised is so too where the layers are not made
    /// so, in the backend's own form.
    pub fn dtype<B: Backend>(self, dtype: WeightDtype, forms: &Forms) -> WeightDtype {
        match (self, dtype) {
            (End::Embedding, _) => dtype.of_ends(),
            (End::Head, WeightDtype::Bf16) if forms.head_quantised => {
                WeightDtype::Int8.of_head(B::QUANTISED_HEAD)
            }
            (End::Head, _) => dtype.of_head(B::QUANTISED_HEAD),
        }
    }
}

/// The forms of those of a layer's matrices that a rank keeps as the checkpoint has them, in the order of
/// [`LayerTensors::matrices`](crate::models::tensors::LayerTensors::matrices).
pub(crate) fn kept<B: Backend>(
    spec: &ModelSpec,
    partition: &Partition,
    forms: LayerForms,
    dtype: WeightDtype,
) -> [Option<ReadyForm>; 4] {
    let [qkv, attention_out] = attention::slices(spec, partition);
    let [mlp_in, mlp_out] = mlp::slices(spec, partition);
    let keep = |slice: &Slice, ready| slice.kept::<B>(dtype, ready).and(ready);
    [
        keep(&qkv, forms.qkv),
        keep(&attention_out, forms.attention_out),
        keep(&mlp_in, forms.mlp_in),
        keep(&mlp_out, forms.mlp_out),
    ]
}

/// The rows that a rank takes of a matrix, where they lie in the file.
struct Rows<'a> {
    pieces: Vec<(Tensor<'a>, Range<usize>)>,
    /// Columns of the whole matrix.
    width: usize,
}

impl Rows<'_> {
    /// Reads numbers of row `row` from column `first` on.
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let (tensor, row) = self.place(row);
        tensor.read(row * self.width + first, out);
    }

    /// Reads columns of row `row` as they are quantised.
    fn read_quantised(&self, row: usize, columns: &Range<usize>, out: QuantRow<'_>) {
        let (tensor, row) = self.place(row);
        tensor.read_quantised(row, columns, out);
    }

    /// The tensor that has row `row`, and which one of its own it is.
    fn place(&self, mut row: usize) -> (&Tensor<'_>, usize) {
        for (tensor, rows) in &self.pieces {
            if row < rows.len() {
                return (tensor, rows.start + row);
            }
            row -= rows.len();
        }
        panic!("a row past the last one was asked for");
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
