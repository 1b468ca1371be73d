//! How a group comes together: the leader waits for its members, agrees with them on a transport, and says go.
//!
//! Owns both sides of that, and its error. A group forms within its deadline or not at all.

use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::frame::{self, FrameError, Kind};
use super::handshake::{self, Greeting, HOST_BYTES_MAX, Hello};
use super::listener::{Arrival, Expectation, GroupListener};
use super::segment::{Name, Segment};
use super::{CollectiveError, GroupId, HostGroup, Membership, RANKS_MAX, Transport};

/// A member tries to reach its leader so often.
const RETRY: Duration = Duration::from_millis(50);
/// A step of the forming takes no longer once all ranks are there.
const STEP_MAX: Duration = Duration::from_secs(10);

/// Why a group did not form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// Ranks stayed away.
    #[error("{} of {ranks} did not join within {waited_s} s", name_ranks(missing))]
    Missing {
        /// Which.
        missing: Vec<u32>,
        /// Ranks of the group.
        ranks: u32,
        /// How long the leader waited, in seconds.
        waited_s: u64,
    },
    /// A rank was there and went.
    #[error(transparent)]
    Lost(#[from] CollectiveError),
    /// The leader cannot be reached, or does not know of the group.
    #[error("rank 0 at {address} did not take this rank in: {reason}")]
    Unreachable {
        /// Where it was looked for.
        address: SocketAddr,
        /// The last thing seen.
        reason: String,
    },
    /// Shared memory was demanded and cannot be had.
    #[error("the ranks cannot share memory: {0}; transport \"auto\" or \"tcp\" would do without")]
    SharedMemory(String),
    /// The membership makes no sense.
    #[error("{0}")]
    Invalid(String),
}

fn name_ranks(ranks: &[u32]) -> String {
    let names = ranks
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    if ranks.len() == 1 {
        format!("rank {names}")
    } else {
        format!("ranks {names}")
    }
}

/// The leader's side. From its making on, members are let in.
pub struct GroupBuilder {
    member: Membership,
    expectation: Expectation,
}

impl GroupBuilder {
    /// Makes the group known at the listener.
    ///
    /// # Errors
    /// [`FormError::Invalid`].
    pub fn new(listener: &GroupListener, member: Membership) -> Result<GroupBuilder, FormError> {
        check(&member)?;
        if member.rank != 0 {
            return Err(FormError::Invalid(format!(
                "rank {} cannot lead a group; rank 0 does",
                member.rank
            )));
        }
        let expectation = listener.expect(&member)?;
        Ok(GroupBuilder {
            member,
            expectation,
        })
    }

    /// Waits for all ranks and forms the group.
    ///
    /// # Errors
    /// [`FormError`], told to the members that had come, too.
    pub fn lead(self, within: Duration) -> Result<HostGroup, FormError> {
        let deadline = Instant::now() + within;
        let ranks = self.member.ranks;
        let mut members: Vec<Option<Arrival>> = (1..ranks).map(|_| None).collect();
        while members.iter().any(Option::is_none) {
            match self
                .expectation
                .arrivals
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                // A rank that comes again has lost its first connection.
                Ok(arrival) => {
                    let place = arrival.hello.rank as usize - 1;
                    members[place] = Some(arrival);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(self.give_up(&members, within));
                }
            }
        }
        let members: Vec<Arrival> = members.into_iter().flatten().collect();
        let segment = agree(&self.member, &members).inspect_err(|error| match error {
            FormError::Lost(CollectiveError::RankLost { rank, reason, .. }) => {
                tell_others(&members, *rank, reason)
            }
            other => tell_others(&members, 0, &other.to_string()),
        })?;
        Ok(HostGroup::new(
            &self.member,
            members.into_iter().map(|arrival| arrival.stream).collect(),
            segment,
        ))
    }

    fn give_up(&self, members: &[Option<Arrival>], within: Duration) -> FormError {
        let missing: Vec<u32> = (1..)
            .zip(members)
            .filter(|(_, arrival)| arrival.is_none())
            .map(|(rank, _)| rank)
            .collect();
        let reason = format!("it did not join within {} s", within.as_secs());
        for arrival in members.iter().flatten() {
            frame::tell_lost(&arrival.stream, missing[0], &reason);
        }
        FormError::Missing {
            missing,
            ranks: self.member.ranks,
            waited_s: within.as_secs(),
        }
    }
}

/// Agrees with all members on a transport: the shared memory, or none for TCP.
fn agree(leader: &Membership, members: &[Arrival]) -> Result<Option<Segment>, FormError> {
    let segment = match leader.transport {
        Transport::Tcp => None,
        Transport::Shm => Some(share(leader, members)?.map_err(FormError::SharedMemory)?),
        Transport::Auto
            if members
                .iter()
                .any(|member| member.hello.host != leader.host) =>
        {
            None
        }
        Transport::Auto => share(leader, members)?
            .inspect_err(|reason| {
                tracing::warn!(
                    reason,
                    "the ranks are on one machine but share no memory; using tcp"
                )
            })
            .ok(),
    };
    for member in members {
        frame::write_frame(
            &member.stream,
            Kind::Use,
            0,
            &[u8::from(segment.is_some())],
            Some(Instant::now() + STEP_MAX),
        )
        .map_err(|error| lost(member.hello.rank, leader.ranks, error))?;
    }
    Ok(segment)
}

/// Makes shared memory and has all members map it. The inner error is why it cannot be had. Its name is gone when this
/// returns.
fn share(leader: &Membership, members: &[Arrival]) -> Result<Result<Segment, String>, FormError> {
    let (segment, name): (Segment, Name) = match Segment::create(leader.ranks) {
        Ok(created) => created,
        Err(error) => return Ok(Err(format!("rank 0: {error}"))),
    };
    let deadline = Some(Instant::now() + STEP_MAX);
    let mut refusal = None;
    for member in members {
        frame::write_frame(&member.stream, Kind::Offer, 0, name.0.as_bytes(), deadline)
            .map_err(|error| lost(member.hello.rank, leader.ranks, error))?;
    }
    for member in members {
        let rank = member.hello.rank;
        let answer = read_text(&member.stream, Kind::Mapped, deadline)
            .map_err(|error| lost(rank, leader.ranks, error))?;
        if !answer.is_empty() {
            refusal.get_or_insert(format!("rank {rank}: {answer}"));
        }
    }
    Ok(refusal.map_or(Ok(segment), Err))
}

fn tell_others(members: &[Arrival], rank: u32, reason: &str) {
    for member in members.iter().filter(|member| member.hello.rank != rank) {
        frame::tell_lost(&member.stream, rank, reason);
    }
}

/// The side of the ranks above 0: dials rank 0 until it takes this rank in, and waits for the group to form.
///
/// # Errors
/// [`FormError`].
pub fn join(
    leader: SocketAddr,
    member: &Membership,
    within: Duration,
) -> Result<HostGroup, FormError> {
    check(member)?;
    if member.rank == 0 {
        return Err(FormError::Invalid(
            "rank 0 cannot join a group; it leads".into(),
        ));
    }
    let deadline = Instant::now() + within;
    let stream = dial(leader, member, deadline)?;
    let segment = follow(&stream, member, deadline).map_err(|error| match error {
        FrameError::TimedOut => FormError::Unreachable {
            address: leader,
            reason: format!("the group did not form within {} s", within.as_secs()),
        },
        error => lost(0, member.ranks, error),
    })?;
    Ok(HostGroup::new(member, vec![stream], segment))
}

fn dial(
    address: SocketAddr,
    member: &Membership,
    deadline: Instant,
) -> Result<TcpStream, FormError> {
    let hello = Hello {
        id: member.id,
        rank: member.rank,
        ranks: member.ranks,
        host: member.host.clone(),
    };
    loop {
        let (wait, reason) = match try_dial(address, &hello, member, deadline) {
            Ok((stream, Greeting::Welcome)) => return Ok(stream),
            Ok((_, Greeting::OtherKey)) => {
                return Err(FormError::Unreachable {
                    address,
                    reason: "it has another key for this generation".into(),
                });
            }
            Ok((_, Greeting::UnknownGroup)) => {
                let GroupId { group, generation } = member.id;
                (
                    RETRY,
                    format!("it does not lead generation {generation} of group {group}"),
                )
            }
            Err(reason) => (RETRY, reason),
        };
        if Instant::now() + wait >= deadline {
            return Err(FormError::Unreachable { address, reason });
        }
        std::thread::sleep(wait);
    }
}

fn try_dial(
    address: SocketAddr,
    hello: &Hello,
    member: &Membership,
    deadline: Instant,
) -> Result<(TcpStream, Greeting), String> {
    let left = deadline
        .saturating_duration_since(Instant::now())
        .max(RETRY);
    let stream = TcpStream::connect_timeout(&address, left).map_err(|error| error.to_string())?;
    frame::prepare(&stream).map_err(|error| error.to_string())?;
    let greeting =
        handshake::greet(&stream, hello, &member.key, deadline).map_err(|error| match error {
            FrameError::Closed(reason)
            | FrameError::Unexpected(reason)
            | FrameError::Lost { reason, .. } => reason,
            FrameError::TimedOut => "it did not answer".into(),
        })?;
    Ok((stream, greeting))
}

/// Does what the leader says until it says which transport to use.
fn follow(
    stream: &TcpStream,
    member: &Membership,
    deadline: Instant,
) -> Result<Option<Segment>, FrameError> {
    let deadline = Some(deadline);
    let mut segment = None;
    loop {
        let header = frame::read_any_header(stream, deadline)?;
        let bytes = read_payload(stream, header, deadline)?;
        match header.kind {
            Kind::Offer => {
                let opened = Segment::open(&String::from_utf8_lossy(&bytes), member.ranks);
                let answer = opened
                    .as_ref()
                    .err()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                segment = opened.ok();
                frame::write_frame(stream, Kind::Mapped, 0, answer.as_bytes(), deadline)?;
            }
            Kind::Use => return Ok(segment.filter(|_| bytes == [1])),
            other => {
                return Err(FrameError::Unexpected(format!(
                    "{other:?} while the group forms"
                )));
            }
        }
    }
}

fn read_text(
    stream: &TcpStream,
    kind: Kind,
    deadline: Option<Instant>,
) -> Result<String, FrameError> {
    let header = frame::read_header(stream, kind, deadline)?;
    Ok(String::from_utf8_lossy(&read_payload(stream, header, deadline)?).into_owned())
}

fn read_payload(
    stream: &TcpStream,
    header: frame::Header,
    deadline: Option<Instant>,
) -> Result<Vec<u8>, FrameError> {
    if header.len as usize > frame::REASON_BYTES_MAX {
        return Err(FrameError::Unexpected(format!(
            "a {:?} of {} bytes",
            header.kind, header.len
        )));
    }
    let mut bytes = vec![0; header.len as usize];
    frame::read_bytes(stream, &mut bytes, deadline)?;
    Ok(bytes)
}

fn lost(rank: u32, ranks: u32, error: FrameError) -> FormError {
    let (rank, reason) = match error {
        FrameError::Closed(reason) => (rank, reason),
        FrameError::TimedOut => (rank, "it did not answer while the group formed".into()),
        FrameError::Lost { rank, reason } => (rank, reason),
        FrameError::Unexpected(what) => (rank, format!("it sent {what}")),
    };
    FormError::Lost(CollectiveError::RankLost {
        rank,
        ranks,
        reason,
    })
}

fn check(member: &Membership) -> Result<(), FormError> {
    let Membership { rank, ranks, .. } = *member;
    if !(2..=RANKS_MAX).contains(&ranks) || rank >= ranks {
        return Err(FormError::Invalid(format!(
            "rank {rank} of {ranks}: a group of processes has 2 to {RANKS_MAX} ranks"
        )));
    }
    if member.host.len() > HOST_BYTES_MAX {
        return Err(FormError::Invalid(format!(
            "a host id of {} bytes; {HOST_BYTES_MAX} are allowed",
            member.host.len()
        )));
    }
    Ok(())
}
