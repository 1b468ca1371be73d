//! Matrices as GPTQ and AWQ have them: eight numbers of four bits, or four of eight, in a 32-bit word, with scales and zero
//! points of each group in tensors beside them.
//!
//! Both store a matrix `[n, k]` turned, `[k, n]`. GPTQ packs numbers of one column of it, AWQ of one row and in an order of
//! its own; zero points are packed along the rows by both. Owns the reading, and the assembly of such tensors to matrices.

use super::form::ReadyForm;
use super::{Entry, Numbers, Place, Weights, WeightsError};
use crate::backend::{QuantBits, QuantOffset, QuantRow};
use half::f16;
use safetensors::Dtype;
use std::fmt;
use std::ops::Range;

#[cfg(test)]
mod tests;

/// Where AWQ puts the numbers of eight neighbouring columns in a word.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// The largest group of the logical form.
const GROUP_MAX: usize = 128;

/// What a checkpoint's `quantization_config` says about all its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WordsFormat {
    /// Who made it.
    pub method: Method,
    /// Bits of a number: 4 or 8.
    pub bits: u32,
    /// Columns of a group; none where a row is one group.
    pub group: Option<usize>,
    /// Whether all zero points are the middle.
    pub symmetric: bool,
    /// Whether groups are not of neighbouring columns but as `g_idx` says.
    pub by_index: bool,
}

/// Quantisers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// GPTQ; the first form of its checkpoints has zero points that are one too small.
    Gptq {
        /// What is added to a zero point.
        zero_add: u8,
    },
    /// AWQ's `gemm` form.
    Awq,
}

/// The parts of one matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<P> {
    pub format: WordsFormat,
    n: usize,
    k: usize,
    qweight: P,
    qzeros: P,
    /// f16.
    scales: P,
    /// The group of each column, where columns are not grouped in order.
    g_idx: Option<P>,
}

impl fmt::Display for WordsFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.method {
            Method::Gptq { .. } if self.by_index => {
                write!(f, "GPTQ int{} with act-order", self.bits)
            }
            Method::Gptq { .. } => write!(f, "GPTQ int{}", self.bits),
            Method::Awq => write!(f, "AWQ int{}", self.bits),
        }
    }
}

impl WordsFormat {
    /// The logical form, where there is one: neighbouring columns in groups of 32, 64 or whole 128s.
    #[must_use]
    pub fn form(&self) -> Option<ReadyForm> {
        let group = match self.group {
            Some(group @ (32 | 64)) => group,
            Some(group) if !group.is_multiple_of(GROUP_MAX) => return None,
            _ => GROUP_MAX,
        };
        let (bits, offset) = match self.bits {
            4 => (QuantBits::Int4, QuantOffset::Zeros),
            8 if self.symmetric => (QuantBits::Int8, QuantOffset::Middle),
            _ => return None,
        };
        (!self.by_index).then_some(ReadyForm {
            bits,
            group,
            offset,
        })
    }

    /// Numbers in a word.
    fn per_word(&self) -> usize {
        32 / self.bits as usize
    }
}

impl<P> Words<P> {
    /// The same with other words for where the parts lie.
    pub(super) fn located<'a, Q>(&'a self, at: impl Fn(&'a P) -> Option<Q>) -> Option<Words<Q>> {
        Some(Words {
            format: self.format,
            n: self.n,
            k: self.k,
            qweight: at(&self.qweight)?,
            qzeros: at(&self.qzeros)?,
            scales: at(&self.scales)?,
            g_idx: match &self.g_idx {
                Some(place) => Some(at(place)?),
                None => None,
            },
        })
    }

    /// The group of a column, in the order of groups.
    fn group_of(&self, column: usize) -> usize {
        column / self.format.group.unwrap_or(self.k)
    }

    fn groups(&self) -> usize {
        self.group_of(self.k - 1) + 1
    }
}

impl Words<&[u8]> {
    /// The numbers of row `row` from column `first` on.
    pub(super) fn dequantise(&self, row: usize, first: usize, out: &mut [f32]) {
        let mut last = None;
        let (mut scale, mut zero) = (0.0, 0.0);
        for (column, out) in (first..).zip(out) {
            let group = match self.g_idx {
                Some(index) => word(index, column) as usize,
                None => self.group_of(column),
            };
            if last != Some(group) {
                (scale, zero) = (self.scale(row, group), f32::from(self.zero(row, group)));
                last = Some(group);
            }
            *out = scale * (f32::from(self.q(row, column)) - zero);
        }
    }

    /// The columns `columns` of row `row` as they are quantised.
    ///
    /// # Panics
    /// Where there is no [`WordsFormat::form`].
    pub(super) fn read_quantised(&self, row: usize, columns: &Range<usize>, out: QuantRow<'_>) {
        let form = self.format.form().expect("a matrix with a logical form");
        let middle: u8 = match form.bits {
            QuantBits::Int8 => 128,
            QuantBits::Int4 => 0,
        };
        for (column, q) in columns.clone().zip(&mut *out.q) {
            *q = self.q(row, column).wrapping_sub(middle) as i8;
        }
        let first = columns.start / form.group;
        for group in first..columns.end.div_ceil(form.group) {
            // A group of more than 128 columns is given as several that have its scale.
            let whole = self.group_of(group * form.group);
            out.scales[group - first] = self.scale(row, whole);
            out.zeros[group - first] = self.zero(row, whole).wrapping_sub(middle);
        }
    }

    fn q(&self, row: usize, column: usize) -> u8 {
        let per = self.format.per_word();
        let (word, place) = match self.format.method {
            Method::Gptq { .. } => (
                word(self.qweight, column / per * self.n + row),
                column % per,
            ),
            Method::Awq => (
                word(self.qweight, column * (self.n / per) + row / per),
                AWQ_PLACES[row % per],
            ),
        };
        self.at(word, place)
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        let per = self.format.per_word();
        let word = word(self.qzeros, group * (self.n / per) + row / per);
        match self.format.method {
            // Of eight bits, 0 is stored as 255.
            Method::Gptq { zero_add } => self.at(word, row % per).wrapping_add(zero_add),
            Method::Awq => self.at(word, AWQ_PLACES[row % per]),
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        let at = 2 * (group * self.n + row);
        f16::from_le_bytes([self.scales[at], self.scales[at + 1]]).to_f32()
    }

    /// The number at a place of a word.
    fn at(&self, word: u32, place: usize) -> u8 {
        let bits = self.format.bits as usize;
        (word >> (place * bits)) as u8 & (u8::MAX >> (8 - bits))
    }

    /// Holds the parts against what is said of them: whether groups are in order, and zero points in the middle.
    fn check(&self) -> Result<(), String> {
        let groups = self.groups();
        if let Some(index) = self.g_idx {
            for column in 0..self.k {
                let group = word(index, column) as usize;
                if group >= groups {
                    return Err(format!(
                        "g_idx puts column {column} into group {group} of {groups}"
                    ));
                }
                if !self.format.by_index && group != self.group_of(column) {
                    return Err("its g_idx is not in order although desc_act is false; the checkpoint contradicts itself".to_owned());
                }
            }
        }
        if self.format.symmetric && self.format.bits == 8 {
            let all = (0..groups).flat_map(|group| (0..self.n).map(move |row| (row, group)));
            let mut odd = all.filter(|(row, group)| self.zero(*row, *group) != 128);
            if odd.next().is_some() {
                return Err("its zero points are not in the middle although sym is true; the checkpoint contradicts itself".to_owned());
            }
        }
        Ok(())
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let bytes = &bytes[4 * index..][..4];
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

impl Weights {
    /// Makes matrices of the tensors `NAME.qweight`, `.qzeros`, `.scales` and `.g_idx`: each becomes `NAME.weight [n, k]`.
    ///
    /// # Errors
    /// [`WeightsError::Quantised`]: parts are missing, or do not fit together.
    pub fn assemble(&mut self, format: WordsFormat) -> Result<(), WeightsError> {
        let names = self.tensors.keys();
        let stems: Vec<String> = names
            .filter_map(|name| name.strip_suffix(".qweight").map(str::to_owned))
            .collect();
        for stem in stems {
            let (shape, words) = self.words(&stem, format)?;
            let bytes = |place: &Place| {
                let (_, map) = self.files.get(place.file)?;
                map.get(place.bytes.clone())
            };
            let checked = match words.located(bytes) {
                Some(words) => words.check(),
                None => Err("its bytes are not in the file".to_owned()),
            };
            checked.map_err(|reason| WeightsError::Quantised {
                name: format!("{stem}.qweight"),
                reason,
            })?;
            let entry = Entry {
                shape,
                numbers: Numbers::Words(words),
                rotary: None,
            };
            self.tensors.insert(format!("{stem}.weight"), entry);
        }
        Ok(())
    }

    /// Takes the parts of a matrix out of the tensors.
    fn words(
        &mut self,
        stem: &str,
        format: WordsFormat,
    ) -> Result<(Vec<usize>, Words<Place>), WeightsError> {
        let qweight = self.tensors.get(&format!("{stem}.qweight"));
        let turned = qweight.map_or(&[][..], |entry| &entry.shape);
        let per = format.per_word();
        let (k, n) = match (turned, format.method) {
            (&[words, n], Method::Gptq { .. }) => (words.saturating_mul(per), n),
            (&[k, words], Method::Awq) => (k, words.saturating_mul(per)),
            _ => (0, 0),
        };
        let bad = |part: &str, reason: String| {
            Err(WeightsError::Quantised {
                name: format!("{stem}.{part}"),
                reason,
            })
        };
        if k == 0 || n == 0 || !n.is_multiple_of(per) {
            return bad(
                "qweight",
                format!(
                    "its shape {turned:?} is none of a matrix of {format}, whose rows are a multiple of {per}"
                ),
            );
        }
        let groups = (k - 1) / format.group.unwrap_or(k) + 1;
        let mut take = |part: &str, dtypes: &[Dtype], shape: &[usize]| {
            let name = format!("{stem}.{part}");
            match self.tensors.remove(&name) {
                Some(Entry {
                    shape: found,
                    numbers: Numbers::Plain(dtype, place),
                    ..
                }) if found == shape && dtypes.contains(&dtype) => Ok(Some(place)),
                Some(entry) => Err(WeightsError::Quantised {
                    name,
                    reason: format!(
                        "it is {} of the shape {:?}; it should be {:?} of the shape {shape:?}",
                        entry.numbers.dtype_name(),
                        entry.shape,
                        dtypes[0]
                    ),
                }),
                None => Ok(None),
            }
        };
        const WORDS: [Dtype; 2] = [Dtype::I32, Dtype::U32];
        let packed = match format.method {
            Method::Gptq { .. } => [k / per, n],
            Method::Awq => [k, n / per],
        };
        let parts = (
            take("qweight", &WORDS, &packed)?,
            take("qzeros", &WORDS, &[groups, n / per])?,
            take("scales", &[Dtype::F16], &[groups, n])?,
        );
        let g_idx = take("g_idx", &WORDS, &[k])?;
        let (Some(qweight), Some(qzeros), Some(scales)) = parts else {
            return bad(
                "qweight",
                "its qzeros or scales are not in the checkpoint".to_owned(),
            );
        };
        if format.by_index && g_idx.is_none() {
            return bad(
                "qweight",
                "desc_act is true and its g_idx is not in the checkpoint".to_owned(),
            );
        }
        let words = Words {
            format,
            n,
            k,
            qweight,
            qzeros,
            scales,
            g_idx,
        };
        Ok((vec![n, k], words))
    }
}

impl<P> Numbers<P> {
    fn dtype_name(&self) -> String {
        match self {
            Numbers::Plain(dtype, _) => format!("{dtype:?}"),
            Numbers::Blocks(..) | Numbers::Words(_) => "quantised".to_owned(),
        }
    }
}
