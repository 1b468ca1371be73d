//! Attention over the paged cache, divided by heads.

use super::linear::Slice;
use super::norm::Norm;
use super::position::Position;
use super::{LoadError, Loader, Step, Workspace};
use crate::backend::{self, Backend, Columns, Heads};
use crate::collective::{Collective, CollectiveError};
use crate::models::partition::Partition;
use crate::models::spec::ModelSpec;
use crate::models::tensors::LayerTensors;
use std::ops::Range;

/// One layer's attention.
pub(crate) struct Attention<B: Backend> {
    hidden: usize,
    heads: Heads,
    /// This rank's query heads, as columns of all ranks' queries.
    own: Range<usize>,
    scale: f32,
    window: Option<usize>,
    clip: Option<f32>,
    qkv: B::Linear,
    qk_norm: Option<[Norm<B>; 2]>,
    out: B::Linear,
}

impl<B: Backend> Attention<B> {
    /// Reads this rank's heads.
    pub fn load(
        loader: &mut Loader<'_, B>,
        tensors: &LayerTensors,
    ) -> Result<Attention<B>, LoadError> {
        let (
            spec,
            Partition {
                heads,
                q_heads,
                kv_heads,
                ..
            },
        ) = (loader.spec, loader.partition);
        let d = spec.head_width;
        let columns =
            |first: usize, heads: &Range<usize>| (first + heads.start) * d..(first + heads.end) * d;
        let own = columns(0, q_heads);
        let qkv_rows = [
            own.clone(),
            columns(spec.heads, kv_heads),
            columns(spec.heads + spec.kv_heads, kv_heads),
        ];
        let qk_norm = match &tensors.qk_norm {
            Some([q, k]) => Some([Norm::load(loader, q)?, Norm::load(loader, k)?]),
            None => None,
        };
        Ok(Attention {
            hidden: spec.hidden,
            heads: *heads,
            scale: spec.softmax_scale,
            window: spec.window,
            clip: spec.clip_qkv,
            qkv: loader.rows(&tensors.qkv, &qkv_rows)?,
            qk_norm,
            out: loader.columns(&tensors.attention_out, own.clone())?,
            own,
        })
    }

    /// `y` = attention of `y`, which holds the normed stream.
    pub fn forward<C: Collective<B::Buf>>(
        &self,
        step: &mut Step<'_, B, C>,
        work: &mut Workspace<B>,
        kv: &mut B::Kv,
        layer: usize,
    ) -> Result<(), CollectiveError> {
        let (heads, rows) = (self.heads, step.size(self.heads.qkv_width()));
        step.backend
            .linear(rows.rows, &work.y, &self.qkv, &mut work.qkv);
        if let Some(limit) = self.clip {
            step.backend.clamp(rows, &mut work.qkv, limit);
        }
        if let Some([q, k]) = &self.qk_norm {
            self.norm_whole(q, 0, step, work)?;
            self.norm_whole(k, heads.q_width(), step, work)?;
        }
        let (cos_sin, slopes) = match &work.position {
            Position::Rope { cos_sin, .. } => (Some(cos_sin), None),
            Position::Alibi { slopes } => (None, Some(slopes)),
        };
        step.backend
            .write_kv(step.batch, heads, &mut work.qkv, cos_sin, kv, layer);
        let attention = backend::Attention {
            heads,
            qkv: &work.qkv,
            scale: self.scale,
            window: self.window,
            slopes,
        };
        step.backend
            .attention(step.batch, &attention, kv, layer, &mut work.attended);
        step.backend
            .linear(rows.rows, &work.attended, &self.out, &mut work.y);
        step.collective
            .all_reduce_sum(&mut work.y, rows.rows * self.hidden)
    }

    /// Norms this rank's queries (or keys, at column `at` of qkv) by the mean and variance of all ranks': every rank puts
    /// its columns among zeros, and the sum is the whole row.
    fn norm_whole<C: Collective<B::Buf>>(
        &self,
        norm: &Norm<B>,
        at: usize,
        step: &mut Step<'_, B, C>,
        work: &mut Workspace<B>,
    ) -> Result<(), CollectiveError> {
        let (whole, rows, width) = (
            step.size(self.hidden),
            step.batch.len(),
            self.heads.qkv_width(),
        );
        let (in_qkv, in_whole) = (at..at + self.heads.q_width(), self.own.clone());
        step.backend.scale(whole, &mut work.qk_whole, 0.0);
        step.backend.copy_columns(
            rows,
            Columns {
                buf: &work.qkv,
                width,
                columns: in_qkv.clone(),
            },
            Columns {
                buf: &mut work.qk_whole,
                width: self.hidden,
                columns: in_whole.clone(),
            },
        );
        step.collective
            .all_reduce_sum(&mut work.qk_whole, rows * self.hidden)?;
        norm.forward(step.backend, whole, &work.qk_whole, &mut work.y);
        step.backend.copy_columns(
            rows,
            Columns {
                buf: &work.y,
                width: self.hidden,
                columns: in_whole,
            },
            Columns {
                buf: &mut work.qkv,
                width,
                columns: in_qkv,
            },
        );
        Ok(())
    }
}

/// One rank's matrices of a layer's attention.
pub(crate) fn slices(spec: &ModelSpec, partition: &Partition) -> [Slice; 2] {
    let (heads, d) = (&partition.q_heads, spec.head_width);
    [
        Slice {
            rows: partition.heads.qkv_width(),
            columns: 0..spec.hidden,
            head: false,
        },
        Slice {
            rows: spec.hidden,
            columns: heads.start * d..heads.end * d,
            head: false,
        },
    ]
}
