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

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{AbortHandle, Collective, CollectiveError, PLAN_BYTES_MAX, check_gather};
use frame::{FrameError, Kind};
use segment::Segment;

mod form;
mod frame;
mod handshake;
mod listener;
#[allow(unsafe_code)]
mod segment;
mod star;
#[allow(unsafe_code)]
mod sys;

pub use form::{FormError, GroupBuilder, join};
pub use listener::GroupListener;

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

/// One rank of a formed group.
pub struct HostGroup {
    rank: u32,
    ranks: u32,
    links: Arc<Links>,
    segment: Option<Segment>,
    /// Counts sums and gathers; on all ranks alike.
    op: u32,
    /// Counts what went through the shared memory.
    round: u32,
    wait_max: Duration,
    failed: Option<CollectiveError>,
}

/// The connections: rank 0 has those of ranks 1, 2, ... in order, the others have rank 0's.
struct Links {
    streams: Vec<TcpStream>,
    aborted: AtomicBool,
}

impl Links {
    fn close(&self) {
        for stream in &self.streams {
            // Fails when the other end was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl HostGroup {
    fn new(member: &Membership, streams: Vec<TcpStream>, segment: Option<Segment>) -> HostGroup {
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
            }),
            segment,
            op: 0,
            round: 0,
            wait_max: member.wait_max + grace,
            failed: None,
        }
    }

    /// How the ranks' numbers travel: never [`Transport::Auto`].
    #[must_use]
    pub fn transport(&self) -> Transport {
        if self.segment.is_some() {
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
        self.step(|group| {
            if group.segment.is_some() {
                group.shared_sum(values)
            } else {
                group.star_sum(values)
            }
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
            if group.segment.is_some() {
                group.shared_gather(part, rows, widths, out)
            } else {
                group.star_gather(part, rows, widths, out)
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
        self.step(|group| {
            if group.rank == 0 {
                return Err(CollectiveError::OutOfStep(
                    "rank 0 receives no plans".into(),
                ));
            }
            let stream = group.link(0);
            let header = frame::read_header(stream, Kind::Plan, None)
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

    fn aborted(&self) -> bool {
        self.links.aborted.load(Ordering::SeqCst)
    }

    /// The connection to `rank`, which is 0 unless this is rank 0.
    fn link(&self, rank: u32) -> &TcpStream {
        &self.links.streams[if self.rank == 0 { rank as usize - 1 } else { 0 }]
    }

    fn deadline(&self) -> Option<Instant> {
        Some(Instant::now() + self.wait_max)
    }

    /// What a failed read or write on the connection to `rank` means.
    fn lost(&self, rank: u32, error: FrameError) -> CollectiveError {
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

    fn silence(&self) -> String {
        format!("it did not answer within {} s", self.wait_max.as_secs_f32())
    }

    /// The sum through shared memory: every rank adds up all slots, in rank order.
    fn shared_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        /// Numbers added at a time, to stay in the nearest cache.
        const STRIP: usize = 2048;
        for chunk in values.chunks_mut(segment::SLOT) {
            let round = self.publish(chunk)?;
            for rank in 0..self.ranks {
                self.wait_for(rank, round)?;
            }
            let Some(segment) = &self.segment else {
                return Ok(());
            };
            for (i, strip) in chunk.chunks_mut(STRIP).enumerate() {
                let len = strip.len();
                let part = |rank| &segment.values(rank, round, segment::SLOT)[i * STRIP..][..len];
                strip.copy_from_slice(part(0));
                for rank in 1..self.ranks {
                    strip
                        .iter_mut()
                        .zip(part(rank))
                        .for_each(|(sum, x)| *sum += x);
                }
            }
        }
        Ok(())
    }

    fn shared_gather(
        &mut self,
        part: &[f32],
        rows: usize,
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let whole = widths.iter().sum::<usize>();
        let longest = rows * widths[1..].iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(segment::SLOT) {
            let chunk = |len: usize| start.min(len)..(start + segment::SLOT).min(len);
            // Rank 0 publishes too, nothing: the others must know when it has read their slots.
            let own = if self.rank == 0 {
                &[]
            } else {
                &part[chunk(part.len())]
            };
            let round = self.publish(own)?;
            if self.rank != 0 {
                continue;
            }
            let mut column = widths[0];
            for (rank, width) in (1..).zip(&widths[1..]) {
                self.wait_for(rank, round)?;
                let Some(segment) = &self.segment else {
                    return Ok(());
                };
                let values = segment.values(rank, round, chunk(rows * width).len());
                place_columns(out, whole, column, values, start.min(rows * width), *width);
                column += width;
            }
        }
        Ok(())
    }

    /// Starts a round of the shared memory with this rank's numbers; gives the round.
    fn publish(&mut self, values: &[f32]) -> Result<u32, CollectiveError> {
        for rank in 0..self.ranks {
            self.wait_for(rank, self.round)?;
        }
        self.round = self.round.wrapping_add(1);
        if let Some(segment) = &mut self.segment {
            segment.publish(self.rank, self.round, values);
        }
        Ok(self.round)
    }

    /// Waits for another rank in the shared memory, looking now and then whether anybody is lost.
    fn wait_for(&self, rank: u32, round: u32) -> Result<(), CollectiveError> {
        let Some(segment) = &self.segment else {
            return Ok(());
        };
        let mut deadline = None;
        segment.wait(rank, round, &mut || {
            if self.aborted() {
                return Err(CollectiveError::Aborted);
            }
            for (i, stream) in (1..).zip(&self.links.streams) {
                let peer = if self.rank == 0 { i } else { 0 };
                frame::look(stream).map_err(|error| self.lost(peer, error))?;
            }
            let now = Instant::now();
            if now < *deadline.get_or_insert(now + self.wait_max) {
                return Ok(());
            }
            Err(CollectiveError::RankLost {
                rank,
                ranks: self.ranks,
                reason: self.silence(),
            })
        })
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
fn place_columns(
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

/// Random bytes from the operating system.
fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
