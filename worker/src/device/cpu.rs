//! The host's cores as a device.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result};
use common::config::DeviceEntry;
use common::request::{Failure, FailureKind};
use common::wire::message::{Quantization, ShardOptions};
use engine::backend::DeviceError;
use engine::backend::cpu::{CpuBackend, Isa, Pool};
use engine::collective::host::HostGroup;
use engine::rates;

use super::{Compute, Found};
use crate::platform::Platform;

/// Share of the machine's available memory that shards may use when cluster.toml does not say: the rest is for the
/// processes themselves and the page cache under mapped weights.
const MEMORY_SHARE_PERCENT: u64 = 80;

/// Compute threads on the host's cores.
pub struct Cores {
    pool: Arc<Pool>,
}

pub(super) fn open(entry: &DeviceEntry) -> Result<Found> {
    let cores: Vec<usize> = entry.cores.iter().map(|&core| core as usize).collect();
    let everything = if cores.is_empty() {
        cores_of_machine()
    } else {
        cores.len()
    };
    let threads = entry.threads.map_or(everything, |threads| threads as usize);
    let pool = Pool::new(threads, &cores).context("cannot start the compute threads")?;
    let memory_bytes = match entry.memory_bytes {
        Some(bytes) => bytes,
        None => {
            available_memory()
                .context("cannot read the machine's memory; set memory of the device")?
                * MEMORY_SHARE_PERCENT
                / 100
        }
    };
    let mut backend = CpuBackend::new(pool.clone()).context("cannot compute")?;
    Ok(Found {
        name: format!("{} ({})", processor_name(), Isa::detect().path().name()),
        threads: pool.threads() as u32,
        memory_bytes,
        rates: rates::measure(&mut backend).context("cannot measure the device")?,
        compute: Compute::Cpu(Cores { pool }),
    })
}

impl Platform for Cores {
    type Backend = CpuBackend;
    type Group = HostGroup;

    fn check(&self, options: &ShardOptions) -> Result<(), Failure> {
        if options.quantization == Quantization::None {
            return Ok(());
        }
        let message = format!(
            "quantization {} is for GPUs, and this device is a CPU: choose a workload type of GPUs, or \"none\"",
            options.quantization.name()
        );
        Err(Failure::new(FailureKind::BadRequest, message))
    }

    fn backend(&self) -> Result<CpuBackend, DeviceError> {
        CpuBackend::new(self.pool.clone())
    }

    fn join(&self, ranks: HostGroup, _: &mut CpuBackend) -> Result<HostGroup, Failure> {
        Ok(ranks)
    }
}

/// Cores this process may run on.
pub fn cores_of_machine() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes that programs can take without swapping.
pub fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

/// The processor's product name.
pub fn processor_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| "cpu".to_owned(), |(_, name)| name.trim().to_owned())
}
