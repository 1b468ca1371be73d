//! A GPU as a device: one process owns it.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use common::config::DeviceEntry;
use common::request::{Failure, FailureKind};
use common::wire::message::{KvDtype, ShardOptions};
use engine::backend::cuda::{CudaBackend, CudaDevice, CudaOptions};
use engine::backend::{Backend, DeviceError};
use engine::collective::host::HostGroup;
use engine::collective::nccl::NcclGroup;
use engine::rates::{self, Rates};
use nccl_rs::Library;
use serde::{Deserialize, Serialize};

use super::{Compute, Found};
use crate::memory::show;
use crate::platform::Platform;

/// What shards may not use of the free memory when cluster.toml does not say: NCCL's buffers, recorded steps, and what the
/// driver itself takes as kernels run.
const RESERVE_BYTES: u64 = 1 << 30;
/// The devices of a group meet within this time or not at all: their processes have met already.
const JOIN_MAX: Duration = Duration::from_secs(60);
/// The other ranks are told so much of why a library cannot be had.
const REASON_CHARS_MAX: usize = 512;

/// The memory of a process that has just died comes back within moments: what is free is read so often, and so many times
/// at most.
const SETTLE_PAUSE: Duration = Duration::from_millis(200);
const SETTLE_READINGS: u32 = 50;

/// A GPU with its kernels loaded.
pub struct Gpu {
    device: Arc<CudaDevice>,
    options: CudaOptions,
}

pub(super) fn open(entry: &DeviceEntry) -> Result<Found> {
    let what = format!("device {} is cuda:{}", entry.worker, entry.ordinal);
    let device = CudaDevice::open(entry.ordinal).with_context(|| what.clone())?;
    let memory_bytes = match entry.memory_bytes {
        Some(bytes) => {
            let (free, _) = device.memory().with_context(|| what.clone())?;
            if bytes > free {
                tracing::warn!(
                    memory = show(bytes),
                    free = show(free),
                    "cluster.toml gives the device more memory than is free: large models will not load"
                );
            }
            bytes
        }
        None => {
            let (free, total) =
                settled(|| device.memory(), SETTLE_PAUSE).with_context(|| what.clone())?;
            if is_crowded(free, total) {
                tracing::warn!(
                    free = show(free),
                    total = show(total),
                    "others hold memory of the device: shards get what is free now"
                );
            }
            free.saturating_sub(RESERVE_BYTES)
        }
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

/// What is free of how much, once that stands still: an earlier process may be giving its memory back.
fn settled<E>(
    mut memory: impl FnMut() -> Result<(u64, u64), E>,
    pause: Duration,
) -> Result<(u64, u64), E> {
    let mut last = memory()?;
    for _ in 0..SETTLE_READINGS {
        if !is_crowded(last.0, last.1) {
            break;
        }
        thread::sleep(pause);
        let before = std::mem::replace(&mut last, memory()?);
        if before == last {
            break;
        }
    }
    Ok(last)
}

/// Whether somebody else seems to hold memory of the device: less than nine tenths are free.
fn is_crowded(free: u64, total: u64) -> bool {
    free < total / 10 * 9
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

    /// Ranks that compute differently, or fill steps up differently, would add numbers that do not belong together. Each
    /// rank hears of all the others, so that all refuse with the same words. Gives the library that joins them.
    fn agree(&self, ranks: &mut HostGroup, backend: &CudaBackend) -> Result<Arc<Library>, Failure> {
        // Looked for at each group, so that installing it needs no restart of what serves.
        let library = Library::load().map_err(|e| e.to_string());
        let (major, minor) = self.device.facts().compute_capability;
        let own = Traits {
            kind: format!("sm_{major}{minor}"),
            numerics: backend.numerics(),
            graphs: self.options.graphs,
            nccl: match &library {
                Ok(library) => Ok(library.version().to_string()),
                Err(why) => Err(why.chars().take(REASON_CHARS_MAX).collect()),
            },
        };
        let broken = |e: serde_json::Error| Failure::new(FailureKind::Internal, e.to_string());
        let own = serde_json::to_vec(&own).map_err(broken)?;
        let words = ranks
            .exchange(&own, JOIN_MAX)
            .map_err(|e| Failure::new(FailureKind::Unavailable, e.to_string()))?;
        let all: Vec<Traits> = words
            .iter()
            .map(|word| serde_json::from_slice(word))
            .collect::<Result<_, _>>()
            .map_err(broken)?;
        let refused = |message| Failure::new(FailureKind::BadRequest, message);
        match disagreement(&all) {
            Some(message) => Err(refused(message)),
            None => library.map_err(refused),
        }
    }
}

/// What the ranks of a group must have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Traits {
    /// The kind of GPU, such as `sm_80`.
    kind: String,
    /// What decides the bits of a product.
    numerics: String,
    graphs: bool,
    /// The version of NCCL, or why there is none.
    nccl: Result<String, String>,
}

impl fmt::Display for Traits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nccl = self.nccl.as_deref().unwrap_or("missing");
        let Traits {
            numerics, graphs, ..
        } = self;
        write!(f, "{numerics}, graphs = {graphs}, NCCL {nccl}")
    }
}

/// Why ranks with these traits, in rank order, form no group.
fn disagreement(all: &[Traits]) -> Option<String> {
    let without = (0..)
        .zip(all)
        .find_map(|(rank, traits): (u32, _)| Some((rank, traits.nccl.as_ref().err()?)));
    if let Some((rank, why)) = without {
        return Some(format!(
            "a shard group of GPUs needs NCCL, and rank {rank} has none: {why}"
        ));
    }
    let first = all.first()?;
    let (rank, other) = (0..)
        .zip(all)
        .find(|(_, traits): &(u32, _)| *traits != first)?;
    let help = if first.kind == other.kind {
        "give them the same switches in cluster.toml (graphs, batch_invariant), the same cuBLAS and the same NCCL"
    } else {
        "a group needs the same kind of GPU on all ranks"
    };
    Some(format!(
        "the GPUs of the shard group compute differently: rank 0 with {first}, rank {rank} with {other}; {help}"
    ))
}

impl Platform for Gpu {
    type Backend = CudaBackend;
    type Group = NcclGroup;

    fn check(&self, options: &ShardOptions) -> Result<(), Failure> {
        if options.kv_dtype == KvDtype::Bf16 {
            return Ok(());
        }
        let message = format!(
            "kv_dtype = \"{}\" is for CPUs, and this device is a GPU: leave kv_dtype out",
            options.kv_dtype.name()
        );
        Err(Failure::new(FailureKind::BadRequest, message))
    }

    fn backend(&self) -> Result<CudaBackend, DeviceError> {
        CudaBackend::new(self.device.clone(), self.options)
    }

    fn join(&self, mut ranks: HostGroup, backend: &mut CudaBackend) -> Result<NcclGroup, Failure> {
        let library = self.agree(&mut ranks, backend)?;
        NcclGroup::form(ranks, backend, &library, JOIN_MAX).map_err(|e| {
            let message = format!("the GPUs of the shard group did not meet: {e}");
            Failure::new(FailureKind::Unavailable, message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits() -> Traits {
        Traits {
            kind: "sm_80".into(),
            numerics: "cuda-1-sm_80-invariant".into(),
            graphs: true,
            nccl: Ok("2.21.5".into()),
        }
    }

    #[test]
    fn memory_is_counted_once_an_earlier_process_has_given_its_own_back() {
        let after = |readings: &[u64]| {
            let mut left = readings.iter();
            let read = || left.next().map(|free| (*free, 100)).ok_or("read too often");
            let free = settled(read, Duration::ZERO).map(|(free, _)| free);
            (free, left.len())
        };
        assert_eq!(
            after(&[95, 1]),
            (Ok(95), 1),
            "an empty device is taken as it is"
        );
        assert_eq!(after(&[10, 40, 92, 1]), (Ok(92), 1));
        assert_eq!(
            after(&[10, 40, 40, 1]),
            (Ok(40), 1),
            "the rest is another's"
        );
        let restless: Vec<u64> = (0..80).collect();
        assert_eq!(
            after(&restless),
            (Ok(50), 29),
            "nobody is waited for for ever"
        );
        assert_eq!(after(&[10]).0, Err("read too often"));
    }

    #[test]
    fn ranks_that_differ_are_refused_with_words_that_say_what_would_help() {
        assert_eq!(disagreement(&[traits(), traits(), traits()]), None);
        let refused = |other: Traits| disagreement(&[traits(), traits(), other]).unwrap();
        let message = refused(Traits {
            graphs: false,
            ..traits()
        });
        assert!(
            message.contains(
                "rank 0 with cuda-1-sm_80-invariant, graphs = true, NCCL 2.21.5, rank 2 with"
            ) && message.contains("give them the same switches"),
            "{message}"
        );
        let message = refused(Traits {
            nccl: Ok("2.14.3".into()),
            ..traits()
        });
        assert!(message.ends_with("the same NCCL"), "{message}");
        let message = refused(Traits {
            kind: "sm_90".into(),
            numerics: "cuda-1-sm_90-invariant".into(),
            ..traits()
        });
        assert!(
            message.ends_with("the same kind of GPU on all ranks"),
            "{message}"
        );
        let message = refused(Traits {
            nccl: Err("no libnccl.so.2".into()),
            graphs: false,
            ..traits()
        });
        assert_eq!(
            message,
            "a shard group of GPUs needs NCCL, and rank 2 has none: no libnccl.so.2"
        );
    }
}
