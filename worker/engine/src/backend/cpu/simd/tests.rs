//! The functions made of vector operations, on every path of this processor.

use super::super::isa::{Isa, Kernel, Path};
use super::super::tests::numbers;
use super::*;

/// Applies exp or erf to 16 numbers.
struct Apply {
    x: [f32; LANES],
    erf: bool,
}

impl Kernel for Apply {
    type Output = [f32; LANES];

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: the arrays have 16 numbers; the features are the caller's promise.
        unsafe {
            let x = S::load(self.x.as_ptr());
            S::store(
                out.as_mut_ptr(),
                if self.erf { S::erf(x) } else { S::exp(x) },
            );
        }
        out
    }
}

fn apply(isa: Isa, erf: bool, xs: &[f32]) -> Vec<f32> {
    xs.chunks(LANES)
        .flat_map(|chunk| {
            let x = std::array::from_fn(|i| chunk[i.min(chunk.len() - 1)]);
            isa.run(Apply { x, erf })[..chunk.len()].to_vec()
        })
        .collect()
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let xs: Vec<f32> = (-86_900..=88_600).map(|i| i as f32 * 1e-3 + 1e-4).collect();
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        for (x, y) in xs.iter().zip(apply(isa, false, &xs)) {
            let expected = f64::from(*x).exp();
            assert!(
                (f64::from(y) / expected - 1.0).abs() < 2.5e-7,
                "{isa:?}: exp({x}) = {y}, expected {expected}"
            );
        }
        assert_eq!(apply(isa, false, &[0.0]), [1.0]);
        assert_eq!(
            apply(isa, false, &[-88.0, -1e30, f32::NEG_INFINITY]),
            [0.0; 3]
        );
    }
}

#[test]
fn erf_is_within_three_in_ten_million() {
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        let step = 1e-2f64;
        let xs: Vec<f32> = (0..=400).map(|i| (f64::from(i) * step) as f32).collect();
        let (positive, negative) = (
            apply(isa, true, &xs),
            apply(isa, true, &xs.iter().map(|x| -x).collect::<Vec<_>>()),
        );
        // The integral of 2 / sqrt(pi) * exp(-t^2), by Simpson's rule.
        let slope = |t: f64| std::f64::consts::FRAC_2_SQRT_PI * (-t * t).exp();
        let mut expected = 0.0;
        for (i, (y, z)) in positive.into_iter().zip(negative).enumerate() {
            assert!(
                (f64::from(y) - expected).abs() < 3e-7,
                "{isa:?}: erf({}) = {y}, expected {expected}",
                xs[i]
            );
            assert_eq!(z, -y);
            let t = i as f64 * step;
            expected += step / 6.0 * (slope(t) + 4.0 * slope(t + step / 2.0) + slope(t + step));
        }
    }
}

#[test]
fn nan_stays_nan() {
    for isa in Path::ALL.into_iter().filter_map(Isa::new) {
        assert!(apply(isa, true, &[f32::NAN])[0].is_nan(), "{isa:?}");
        assert!(apply(isa, false, &[f32::NAN])[0].is_nan(), "{isa:?}");
    }
}

/// A product of pairs: 32 numbers rounded, 32 bf16 as their bits, and sums.
#[derive(Clone)]
struct DotPairs {
    x: [f32; 2 * LANES],
    w: [f32; LANES],
    sums: [f32; LANES],
}

impl Kernel for DotPairs {
    type Output = [u32; LANES];

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> [u32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: the arrays have as many numbers as are read and written; the features are the caller's promise.
        unsafe {
            let second = self.x.as_ptr().wrapping_add(LANES);
            let x = S::round_pairs(S::load(self.x.as_ptr()), S::load(second));
            let sums = S::load(self.sums.as_ptr());
            S::store(
                out.as_mut_ptr(),
                S::dot_pairs(sums, S::load(self.w.as_ptr()), x),
            );
        }
        out.map(f32::to_bits)
    }
}

#[test]
fn the_processors_products_of_pairs_equal_their_plain_twin_to_the_bit() {
    let (Some(isa), Some(plain)) = (Isa::new(Path::Avx512Bf16), Isa::new(Path::Portable)) else {
        return;
    };
    let mut state = 1_u32;
    let mut bits = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state ^ state >> 15
    };
    // Numbers of every exponent that neither overflows nor is none, and those around 1.
    let mut number = |wide: bool| {
        let exponent = if wide {
            bits() % 0xbe
        } else {
            0x78 + bits() % 0xf
        };
        f32::from_bits(bits() & 0x807f_ffff | exponent << 23)
    };
    for round in 0..20_000 {
        let wide = round % 2 == 0;
        let dot = DotPairs {
            x: std::array::from_fn(|_| number(wide)),
            w: std::array::from_fn(|_| {
                let [low, high] = [number(wide), number(wide)].map(|x| x.to_bits() >> 16);
                f32::from_bits(high << 16 | low)
            }),
            sums: std::array::from_fn(|_| number(wide)),
        };
        assert_eq!(isa.run_pairs(dot.clone()), plain.run(dot), "round {round}");
    }
}

/// The sum and the largest of 16 numbers.
struct Fold([f32; LANES]);

impl Kernel for Fold {
    type Output = (f32, f32);

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> (f32, f32) {
        // SAFETY: the array has 16 numbers; the features are the caller's promise.
        unsafe {
            let x = S::load(self.0.as_ptr());
            (S::sum(x), S::largest(x))
        }
    }
}

#[test]
fn lanes_are_added_up_halves_upon_halves_on_every_path() {
    for seed in 0..200 {
        let mut x = [0.0; LANES];
        x.copy_from_slice(&numbers(LANES, seed));
        let mut halves = x;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                halves[i] += halves[i + half];
            }
        }
        let expected = (halves[0], x.into_iter().fold(f32::MIN, f32::max));
        for isa in Path::ALL.into_iter().filter_map(Isa::new) {
            assert_eq!(isa.run(Fold(x)), expected, "{isa:?} {x:?}");
        }
    }
}
