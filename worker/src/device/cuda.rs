//! A GPU as a device: one process owns it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use common::config::DeviceEntry;
use common::request::{Failure, FailureKind};
use common::wire::message::{KvDtype, ShardOptions};
use engine::backend::cuda::{CudaBackend, CudaDevice, CudaOptions};
use engine::backend::{Backend, DeviceError};
use engine::collective::host::HostGroup;
use engine::collective::nccl::NcclGroup;
use engine::collective::{Collective, CollectiveError};
use engine::rates::{self, Rates};
use nccl_rs::Library;

use super::{Compute, Found};
use crate::memory::show;
use crate::platform::Platform;

/// What shards may not use of the free memory when cluster.toml does not say: NCCL's buffers, recorded steps, and what the
/// driver itself takes as kernels run.
const RESERVE_BYTES: u64 = 1 << 30;
/// The devices of a group meet within this time or not at all: their processes have met already.
const JOIN_MAX: Duration = Duration::from_secs(60);

/// A GPU with its kernels loaded.
pub struct Gpu {
    device: Arc<CudaDevice>,
    options: CudaOptions,
}

pub(super) fn open(entry: &DeviceEntry) -> Result<Found> {
    let what = format!("device {} is cuda:{}", entry.worker, entry.ordinal);
    let device = CudaDevice::open(entry.ordinal).with_context(|| what.clone())?;
    let (free, _) = device.memory().with_context(|| what.clone())?;
    let memory_bytes = match entry.memory_bytes {
        Some(bytes) => {
            if bytes > free {
                tracing::warn!(
                    memory = show(bytes),
                    free = show(free),
                    "cluster.toml gives the device more memory than is free: large models will not load"
                );
            }
            bytes
        }
        None => free.saturating_sub(RESERVE_BYTES),
    };
    let rates = measure(&device).context(what)?;
    let facts = device.facts();
    let (major, minor) = facts.compute_capability;
    Ok(Found {
        name: format!("{} (sm_{major}{minor}, {})", facts.name, facts.pci),
        threads: 0,
        memory_bytes,
        rates,
        compute: Compute::Cuda(Gpu {
            options: CudaOptions {
                graphs: entry.cuda.graphs,
                batch_invariant: entry.cuda.batch_invariant,
            },
            device,
        }),
    })
}

/// How fast the products are that most steps consist of: those of cuBLAS, also where they are not used.
fn measure(device: &Arc<CudaDevice>) -> Result<Rates> {
    let options = CudaOptions {
        graphs: false,
        batch_invariant: false,
    };
    let mut backend = CudaBackend::new(device.clone(), options)?;
    rates::measure(&mut backend).context("cannot measure the device")
}

impl Gpu {
    /// Whether the device still answers. One that has failed does so until its process is over: what failed once makes all
    /// of it unusable.
    ///
    /// # Errors
    /// What the driver says.
    pub fn check_alive(&self) -> Result<(), DeviceError> {
        self.device.memory().map(drop).map_err(DeviceError::from)
    }

    /// Ranks that compute differently, or fill steps up differently, would add numbers that do not belong together.
    fn agree(&self, ranks: &mut HostGroup, backend: &CudaBackend) -> Result<(), Failure> {
        let own = format!("{}, graphs = {}", backend.numerics(), self.options.graphs);
        let plans: &mut dyn Collective<Vec<f32>> = ranks;
        let lost =
            |error: CollectiveError| Failure::new(FailureKind::Unavailable, error.to_string());
        if plans.rank() == 0 {
            return plans.send_plan(own.as_bytes()).map_err(lost);
        }
        let mut leader = Vec::new();
        plans.recv_plan(&mut leader).map_err(lost)?;
        if leader == own.as_bytes() {
            return Ok(());
        }
        let message = format!(
            "the GPUs of the shard group compute differently: rank 0 with {}, rank {} with {own}; give them the same \
             switches in cluster.toml (graphs, batch_invariant) and the same cuBLAS",
            String::from_utf8_lossy(&leader),
            plans.rank()
        );
        Err(Failure::new(FailureKind::BadRequest, message))
    }
}

impl Platform for Gpu {
    type Backend = CudaBackend;
    type Group = NcclGroup;

    fn check(&self, options: &ShardOptions) -> Result<(), Failure> {
        if options.kv_dtype == KvDtype::Bf16 {
            return Ok(());
        }
        let message =
            "kv_dtype = \"f32\" is for CPUs, and this device is a GPU: leave kv_dtype out";
        Err(Failure::new(FailureKind::BadRequest, message))
    }

    fn backend(&self) -> Result<CudaBackend, DeviceError> {
        CudaBackend::new(self.device.clone(), self.options)
    }

    fn join(&self, mut ranks: HostGroup, backend: &mut CudaBackend) -> Result<NcclGroup, Failure> {
        self.agree(&mut ranks, backend)?;
        // Looked for at each group, so that installing it needs no restart of what serves.
        let library = Library::load().map_err(|e| {
            Failure::new(
                FailureKind::BadRequest,
                format!("a shard group of GPUs needs NCCL: {e}"),
            )
        })?;
        NcclGroup::form(ranks, backend, &library, JOIN_MAX).map_err(|e| {
            let message = format!("the GPUs of the shard group did not meet: {e}");
            Failure::new(FailureKind::Unavailable, message)
        })
    }
}
