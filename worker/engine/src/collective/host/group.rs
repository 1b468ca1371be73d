//! One rank's end of a group: its connections, its collectives, and how the first error ends it.
//!
//! Owns who is told of what: a leader that sees a rank lost tells the others before it closes their connections. How
//! numbers travel stands in [`super::shared`] and [`super::star`].

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::frame::{self, FrameError, Kind};
use super::segment::Segment;
use super::shared::Shared;
use super::watch::LinkWatch;
use super::{FOLLOWER_GRACE, Membership, Transport};
use crate::collective::{AbortHandle, Collective, CollectiveError, PLAN_BYTES_MAX, check_gather};

/// Longest word of a rank in [`HostGroup::exchange`], in bytes.
const WORD_BYTES_MAX: usize = 4096;

/// One rank of a formed group.
pub struct HostGroup {
    pub(super) rank: u32,
    pub(super) ranks: u32,
    pub(super) links: Arc<Links>,
    /// None: numbers travel over the links.
    shared: Option<Shared>,
    /// Counts sums and gathers; on all ranks alike.
    pub(super) op: u32,
    pub(super) wait_max: Duration,
    failed: Option<CollectiveError>,
}

/// The connections: rank 0 has those of ranks 1, 2, ... in order, the others have rank 0's.
pub(super) struct Links {
    pub(super) streams: Vec<TcpStream>,
    aborted: AtomicBool,
    closed: AtomicBool,
}

impl Links {
    /// Whether this end closed them.
    pub(super) fn closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        for stream in &self.streams {
            // Fails when the other end was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl HostGroup {
    pub(super) fn new(
        member: &Membership,
        streams: Vec<TcpStream>,
        segment: Option<Segment>,
    ) -> HostGroup {
        let grace = if member.rank == 0 {
            Duration::ZERO
        } else {
            FOLLOWER_GRACE
        };
        HostGroup {
            rank: member.rank,
            ranks: member.ranks,
            links: Arc::new(Links {
                streams,
                aborted: AtomicBool::new(false),
                closed: AtomicBool::new(false),
            }),
            shared: segment.map(Shared::new),
            op: 0,
            wait_max: member.wait_max + grace,
            failed: None,
        }
    }

    /// How the ranks' numbers travel: never [`Transport::Auto`].
    #[must_use]
    pub fn transport(&self) -> Transport {
        if self.shared.is_some() {
            Transport::Shm
        } else {
            Transport::Tcp
        }
    }

    /// This rank, from 0.
    #[must_use]
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.ranks
    }

    /// [`Collective::all_reduce_sum`] over plain numbers.
    ///
    /// # Errors
    /// As there.
    pub fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.step(|group| match group.shared.take() {
            Some(mut shared) => {
                let result = shared.sum(group, values);
                group.shared = Some(shared);
                result
            }
            None => group.star_sum(values),
        })
    }

    /// [`Collective::gather_columns`] over plain numbers.
    ///
    /// # Errors
    /// As there.
    pub fn gather_columns(
        &mut self,
        part: &[f32],
        rows: usize,
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let whole = check_gather(self.rank, self.ranks, rows, widths, part.len(), out.len())?;
        let part = &part[..rows * widths[self.rank as usize]];
        self.step(|group| {
            if group.rank == 0 {
                place_columns(out, whole, 0, part, 0, widths[0]);
            }
            match group.shared.take() {
                Some(mut shared) => {
                    let result = shared.gather(group, part, rows, widths, out);
                    group.shared = Some(shared);
                    result
                }
                None => group.star_gather(part, rows, widths, out),
            }
        })
    }

    /// [`Collective::send_plan`].
    ///
    /// # Errors
    /// As there.
    pub fn send_plan(&mut self, plan: &[u8]) -> Result<(), CollectiveError> {
        self.step(|group| {
            if group.rank != 0 || plan.len() > PLAN_BYTES_MAX {
                return Err(CollectiveError::OutOfStep(format!(
                    "rank {} sends a plan of {} bytes",
                    group.rank,
                    plan.len()
                )));
            }
            let deadline = group.deadline();
            for rank in 1..group.ranks {
                frame::write_frame(group.link(rank), Kind::Plan, 0, plan, deadline)
                    .map_err(|error| group.lost(rank, error))?;
            }
            Ok(())
        })
    }

    /// [`Collective::recv_plan`].
    ///
    /// # Errors
    /// As there.
    pub fn recv_plan(&mut self, plan: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.recv_plan_within(plan, None)
    }

    /// As [`HostGroup::recv_plan`]; a leader that sends nothing within `within` is lost.
    ///
    /// # Errors
    /// As there.
    pub fn recv_plan_within(
        &mut self,
        plan: &mut Vec<u8>,
        within: Option<Duration>,
    ) -> Result<(), CollectiveError> {
        let deadline = within.map(|within| Instant::now() + within);
        self.step(|group| {
            if group.rank == 0 {
                return Err(CollectiveError::OutOfStep(
                    "rank 0 receives no plans".into(),
                ));
            }
            let stream = group.link(0);
            let header = frame::read_header(stream, Kind::Plan, deadline)
                .map_err(|error| group.lost(0, error))?;
            if header.len as usize > PLAN_BYTES_MAX {
                return Err(CollectiveError::OutOfStep(format!(
                    "a plan of {} bytes",
                    header.len
                )));
            }
            plan.resize(header.len as usize, 0);
            frame::read_bytes(stream, plan, group.deadline()).map_err(|error| group.lost(0, error))
        })
    }

    /// Gives this rank's `word` and gets the words of all, in rank order. A rank that says nothing `within` is lost.
    ///
    /// # Errors
    /// [`CollectiveError`]; also when a word is longer than 4096 bytes.
    pub fn exchange(
        &mut self,
        word: &[u8],
        within: Duration,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let within = match self.rank {
            0 => within,
            _ => within + FOLLOWER_GRACE,
        };
        let deadline = Instant::now() + within;
        let mut words = Vec::new();
        self.step(|group| {
            if word.len() > WORD_BYTES_MAX {
                return Err(CollectiveError::OutOfStep(format!(
                    "rank {} gives a word of {} bytes",
                    group.rank,
                    word.len()
                )));
            }
            let lost = |rank, error| match error {
                FrameError::TimedOut => CollectiveError::RankLost {
                    rank,
                    ranks: group.ranks,
                    reason: format!("it did not answer within {} s", within.as_secs_f32()),
                },
                error => group.lost(rank, error),
            };
            let send = |rank, word: &[u8]| {
                frame::write_frame(group.link(rank), Kind::Word, 0, word, Some(deadline))
                    .map_err(|error| lost(rank, error))
            };
            let receive = |rank| {
                let stream = group.link(rank);
                let header = frame::read_header(stream, Kind::Word, Some(deadline))
                    .map_err(|error| lost(rank, error))?;
                let len = header.len as usize;
                if len > WORD_BYTES_MAX {
                    let what = format!("rank {rank} sent a word of {len} bytes");
                    return Err(CollectiveError::OutOfStep(what));
                }
                let mut word = vec![0; len];
                frame::read_bytes(stream, &mut word, Some(deadline))
                    .map_err(|error| lost(rank, error))?;
                Ok(word)
            };
            if group.rank != 0 {
                send(0, word)?;
                for _ in 0..group.ranks {
                    words.push(receive(0)?);
                }
                return Ok(());
            }
            words.push(word.to_vec());
            for rank in 1..group.ranks {
                words.push(receive(rank)?);
            }
            for rank in 1..group.ranks {
                words.iter().try_for_each(|word| send(rank, word))?;
            }
            Ok(())
        })?;
        Ok(words)
    }

    /// A handle that ends the group from another thread.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        let links = Arc::downgrade(&self.links);
        AbortHandle::new(move || {
            if let Some(links) = links.upgrade() {
                links.aborted.store(true, Ordering::SeqCst);
                links.close();
            }
        })
    }

    /// How long this rank waits for another one inside a step.
    #[must_use]
    pub fn wait_max(&self) -> Duration {
        self.wait_max
    }

    /// A look at the connections, for another thread.
    #[must_use]
    pub fn link_watch(&self) -> LinkWatch {
        LinkWatch::new(Arc::clone(&self.links), self.rank, self.ranks)
    }

    /// Ends the group for a reason seen elsewhere: the other ranks are told as of any lost rank.
    pub fn fail(&mut self, error: CollectiveError) {
        if self.failed.is_none() {
            self.end(error);
        }
    }

    /// Runs one collective. The first error ends the group: it is told to the others and given again ever after.
    fn step(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = if self.aborted() {
            Err(CollectiveError::Aborted)
        } else {
            run(self)
        };
        result.map_err(|error| {
            let error = if self.aborted() {
                CollectiveError::Aborted
            } else {
                error
            };
            self.end(error.clone());
            error
        })
    }

    fn end(&mut self, error: CollectiveError) {
        if let (0, CollectiveError::RankLost { rank, reason, .. }) = (self.rank, &error) {
            for survivor in (1..self.ranks).filter(|survivor| survivor != rank) {
                frame::tell_lost(self.link(survivor), *rank, reason);
            }
        }
        self.links.close();
        self.failed = Some(error);
    }

    pub(super) fn aborted(&self) -> bool {
        self.links.aborted.load(Ordering::SeqCst)
    }

    /// The connection to `rank`, which is 0 unless this is rank 0.
    pub(super) fn link(&self, rank: u32) -> &TcpStream {
        &self.links.streams[if self.rank == 0 { rank as usize - 1 } else { 0 }]
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        Some(Instant::now() + self.wait_max)
    }

    /// What a failed read or write on the connection to `rank` means.
    pub(super) fn lost(&self, rank: u32, error: FrameError) -> CollectiveError {
        let (rank, reason) = match error {
            FrameError::Closed(reason) => match self.last_words(rank) {
                Some(news) => news,
                None => (rank, reason),
            },
            FrameError::TimedOut => (rank, self.silence()),
            FrameError::Lost { rank, reason } => (rank, reason),
            FrameError::Unexpected(what) => {
                return CollectiveError::OutOfStep(format!("rank {rank} sent {what}"));
            }
        };
        CollectiveError::RankLost {
            rank,
            ranks: self.ranks,
            reason,
        }
    }

    /// A leader that ended the group said why before it closed the connection: while this rank was still writing, that
    /// word lies unread.
    fn last_words(&self, rank: u32) -> Option<(u32, String)> {
        let unread = self.rank != 0 && rank == 0;
        match unread.then(|| frame::look(self.link(0))) {
            Some(Err(FrameError::Lost { rank, reason })) => Some((rank, reason)),
            _ => None,
        }
    }

    pub(super) fn silence(&self) -> String {
        format!("it did not answer within {} s", self.wait_max.as_secs_f32())
    }
}

impl Drop for HostGroup {
    fn drop(&mut self) {
        self.links.close();
    }
}

impl std::fmt::Debug for HostGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostGroup")
            .field("rank", &self.rank)
            .field("ranks", &self.ranks)
            .field("transport", &self.transport())
            .finish()
    }
}

impl<Buf: AsRef<[f32]> + AsMut<[f32]>> Collective<Buf> for HostGroup {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn all_reduce_sum(&mut self, buf: &mut Buf, len: usize) -> Result<(), CollectiveError> {
        HostGroup::all_reduce_sum(self, &mut buf.as_mut()[..len])
    }

    fn gather_columns(
        &mut self,
        part: &Buf,
        rows: usize,
        widths: &[usize],
        out: &mut Buf,
    ) -> Result<(), CollectiveError> {
        HostGroup::gather_columns(self, part.as_ref(), rows, widths, out.as_mut())
    }

    fn send_plan(&mut self, plan: &[u8]) -> Result<(), CollectiveError> {
        HostGroup::send_plan(self, plan)
    }

    fn recv_plan(&mut self, plan: &mut Vec<u8>) -> Result<(), CollectiveError> {
        HostGroup::recv_plan(self, plan)
    }

    fn abort_handle(&self) -> AbortHandle {
        HostGroup::abort_handle(self)
    }
}

/// Puts `values`, numbers `start ..` of a rank's `[rows, width]`, into columns `column ..` of `out [rows, whole]`.
pub(super) fn place_columns(
    out: &mut [f32],
    whole: usize,
    column: usize,
    mut values: &[f32],
    start: usize,
    width: usize,
) {
    let mut at = start;
    while !values.is_empty() {
        let (row, offset) = (at / width, at % width);
        let count = (width - offset).min(values.len());
        out[row * whole + column + offset..][..count].copy_from_slice(&values[..count]);
        values = &values[count..];
        at += count;
    }
}
