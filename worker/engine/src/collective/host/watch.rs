//! Seeing a death from beside: for groups whose numbers travel elsewhere, so that nobody reads the connections meanwhile.
//!
//! Owns the look, and reads nothing: the connections stay their owner's.

use std::sync::Arc;
use std::time::Duration;

use super::frame::{REMAINS_BYTES, Remains, remains};
use super::group::Links;
use super::sys;
use crate::collective::CollectiveError;

/// Looks at a group's connections from another thread.
#[derive(Clone)]
pub struct LinkWatch {
    links: Arc<Links>,
    rank: u32,
    ranks: u32,
}

impl LinkWatch {
    pub(super) fn new(links: Arc<Links>, rank: u32, ranks: u32) -> LinkWatch {
        LinkWatch { links, rank, ranks }
    }

    /// The rank that is lost, if one is, or becomes so within `wait_max`. One whose connection still holds a plan counts as
    /// alive until its owner has read that: it was through with all the steps before. Nobody is lost once this end closed
    /// the group itself.
    #[must_use]
    pub fn lost(&self, wait_max: Duration) -> Option<CollectiveError> {
        // Interrupted by a signal: the next look tells.
        let closed = sys::closed(&self.links.streams, wait_max).unwrap_or_default();
        if self.links.closed() {
            return None;
        }
        let peers = if self.rank == 0 { 1.. } else { 0.. };
        let mut ends = peers.zip(&self.links.streams).zip(closed);
        ends.find_map(|((peer, stream), closed)| {
            let mut bytes = [0; REMAINS_BYTES];
            let unread = if closed {
                sys::peek(stream, &mut bytes).unwrap_or(0)
            } else {
                return None;
            };
            let (rank, reason) = match remains(&bytes[..unread]) {
                Remains::Work => return None,
                Remains::Lost { rank, reason } => (rank, reason),
                Remains::Nothing => (peer, "it closed its connection".into()),
            };
            Some(CollectiveError::RankLost {
                rank,
                ranks: self.ranks,
                reason,
            })
        })
    }
}

impl std::fmt::Debug for LinkWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LinkWatch")
    }
}
