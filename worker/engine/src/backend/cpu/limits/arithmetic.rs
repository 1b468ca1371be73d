//! Arithmetic as fast as a thread can: many chains of multiplications and additions, each waiting for itself alone.

use super::super::isa::{Isa, Kernel, Path};
use super::super::simd::{LANES, Simd};

/// Independent chains of fused multiply-adds. Gives how many operations they were.
pub(super) struct Multiply {
    pub(super) rounds: usize,
}

impl Kernel for Multiply {
    type Output = usize;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> usize {
        #[inline(always)]
        unsafe fn chains<S: Simd, const CHAINS: usize>(rounds: usize) -> usize {
            // SAFETY: the features are the caller's promise.
            unsafe {
                let (a, b) = (
                    S::splat(std::hint::black_box(0.999)),
                    S::splat(std::hint::black_box(1e-3)),
                );
                let mut sums = [S::splat(1.0); CHAINS];
                for _ in 0..rounds {
                    for sum in &mut sums {
                        *sum = S::fma(*sum, a, b);
                    }
                }
                for sum in sums {
                    std::hint::black_box(S::sum(sum));
                }
            }
            rounds * CHAINS * LANES * 2
        }
        // SAFETY: as above.
        unsafe {
            match S::ROWS {
                12 => chains::<S, 12>(self.rounds),
                6 => chains::<S, 6>(self.rounds),
                _ => chains::<S, 2>(self.rounds),
            }
        }
    }
}

/// Independent chains of bf16 products summed in f32, as the path's kernels multiply bf16 weights. Gives how many operations
/// they were.
pub(super) fn multiply_bf16(isa: Isa, rounds: usize) -> usize {
    match isa.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the path's features.
        Path::Avx512Bf16 => unsafe { x86::bf16(rounds) },
        // Weights are widened, which takes instructions of other kinds.
        _ => isa.run(Multiply { rounds }),
    }
}

/// Independent chains of int8 products summed in int32, by the shortest sequence of the path's instructions. Gives how many
/// operations they were.
pub(super) fn multiply_int8(isa: Isa, rounds: usize) -> usize {
    match isa.path() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the path's features.
        Path::Avx512Bf16 | Path::Avx512Vnni => unsafe { x86::vnni(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Path::Avx512 => unsafe { x86::avx512(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the path's features.
        Path::Avx2 => unsafe { x86::avx2(rounds) },
        #[cfg(not(target_arch = "x86_64"))]
        Path::Avx512Bf16 | Path::Avx512Vnni | Path::Avx512 | Path::Avx2 => portable_int8(rounds),
        Path::Portable => portable_int8(rounds),
    }
}

/// Plain loops: products of 16-bit numbers, added in pairs, are what most processors' compilers know best.
fn portable_int8(rounds: usize) -> usize {
    const CHAINS: usize = 8;
    let mut sums = [0i32; LANES];
    for _ in 0..rounds / CHAINS {
        let (a, b) = std::hint::black_box(([1i16; CHAINS * LANES * 2], [2i16; CHAINS * LANES * 2]));
        let chains = a.chunks_exact(2 * LANES).zip(b.chunks_exact(2 * LANES));
        for (a, b) in chains {
            for (sum, (a, b)) in sums
                .iter_mut()
                .zip(a.chunks_exact(2).zip(b.chunks_exact(2)))
            {
                *sum += i32::from(a[0]) * i32::from(b[0]) + i32::from(a[1]) * i32::from(b[1]);
            }
        }
    }
    std::hint::black_box(sums);
    rounds / CHAINS * CHAINS * LANES * 4
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Chains that hide every latency and still stay in registers.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub(super) fn bf16(rounds: usize) -> usize {
        let pairs = |bits: i32| {
            // SAFETY: both are 64 bytes, of which any are valid.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(bits))) }
        };
        // 0.5 and 0.25 as bf16.
        let (a, b) = (pairs(0x3f00_3f00), pairs(0x3e80_3e80));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        for sum in sums {
            black_box(_mm512_reduce_add_ps(sum));
        }
        rounds * CHAINS * 32 * 2
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) fn vnni(rounds: usize) -> usize {
        let (a, b) = (
            _mm512_set1_epi8(black_box(3)),
            _mm512_set1_epi8(black_box(-1)),
        );
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        for sum in sums {
            black_box(_mm512_reduce_add_epi32(sum));
        }
        rounds * CHAINS * 64 * 2
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn avx512(rounds: usize) -> usize {
        let (b, ones) = (
            _mm512_set1_epi8(black_box(1)),
            _mm512_set1_epi16(black_box(1)),
        );
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                // A product of the sum itself cannot be taken out of the loop.
                let pairs = _mm512_maddubs_epi16(*sum, b);
                *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(pairs, ones));
            }
        }
        for sum in sums {
            black_box(_mm512_reduce_add_epi32(sum));
        }
        rounds * CHAINS * 64 * 2
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn avx2(rounds: usize) -> usize {
        let (b, ones) = (
            _mm256_set1_epi8(black_box(1)),
            _mm256_set1_epi16(black_box(1)),
        );
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                let pairs = _mm256_maddubs_epi16(*sum, b);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        for sum in sums {
            black_box(_mm256_extract_epi32::<0>(sum));
        }
        rounds * CHAINS * 32 * 2
    }
}
