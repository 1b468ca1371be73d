//! What this machine could do at best, measured: the yardstick of the kernels' benchmarks.
//!
//! Owns the measuring. Others use the machine as well, so that each limit is what the best of many short bursts
//! reaches: all threads at once, for a millisecond or less. What bursts consist of stands in `arithmetic` and `reading`.

use std::path::Path as File;
use std::time::{Duration, Instant};

use super::Pool;
use super::isa::Isa;
use super::memory::Memory;
use crate::backend::DeviceError;
use arithmetic::{Multiply, multiply_bf16, multiply_int8};
use reading::Read;

mod arithmetic;
mod reading;

/// Bytes read for the bandwidth where the cache's size is not known.
const READ_BYTES: usize = 256 << 20;
/// No machine needs more, however large a cache it shows: other machines' programs use the same.
const READ_BYTES_MAX: usize = 1 << 30;
/// Bytes that one thread reads in one piece.
const PIECE_BYTES: usize = 1 << 20;
/// Bytes that all threads read in one burst: shorter ones find too many of them in caches.
const BURST_BYTES: usize = 64 << 20;
/// Each way of reading is tried for so long.
const READ_TIME: Duration = Duration::from_millis(120);
/// Each kind of arithmetic is tried for so long.
const ARITHMETIC_TIME: Duration = Duration::from_millis(120);
/// Rounds of arithmetic in a burst of one thread.
const ROUNDS: usize = 50_000;

/// The limits of a pool's threads together.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The peaks, of the instructions that the path's kernels multiply with.
    pub arithmetic: Arithmetic,
    /// Billions of bytes per second read from memory.
    pub read_gb_per_s: f64,
}

/// Billions of additions and multiplications per second, two per fused one.
#[derive(Debug, Clone, Copy)]
pub struct Arithmetic {
    /// Of f32.
    pub f32: f64,
    /// Of bf16 weights: of f32 where they are widened, else of bf16 summed in f32.
    pub bf16: f64,
    /// Of int8, summed in int32.
    pub int8: f64,
}

impl Limits {
    /// Measures for most of a second, with 256 MiB of memory or more where caches are large. Threads that are not pinned
    /// may share a core for all that time and then show half of what there is.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn measure(isa: Isa, pool: &Pool) -> Result<Limits, DeviceError> {
        Ok(Limits {
            arithmetic: arithmetic(isa, pool),
            read_gb_per_s: read_gb_per_s(isa, pool)?,
        })
    }
}

/// The arithmetic alone.
#[must_use]
pub fn arithmetic(isa: Isa, pool: &Pool) -> Arithmetic {
    Arithmetic {
        f32: arithmetic_rate(pool, &|| isa.run(Multiply { rounds: ROUNDS })),
        bf16: arithmetic_rate(pool, &|| multiply_bf16(isa, ROUNDS)),
        int8: arithmetic_rate(pool, &|| multiply_int8(isa, ROUNDS)),
    }
}

/// Bytes of the last cache before memory, as the system tells; it may be shared with others.
#[must_use]
pub fn cache_bytes() -> Option<usize> {
    let caches = File::new("/sys/devices/system/cpu/cpu0/cache");
    let text = |index: usize, name: &str| {
        std::fs::read_to_string(caches.join(format!("index{index}")).join(name)).ok()
    };
    let levels = (0..).map_while(|index| Some((index, text(index, "level")?)));
    let (last, _) = levels.max_by_key(|(_, level)| level.trim().parse::<u32>().unwrap_or(0))?;
    parse_bytes(&text(last, "size")?)
}

/// `32768K` in bytes.
fn parse_bytes(text: &str) -> Option<usize> {
    let text = text.trim();
    let (digits, shift) = match text.strip_suffix('K') {
        Some(digits) => (digits, 10),
        None => match text.strip_suffix('M') {
            Some(digits) => (digits, 20),
            None => (text, 0),
        },
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// Billions of operations per second of all threads in the best burst; `burst` gives how many it did.
fn arithmetic_rate(pool: &Pool, burst: &(dyn Fn() -> usize + Sync)) -> f64 {
    let threads = pool.threads();
    let operations = (burst() * threads) as f64;
    let began = Instant::now();
    let mut best = f64::MAX;
    while began.elapsed() < ARITHMETIC_TIME {
        best = best.min(seconds(|| {
            pool.run(threads, &|_, _| {
                burst();
            });
        }));
    }
    operations / best / 1e9
}

/// As [`Limits::read_gb_per_s`]: the best burst of the best way to read.
fn read_gb_per_s(isa: Isa, pool: &Pool) -> Result<f64, DeviceError> {
    let bytes = cache_bytes().map_or(READ_BYTES, |cache| {
        (4 * cache).clamp(READ_BYTES, READ_BYTES_MAX)
    });
    let mut memory = Memory::<f32>::new(bytes / size_of::<f32>())?;
    memory.as_mut().fill(1.0);
    let pieces: Vec<&[f32]> = memory.as_ref().chunks_exact(PIECE_BYTES / 4).collect();
    let mut best = f64::MAX;
    for way in Read::WAYS {
        let began = Instant::now();
        for pieces in pieces.chunks_exact(BURST_BYTES / PIECE_BYTES).cycle() {
            best = best.min(seconds(|| {
                pool.run(pieces.len(), &|item, _| {
                    std::hint::black_box(isa.run(way(pieces[item])));
                });
            }));
            if began.elapsed() > READ_TIME {
                break;
            }
        }
    }
    Ok(BURST_BYTES as f64 / best / 1e9)
}

fn seconds(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_limits_and_memory_is_slower_than_arithmetic() {
        let pool = Pool::new(1, &[]).unwrap();
        let limits = Limits::measure(Isa::detect(), &pool).unwrap();
        assert!(limits.read_gb_per_s > 0.1, "{limits:?}");
        for isa in super::super::Path::ALL.into_iter().filter_map(Isa::new) {
            let found = arithmetic(isa, &pool);
            assert!(
                found.f32 > 0.1 && found.bf16 > 0.1 && found.int8 > 0.1,
                "{isa:?}: {found:?}"
            );
        }
    }

    #[test]
    fn sizes_of_caches_are_read_with_their_units() {
        let read = ["32768K\n", "260M", "512", "", "many K"].map(parse_bytes);
        assert_eq!(
            read,
            [Some(32 << 20), Some(260 << 20), Some(512), None, None]
        );
    }
}
