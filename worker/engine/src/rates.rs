//! How fast a backend does what a decoder's steps consist of: measured in a moment, when a worker starts.
//!
//! Two numbers foretell a step: one of few tokens takes as long as reading all weights, one of many as long as its
//! multiplications. Both are measured with the product that steps are made of; what the machine could do at best is
//! [`crate::backend::cpu::limits`].

use crate::backend::{Backend, DeviceError, FloatDtype, LinearShape};
use std::time::{Duration, Instant};

/// Read by one token: more than most caches hold.
const READ: LinearShape = LinearShape {
    n: 16 << 10,
    k: 2 << 10,
    dtype: FloatDtype::Bf16,
};
/// Multiplied with many tokens.
const COMPUTE: LinearShape = LinearShape {
    n: 1 << 10,
    k: 2 << 10,
    dtype: FloatDtype::Bf16,
};
/// Tokens enough that a step computes for longer than it reads.
const ROWS: usize = 64;
/// The best of so many tries counts: others use the machine as well.
const TRIES: usize = 5;
/// No further try after so long.
const TIME_MAX: Duration = Duration::from_millis(100);

/// A device's speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Bytes of weights that a step of one token reads per second.
    pub bytes_per_s: u64,
    /// Additions and multiplications per second in a step of many tokens.
    pub flops_per_s: u64,
}

/// Measures for some tenth of a second, with 64 MiB of memory.
///
/// # Errors
/// [`DeviceError`].
pub fn measure<B: Backend>(backend: &mut B) -> Result<Rates, DeviceError> {
    let read_s = seconds(backend, READ, 1)?;
    let compute_s = seconds(backend, COMPUTE, ROWS)?;
    let flops = (2 * ROWS * COMPUTE.n * COMPUTE.k) as f64;
    Ok(Rates {
        bytes_per_s: (B::linear_bytes(READ) as f64 / read_s) as u64,
        flops_per_s: (flops / compute_s) as u64,
    })
}

/// The shortest time of a product of `rows` tokens with a matrix.
fn seconds<B: Backend>(
    backend: &mut B,
    shape: LinearShape,
    rows: usize,
) -> Result<f64, DeviceError> {
    let weight = backend.pack(shape, &|_, out| out.fill(0.5), None)?;
    let mut x = backend.alloc(rows * shape.k)?;
    backend.write(&vec![0.5; rows * shape.k], &mut x);
    let mut y = backend.alloc(rows * shape.n)?;
    let mut last = vec![0.0; 1];
    let started = Instant::now();
    let mut best = f64::MAX;
    for _ in 0..TRIES {
        let start = Instant::now();
        backend.linear(rows, &x, &weight, &mut y);
        // A device that runs ahead has done the product when its result can be read.
        backend.read(&y, &mut last)?;
        best = best.min(start.elapsed().as_secs_f64());
        if started.elapsed() > TIME_MAX {
            break;
        }
    }
    Ok(best.max(f64::MIN_POSITIVE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{CpuBackend, Pool};

    #[test]
    fn a_cpu_computes_more_than_it_reads() {
        let mut backend = CpuBackend::new(Pool::new(1, &[]).unwrap()).unwrap();
        let rates = measure(&mut backend).unwrap();
        // The slowest machine that runs this at all reads 100 MB/s.
        assert!(rates.bytes_per_s > 100_000_000, "{rates:?}");
        assert!(rates.flops_per_s > rates.bytes_per_s / 4, "{rates:?}");
    }
}
