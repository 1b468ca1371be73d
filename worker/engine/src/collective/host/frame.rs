//! Frames between two ranks: a kind, a counter, a length and the bytes, each wait with its deadline.
//!
//! Owns the header and the reading and writing of whole frames. Readers know the length they expect, or the most they
//! take: no length from the wire decides an allocation alone.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long one read or write blocks before its deadline is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Bytes of a frame's header: kind, three zeros, op, length.
pub(super) const HEADER_BYTES: usize = 12;
/// Longest reason in a [`Kind::Lost`] frame.
pub(super) const REASON_BYTES_MAX: usize = 512;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Rank 0: the name of the shared memory to map.
    Offer = 1,
    /// A follower: whether it mapped it; empty if so, else why not.
    Mapped = 2,
    /// Rank 0: the transport to use; the group is formed.
    Use = 3,
    /// Rank 0: a plan.
    Plan = 4,
    /// A follower: its part of a sum.
    Part = 5,
    /// Rank 0: the sum.
    Sum = 6,
    /// A follower: its columns of a gather.
    Columns = 7,
    /// Rank 0: which rank is lost (u32) and why. The last frame of a connection.
    Lost = 8,
    /// A follower: its word. Rank 0: the words of all ranks, a frame each.
    Word = 9,
}

const KINDS: [Kind; 9] = [
    Kind::Offer,
    Kind::Mapped,
    Kind::Use,
    Kind::Plan,
    Kind::Part,
    Kind::Sum,
    Kind::Columns,
    Kind::Lost,
    Kind::Word,
];

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Counts the collectives; both ends must be at the same one.
    pub(super) op: u32,
    /// Bytes that follow.
    pub(super) len: u32,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.op.to_le_bytes());
        bytes[8..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    /// `None` for a kind this version does not know or a header that is not one.
    pub(super) fn decode(bytes: [u8; HEADER_BYTES]) -> Option<Header> {
        let kind = *KINDS.iter().find(|kind| **kind as u8 == bytes[0])?;
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        (bytes[1..4] == [0; 3]).then(|| Header {
            kind,
            op: word(4),
            len: word(8),
        })
    }
}

/// Why a frame could not be read or written.
#[derive(Debug)]
pub(super) enum FrameError {
    /// The other end closed the connection.
    Closed(String),
    /// Nothing moved until the deadline.
    TimedOut,
    /// The other end says that this rank is lost, and why.
    Lost { rank: u32, reason: String },
    /// The other end sent something that does not belong here.
    Unexpected(String),
}

/// Prepares a connection: small frames leave at once, waits look up regularly, an idle peer is probed.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(POLL))?;
    stream.set_write_timeout(Some(POLL))?;
    super::sys::keep_alive(stream)
}

/// Fills `bytes` from the connection. No deadline waits as long as the connection lives.
pub(super) fn read_bytes(
    mut stream: &TcpStream,
    mut bytes: &mut [u8],
    deadline: Option<Instant>,
) -> Result<(), FrameError> {
    while !bytes.is_empty() {
        match stream.read(bytes) {
            Ok(0) => return Err(FrameError::Closed("it closed its connection".into())),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) => check(&error, deadline)?,
        }
    }
    Ok(())
}

/// Writes all of `bytes`.
pub(super) fn write_bytes(
    mut stream: &TcpStream,
    mut bytes: &[u8],
    deadline: Option<Instant>,
) -> Result<(), FrameError> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(0) => {
                return Err(FrameError::Closed(
                    "its connection takes no more bytes".into(),
                ));
            }
            Ok(count) => bytes = &bytes[count..],
            Err(error) => check(&error, deadline)?,
        }
    }
    Ok(())
}

/// Whether a read or write that gave `error` may be tried again.
fn check(error: &io::Error, deadline: Option<Instant>) -> Result<(), FrameError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                Err(FrameError::TimedOut)
            } else {
                Ok(())
            }
        }
        _ => Err(FrameError::Closed(format!("its connection broke: {error}"))),
    }
}

/// Writes one frame.
pub(super) fn write_frame(
    stream: &TcpStream,
    kind: Kind,
    op: u32,
    bytes: &[u8],
    deadline: Option<Instant>,
) -> Result<(), FrameError> {
    let len = u32::try_from(bytes.len())
        .map_err(|_| FrameError::Unexpected(format!("a frame of {} bytes", bytes.len())))?;
    let header = Header { kind, op, len }.encode();
    // One packet for what fits one: the header alone would cost the reader a second wake-up.
    const SMALL: usize = 4096;
    if bytes.len() <= SMALL {
        let mut both = [0; HEADER_BYTES + SMALL];
        both[..HEADER_BYTES].copy_from_slice(&header);
        both[HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
        return write_bytes(stream, &both[..HEADER_BYTES + bytes.len()], deadline);
    }
    write_bytes(stream, &header, deadline)?;
    write_bytes(stream, bytes, deadline)
}

/// Reads a header of the given kind; a [`Kind::Lost`] frame in its place is read whole and returned as the error.
pub(super) fn read_header(
    stream: &TcpStream,
    kind: Kind,
    deadline: Option<Instant>,
) -> Result<Header, FrameError> {
    let header = read_any_header(stream, deadline)?;
    if header.kind == kind {
        Ok(header)
    } else {
        Err(FrameError::Unexpected(format!(
            "{:?} in place of {kind:?}",
            header.kind
        )))
    }
}

/// Reads a header of any kind but [`Kind::Lost`], as [`read_header`] does.
pub(super) fn read_any_header(
    stream: &TcpStream,
    deadline: Option<Instant>,
) -> Result<Header, FrameError> {
    let mut bytes = [0; HEADER_BYTES];
    read_bytes(stream, &mut bytes, deadline)?;
    let header = Header::decode(bytes)
        .ok_or_else(|| FrameError::Unexpected("bytes that are no frame".into()))?;
    if header.kind == Kind::Lost {
        Err(read_lost(stream, header.len, deadline))
    } else {
        Ok(header)
    }
}

fn read_lost(stream: &TcpStream, len: u32, deadline: Option<Instant>) -> FrameError {
    if !(4..=4 + REASON_BYTES_MAX).contains(&(len as usize)) {
        return FrameError::Unexpected(format!("a loss told in {len} bytes"));
    }
    let mut bytes = vec![0; len as usize];
    if let Err(error) = read_bytes(stream, &mut bytes, deadline) {
        return error;
    }
    let (rank, reason) = decode_lost(&bytes);
    FrameError::Lost { rank, reason }
}

/// Which rank is lost and why: what follows the header of a [`Kind::Lost`] frame, at least 4 bytes.
fn decode_lost(bytes: &[u8]) -> (u32, String) {
    let rank = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    (rank, String::from_utf8_lossy(&bytes[4..]).into_owned())
}

/// What a closed connection still held, without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Remains {
    /// Nothing, or nothing that says why.
    Nothing,
    /// The other end's word on who is lost.
    Lost { rank: u32, reason: String },
    /// Frames that belong to the group's work.
    Work,
}

/// Tells from the first unread bytes of a connection what lies there. Long enough are [`REMAINS_BYTES`].
pub(super) fn remains(bytes: &[u8]) -> Remains {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Remains::Nothing;
    };
    match Header::decode(*header) {
        Some(Header {
            kind: Kind::Lost,
            len,
            ..
        }) if (4..=rest.len()).contains(&(len as usize)) => {
            let (rank, reason) = decode_lost(&rest[..len as usize]);
            Remains::Lost { rank, reason }
        }
        Some(header) if header.kind != Kind::Lost => Remains::Work,
        _ => Remains::Nothing,
    }
}

/// Bytes of the longest [`Kind::Lost`] frame.
pub(super) const REMAINS_BYTES: usize = HEADER_BYTES + 4 + REASON_BYTES_MAX;

/// Tells a follower that `rank` is lost. Gives up soon: the follower may be the next to go.
pub(super) fn tell_lost(stream: &TcpStream, rank: u32, reason: &str) {
    let mut bytes = rank.to_le_bytes().to_vec();
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    bytes.extend_from_slice(&reason.as_bytes()[..end]);
    // A follower that does not take it sees the connection close.
    let _ = write_frame(stream, Kind::Lost, 0, &bytes, Some(Instant::now() + POLL));
}

/// Looks at an idle connection without waiting: an end or a [`Kind::Lost`] frame is an error, all else stays unread.
pub(super) fn look(stream: &TcpStream) -> Result<(), FrameError> {
    let closed = |error: io::Error| FrameError::Closed(format!("its connection broke: {error}"));
    let mut first = [0; 1];
    stream.set_nonblocking(true).map_err(closed)?;
    let peeked = stream.peek(&mut first);
    stream.set_nonblocking(false).map_err(closed)?;
    match peeked {
        Ok(0) => Err(FrameError::Closed("it closed its connection".into())),
        Ok(_) if first[0] == Kind::Lost as u8 => {
            let deadline = Some(Instant::now() + POLL);
            Err(read_any_header(stream, deadline)
                .err()
                .unwrap_or(FrameError::TimedOut))
        }
        Ok(_) => Ok(()),
        Err(error) => check(&error, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were() {
        for kind in KINDS {
            let header = Header {
                kind,
                op: 0x0102_0304,
                len: 0xfffe_fdfc,
            };
            assert_eq!(Header::decode(header.encode()), Some(header));
        }
    }

    #[test]
    fn a_closed_connection_tells_what_it_held() {
        let frame = |kind, len: u32, rest: &[u8]| {
            let mut bytes = Header { kind, op: 0, len }.encode().to_vec();
            bytes.extend_from_slice(rest);
            bytes
        };
        let lost = frame(Kind::Lost, 7, b"\x02\0\0\0why");
        assert_eq!(
            remains(&lost),
            Remains::Lost {
                rank: 2,
                reason: "why".into()
            }
        );
        assert_eq!(remains(&frame(Kind::Plan, 9, b"")), Remains::Work);
        let cut_short = &lost[..lost.len() - 1];
        let too_short = frame(Kind::Lost, 3, b"abc");
        for nothing in [b"".as_slice(), &lost[..11], cut_short, &too_short, &[9; 40]] {
            assert_eq!(remains(nothing), Remains::Nothing, "{nothing:?}");
        }
    }

    #[test]
    fn odd_headers_are_refused() {
        for kind in [0, 10, 255] {
            assert_eq!(
                Header::decode([kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                None
            );
        }
        assert_eq!(Header::decode([1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
