//! One key or value as int8: the rule that every backend with such a cache keeps.

/// Quantises a vector: `scale = max |x| / 127`, `q = x * (1 / scale)` rounded to nearest, ties to even. Gives the scale; a vector
/// of zeros has the scale 0, one with a number that is not finite a scale that is not.
#[inline(always)]
pub(super) fn quantise_kv<'a>(vector: &[f32], q: impl IntoIterator<Item = &'a mut i8>) -> f32 {
    let largest = vector.iter().fold(0.0f32, |largest, x| {
        // NaN stays, whatever comes after it.
        if largest >= x.abs() || largest.is_nan() {
            largest
        } else {
            x.abs()
        }
    });
    let scale = largest / 127.0;
    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (q, x) in q.into_iter().zip(vector) {
        *q = (x * factor).round_ties_even() as i8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantised(vector: &[f32]) -> (Vec<i8>, f32) {
        let mut q = vec![0; vector.len()];
        let scale = quantise_kv(vector, &mut q);
        (q, scale)
    }

    #[test]
    fn the_largest_number_is_127_and_ties_go_to_even() {
        let (q, scale) = quantised(&[127.0, -127.0, 0.5, 1.5, -2.5, 3.4, 0.0]);
        assert_eq!((&q[..], scale), (&[127, -127, 0, 2, -2, 3, 0][..], 1.0));
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_shows_in_the_scale() {
        assert_eq!(quantised(&[0.0, -0.0]), (vec![0, 0], 0.0));
        assert!(quantised(&[1.0, f32::NAN, 2.0]).1.is_nan());
        assert!(quantised(&[1.0, f32::INFINITY]).1.is_infinite());
    }
}
