//! A message in a frame's body. The only file that names bincode.
//!
//! bincode has no field skew: a released message never changes, a new field means a new variant. Golden frames are in
//! the tests of [`super::message`]. Decoding is limited in size, and trailing bytes are refused.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame::BODY_BYTES_MAX;

/// Why a body is not a message.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Not a message of this type, or one that claims more than the limit.
    #[error("malformed message: {0}")]
    Decode(String),
    /// A message followed by something else.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// Too long, or not representable.
    #[error("message cannot be sent: {0}")]
    Encode(String),
}

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<BODY_BYTES_MAX>()
}

/// A message as a frame's body.
///
/// # Errors
/// [`CodecError::Encode`] when it is longer than a frame may be.
pub fn encode<T: Serialize>(message: &T) -> Result<Bytes, CodecError> {
    let bytes = bincode::serde::encode_to_vec(message, configuration())
        .map_err(|e| CodecError::Encode(e.to_string()))?;
    if bytes.len() > BODY_BYTES_MAX {
        return Err(CodecError::Encode(format!(
            "{} bytes exceed the limit of {BODY_BYTES_MAX}",
            bytes.len()
        )));
    }
    Ok(bytes.into())
}

/// The message in a frame's body.
///
/// # Errors
/// [`CodecError`] for anything but exactly one message.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, CodecError> {
    let (message, used) = bincode::serde::decode_from_slice(body, configuration())
        .map_err(|e| CodecError::Decode(e.to_string()))?;
    match body.len() - used {
        0 => Ok(message),
        rest => Err(CodecError::Trailing(rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_of_a_tebibyte_is_refused_without_allocating() {
        let mut lying = vec![253u8]; // bincode's mark for a u64 length
        lying.extend_from_slice(&(1u64 << 40).to_le_bytes());
        lying.push(b'x');
        assert!(matches!(
            decode::<String>(&lying),
            Err(CodecError::Decode(_))
        ));
        assert!(matches!(
            decode::<Vec<u8>>(&lying),
            Err(CodecError::Decode(_))
        ));
        assert!(matches!(
            decode::<Vec<(u64, String)>>(&lying),
            Err(CodecError::Decode(_))
        ));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut body = encode(&7u32).unwrap().to_vec();
        body.push(0);
        assert!(matches!(decode::<u32>(&body), Err(CodecError::Trailing(1))));
    }
}
