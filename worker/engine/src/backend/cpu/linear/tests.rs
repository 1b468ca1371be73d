//! Products against plain loops, and the bits of rows in company.

use super::super::float_tile::Weight;
use super::super::isa::Path;
use super::super::rows::SiluMulRows;
use super::super::tests::numbers;
use super::*;

fn isas() -> impl Iterator<Item = Isa> {
    Path::ALL.into_iter().filter_map(Isa::new)
}

fn matrix(
    pool: &Pool,
    n: usize,
    k: usize,
    dtype: FloatDtype,
    bias: bool,
) -> (CpuLinear, Vec<f32>, Vec<f32>) {
    let weights = numbers(n * k, 1);
    let rounded = weights.iter().map(|w| match dtype {
        FloatDtype::F32 => *w,
        FloatDtype::Bf16 => u16::round(*w).widen(),
    });
    let rounded = rounded.collect();
    let bias_values = if bias { numbers(n, 2) } else { vec![0.0; n] };
    let rows = |i: usize, out: &mut [f32]| out.copy_from_slice(&weights[i * k..][..k]);
    let linear = CpuLinear::pack(
        pool,
        LinearShape { n, k, dtype },
        &rows,
        bias.then_some(bias_values.as_slice()),
    )
    .unwrap();
    (linear, rounded, bias_values)
}

fn multiply(linear: &CpuLinear, isa: Isa, pool: &Pool, m: usize, x: &[f32]) -> Vec<f32> {
    // Numbers that are no sum must not show through.
    let mut y = vec![f32::NAN; m * linear.n];
    linear
        .multiply((isa, pool), m, x, &mut y, &mut Memory::new(0).unwrap())
        .unwrap();
    y
}

#[test]
fn products_equal_plain_loops_for_odd_shapes() {
    let pool = Pool::new(2, &[]).unwrap();
    let shapes = [
        (1, 1),
        (16, 2),
        (17, 3),
        (33, 64),
        (64, 511),
        (48, 513),
        (100, 1030),
        (130, 77),
    ];
    for (n, k) in shapes {
        for dtype in [FloatDtype::F32, FloatDtype::Bf16] {
            let (linear, weights, bias) = matrix(&pool, n, k, dtype, (n + k) % 2 == 0);
            for m in [1, 2, 3, 5, 7, 12, 13, 40, 97] {
                let exact = numbers(m * k, 3);
                for isa in isas() {
                    let rounds = dtype == FloatDtype::Bf16 && isa.multiplies_pairs();
                    let x: Vec<f32> = if rounds {
                        exact.iter().map(|x| u16::round(*x).widen()).collect()
                    } else {
                        exact.clone()
                    };
                    // What is not rounded yet is rounded on the way.
                    let y = multiply(&linear, isa, &pool, m, &exact);
                    for (i, y) in y.iter().enumerate() {
                        let (row, column) = (i / n, i % n);
                        let products = (0..k).map(|j| {
                            f64::from(x[row * k + j]) * f64::from(weights[column * k + j])
                        });
                        let expected = products.sum::<f64>() + f64::from(bias[column]);
                        let error = (f64::from(*y) - expected).abs();
                        assert!(
                            error < 2e-6 * (k as f64).sqrt() + 1e-6,
                            "{isa:?} {dtype:?} m={m} n={n} k={k} at {i}: {y}, expected {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company_and_on_any_threads() {
    let pools = [1, 2].map(|threads| Pool::new(threads, &[]).unwrap());
    for dtype in [FloatDtype::F32, FloatDtype::Bf16] {
        let (n, k) = (83, 1029);
        let (linear, ..) = matrix(&pools[0], n, k, dtype, true);
        let x = numbers(130 * k, 4);
        for isa in isas() {
            let alone: Vec<f32> = x
                .chunks(k)
                .flat_map(|x| multiply(&linear, isa, &pools[0], 1, x))
                .collect();
            for m in (2..=70).chain([96, 97, 130]) {
                for pool in &pools {
                    let together = multiply(&linear, isa, pool, m, &x[..m * k]);
                    let equal = together
                        .iter()
                        .zip(&alone)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(equal, "{isa:?} {dtype:?} m={m} threads={}", pool.threads());
                }
            }
        }
    }
}

#[test]
fn gates_and_ups_become_one_number_with_the_same_bits_as_in_two_ops() {
    let pools = [1, 2].map(|threads| Pool::new(threads, &[]).unwrap());
    for (width, k) in [(32, 5), (96, 130), (640, 257)] {
        let (linear, ..) = matrix(&pools[0], 2 * width, k, FloatDtype::Bf16, true);
        for m in [13, 40, 97] {
            let x = numbers(m * k, 6);
            for isa in isas() {
                let gate_up = multiply(&linear, isa, &pools[0], m, &x);
                let mut expected = vec![0.0; m * width];
                let (gate_up, out) = (&gate_up[..], &mut expected[..]);
                isa.run(SiluMulRows {
                    gate_up,
                    width,
                    out,
                });
                for pool in &pools {
                    let mut y = vec![f32::NAN; m * width];
                    let mut scratch = Memory::new(0).unwrap();
                    linear
                        .multiply_gated((isa, pool), m, &x, &mut y, &mut scratch)
                        .unwrap();
                    let equal = y.iter().zip(&expected);
                    assert!(
                        equal.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{isa:?} m={m} width={width} threads={}",
                        pool.threads()
                    );
                }
            }
        }
    }
}

#[test]
fn rows_come_back_out_of_the_panels() {
    let pool = Pool::new(1, &[]).unwrap();
    for dtype in [FloatDtype::F32, FloatDtype::Bf16] {
        let (linear, weights, _) = matrix(&pool, 35, 21, dtype, false);
        let mut row = vec![0.0; 21];
        for i in 0..35 {
            linear.row(i, &mut row);
            assert_eq!(row, weights[i * 21..][..21]);
        }
    }
}

#[test]
fn a_number_that_is_not_finite_stays_in_its_row() {
    let pool = Pool::new(1, &[]).unwrap();
    let k = 33;
    let (linear, ..) = matrix(&pool, 20, k, FloatDtype::Bf16, false);
    for isa in isas() {
        let mut x = numbers(3 * k, 5);
        x[k] = f32::NAN;
        let y = multiply(&linear, isa, &pool, 3, &x);
        assert!(
            y[..20].iter().chain(&y[40..]).all(|y| y.is_finite())
                && y[20..40].iter().all(|y| y.is_nan())
        );
    }
}
