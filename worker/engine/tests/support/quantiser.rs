//! Folders as GPTQ and AWQ write them, made of the tiny models: what other tools quantised, without those tools.

use engine::weights::Weights;
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// The one file of a tiny model's weights.
const WEIGHTS: &str = "model.safetensors";

/// Which quantiser's folder, with which groups.
#[derive(Debug, Clone, Copy)]
pub struct Quantiser {
    /// AWQ, else GPTQ.
    pub awq: bool,
    pub bits: usize,
    pub group: usize,
    /// GPTQ's columns are grouped by index.
    pub by_index: bool,
    /// GPTQ's second form of zero points.
    pub second: bool,
}

impl Quantiser {
    /// GPTQ as it is mostly used.
    pub const GPTQ: Quantiser = Quantiser {
        awq: false,
        bits: 4,
        group: 32,
        by_index: false,
        second: false,
    };

    /// AWQ as it is mostly used.
    pub const AWQ: Quantiser = Quantiser {
        awq: true,
        ..Quantiser::GPTQ
    };

    fn per_word(self) -> usize {
        32 / self.bits
    }

    fn config(self) -> Value {
        match self.awq {
            true => {
                json!({"quant_method": "awq", "bits": 4, "group_size": self.group, "version": "gemm", "zero_point": true})
            }
            false => {
                json!({"quant_method": "gptq", "bits": self.bits, "group_size": self.group, "desc_act": self.by_index,
                "sym": self.bits == 8, "checkpoint_format": if self.second { "gptq_v2" } else { "gptq" }})
            }
        }
    }

    /// The group of a column of `k`.
    fn group_of(self, column: usize, k: usize) -> usize {
        match self.by_index {
            true => column % k.div_ceil(self.group),
            false => column / self.group,
        }
    }
}

/// A folder of the model in this one, with the layers' matrices quantised.
pub fn quantised(model: &Path, quantiser: Quantiser) -> TempDir {
    let mut tensors = BTreeMap::new();
    for (name, (shape, numbers)) in tensors_of(model) {
        match name.strip_suffix("_proj.weight") {
            Some(stem) => quantise(
                &format!("{stem}_proj"),
                shape[0],
                &numbers,
                quantiser,
                &mut tensors,
            ),
            None => {
                let bytes = numbers
                    .iter()
                    .flat_map(|x| bf16::from_f32(*x).to_le_bytes());
                tensors.insert(name, (Dtype::BF16, shape, bytes.collect()));
            }
        }
    }
    folder(model, quantiser.config(), tensors)
}

/// Tensors by name: numbers, shapes and bytes.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A matrix of `n` rows as words, scales and zero points, to the nearest step.
fn quantise(stem: &str, n: usize, numbers: &[f32], quantiser: Quantiser, tensors: &mut Tensors) {
    let (k, per, bits) = (numbers.len() / n, quantiser.per_word(), quantiser.bits);
    let groups = k.div_ceil(quantiser.group);
    let (mut scales, mut zeros) = (vec![0.0f32; groups * n], vec![0u32; groups * n]);
    let mut q = vec![0u32; n * k];
    let most = ((1 << bits) - 1) as f32;
    for row in 0..n {
        let values = &numbers[row * k..][..k];
        for group in 0..groups {
            let of_group = || (0..k).filter(|column| quantiser.group_of(*column, k) == group);
            let (least, largest) = of_group().fold((0.0f32, 0.0f32), |(least, largest), column| {
                (least.min(values[column]), largest.max(values[column]))
            });
            let (scale, zero) = match bits {
                8 => (largest.max(-least) / 127.0, 128.0),
                _ => {
                    let scale = (largest - least) / most;
                    (scale, (-least / scale).round().clamp(1.0, most))
                }
            };
            let scale = f16::from_f32(scale).to_f32();
            (scales[group * n + row], zeros[group * n + row]) = (scale, zero as u32);
            for column in of_group() {
                q[row * k + column] =
                    (values[column] / scale + zero).round().clamp(0.0, most) as u32;
            }
        }
    }
    let mut put = |part: &str, dtype, shape: &[usize], bytes| {
        tensors.insert(format!("{stem}.{part}"), (dtype, shape.to_vec(), bytes));
    };
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let row =
        |word: usize, place: usize| word * per + if quantiser.awq { ORDER[place] } else { place };
    let pack = |number: &dyn Fn(usize) -> u32| {
        let word = (0..per).fold(0u32, |word, place| word | number(place) << (place * bits));
        word.to_le_bytes()
    };
    let qweight: Vec<u8> = match quantiser.awq {
        true => (0..k * (n / per))
            .flat_map(|at| pack(&|place| q[row(at % (n / per), place) * k + at / (n / per)]))
            .collect(),
        false => (0..k / per * n)
            .flat_map(|at| pack(&|place| q[at % n * k + at / n * per + place]))
            .collect(),
    };
    let shape = if quantiser.awq {
        [k, n / per]
    } else {
        [k / per, n]
    };
    put("qweight", Dtype::I32, &shape, qweight);
    let less = u32::from(!quantiser.awq && !quantiser.second);
    let qzeros = (0..groups * (n / per)).flat_map(|at| {
        pack(&|place| zeros[at / (n / per) * n + row(at % (n / per), place)] - less)
    });
    put("qzeros", Dtype::I32, &[groups, n / per], qzeros.collect());
    let scales = scales.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes());
    put("scales", Dtype::F16, &[groups, n], scales.collect());
    if !quantiser.awq {
        let index = (0..k).flat_map(|column| (quantiser.group_of(column, k) as u32).to_le_bytes());
        put("g_idx", Dtype::I32, &[k], index.collect());
    }
}

/// The tensors of a model in one file: shapes and numbers.
pub fn tensors_of(model: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let weights = Weights::open(model).expect("a model");
    let bytes = std::fs::read(model.join(WEIGHTS)).expect("a model");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = |(name, view): (String, TensorView<'_>)| {
        let numbers = weights.tensor(&name).expect("there").to_vec();
        (name, (view.shape().to_vec(), numbers))
    };
    file.tensors().into_iter().map(tensor).collect()
}

/// A folder with the model's files, what its config is to say about quantisation, and these tensors.
pub fn folder(model: &Path, quantisation: Value, tensors: Tensors) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for file in std::fs::read_dir(model).expect("a model") {
        let file = file.expect("readable");
        std::fs::copy(file.path(), dir.path().join(file.file_name())).expect("copied");
    }
    let config = dir.path().join("config.json");
    let text = std::fs::read(&config).expect("a config");
    let mut json: Value = serde_json::from_slice(&text).expect("JSON");
    json["quantization_config"] = quantisation;
    std::fs::write(config, json.to_string()).expect("written");
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("fits");
        (name.clone(), view)
    });
    let bytes = safetensors::serialize(views, None).expect("serialisable");
    std::fs::write(dir.path().join(WEIGHTS), bytes).expect("written");
    dir
}
