//! Shard groups of devices: NCCL between the devices, a [`HostGroup`] between their processes.
//!
//! The host group is formed first, by the key and generation that the coordinator made. It carries NCCL's id when the
//! devices meet, the plans afterwards, and the news of who is lost; sums and gathers are enqueued on the device's stream
//! (`group`). A collective whose rank has died never ends by itself, and the thread that waits for the stream cannot see
//! why. So another thread looks at the connections, at NCCL and at the clock (`guard`); what it makes of that is decided
//! without any of them (`watch`). It frees the stream in this order: recordings that hold collectives are destroyed, then
//! the communicator is aborted. That has a deadline too, past which the process ends: a device held by a dead group serves
//! nobody.
//!
//! What was read from the device counts once [`Collective::check`](super::Collective::check) says so. NCCL adds in an order
//! of its own: the same bits on all ranks, but only in groups of two surely those of the host groups.

mod group;
mod guard;
mod lane;
mod watch;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use super::CollectiveError;
use super::host::HostGroup;
use crate::backend::Backend;
use crate::backend::cuda::{CudaBackend, CudaLane};

pub use group::{Group, Options};
pub use lane::{LANDING, Lane, Placement};

/// One rank of a group of CUDA devices.
pub type NcclGroup = Group<CudaLane>;

impl NcclGroup {
    /// Forms the group of the devices of a host group's ranks: all of them call this, within `within`. The backend's
    /// recorded steps, which an earlier group may have left, are destroyed.
    ///
    /// # Errors
    /// [`CollectiveError`]: the host group is over too. Of NCCL's refusals the usual one is that two ranks came with one
    /// device.
    pub fn form(
        host: HostGroup,
        backend: &mut CudaBackend,
        library: &Arc<nccl_rs::Library>,
        within: Duration,
    ) -> Result<NcclGroup, CollectiveError> {
        // Also after a group that did not form: its guard has closed the store of recorded steps, for good.
        backend.renew();
        let lane = CudaLane::new(backend, host.rank() == 0)
            .map_err(|error| CollectiveError::Failed(error.to_string()))?;
        Group::form_lane(host, lane, library, Options::new(within))
    }
}
