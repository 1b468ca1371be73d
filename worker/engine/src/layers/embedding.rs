//! Embedding and head, both divided by rows of the vocabulary; one matrix where the head is tied.

use super::linear::{End, Slice};
use super::norm::Norm;
use super::{LoadError, Loader, Step, Workspace};
use crate::backend::{Backend, Size};
use crate::collective::{Collective, CollectiveError};
use crate::models::partition::Partition;
use crate::models::spec::ModelSpec;
use crate::models::tensors::TensorNames;

/// Both ends of the model.
pub(crate) struct Embedding<B: Backend> {
    hidden: usize,
    /// The first row of this rank.
    first: u32,
    /// Rows of each rank.
    vocab_widths: Vec<usize>,
    table: B::Linear,
    final_norm: Norm<B>,
    /// None: the table.
    head: Option<B::Linear>,
    logit_scale: Option<f32>,
}

impl<B: Backend> Embedding<B> {
    /// Reads this rank's rows.
    pub fn load(
        loader: &mut Loader<'_, B>,
        names: &TensorNames,
    ) -> Result<Embedding<B>, LoadError> {
        let (
            spec,
            Partition {
                vocab,
                vocab_widths,
                ..
            },
        ) = (loader.spec, loader.partition);
        Ok(Embedding {
            hidden: spec.hidden,
            first: vocab.start as u32,
            vocab_widths: vocab_widths.clone(),
            table: loader.end(
                match names.head {
                    Some(_) => End::Embedding,
                    None => End::Head,
                },
                &names.embedding,
                vocab.clone(),
            )?,
            final_norm: Norm::load(loader, &names.final_norm)?,
            head: names
                .head
                .as_ref()
                .map(|head| loader.end(End::Head, head, vocab.clone()))
                .transpose()?,
            logit_scale: spec.logit_scale,
        })
    }

    /// `x` = the rows of the step's tokens.
    pub fn forward<C: Collective<B::Buf>>(
        &self,
        step: &mut Step<'_, B, C>,
        work: &mut Workspace<B>,
    ) -> Result<(), CollectiveError> {
        step.backend
            .embed(step.batch, &self.table, self.first, &mut work.x);
        // One rank has the row, the others give zeros.
        step.collective
            .all_reduce_sum(&mut work.x, step.batch.len() * self.hidden)
    }

    /// Some rows of `x` behind the final norm, `[rows.len(), hidden]`: what the head sees. Whole on every rank.
    pub fn hidden<'w, C>(
        &self,
        step: &mut Step<'_, B, C>,
        rows: &[u32],
        work: &'w mut Workspace<B>,
    ) -> &'w B::Buf {
        let size = Size {
            rows: rows.len(),
            width: self.hidden,
        };
        step.backend
            .gather_rows(self.hidden, &work.x, rows, &mut work.y);
        self.final_norm
            .forward(step.backend, size, &work.y, &mut work.rows);
        &work.rows
    }

    /// Computes the logits of some rows of `x`; they are on rank 0, in [`Embedding::logits_in`].
    pub fn logits<C: Collective<B::Buf>>(
        &self,
        step: &mut Step<'_, B, C>,
        rows: &[u32],
        work: &mut Workspace<B>,
    ) -> Result<(), CollectiveError> {
        self.hidden(step, rows, work);
        step.backend.linear(
            rows.len(),
            &work.rows,
            self.head.as_ref().unwrap_or(&self.table),
            &mut work.logits_part,
        );
        if let Some(factor) = self.logit_scale {
            let width = self.vocab_widths[step.collective.rank() as usize];
            step.backend.scale(
                Size {
                    rows: rows.len(),
                    width,
                },
                &mut work.logits_part,
                factor,
            );
        }
        if self.vocab_widths.len() == 1 {
            return Ok(());
        }
        step.collective.gather_columns(
            &work.logits_part,
            rows.len(),
            &self.vocab_widths,
            &mut work.logits,
        )
    }

    /// Where rank 0 finds the logits that were last computed, `[rows, vocab]`.
    pub fn logits_in<'w>(&self, work: &'w Workspace<B>) -> &'w B::Buf {
        match self.vocab_widths.len() {
            1 => &work.logits_part,
            _ => &work.logits,
        }
    }
}

/// One rank's matrices here: the head, and the table unless they are one.
pub(crate) fn slices(spec: &ModelSpec, partition: &Partition) -> Vec<(End, Slice)> {
    let slice = |end| Slice {
        rows: partition.vocab.len(),
        columns: 0..spec.hidden,
        head: end == End::Head,
    };
    let table = (!spec.tied).then_some(End::Embedding);
    let ends = table.into_iter().chain([End::Head]);
    ends.map(|end| (end, slice(end))).collect()
}
