//! Sums and gathers through shared memory.
//!
//! Owns the rounds of one collective over the [`Segment`]'s slots, and the look at the living while a rank waits for
//! another.

use std::time::Instant;

use super::group::{HostGroup, place_columns};
use super::segment::{SLOT, Segment};
use super::{CollectiveError, frame};

/// One rank's end of the shared memory.
pub(super) struct Shared {
    segment: Segment,
    /// The last round that this rank published.
    round: u32,
}

impl Shared {
    pub(super) fn new(segment: Segment) -> Shared {
        Shared { segment, round: 0 }
    }

    /// Every rank adds up all slots, in rank order.
    pub(super) fn sum(
        &mut self,
        group: &HostGroup,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        /// Numbers added at a time, to stay in the nearest cache.
        const STRIP: usize = 2048;
        for chunk in values.chunks_mut(SLOT) {
            self.publish(group, chunk)?;
            for rank in 0..group.ranks {
                self.wait(group, rank)?;
            }
            let len = chunk.len();
            let slot = |rank| self.segment.values(rank, self.round, len);
            for start in (0..len).step_by(STRIP) {
                let range = start..(start + STRIP).min(len);
                let strip = &mut chunk[range.clone()];
                strip.copy_from_slice(&slot(0)[range.clone()]);
                for rank in 1..group.ranks {
                    for (sum, x) in strip.iter_mut().zip(&slot(rank)[range.clone()]) {
                        *sum += x;
                    }
                }
            }
        }
        Ok(())
    }

    /// Rank 0 takes the others' columns out of their slots.
    pub(super) fn gather(
        &mut self,
        group: &HostGroup,
        part: &[f32],
        rows: usize,
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let whole = widths.iter().sum::<usize>();
        let longest = rows * widths[1..].iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(SLOT) {
            let chunk = |len: usize| start.min(len)..(start + SLOT).min(len);
            // Rank 0 publishes too, nothing: the others must know when it has read their slots.
            let own = if group.rank == 0 {
                &[]
            } else {
                &part[chunk(part.len())]
            };
            self.publish(group, own)?;
            if group.rank != 0 {
                continue;
            }
            let mut column = widths[0];
            for (rank, width) in (1..).zip(&widths[1..]) {
                self.wait(group, rank)?;
                let range = chunk(rows * width);
                let values = self.segment.values(rank, self.round, range.len());
                place_columns(out, whole, column, values, range.start, *width);
                column += width;
            }
        }
        Ok(())
    }

    /// Starts a round with this rank's numbers, once all ranks have begun the last one.
    fn publish(&mut self, group: &HostGroup, values: &[f32]) -> Result<(), CollectiveError> {
        for rank in 0..group.ranks {
            self.wait(group, rank)?;
        }
        self.round = self.round.wrapping_add(1);
        self.segment.publish(group.rank, self.round, values);
        Ok(())
    }

    /// Waits until a rank has published this round, looking now and then whether anybody is lost.
    fn wait(&self, group: &HostGroup, rank: u32) -> Result<(), CollectiveError> {
        let mut deadline = None;
        self.segment.wait(rank, self.round, &mut || {
            if group.aborted() {
                return Err(CollectiveError::Aborted);
            }
            for (i, stream) in (1..).zip(&group.links.streams) {
                let peer = if group.rank == 0 { i } else { 0 };
                frame::look(stream).map_err(|error| group.lost(peer, error))?;
            }
            let now = Instant::now();
            if now < *deadline.get_or_insert(now + group.wait_max) {
                return Ok(());
            }
            let reason = group.silence();
            Err(CollectiveError::RankLost {
                rank,
                ranks: group.ranks,
                reason,
            })
        })
    }
}
