//! What this machine could do at best, measured: the yardstick of the kernels' benchmarks.

use std::time::Instant;

use super::Pool;
use super::isa::{Isa, Kernel};
use super::memory::Memory;
use super::simd::{LANES, Simd};
use crate::backend::DeviceError;

/// Bytes read for the bandwidth: far more than caches hold.
const READ_BYTES: usize = 256 << 20;
/// Each limit is the best of so many tries.
const TRIES: usize = 25;

/// The limits of a pool's threads together.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Billions of f32 additions and multiplications per second, two per fused one.
    pub gflops: f64,
    /// Billions of bytes per second read from memory.
    pub read_gb_per_s: f64,
}

impl Limits {
    /// Measures for about a second.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn measure(isa: Isa, pool: &Pool) -> Result<Limits, DeviceError> {
        const ROUNDS: usize = 2_000_000;
        let threads = pool.threads();
        let mut flops = 0;
        let compute = best(|| {
            let counts = std::sync::Mutex::new(0);
            pool.run(threads, &|_, _| {
                let count = isa.run(Multiply { rounds: ROUNDS });
                *counts
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner) += count;
            });
            flops = counts
                .into_inner()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        });
        let mut memory = Memory::<f32>::new(READ_BYTES / size_of::<f32>())?;
        memory.as_mut().fill(1.0);
        let part = 1 << 18;
        let parts: Vec<&[f32]> = memory.as_ref().chunks(part).collect();
        let read = best(|| {
            pool.run(parts.len(), &|item, _| {
                std::hint::black_box(isa.run(Read {
                    values: parts[item],
                }));
            });
        });
        Ok(Limits {
            gflops: flops as f64 / compute / 1e9,
            read_gb_per_s: READ_BYTES as f64 / read / 1e9,
        })
    }
}

/// The shortest time in seconds of some tries.
fn best(mut body: impl FnMut()) -> f64 {
    (0..TRIES)
        .map(|_| {
            let start = Instant::now();
            body();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::MAX, f64::min)
}

/// Independent chains of fused multiply-adds. Gives how many operations they were.
struct Multiply {
    rounds: usize,
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

/// Reads all values.
struct Read<'a> {
    values: &'a [f32],
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: loads stay inside their chunk; the features are the caller's promise.
        unsafe {
            let mut sums = [S::zero(); 4];
            for block in self.values.chunks_exact(4 * LANES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add(*sum, S::load(block.as_ptr().add(i * LANES)));
                }
            }
            S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
        }
    }
}
