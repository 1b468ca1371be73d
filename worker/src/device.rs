//! The device this process owns: what it computes with, its memory and the port where ranks meet.
//!
//! Owns what all shards of the process share. What a shard does with it is [`crate::open`]'s part; what kinds of devices
//! differ in is [`cpu`]'s and [`cuda`]'s.

use std::net::{TcpListener, ToSocketAddrs};
use std::sync::Arc;

use anyhow::{Context, Result};
use common::config::{DeviceEntry, Node};
use common::wire::message::{Device as DeviceFacts, DeviceKind, DeviceRates};
use engine::collective::host::GroupListener;
use engine::rates::Rates;
use tokio_util::sync::CancellationToken;

use crate::memory::Memory;

pub mod cores;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

/// A device and what its shards share.
pub struct Device {
    /// What it is, for the coordinator.
    pub facts: DeviceFacts,
    /// What shards compute with.
    pub compute: Compute,
    /// What shards have been promised, and what was kept of those that are over.
    pub memory: Arc<Memory>,
    /// Lets members of groups in that this process leads.
    pub groups: GroupListener,
    /// Where other ranks reach `groups`, `address:port`.
    pub group_address: String,
    /// Cancelled when the device has failed for good.
    pub lost: CancellationToken,
}

/// What shards compute with.
pub enum Compute {
    /// The host's cores.
    Cpu(cpu::Cores),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Gpu),
}

/// A device as it was found.
struct Found {
    compute: Compute,
    name: String,
    threads: u32,
    memory_bytes: u64,
    rates: Rates,
}

impl Device {
    /// Opens a device of cluster.toml.
    ///
    /// # Errors
    /// A device that is not there, or that this build cannot run; a port that cannot be had. One line that says what would
    /// help.
    pub fn open(node: &Node, entry: &DeviceEntry) -> Result<Device> {
        let found = match entry.kind {
            DeviceKind::Cpu => cpu::open(node, entry)?,
            DeviceKind::Cuda => open_cuda(entry)?,
        };
        tracing::info!(
            name = found.name,
            memory_bytes = found.memory_bytes,
            bytes_per_s = found.rates.bytes_per_s,
            flops_per_s = found.rates.flops_per_s,
            "the device was measured"
        );
        let groups = listen(&node.address, entry.group_port)?;
        let group_address = format!("{}:{}", node.address, groups.address().port());
        Ok(Device {
            facts: DeviceFacts {
                kind: entry.kind,
                name: found.name,
                memory_bytes: found.memory_bytes,
                threads: found.threads,
                rates: Some(DeviceRates {
                    bytes_per_s: found.rates.bytes_per_s,
                    flops_per_s: found.rates.flops_per_s,
                }),
            },
            compute: found.compute,
            memory: Memory::new(found.memory_bytes),
            groups,
            group_address,
            lost: CancellationToken::new(),
        })
    }

    /// Keeps the calling thread, and those that it starts from now on, out of the way of those that compute.
    pub fn keep_off(&self) {
        match &self.compute {
            Compute::Cpu(cores) => cores.keep_off(),
            #[cfg(feature = "cuda")]
            Compute::Cuda(_) => {}
        }
    }

    /// Asks the device whether it still answers, after something on it has failed. A GPU that has failed once does so until
    /// its process is over.
    pub fn check_alive(&self) {
        #[cfg(feature = "cuda")]
        if let Compute::Cuda(gpu) = &self.compute
            && let Err(error) = gpu.check_alive()
        {
            tracing::error!(%error, "the device is lost: this process ends");
            self.lost.cancel();
        }
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(entry: &DeviceEntry) -> Result<Found> {
    cuda::open(entry)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(entry: &DeviceEntry) -> Result<Found> {
    anyhow::bail!(
        "device {} is cuda:{}, and this worker was built without CUDA: build it with the feature \"cuda\" (on by default), \
         or give the device kind = \"cpu\"",
        entry.worker,
        entry.ordinal
    )
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
                && device.facts.memory_bytes < cpu::available_memory().unwrap() * 2
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

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn what_this_build_cannot_run_is_one_clear_line() {
        let gpu = DeviceEntry {
            kind: DeviceKind::Cuda,
            ordinal: 3,
            ..entry()
        };
        let error = format!("{:#}", open(gpu).err().unwrap());
        assert!(
            error.contains("cuda:3, and this worker was built without CUDA"),
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
