//! How two ranks prove to each other that they belong together: HMAC-SHA256 over both ends' challenges.
//!
//! Owns the bytes of the handshake and their checks; both sides of the conversation stand here, one under the other.
//! A member dials and speaks first:
//!
//! ```text
//! member -> leader   hello: magic, version, group, generation, rank, ranks, host, nonce
//! leader -> member   0, nonce, HMAC(key, "tandem leader" || hello || nonce)   or   1: no such group here (yet)
//! member -> leader   HMAC(key, "tandem member" || hello || nonce)
//! ```
//!
//! The connection is authenticated, not encrypted: ranks talk on a private network.

use std::net::TcpStream;
use std::time::Instant;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::frame::{FrameError, read_bytes, write_bytes};
use super::{GroupId, GroupKey, random};

const MAGIC: [u8; 8] = *b"tandemRR";
const VERSION: u16 = 1;
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;
/// Magic, version, length of the host id, group, generation, rank, ranks, nonce.
const FIXED_BYTES: usize = 8 + 2 + 2 + 8 + 8 + 4 + 4 + NONCE_BYTES;
/// Longest host id.
pub(super) const HOST_BYTES_MAX: usize = 255;
const WELCOME: u8 = 0;
const UNKNOWN_GROUP: u8 = 1;

/// What a member says of itself. Nothing of it is proved before the handshake ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) id: GroupId,
    pub(super) rank: u32,
    pub(super) ranks: u32,
    /// Names the machine: two equal ones can try shared memory.
    pub(super) host: String,
}

/// How a handshake ended, seen by the member.
pub(super) enum Greeting {
    /// Both ends know the key.
    Welcome,
    /// The leader has not been told of the group yet: try again.
    UnknownGroup,
    /// The leader does not know the key.
    OtherKey,
}

/// A member's hello as sent, and as hashed into the proofs.
struct Transcript(Vec<u8>);

impl Transcript {
    fn new(hello: &Hello, nonce: [u8; NONCE_BYTES]) -> Transcript {
        debug_assert!(hello.host.len() <= HOST_BYTES_MAX);
        let mut bytes = Vec::with_capacity(FIXED_BYTES + hello.host.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((hello.host.len() as u16).to_le_bytes());
        bytes.extend(hello.id.group.to_le_bytes());
        bytes.extend(hello.id.generation.to_le_bytes());
        bytes.extend(hello.rank.to_le_bytes());
        bytes.extend(hello.ranks.to_le_bytes());
        bytes.extend(nonce);
        bytes.extend(hello.host.as_bytes());
        Transcript(bytes)
    }

    fn read(stream: &TcpStream, deadline: Instant) -> Result<(Hello, Transcript), FrameError> {
        let odd = |what: &str| FrameError::Unexpected(format!("a hello with {what}"));
        let mut bytes = vec![0; FIXED_BYTES];
        read_bytes(stream, &mut bytes, Some(deadline))?;
        let array = |at: usize| -> [u8; 8] { std::array::from_fn(|i| bytes[at + i]) };
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes[..8] != MAGIC {
            return Err(odd("another magic"));
        }
        if short(8) != VERSION {
            return Err(odd(&format!(
                "version {} (this side speaks {VERSION})",
                short(8)
            )));
        }
        let host_bytes = short(10) as usize;
        if host_bytes > HOST_BYTES_MAX {
            return Err(odd("a host id that is too long"));
        }
        let id = GroupId {
            group: u64::from_le_bytes(array(12)),
            generation: u64::from_le_bytes(array(20)),
        };
        let (rank, ranks) = (half(28), half(32));
        bytes.resize(FIXED_BYTES + host_bytes, 0);
        read_bytes(stream, &mut bytes[FIXED_BYTES..], Some(deadline))?;
        let host = String::from_utf8(bytes[FIXED_BYTES..].to_vec())
            .map_err(|_| odd("a host id that is not UTF-8"))?;
        Ok((
            Hello {
                id,
                rank,
                ranks,
                host,
            },
            Transcript(bytes),
        ))
    }

    fn mac(&self, key: &GroupKey, role: &[u8], leader_nonce: &[u8]) -> Hmac<Sha256> {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(key.bytes()).expect("HMAC takes keys of any length");
        mac.update(role);
        mac.update(&self.0);
        mac.update(leader_nonce);
        mac
    }

    fn leader_mac(&self, key: &GroupKey, leader_nonce: &[u8]) -> Hmac<Sha256> {
        self.mac(key, b"tandem leader", leader_nonce)
    }

    fn member_mac(&self, key: &GroupKey, leader_nonce: &[u8]) -> Hmac<Sha256> {
        self.mac(key, b"tandem member", leader_nonce)
    }
}

/// The leader's side, up to where it must know the group: reads a hello.
pub(super) fn read_hello(
    stream: &TcpStream,
    deadline: Instant,
) -> Result<PendingMember<'_>, FrameError> {
    let (hello, transcript) = Transcript::read(stream, deadline)?;
    Ok(PendingMember {
        stream,
        hello,
        transcript,
        deadline,
    })
}

/// A connection that said hello and has proved nothing yet.
pub(super) struct PendingMember<'a> {
    stream: &'a TcpStream,
    /// What it says it is.
    pub(super) hello: Hello,
    transcript: Transcript,
    deadline: Instant,
}

impl PendingMember<'_> {
    /// Tells the member to come again.
    pub(super) fn refuse_unknown_group(self) {
        let _ = write_bytes(self.stream, &[UNKNOWN_GROUP], Some(self.deadline));
    }

    /// Proves to the member that this side knows the key and has it prove the same.
    pub(super) fn authenticate(self, key: &GroupKey) -> Result<Hello, FrameError> {
        let nonce = nonce()?;
        let mut answer = vec![WELCOME];
        answer.extend(nonce);
        answer.extend(
            self.transcript
                .leader_mac(key, &nonce)
                .finalize()
                .into_bytes(),
        );
        write_bytes(self.stream, &answer, Some(self.deadline))?;
        let mut proof = [0; PROOF_BYTES];
        read_bytes(self.stream, &mut proof, Some(self.deadline))?;
        // `verify_slice` compares in constant time.
        match self.transcript.member_mac(key, &nonce).verify_slice(&proof) {
            Ok(()) => Ok(self.hello),
            Err(_) => Err(FrameError::Unexpected(
                "a proof made with another key".into(),
            )),
        }
    }
}

/// The member's side.
pub(super) fn greet(
    stream: &TcpStream,
    hello: &Hello,
    key: &GroupKey,
    deadline: Instant,
) -> Result<Greeting, FrameError> {
    let transcript = Transcript::new(hello, nonce()?);
    write_bytes(stream, &transcript.0, Some(deadline))?;
    let mut status = [0; 1];
    read_bytes(stream, &mut status, Some(deadline))?;
    match status[0] {
        WELCOME => {}
        UNKNOWN_GROUP => return Ok(Greeting::UnknownGroup),
        other => {
            return Err(FrameError::Unexpected(format!(
                "status {other} in a handshake"
            )));
        }
    }
    let mut answer = [0; NONCE_BYTES + PROOF_BYTES];
    read_bytes(stream, &mut answer, Some(deadline))?;
    let (leader_nonce, proof) = answer.split_at(NONCE_BYTES);
    if transcript
        .leader_mac(key, leader_nonce)
        .verify_slice(proof)
        .is_err()
    {
        return Ok(Greeting::OtherKey);
    }
    write_bytes(
        stream,
        &transcript
            .member_mac(key, leader_nonce)
            .finalize()
            .into_bytes(),
        Some(deadline),
    )?;
    Ok(Greeting::Welcome)
}

fn nonce() -> Result<[u8; NONCE_BYTES], FrameError> {
    random().map_err(|error| FrameError::Unexpected(format!("no random numbers: {error}")))
}
