//! Norms: root mean square or mean and variance, by the model's spec.

use super::{LoadError, Loader};
use crate::backend::{Backend, LayerNorm, Size};
use crate::models::spec::NormKind;
use crate::models::tensors::NormTensor;

/// A norm with its weights. Every rank has all of it.
pub(crate) struct Norm<B: Backend> {
    kind: NormKind,
    weight: B::Buf,
    bias: Option<B::Buf>,
    eps: f32,
}

impl<B: Backend> Norm<B> {
    /// Reads the norm's weights.
    pub fn load(loader: &mut Loader<'_, B>, tensor: &NormTensor) -> Result<Norm<B>, LoadError> {
        let upload = |loader: &mut Loader<'_, B>, kind: &str| -> Result<B::Buf, LoadError> {
            let values = loader
                .weights
                .tensor(&format!("{}.{kind}", tensor.name))?
                .to_vec();
            let mut buf = loader.backend.alloc(values.len())?;
            loader.backend.write(&values, &mut buf);
            Ok(buf)
        };
        Ok(Norm {
            kind: loader.spec.norm,
            weight: upload(loader, "weight")?,
            bias: if tensor.bias {
                Some(upload(loader, "bias")?)
            } else {
                None
            },
            eps: loader.spec.norm_eps,
        })
    }

    /// `out = norm(x)`, row by row.
    pub fn forward(&self, backend: &mut B, size: Size, x: &B::Buf, out: &mut B::Buf) {
        match self.kind {
            NormKind::Rms => backend.rms_norm(size, x, &self.weight, self.eps, out),
            NormKind::Layer => {
                let norm = LayerNorm {
                    weight: &self.weight,
                    bias: self.bias.as_ref(),
                    eps: self.eps,
                };
                backend.layer_norm(size, x, norm, out);
            }
        }
    }

    /// `x += y`, then `y = norm(x)`, row by row.
    pub fn forward_sum(&self, backend: &mut B, size: Size, x: &mut B::Buf, y: &mut B::Buf) {
        match self.kind {
            NormKind::Rms => backend.add_rms_norm(size, x, y, &self.weight, self.eps),
            NormKind::Layer => {
                let norm = LayerNorm {
                    weight: &self.weight,
                    bias: self.bias.as_ref(),
                    eps: self.eps,
                };
                backend.add_layer_norm(size, x, y, norm);
            }
        }
    }
}
