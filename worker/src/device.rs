//! The device this process owns: its threads, its memory and the port where ranks meet.
//!
//! Owns what all shards of the process share. What a shard does with it is [`crate::open`]'s part.

use std::fs;
use std::net::{TcpListener, ToSocketAddrs};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use common::config::{DeviceEntry, Node};
use common::wire::message::{Device as DeviceFacts, DeviceKind, DeviceRates};
use engine::backend::cpu::{CpuBackend, Isa, Pool};
use engine::collective::host::GroupListener;
use engine::rates;

use crate::memory::Memory;

/// Share of the machine's available memory that shards may use when cluster.toml does not say: the rest is for the
/// processes themselves and the page cache under mapped weights.
const MEMORY_SHARE_PERCENT: u64 = 80;

/// A device and what its shards share.
pub struct Device {
    /// What it is, for the coordinator.
    pub facts: DeviceFacts,
    /// Compute threads.
    pub pool: Arc<Pool>,
    /// What shards have been promised.
    pub memory: Arc<Memory>,
    /// Lets members of groups in that this process leads.
    pub groups: GroupListener,
    /// Where other ranks reach `groups`, `address:port`.
    pub group_address: String,
}

impl Device {
    /// Opens a device of cluster.toml.
    ///
    /// # Errors
    /// A kind that this build cannot run; a port that cannot be had.
    pub fn open(node: &Node, entry: &DeviceEntry) -> Result<Device> {
        if entry.kind == DeviceKind::Cuda {
            bail!(
                "device {} is cuda:{}, and this build has no CUDA backend yet; give it kind = \"cpu\"",
                entry.worker,
                entry.ordinal
            );
        }
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
        let rates = rates::measure(&mut backend).context("cannot measure the device")?;
        tracing::info!(
            bytes_per_s = rates.bytes_per_s,
            flops_per_s = rates.flops_per_s,
            "the device was measured"
        );
        let groups = listen(&node.address, entry.group_port)?;
        let group_address = format!("{}:{}", node.address, groups.address().port());
        Ok(Device {
            facts: DeviceFacts {
                kind: DeviceKind::Cpu,
                name: format!("{} ({})", processor_name(), Isa::detect().path().name()),
                memory_bytes,
                threads: pool.threads() as u32,
                rates: Some(DeviceRates {
                    bytes_per_s: rates.bytes_per_s,
                    flops_per_s: rates.flops_per_s,
                }),
            },
            pool,
            memory: Memory::new(memory_bytes),
            groups,
            group_address,
        })
    }
}

fn listen(address: &str, port: u16) -> Result<GroupListener> {
    let cannot = || {
        format!(
            "cannot listen on {address}:{port} for other ranks; check nodes.address and the device's group_port"
        )
    };
    let found: Vec<_> = (address, port)
        .to_socket_addrs()
        .with_context(cannot)?
        .collect();
    let listener = TcpListener::bind(&found[..]).with_context(cannot)?;
    GroupListener::start(listener).with_context(cannot)
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

#[cfg(test)]
mod tests {
    use common::config::CudaSwitches;
    use common::ids::WorkerId;

    use super::*;

    fn open(entry: DeviceEntry) -> Result<Device> {
        let node = Node {
            name: "local".into(),
            address: "127.0.0.1".into(),
            devices: Vec::new(),
        };
        Device::open(&node, &entry)
    }

    fn entry() -> DeviceEntry {
        DeviceEntry {
            worker: WorkerId("local/cpu0".into()),
            kind: DeviceKind::Cpu,
            ordinal: 0,
            memory_bytes: None,
            threads: Some(1),
            cores: Vec::new(),
            group_port: 0,
            cuda: CudaSwitches::default(),
        }
    }

    #[test]
    fn a_cpu_takes_most_of_the_available_memory_and_a_port_of_its_own() {
        let device = open(entry()).unwrap();
        assert!(
            device.facts.memory_bytes > 0
                && device.facts.memory_bytes < available_memory().unwrap() * 2
        );
        assert!(
            device.group_address.starts_with("127.0.0.1:") && !device.group_address.ends_with(":0")
        );
        assert_eq!(device.facts.threads, 1);
        let rates = device.facts.rates.unwrap();
        assert!(
            rates.bytes_per_s > 1 << 20 && rates.flops_per_s > 1 << 20,
            "{rates:?}"
        );
    }

    #[test]
    fn what_this_build_cannot_run_is_one_clear_line() {
        let error = open(DeviceEntry {
            kind: DeviceKind::Cuda,
            ordinal: 3,
            ..entry()
        })
        .err()
        .unwrap();
        assert!(
            error
                .to_string()
                .contains("cuda:3, and this build has no CUDA backend yet"),
            "{error}"
        );
    }

    #[test]
    fn a_taken_group_port_is_named() {
        let taken = open(entry()).unwrap();
        let port = taken.groups.address().port();
        let error = open(DeviceEntry {
            group_port: port,
            ..entry()
        })
        .err()
        .unwrap();
        assert!(
            format!("{error:#}").contains(&format!("127.0.0.1:{port} for other ranks")),
            "{error:#}"
        );
    }
}
