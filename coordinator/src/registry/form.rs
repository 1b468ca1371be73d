//! How a matrix lies in its files: as numbers of a float type, or quantised in groups that workers keep as they are.
//!
//! Owns the forms, not where they are read.

use std::collections::BTreeMap;

use common::wire::message::Quantization;

use super::tensors::WeightTensor;

/// Columns of a group that is quantised while it is loaded, and most of any group: larger ones are kept as several.
pub const GROUP: u64 = 128;

/// How a matrix lies in its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// Floats.
    #[default]
    Float,
    /// Quantised, and floats again when it is loaded.
    Unpacked,
    /// Groups of columns that share a scale.
    Grouped(Grouped),
}

/// A quantised form that workers keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grouped {
    /// Bits of a number: 4 or 8.
    pub bits: u64,
    /// Columns of a group, counted in the whole matrix: 32, 64 or 128.
    pub group: u64,
    /// What stands for zero.
    pub offset: Offset,
}

/// What stands for zero in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offset {
    /// The middle of the numbers.
    Middle,
    /// A zero point per group.
    Zeros,
    /// The least number, per group.
    Mins,
}

impl Grouped {
    /// The form that floats get when they are quantised while they are loaded, if they are.
    pub const fn loaded(quantization: Quantization) -> Option<Grouped> {
        let bits = match quantization {
            Quantization::None => return None,
            Quantization::Int8 => 8,
            Quantization::Int4 => 4,
        };
        Some(Grouped {
            bits,
            group: GROUP,
            offset: Offset::Middle,
        })
    }

    /// Whether floats that are quantised so have numbers of the same size.
    pub const fn is_of(&self, quantization: Quantization) -> bool {
        match Grouped::loaded(quantization) {
            Some(loaded) => loaded.bits == self.bits,
            None => true,
        }
    }

    /// Its name among the values of `quantization`.
    pub fn name(&self) -> &'static str {
        match self.bits {
            8 => Quantization::Int8.name(),
            _ => Quantization::Int4.name(),
        }
    }
}

/// Matrices that workers stack into one keep their form where all parts have the same; otherwise all become floats.
pub(super) fn settle(tensors: &mut [WeightTensor]) {
    let mut stacks: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, tensor) in tensors.iter().enumerate() {
        if let Some(stack) = stack(&tensor.name) {
            stacks.entry(stack).or_default().push(index);
        }
    }
    for parts in stacks.values() {
        let first = tensors[parts[0]].form;
        if parts.iter().any(|&part| tensors[part].form != first) {
            for &part in parts {
                tensors[part].form = Form::Unpacked;
            }
        }
    }
}

/// The stack that a matrix is a part of, by name, if workers stack it.
pub fn stack(name: &str) -> Option<String> {
    const STACKS: [(&str, &str); 5] = [
        ("self_attn.q_proj.weight", "qkv"),
        ("self_attn.k_proj.weight", "qkv"),
        ("self_attn.v_proj.weight", "qkv"),
        ("mlp.gate_proj.weight", "gate_up"),
        ("mlp.up_proj.weight", "gate_up"),
    ];
    STACKS
        .iter()
        .find_map(|(end, stack)| Some(format!("{}{stack}", name.strip_suffix(end)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tensors::Slice;

    const INT4: Form = Form::Grouped(Grouped {
        bits: 4,
        group: 32,
        offset: Offset::Middle,
    });
    const INT8: Form = Form::Grouped(Grouped {
        bits: 8,
        group: 32,
        offset: Offset::Middle,
    });

    fn settled(tensors: &[(&str, Form)]) -> Vec<Form> {
        let tensor = |&(name, form): &(&str, Form)| WeightTensor {
            name: format!("model.{name}.weight"),
            dims: vec![64, 64],
            slice: Slice::Whole,
            by_columns: false,
            form,
        };
        let mut tensors: Vec<WeightTensor> = tensors.iter().map(tensor).collect();
        settle(&mut tensors);
        tensors.iter().map(|tensor| tensor.form).collect()
    }

    #[test]
    fn a_stack_keeps_its_form_where_all_parts_have_the_same() {
        let forms = settled(&[
            ("layers.0.self_attn.q_proj", INT4),
            ("layers.0.self_attn.k_proj", INT4),
            ("layers.0.self_attn.v_proj", INT4),
            ("layers.1.self_attn.q_proj", INT4),
            ("layers.1.self_attn.k_proj", INT4),
            ("layers.1.self_attn.v_proj", INT8),
            ("layers.1.mlp.gate_proj", INT8),
            ("layers.1.mlp.up_proj", Form::Float),
            ("layers.1.mlp.down_proj", INT8),
        ]);
        let float = Form::Unpacked;
        assert_eq!(
            forms,
            [INT4, INT4, INT4, float, float, float, float, float, INT8]
        );
    }
}
