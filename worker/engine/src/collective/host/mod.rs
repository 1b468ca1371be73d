//! Shard groups of processes: shared memory where all ranks are on one machine, TCP where they are not.
//!
//! The group is a star: each rank above 0 holds one TCP connection, to rank 0. It carries the handshake (`handshake`),
//! the forming of the group (`form`), the plans, and the news of who is lost; its end is how a death is seen. Sums
//! and gathers go through shared memory (`segment`) or, framed, through the same connections (`star`). Both add in
//! rank order and give the same bits.
//!
//! The leader's process has one [`GroupListener`] for all groups it leads; [`GroupBuilder`] forms one of them, and
//! [`join`] is the other ranks' side.
//!
//! Unsafe code stands in `segment` and `sys` alone.

use std::sync::Arc;
use std::time::Duration;

use super::CollectiveError;

mod form;
mod frame;
mod group;
mod handshake;
mod listener;
#[allow(unsafe_code)]
mod segment;
mod shared;
mod star;
#[allow(unsafe_code)]
mod sys;
mod watch;

pub use form::{FormError, GroupBuilder, join};
pub use group::HostGroup;
pub use listener::GroupListener;
pub use watch::LinkWatch;

/// Most ranks in a group.
pub const RANKS_MAX: u32 = 64;
/// A rank that lets the others wait longer inside a step counts as lost. Ranks do equal work, so that even a long
/// prefill has them arrive within seconds.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Followers wait a little longer than the leader, so that its word on who is lost reaches them first.
const FOLLOWER_GRACE: Duration = Duration::from_secs(2);

/// Which group, and which of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupId {
    /// The group.
    pub group: u64,
    /// Counts its lives; ranks of different generations never meet.
    pub generation: u64,
}

/// The secret of one generation of a group, made by the coordinator and given to its ranks.
#[derive(Clone)]
pub struct GroupKey(Arc<[u8]>);

impl GroupKey {
    /// At least 16 random bytes.
    ///
    /// # Errors
    /// [`FormError::Invalid`]: fewer.
    pub fn new(bytes: &[u8]) -> Result<GroupKey, FormError> {
        if bytes.len() < 16 {
            return Err(FormError::Invalid(format!(
                "a group key of {} bytes; at least 16 are needed",
                bytes.len()
            )));
        }
        Ok(GroupKey(bytes.into()))
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for GroupKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GroupKey")
    }
}

/// How the ranks' numbers travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// Shared memory if all ranks can map it, else TCP.
    #[default]
    Auto,
    /// Shared memory, or no group.
    Shm,
    /// TCP.
    Tcp,
}

/// One rank's place in a group.
#[derive(Debug, Clone)]
pub struct Membership {
    /// Which group.
    pub id: GroupId,
    /// This rank.
    pub rank: u32,
    /// Ranks in the group.
    pub ranks: u32,
    /// The generation's key.
    pub key: GroupKey,
    /// Names this machine; [`host_id`] gives a good one.
    pub host: String,
    /// Only rank 0's choice counts.
    pub transport: Transport,
    /// See [`WAIT_MAX`].
    pub wait_max: Duration,
}

/// A name for this machine and this boot of it. Containers on one machine share it; whether they share memory too is
/// found out when a group forms.
#[must_use]
pub fn host_id() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mut id = format!(
        "{}.{}",
        read("/proc/sys/kernel/random/boot_id").trim(),
        read("/proc/sys/kernel/hostname").trim()
    );
    id.truncate(
        (0..=handshake::HOST_BYTES_MAX.min(id.len()))
            .rev()
            .find(|end| id.is_char_boundary(*end))
            .unwrap_or(0),
    );
    id
}

/// Random bytes from the operating system.
fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
