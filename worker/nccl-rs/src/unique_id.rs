//! What the ranks of one communicator share before they meet.

use std::ffi::c_char;
use std::fmt;

/// Length of a [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;

/// Names one communicator to be: all its ranks are made with the same id. Rank 0 makes it
/// ([`Library::unique_id`](crate::Library::unique_id)) and must stay alive until all have met; the others get its bytes
/// from outside. It holds an address and a secret number: whoever has it can join.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct UniqueId([u8; UNIQUE_ID_BYTES]);

/// `ncclUniqueId`, as it is passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct RawUniqueId(pub(crate) [c_char; UNIQUE_ID_BYTES]);

impl UniqueId {
    /// The id of these bytes, which another rank's [`UniqueId::as_bytes`] gave.
    #[must_use]
    pub fn from_bytes(bytes: [u8; UNIQUE_ID_BYTES]) -> UniqueId {
        UniqueId(bytes)
    }

    /// Its bytes, to send to the other ranks.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; UNIQUE_ID_BYTES] {
        &self.0
    }

    pub(crate) fn from_raw(raw: RawUniqueId) -> UniqueId {
        UniqueId(raw.0.map(|byte| byte as u8))
    }

    pub(crate) fn to_raw(self) -> RawUniqueId {
        RawUniqueId(self.0.map(|byte| byte as c_char))
    }
}

impl TryFrom<&[u8]> for UniqueId {
    type Error = std::array::TryFromSliceError;

    fn try_from(bytes: &[u8]) -> Result<UniqueId, Self::Error> {
        bytes.try_into().map(UniqueId)
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId")
    }
}
