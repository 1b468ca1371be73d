//! Integer products against their naive twin, to the bit; and the bits of rows in company.

use super::super::super::isa::{Isa, Path};
use super::super::super::tests::numbers;
use super::super::CpuLinear;
use super::*;
use crate::backend::QuantBits;
use crate::weights::quant::dequantise_row;

/// A quantised matrix as a checkpoint has it.
struct Matrix {
    shape: QuantShape,
    q: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
    mins: Vec<f32>,
    bias: Vec<f32>,
}

impl Matrix {
    fn new(shape: QuantShape) -> Matrix {
        let (n, groups) = (shape.n, shape.groups());
        let whole = |len: usize, seed: u32, least: f32, most: f32| {
            let place = move |x: f32| least + (x + 0.5) * (most - least);
            numbers(len, seed)
                .into_iter()
                .map(move |x| place(x).round())
        };
        let (least, most) = match shape.bits {
            QuantBits::Int8 => (-128.0, 127.0),
            QuantBits::Int4 => (0.0, 15.0),
        };
        let zeros = |zero| match shape.offset {
            QuantOffset::Zeros => zero,
            QuantOffset::Middle | QuantOffset::Mins => 8.0,
        };
        let halves = |len, seed| {
            let numbers = numbers(len, seed).into_iter();
            numbers.map(|x| f16::from_f32(x / most).to_f32()).collect()
        };
        let int4 = shape.bits == QuantBits::Int4;
        Matrix {
            shape,
            q: whole(n * shape.k, 1, least, most)
                .map(|q| q as i8)
                .collect(),
            scales: halves(n * groups, 2),
            zeros: whole(n * groups, 3, 0.0, 16.0)
                .map(|zero| if int4 { zeros(zero) as u8 } else { 0 })
                .collect(),
            mins: halves(n * shape.mins(), 4),
            bias: numbers(n, 5),
        }
    }

    fn row<T>(&self, i: usize, body: impl FnOnce(QuantRow<'_>) -> T) -> T {
        let (k, groups, mins) = (self.shape.k, self.shape.groups(), self.shape.mins());
        body(QuantRow {
            q: &mut self.q[i * k..][..k].to_vec(),
            scales: &mut self.scales[i * groups..][..groups].to_vec(),
            zeros: &mut self.zeros[i * groups..][..groups].to_vec(),
            mins: &mut self.mins[i * mins..][..mins].to_vec(),
        })
    }

    fn pack(&self, pool: &Pool) -> CpuLinear {
        let rows = |i: usize, to: QuantRow<'_>| {
            self.row(i, |from| {
                to.q.copy_from_slice(from.q);
                to.scales.copy_from_slice(from.scales);
                to.zeros.copy_from_slice(from.zeros);
                to.mins.copy_from_slice(from.mins);
            });
        };
        CpuLinear::pack_quantised(pool, self.shape, &rows, Some(&self.bias)).unwrap()
    }

    /// The columns of each group.
    fn groups(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let QuantShape { k, group, lead, .. } = self.shape;
        let start = move |g: usize| (g * group).saturating_sub(lead);
        (0..self.shape.groups()).map(move |g| start(g)..start(g + 1).min(k))
    }

    /// The naive twin of one row's products.
    fn multiply(&self, x: &[f32], fused: bool) -> Vec<f32> {
        let add = |a: f32, b: f32, c: f32| if fused { a.mul_add(b, c) } else { a * b + c };
        let layout = QuantLayout::new(self.shape);
        // Group by group, the columns that share a scale of activations.
        let segments: Vec<(usize, std::ops::Range<usize>)> = self
            .groups()
            .enumerate()
            .flat_map(|(g, columns)| {
                let mut start = columns.start;
                layout.segments(g).map(move |width| {
                    start += width;
                    (g, start - width..start)
                })
            })
            .collect();
        let parts: Vec<_> = segments
            .iter()
            .map(|(_, columns)| quantised(&x[columns.clone()]))
            .collect();
        let sum_of = |i: usize, part: usize| {
            self.row(i, |row| {
                let mut sum = if part == 0 { self.bias[i] } else { 0.0 };
                for ((g, columns), parts) in segments.iter().cloned().zip(&parts) {
                    let (x, x_scale) = &parts[part];
                    let zero = match self.shape.offset {
                        QuantOffset::Mins => 0,
                        QuantOffset::Middle | QuantOffset::Zeros => i32::from(row.zeros[g]),
                    };
                    let products = row.q[columns].iter().zip(x);
                    let dot: i32 = products.map(|(q, x)| (i32::from(*q) - zero) * x).sum();
                    sum = add(dot as f32, row.scales[g] * x_scale, sum);
                    if self.shape.offset == QuantOffset::Mins {
                        sum = add(row.mins[g], x_scale * x.iter().sum::<i32>() as f32, sum);
                    }
                }
                sum
            })
        };
        let of_row = |i: usize| {
            if layout.parts == 1 {
                sum_of(i, 0)
            } else {
                sum_of(i, 0) + sum_of(i, 1)
            }
        };
        (0..self.shape.n).map(of_row).collect()
    }
}

/// The rule for activations, in plain words: both parts and their scales.
fn quantised(x: &[f32]) -> [(Vec<i32>, f32); 2] {
    let largest = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let (factor, scale) = (127.0 / largest, largest / 127.0);
    let whole = |x: &f32| (x * factor).round_ties_even();
    let left = |x: &f32| ((x * factor - whole(x)) * 254.0).round_ties_even();
    let first = x.iter().map(|x| whole(x) as i32).collect();
    let second = x.iter().map(|x| left(x) as i32).collect();
    [(first, scale), (second, scale / 254.0)]
}

fn isas() -> impl Iterator<Item = Isa> {
    Path::ALL.into_iter().filter_map(Isa::new)
}

fn multiply(linear: &CpuLinear, isa: Isa, pool: &Pool, m: usize, x: &[f32]) -> Vec<f32> {
    // Numbers that are no sum must not show through.
    let mut y = vec![f32::NAN; m * linear.n];
    linear
        .multiply((isa, pool), m, x, &mut y, &mut Memory::new(0).unwrap())
        .unwrap();
    y
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Both widths of numbers with all offsets that a CPU takes.
const FORMS: [(QuantBits, QuantOffset); 5] = [
    (QuantBits::Int8, QuantOffset::Middle),
    (QuantBits::Int8, QuantOffset::Zeros),
    (QuantBits::Int4, QuantOffset::Middle),
    (QuantBits::Int4, QuantOffset::Zeros),
    (QuantBits::Int4, QuantOffset::Mins),
];

/// `(n, k, group, lead)`: one number, less than a group, slices that begin and end inside one, all that is odd.
const SHAPES: [(usize, usize, usize, usize); 12] = [
    (1, 1, 128, 0),
    (1, 1, 32, 31),
    (3, 2, 64, 63),
    (31, 7, 32, 0),
    (32, 32, 32, 0),
    (33, 96, 32, 16),
    (64, 128, 64, 1),
    (40, 257, 128, 0),
    (70, 300, 128, 100),
    (97, 333, 64, 5),
    (17, 1000, 32, 13),
    (130, 1152, 128, 0),
];

fn shapes() -> impl Iterator<Item = QuantShape> {
    SHAPES
        .into_iter()
        .enumerate()
        .flat_map(|(at, (n, k, group, lead))| {
            let forms = FORMS.into_iter().enumerate();
            forms.map(move |(form, (bits, offset))| QuantShape {
                n,
                k,
                bits,
                group,
                lead,
                offset,
                // Each form in every other shape.
                head: (at + form) % 2 == 1,
            })
        })
}

/// A small matrix of two whole groups.
fn two_groups(bits: QuantBits, offset: QuantOffset, head: bool) -> QuantShape {
    QuantShape {
        n: 40,
        k: 256,
        bits,
        group: 128,
        lead: 0,
        offset,
        head,
    }
}

#[test]
fn products_equal_their_naive_twin_to_the_bit_on_every_path() {
    let pool = Pool::new(2, &[]).unwrap();
    for shape in shapes() {
        let matrix = Matrix::new(shape);
        let linear = matrix.pack(&pool);
        for m in [1, 2, 3, 4, 5, 7, 11, 12, 13, 25, 97] {
            let x = numbers(m * shape.k, 6);
            let expected = |fused| -> Vec<u32> {
                let rows = x.chunks(shape.k).map(|x| matrix.multiply(x, fused));
                bits(&rows.collect::<Vec<_>>().concat())
            };
            let (fused, plain) = (expected(true), expected(false));
            for isa in isas() {
                let y = bits(&multiply(&linear, isa, &pool, m, &x));
                // The portable path has no fused product and sum.
                let expected = if isa.path() == Path::Portable {
                    &plain
                } else {
                    &fused
                };
                assert!(&y == expected, "{isa:?} m={m} {shape:?}");
            }
        }
    }
}

#[test]
fn activations_of_a_head_lose_next_to_nothing() {
    let pool = Pool::new(1, &[]).unwrap();
    for (bits_of, offset) in FORMS {
        let shape = two_groups(bits_of, offset, true);
        let mut matrix = Matrix::new(shape);
        matrix.bias.fill(0.0);
        let linear = matrix.pack(&pool);
        let x = numbers(shape.k, 6);
        let mut row = vec![0.0; shape.k];
        for isa in isas() {
            let y = multiply(&linear, isa, &pool, 1, &x);
            let (mut error, mut size) = (0.0, 0.0);
            for (i, y) in y.iter().enumerate() {
                linear.row(i, &mut row);
                let products = row.iter().zip(&x);
                let expected: f64 = products.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                error += (f64::from(*y) - expected).powi(2);
                size += expected.powi(2);
            }
            let error = (error / size).sqrt();
            assert!(error < 5e-5, "{isa:?} {shape:?}: {error}");
        }
    }
}

#[test]
fn the_largest_numbers_do_not_saturate() {
    let pool = Pool::new(1, &[]).unwrap();
    for (bits_of, offset) in FORMS {
        let shape = two_groups(bits_of, offset, false);
        for sign in [1.0, -1.0] {
            let mut matrix = Matrix::new(shape);
            let (least, most) = match bits_of {
                QuantBits::Int8 => (-128, 127),
                QuantBits::Int4 => (0, 15),
            };
            let q = |i: usize| {
                if (i / 512).is_multiple_of(2) {
                    least
                } else {
                    most
                }
            };
            matrix.q = (0..shape.n * shape.k).map(q).collect();
            let (linear, x) = (matrix.pack(&pool), vec![sign; shape.k]);
            for isa in isas().filter(|isa| isa.path() != Path::Portable) {
                let y = multiply(&linear, isa, &pool, 1, &x);
                assert_eq!(
                    bits(&y),
                    bits(&matrix.multiply(&x, true)),
                    "{isa:?} {shape:?}"
                );
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company_and_on_any_threads() {
    let pools = [1, 2].map(|threads| Pool::new(threads, &[]).unwrap());
    for (bits_of, offset) in FORMS {
        let shape = QuantShape {
            n: 83,
            k: 1029,
            bits: bits_of,
            group: 64,
            lead: 9,
            offset,
            head: offset == QuantOffset::Zeros,
        };
        let linear = Matrix::new(shape).pack(&pools[0]);
        let x = numbers(130 * shape.k, 4);
        for isa in isas() {
            let rows = x.chunks(shape.k);
            let alone = rows.flat_map(|x| multiply(&linear, isa, &pools[0], 1, x));
            let alone = bits(&alone.collect::<Vec<_>>());
            for m in (2..=40).chain([96, 97, 130]) {
                for pool in &pools {
                    let together = multiply(&linear, isa, pool, m, &x[..m * shape.k]);
                    assert!(
                        bits(&together) == alone[..m * shape.n],
                        "{isa:?} {shape:?} m={m} threads={}",
                        pool.threads()
                    );
                }
            }
        }
    }
}

#[test]
fn rows_come_back_out_of_the_panels() {
    let pool = Pool::new(2, &[]).unwrap();
    for shape in shapes() {
        let matrix = Matrix::new(shape);
        let linear = matrix.pack(&pool);
        let (mut found, mut expected) = (vec![0.0; shape.k], vec![0.0; shape.k]);
        for i in 0..shape.n {
            linear.row(i, &mut found);
            matrix.row(i, |row| dequantise_row(shape, &row, &mut expected));
            assert_eq!(found, expected, "{shape:?}");
        }
    }
}

#[test]
fn activations_that_are_not_finite_stay_in_their_row_and_show() {
    let pool = Pool::new(1, &[]).unwrap();
    for (bits_of, offset) in FORMS {
        let shape = QuantShape {
            n: 20,
            k: 200,
            bits: bits_of,
            group: 128,
            lead: 0,
            offset,
            head: false,
        };
        let linear = Matrix::new(shape).pack(&pool);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 127, 199] {
                for isa in isas() {
                    let mut x = numbers(3 * shape.k, 5);
                    x[shape.k + at] = broken;
                    let y = multiply(&linear, isa, &pool, 3, &x);
                    let others = y[..20].iter().chain(&y[40..]);
                    assert!(others.clone().all(|y| y.is_finite()), "{isa:?} {shape:?}");
                    assert!(y[20..40].iter().all(|y| y.is_nan()), "{isa:?} {shape:?}");
                }
            }
        }
    }
}

#[test]
fn a_scale_that_is_not_a_number_shows() {
    let pool = Pool::new(1, &[]).unwrap();
    let shape = QuantShape {
        n: 3,
        k: 64,
        bits: QuantBits::Int4,
        group: 32,
        lead: 0,
        offset: QuantOffset::Middle,
        head: false,
    };
    let mut matrix = Matrix::new(shape);
    matrix.scales[2] = f32::NAN;
    let linear = matrix.pack(&pool);
    for isa in isas() {
        let y = multiply(&linear, isa, &pool, 1, &numbers(64, 5));
        assert!(
            y[0].is_finite() && y[1].is_nan() && y[2].is_finite(),
            "{y:?}"
        );
    }
}

#[test]
fn very_small_and_very_large_activations_are_nothing_and_finite() {
    let pool = Pool::new(1, &[]).unwrap();
    let shape = QuantShape {
        n: 33,
        k: 130,
        bits: QuantBits::Int8,
        group: 64,
        lead: 0,
        offset: QuantOffset::Middle,
        head: false,
    };
    let matrix = Matrix::new(shape);
    let linear = matrix.pack(&pool);
    for isa in isas() {
        for size in [0.0, 1e-38, 1e-31] {
            let x: Vec<f32> = numbers(shape.k, 5).iter().map(|x| x * size).collect();
            assert_eq!(multiply(&linear, isa, &pool, 1, &x), matrix.bias, "{isa:?}");
        }
        let x: Vec<f32> = numbers(shape.k, 5).iter().map(|x| x * 1e36).collect();
        assert!(
            multiply(&linear, isa, &pool, 1, &x)
                .iter()
                .all(|y| y.is_finite())
        );
    }
}

#[test]
fn packed_bytes_follow_the_published_formula() {
    for shape in shapes() {
        let QuantShape {
            n, k, group, lead, ..
        } = shape;
        let first = k.min(group - lead);
        let rest = k - first;
        let columns =
            first.next_multiple_of(8) + rest / group * group + (rest % group).next_multiple_of(8);
        let head = if shape.offset == QuantOffset::Middle {
            64
        } else {
            128
        };
        let column = if shape.bits == QuantBits::Int8 {
            32
        } else {
            16
        };
        assert_eq!(
            bytes(shape),
            n.div_ceil(32) * (shape.groups() * head + columns * column),
            "{shape:?}"
        );
    }
}
