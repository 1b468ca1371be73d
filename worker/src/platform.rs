//! What opening a shard asks of a kind of device, so that it is written once for all of them.

use common::request::Failure;
use common::wire::message::ShardOptions;
use engine::backend::{Backend, DeviceError};
use engine::collective::Collective;
use engine::collective::host::HostGroup;

/// A kind of device.
pub trait Platform {
    /// Computes a shard's steps.
    type Backend: Backend;
    /// Joins the ranks of a group.
    type Group: Collective<<Self::Backend as Backend>::Buf> + 'static;

    /// Refuses options that the device cannot serve, before anything is read.
    ///
    /// # Errors
    /// [`Failure`] of kind `BadRequest`: trying again would not help.
    fn check(&self, options: &ShardOptions) -> Result<(), Failure>;

    /// A backend for one shard.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn backend(&self) -> Result<Self::Backend, DeviceError>;

    /// Joins the ranks' devices, given the group of their processes.
    ///
    /// # Errors
    /// [`Failure`]: `Unavailable` where another life of the group may form.
    fn join(&self, ranks: HostGroup, backend: &mut Self::Backend) -> Result<Self::Group, Failure>;
}
