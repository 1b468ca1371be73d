//! Matrices of words made by hand: numbers, zero points and scales that are known before they are packed.

use super::*;
use crate::weights::quant::dequantise_row;
use safetensors::tensor::TensorView;

/// Rows and columns of the matrix, and columns of its groups.
const N: usize = 16;
const K: usize = 160;
const GROUP: usize = 32;

fn q(row: usize, column: usize) -> u32 {
    (7 * row + 3 * column) as u32
}

fn zero(row: usize, group: usize) -> u32 {
    (row + 5 * group) as u32 % 15 + 1
}

fn scale(row: usize, group: usize) -> f32 {
    0.125 * (row + 1) as f32 + group as f32
}

/// A format, and the group of each column.
struct Case {
    format: WordsFormat,
    group_of: fn(usize) -> usize,
}

impl Case {
    fn mask(&self) -> u32 {
        (1 << self.format.bits) - 1
    }

    fn zero(&self, row: usize, group: usize) -> u32 {
        match self.format.symmetric {
            true => 1 << (self.format.bits - 1),
            false => zero(row, group) & self.mask(),
        }
    }

    fn number(&self, row: usize, column: usize) -> f32 {
        let group = (self.group_of)(column);
        let steps = (q(row, column) & self.mask()) as f32 - self.zero(row, group) as f32;
        scale(row, group) * steps
    }

    /// The tensors of the matrix `m`.
    fn file(&self) -> Vec<u8> {
        let (bits, per) = (self.format.bits, self.format.per_word());
        let pack = |numbers: &mut dyn Iterator<Item = u32>| {
            let places = numbers.zip(0..);
            places.fold(0, |word, (number, place)| word | number << (place * bits))
        };
        // Word by word, its numbers from the lowest bits on.
        const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let awq = self.format.method == Method::Awq;
        let along_rows = |number: &dyn Fn(usize) -> u32| -> Vec<u32> {
            let word = |word: usize| {
                let row = |place: usize| word * per + if awq { ORDER[place] } else { place };
                pack(&mut (0..per).map(|place| number(row(place))))
            };
            (0..N / per).map(word).collect()
        };
        let number = |row: usize, column: usize| q(row, column) & self.mask();
        let qweight: Vec<u32> = match awq {
            true => (0..K)
                .flat_map(|k| along_rows(&|row| number(row, k)))
                .collect(),
            false => (0..K / per)
                .flat_map(|word| {
                    (0..N).map(move |row| {
                        pack(&mut (0..per).map(|place| number(row, word * per + place)))
                    })
                })
                .collect(),
        };
        let less = match self.format.method {
            Method::Gptq { zero_add } => u32::from(zero_add),
            Method::Awq => 0,
        };
        let groups = K.div_ceil(self.format.group.unwrap_or(K));
        let qzeros: Vec<u32> = (0..groups)
            .flat_map(|group| {
                along_rows(&|row| self.zero(row, group).wrapping_sub(less) & self.mask())
            })
            .collect();
        let scales: Vec<u8> = (0..groups)
            .flat_map(|group| (0..N).map(move |row| f16::from_f32(scale(row, group))))
            .flat_map(f16::to_le_bytes)
            .collect();
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (qweight, qzeros): (Vec<u8>, Vec<u8>) = (bytes(&qweight), bytes(&qzeros));
        let index: Vec<u32> = (0..K).map(|k| (self.group_of)(k) as u32).collect();
        let index: Vec<u8> = bytes(&index);
        let packed = if awq {
            vec![K, N / per]
        } else {
            vec![K / per, N]
        };
        let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).expect("fits");
        let mut tensors = vec![
            ("m.qweight", view(Dtype::I32, packed, &qweight)),
            ("m.qzeros", view(Dtype::I32, vec![groups, N / per], &qzeros)),
            ("m.scales", view(Dtype::F16, vec![groups, N], &scales)),
        ];
        if !awq {
            tensors.push(("m.g_idx", view(Dtype::I32, vec![K], &index)));
        }
        safetensors::serialize(tensors, None).expect("serialisable")
    }

    fn open(&self) -> Result<Weights, String> {
        open(&self.file(), self.format)
    }
}

fn open(file: &[u8], format: WordsFormat) -> Result<Weights, String> {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("model.safetensors"), file).expect("written");
    let mut weights = Weights::open(dir.path()).expect("safetensors");
    weights
        .assemble(format)
        .map_err(|error| error.to_string())?;
    Ok(weights)
}

fn gptq(bits: u32, symmetric: bool) -> Case {
    Case {
        format: WordsFormat {
            method: Method::Gptq { zero_add: 1 },
            bits,
            group: Some(GROUP),
            symmetric,
            by_index: false,
        },
        group_of: |column| column / GROUP,
    }
}

fn awq() -> Case {
    let mut case = gptq(4, false);
    case.format.method = Method::Awq;
    case
}

fn second_form(mut case: Case) -> Case {
    case.format.method = Method::Gptq { zero_add: 0 };
    case
}

fn in_one_group(mut case: Case) -> Case {
    (case.format.group, case.group_of) = (None, |_| 0);
    case
}

fn by_index(mut case: Case) -> Case {
    (case.format.by_index, case.group_of) = (true, |column| column % 3);
    case
}

#[test]
fn every_form_gives_the_numbers_that_were_packed() {
    for case in [
        gptq(4, false),
        gptq(4, true),
        gptq(8, true),
        gptq(8, false),
        second_form(gptq(4, false)),
        second_form(gptq(8, true)),
        in_one_group(gptq(4, false)),
        by_index(gptq(4, false)),
        by_index(gptq(8, true)),
        awq(),
        in_one_group(awq()),
    ] {
        let weights = case.open().expect("assembled");
        let tensor = weights.tensor("m.weight").expect("there");
        let mut expected = (0..N).flat_map(|row| (0..K).map(move |column| (row, column)));
        for number in tensor.to_vec() {
            let (row, column) = expected.next().expect("no more numbers than that");
            assert_eq!(
                number,
                case.number(row, column),
                "{:?} at {row}, {column}",
                case.format
            );
        }
        let Some(form) = tensor.form() else {
            assert!(case.format.by_index || case.format.bits == 8);
            continue;
        };
        for columns in [0..K, 0..40, 33..96, 30..34, 120..K] {
            let shape = form.shape(1, &columns);
            let mut out = QuantRow {
                q: &mut vec![0; shape.k],
                scales: &mut vec![0.0; shape.groups()],
                zeros: &mut vec![0; shape.groups()],
                mins: &mut [],
            };
            tensor.read_quantised(5, &columns, out.lend());
            let mut numbers = vec![0.0; shape.k];
            dequantise_row(shape, &out, &mut numbers);
            let expected: Vec<f32> = columns.map(|column| case.number(5, column)).collect();
            assert_eq!(numbers, expected, "{:?}", case.format);
        }
    }
}

#[test]
fn groups_of_neighbours_are_kept_and_others_are_not() {
    let form = |change: fn(&mut WordsFormat)| {
        let mut format = gptq(4, true).format;
        change(&mut format);
        format
            .form()
            .map(|form| (form.bits, form.group, form.offset))
    };
    let zeros = |group| Some((QuantBits::Int4, group, QuantOffset::Zeros));
    assert_eq!(form(|_| {}), zeros(32));
    assert_eq!(form(|format| format.group = Some(256)), zeros(128));
    assert_eq!(form(|format| format.group = None), zeros(128));
    assert_eq!(form(|format| format.group = Some(48)), None);
    assert_eq!(form(|format| format.by_index = true), None);
    let int8 = Some((QuantBits::Int8, 32, QuantOffset::Middle));
    assert_eq!(form(|format| format.bits = 8), int8);
    assert_eq!(
        form(|format| (format.bits, format.symmetric) = (8, false)),
        None
    );
}

#[test]
fn a_checkpoint_that_contradicts_itself_is_refused() {
    let refused =
        |case: &Case, format: WordsFormat| open(&case.file(), format).expect_err("refused");
    let shuffled = by_index(gptq(4, false));
    let said = gptq(4, false).format;
    assert!(refused(&shuffled, said).contains("g_idx is not in order although desc_act is false"));
    let odd = gptq(8, false);
    assert!(refused(&odd, gptq(8, true).format).contains("not in the middle although sym is true"));
    let mut wrong = gptq(4, false);
    wrong.group_of = |column| column / GROUP + 90;
    wrong.format.by_index = true;
    assert_eq!(
        wrong.open().expect_err("refused"),
        "tensor m.qweight: g_idx puts column 0 into group 90 of 5"
    );
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let case = gptq(4, false);
    let mut format = case.format;
    format.group = Some(64);
    assert_eq!(
        open(&case.file(), format).expect_err("refused"),
        "tensor m.qzeros: it is I32 of the shape [5, 2]; it should be I32 of the shape [3, 2]"
    );
    assert!(
        open(&awq().file(), case.format)
            .expect_err("refused")
            .starts_with("tensor m.qweight: its shape [160, 2] is none of a matrix of GPTQ int4")
    );
}
