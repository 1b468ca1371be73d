use super::*;
use proptest::prelude::*;

/// A quantised row, owned.
#[derive(Debug, PartialEq)]
struct Row {
    q: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl Row {
    fn of(bits: QuantBits, values: &[f32], columns: &Range<usize>) -> Row {
        let shape = shape(bits, 1, columns);
        let mut row = Row {
            q: vec![99; shape.k],
            scales: vec![99.0; shape.groups()],
            zeros: vec![99; shape.groups()],
        };
        let read = |first: usize, out: &mut [f32]| {
            out.copy_from_slice(&values[first..first + out.len()]);
        };
        quantise_row(bits, values.len(), columns, read, row.lend());
        row
    }

    fn lend(&mut self) -> QuantRow<'_> {
        QuantRow {
            q: &mut self.q,
            scales: &mut self.scales,
            zeros: &mut self.zeros,
            mins: &mut [],
        }
    }

    fn back(&mut self, bits: QuantBits, columns: &Range<usize>) -> Vec<f32> {
        let mut out = vec![99.0; columns.len()];
        dequantise_row(shape(bits, 1, columns), &self.lend(), &mut out);
        out
    }
}

/// Whole rows whose groups may be ragged, of any scale that f16 reaches.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    (
        prop::collection::vec(-1.0f32..1.0, 1..400),
        -20i32..12,
        any::<bool>(),
    )
        .prop_map(|(mut values, exponent, outlier)| {
            if outlier {
                values[0] *= 40.0;
            }
            let size = 2.0f32.powi(exponent);
            values.iter().map(|x| x * size).collect()
        })
}

fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    a.iter().zip(b).map(square).sum()
}

proptest! {
    #[test]
    fn int8_numbers_are_off_by_half_a_step_at_most(values in rows()) {
        let whole = 0..values.len();
        let mut row = Row::of(QuantBits::Int8, &values, &whole);
        prop_assert!(row.q.iter().all(|q| *q != i8::MIN) && row.zeros.iter().all(|zero| *zero == 0));
        let back = row.back(QuantBits::Int8, &whole);
        for (group, values) in values.chunks(GROUP).enumerate() {
            let largest = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let scale = row.scales[group];
            prop_assert!(scale >= largest / 127.0 && scale <= largest / 127.0 * 1.001 + 6e-8);
            for (value, back) in values.iter().zip(&back[group * GROUP..]) {
                let off = (value - back).abs();
                prop_assert!(off <= 0.501 * row.scales[group], "{} became {}", value, back);
            }
        }
    }

    #[test]
    fn int4_is_never_worse_than_one_scale_that_reaches_eight_steps(values in rows()) {
        let whole = 0..values.len();
        let mut row = Row::of(QuantBits::Int4, &values, &whole);
        prop_assert!(row.q.iter().all(|q| (0..16).contains(q)) && row.zeros.iter().all(|zero| *zero == 8));
        let back = row.back(QuantBits::Int4, &whole);
        for (values, back) in values.chunks(GROUP).zip(back.chunks(GROUP)) {
            let largest = values.iter().fold(0.0f32, |a, b| if b.abs() > a.abs() { *b } else { a });
            let scale = away_to_f16(largest / -8.0);
            let plain: Vec<f32> =
                values.iter().map(|x| (x / scale).round().clamp(-8.0, 7.0) * scale).collect();
            let (error, bound) = (squared_error(values, back), squared_error(values, &plain));
            prop_assert!(error <= 1.001 * bound + f64::MIN_POSITIVE, "{} above {}", error, bound);
        }
    }

    #[test]
    fn a_slice_of_columns_has_the_numbers_of_the_whole_row(
        values in rows(), cut in (0.0..1.0, 0.0..1.0), int4 in any::<bool>(),
    ) {
        let bits = if int4 { QuantBits::Int4 } else { QuantBits::Int8 };
        let at = |share: f64| (share * values.len() as f64) as usize;
        let columns = at(cut.0).min(at(cut.1))..at(cut.0).max(at(cut.1)) + 1;
        let whole = Row::of(bits, &values, &(0..values.len())).back(bits, &(0..values.len()));
        let part = Row::of(bits, &values, &columns).back(bits, &columns);
        prop_assert_eq!(&part[..], &whole[columns.clone()], "columns {:?}", columns);
    }
}

#[test]
fn int4_gains_a_quarter_on_numbers_that_are_spread_as_weights_are() {
    // Sums of twelve even numbers are nearly normal.
    let even = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 24) as f32;
    let values: Vec<f32> = (0..128 * 200)
        .map(|i| (0..12).map(|j| even(12 * i + j)).sum::<f32>() - 6.0)
        .collect();
    let whole = 0..values.len();
    let back = Row::of(QuantBits::Int4, &values, &whole).back(QuantBits::Int4, &whole);
    let plain: Vec<f32> = values
        .chunks(GROUP)
        .flat_map(|group| {
            let scale = group.iter().fold(0.0f32, |a, b| a.max(b.abs())) / 7.0;
            group.iter().map(move |x| (x / scale).round() * scale)
        })
        .collect();
    let share = squared_error(&values, &back) / squared_error(&values, &plain);
    assert!(share < 0.75, "{share} of the error of plain rounding");
}

#[test]
fn scales_are_numbers_that_f16_has() {
    for exponent in -20..12 {
        for bits in [QuantBits::Int8, QuantBits::Int4] {
            let values = [0.7 * 2.0f32.powi(exponent), -0.1];
            for scale in Row::of(bits, &values, &(0..2)).scales {
                assert_eq!(f16::from_f32(scale).to_f32(), scale);
            }
        }
    }
}

#[test]
fn broken_numbers_show_and_vanishing_ones_are_zero() {
    for bits in [QuantBits::Int8, QuantBits::Int4] {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let back = Row::of(bits, &[1.0, broken, 2.0], &(0..3)).back(bits, &(0..3));
            assert!(back.iter().all(|x| x.is_nan()), "{back:?}");
        }
        for small in [0.0, f32::from_bits(1), -1e-40] {
            let back = Row::of(bits, &[small, 0.0], &(0..2)).back(bits, &(0..2));
            assert_eq!(back, [0.0, 0.0]);
        }
        let large = Row::of(bits, &[4e5, -4e5], &(0..2)).back(bits, &(0..2));
        assert!(large.iter().all(|x| x.is_finite()), "{large:?}");
        let beyond = Row::of(bits, &[1e38, -1e38], &(0..2)).back(bits, &(0..2));
        assert!(beyond.iter().all(|x| x.is_nan()), "{beyond:?}");
    }
}
