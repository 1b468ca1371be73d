//! Frames: `magic u16 | version u8 | kind u8 | length u32 | body`, integers little-endian.
//!
//! Works on slices and can answer "incomplete". Knows neither sockets nor what a body means.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

/// First two bytes of each frame: a stranger's protocol is noticed at once.
pub const MAGIC: u16 = 0x7d1a;
/// Version of the frame layout itself, not of the messages.
pub const FRAME_VERSION: u8 = 1;
/// Bytes before the body.
pub const HEADER_BYTES: usize = 8;
/// Longest body. A prompt of 4 MiB and its wrapping fit; nothing legal is longer.
pub const BODY_BYTES_MAX: usize = 8 << 20;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Coordinator to worker.
    Command,
    /// Worker to coordinator.
    Report,
}

/// A frame: its kind and its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: FrameKind,
    /// The encoded message.
    pub body: Bytes,
}

/// Why bytes are not a frame. Each closes the link.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol.
    #[error("frame starts with {0:#06x}, not {MAGIC:#06x}: the peer speaks another protocol")]
    Magic(u16),
    /// Another frame layout.
    #[error("frame version {0} is unknown; this side speaks {FRAME_VERSION}")]
    Version(u8),
    /// Not a kind of ours.
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    /// Longer than the limit.
    #[error("frame body of {0} bytes exceeds the limit of {1}")]
    TooLong(usize, usize),
    /// The stream ended inside a frame.
    #[error("the connection closed inside a frame")]
    Truncated,
    /// The socket failed.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
}

/// Cuts a byte stream into frames and back.
#[derive(Debug)]
pub struct FrameCodec {
    body_bytes_max: usize,
}

impl FrameCodec {
    /// Takes bodies up to `body_bytes_max`, which is at most [`BODY_BYTES_MAX`], from the next frame on.
    pub fn limit(&mut self, body_bytes_max: usize) {
        self.body_bytes_max = body_bytes_max.min(BODY_BYTES_MAX);
    }
}

impl Default for FrameCodec {
    fn default() -> Self {
        FrameCodec {
            body_bytes_max: BODY_BYTES_MAX,
        }
    }
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = FrameError;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if source.len() < HEADER_BYTES {
            return Ok(None);
        }
        let mut header = &source[..HEADER_BYTES];
        let magic = header.get_u16_le();
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let version = header.get_u8();
        if version != FRAME_VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = match header.get_u8() {
            0 => FrameKind::Command,
            1 => FrameKind::Report,
            other => return Err(FrameError::Kind(other)),
        };
        let length = header.get_u32_le() as usize;
        if length > self.body_bytes_max {
            return Err(FrameError::TooLong(length, self.body_bytes_max));
        }
        if source.len() < HEADER_BYTES + length {
            // Grow by what arrives, at most a read ahead: a lying length costs its sender the bytes, not us.
            source.reserve((HEADER_BYTES + length - source.len()).min(64 << 10));
            return Ok(None);
        }
        source.advance(HEADER_BYTES);
        Ok(Some(Frame {
            kind,
            body: source.split_to(length).freeze(),
        }))
    }

    fn decode_eof(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        match self.decode(source)? {
            Some(frame) => Ok(Some(frame)),
            None if source.is_empty() => Ok(None),
            None => Err(FrameError::Truncated),
        }
    }
}

impl Encoder<Frame> for FrameCodec {
    type Error = FrameError;

    fn encode(&mut self, frame: Frame, target: &mut BytesMut) -> Result<(), FrameError> {
        if frame.body.len() > self.body_bytes_max {
            return Err(FrameError::TooLong(frame.body.len(), self.body_bytes_max));
        }
        target.reserve(HEADER_BYTES + frame.body.len());
        target.put_u16_le(MAGIC);
        target.put_u8(FRAME_VERSION);
        target.put_u8(match frame.kind {
            FrameKind::Command => 0,
            FrameKind::Report => 1,
        });
        target.put_u32_le(frame.body.len() as u32);
        target.extend_from_slice(&frame.body);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(body: &[u8]) -> BytesMut {
        let mut bytes = BytesMut::new();
        let frame = Frame {
            kind: FrameKind::Report,
            body: Bytes::copy_from_slice(body),
        };
        FrameCodec::default().encode(frame, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_body_at_the_limit_passes_and_one_past_it_does_not() {
        let mut at_limit = encoded(&vec![7; BODY_BYTES_MAX]);
        assert_eq!(
            FrameCodec::default()
                .decode(&mut at_limit)
                .unwrap()
                .unwrap()
                .body
                .len(),
            BODY_BYTES_MAX
        );
        let too_long = Frame {
            kind: FrameKind::Report,
            body: vec![7; BODY_BYTES_MAX + 1].into(),
        };
        assert!(matches!(
            FrameCodec::default().encode(too_long, &mut BytesMut::new()),
            Err(FrameError::TooLong(..))
        ));
        let mut lying = encoded(b"x");
        lying[4..8].copy_from_slice(&(BODY_BYTES_MAX as u32 + 1).to_le_bytes());
        assert!(matches!(
            FrameCodec::default().decode(&mut lying),
            Err(FrameError::TooLong(..))
        ));
    }

    #[test]
    fn a_lower_limit_holds_from_the_next_frame_on() {
        let mut codec = FrameCodec::default();
        codec.limit(3);
        let mut two = encoded(b"abc");
        two.extend_from_slice(&encoded(b"abcd"));
        assert_eq!(&codec.decode(&mut two).unwrap().unwrap().body[..], b"abc");
        let refused = codec.decode(&mut two.clone());
        assert!(matches!(refused, Err(FrameError::TooLong(4, 3))));
        codec.limit(usize::MAX);
        assert_eq!(&codec.decode(&mut two).unwrap().unwrap().body[..], b"abcd");
    }

    #[test]
    fn a_lying_length_within_the_limit_allocates_only_a_read_ahead() {
        let mut lying = encoded(b"x");
        lying[4..8].copy_from_slice(&(BODY_BYTES_MAX as u32).to_le_bytes());
        assert!(FrameCodec::default().decode(&mut lying).unwrap().is_none());
        assert!(
            lying.capacity() < 256 << 10,
            "reserved {} bytes on the peer's word",
            lying.capacity()
        );
    }

    #[test]
    fn closing_between_frames_and_inside_a_frame_are_two_results() {
        assert!(
            FrameCodec::default()
                .decode_eof(&mut BytesMut::new())
                .unwrap()
                .is_none()
        );
        let mut half = encoded(b"hello").split_to(9);
        assert!(matches!(
            FrameCodec::default().decode_eof(&mut half),
            Err(FrameError::Truncated)
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_frames_or_an_error_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut source = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = FrameCodec::default().decode(&mut source) {
                prop_assert!(frame.body.len() <= bytes.len());
            }
        }

        #[test]
        fn frames_survive_any_cut_of_the_stream(bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..6), cut in 1usize..16) {
            let mut stream = BytesMut::new();
            for body in &bodies { stream.extend_from_slice(&encoded(body)); }
            let (mut source, mut seen) = (BytesMut::new(), Vec::new());
            for piece in stream.chunks(cut) {
                source.extend_from_slice(piece);
                while let Some(frame) = FrameCodec::default().decode(&mut source).unwrap() { seen.push(frame.body.to_vec()); }
            }
            prop_assert_eq!(seen, bodies);
        }
    }
}
