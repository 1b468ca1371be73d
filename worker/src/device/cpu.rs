//! The host's cores as a device.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result};
use common::config::{DeviceEntry, Node};
use common::request::Failure;
use common::wire::message::{DeviceKind, ShardOptions};
use engine::backend::DeviceError;
use engine::backend::cpu::{CpuBackend, Isa, Pool, bind_thread};
use engine::collective::host::HostGroup;
use engine::rates;

use super::cores::{Allowed, Wish, split};
use super::{Compute, Found};
use crate::platform::Platform;

/// Share of the machine's available memory that shards may use when cluster.toml does not say: the rest is for the
/// processes themselves and the page cache under mapped weights.
const MEMORY_SHARE_PERCENT: u64 = 80;

/// Compute threads on the host's cores.
pub struct Cores {
    pool: Arc<Pool>,
    /// Where all other threads run; none where they may run anywhere.
    others: Vec<usize>,
}

impl Cores {
    /// Keeps the calling thread, and those that it starts from now on, off the cores that compute, where others are left.
    pub fn keep_off(&self) {
        if self.others.is_empty() {
            return;
        }
        if let Err(error) = bind_thread(&self.others) {
            tracing::warn!(cores = ?self.others, %error, "threads could not be kept off the compute threads' cores");
        }
    }
}

pub(super) fn open(node: &Node, entry: &DeviceEntry) -> Result<Found> {
    let allowed = Allowed::read();
    let (wishes, own) = wishes(node, entry);
    let split = split(&allowed, &wishes, own);
    tracing::info!(%split, allowed = allowed.cores.len(), quota = allowed.quota, "cores are split");
    if split.threads > allowed.quota {
        tracing::warn!(
            threads = split.threads,
            quota = allowed.quota,
            "more compute threads than this process may run at a time: steps will be slow; lower threads of the device"
        );
    }
    let pool =
        Pool::new(split.threads, &split.compute).context("cannot start the compute threads")?;
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
        compute: Compute::Cpu(Cores {
            pool,
            others: split.others,
        }),
    })
}

/// What the CPU devices of the node wish, and which of them this one is.
fn wishes(node: &Node, entry: &DeviceEntry) -> (Vec<Wish>, usize) {
    let wish = |device: &DeviceEntry| Wish {
        threads: device.threads.map(|threads| threads as usize),
        cores: device.cores.iter().map(|&core| core as usize).collect(),
    };
    let others = node
        .devices
        .iter()
        .filter(|device| device.kind == DeviceKind::Cpu && device.worker != entry.worker);
    let before = node
        .devices
        .iter()
        .take_while(|device| device.worker != entry.worker)
        .filter(|device| device.kind == DeviceKind::Cpu)
        .count();
    let mut wishes: Vec<Wish> = others.map(wish).collect();
    let own = before.min(wishes.len());
    wishes.insert(own, wish(entry));
    (wishes, own)
}

impl Platform for Cores {
    type Backend = CpuBackend;
    type Group = HostGroup;

    /// A CPU has products and attention for all there is.
    fn check(&self, _: &ShardOptions) -> Result<(), Failure> {
        Ok(())
    }

    fn backend(&self) -> Result<CpuBackend, DeviceError> {
        CpuBackend::new(self.pool.clone())
    }

    fn join(&self, ranks: HostGroup, _: &mut CpuBackend) -> Result<HostGroup, Failure> {
        Ok(ranks)
    }
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
