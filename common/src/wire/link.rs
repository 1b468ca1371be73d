//! A connection that carries messages: frames on a byte stream, plain on loopback, TLS between machines.
//!
//! Owns sockets' options and the two halves of a link. Does not reconnect and does not interpret messages.

use std::io;
use std::marker::PhantomData;
use std::pin::Pin;

use futures::{SinkExt, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::codec::{FramedRead, FramedWrite};

use super::codec::{self, CodecError};
use super::frame::{Frame, FrameCodec, FrameError, FrameKind};
use super::message::{Command, Report};

/// A byte stream under a link.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Why a link ended. The peer's fault or the network's: the process goes on.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Bytes that are not a frame, or a broken socket.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that is not a message.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A frame of the wrong direction.
    #[error("the peer sent a {0:?} frame, which only this side may send")]
    Direction(FrameKind),
}

/// A message type and the frames it travels in.
pub trait Message: Serialize + DeserializeOwned + Send {
    /// The frame's kind.
    const KIND: FrameKind;
}
impl Message for Command {
    const KIND: FrameKind = FrameKind::Command;
}
impl Message for Report {
    const KIND: FrameKind = FrameKind::Report;
}

/// The sending half.
pub struct Sender<M> {
    sink: FramedWrite<Pin<Box<dyn AsyncWrite + Send>>, FrameCodec>,
    kind: PhantomData<fn(M)>,
}

impl<M: Message> Sender<M> {
    /// Sends one message and flushes.
    ///
    /// # Errors
    /// [`LinkError`] when the message is too long or the socket is broken.
    pub async fn send(&mut self, message: &M) -> Result<(), LinkError> {
        let body = codec::encode(message)?;
        self.sink
            .send(Frame {
                kind: M::KIND,
                body,
            })
            .await?;
        Ok(())
    }

    /// Buffers one message; call [`Sender::flush`] after the last of a batch.
    ///
    /// # Errors
    /// As [`Sender::send`].
    pub async fn feed(&mut self, message: &M) -> Result<(), LinkError> {
        let body = codec::encode(message)?;
        self.sink
            .feed(Frame {
                kind: M::KIND,
                body,
            })
            .await?;
        Ok(())
    }

    /// Sends what is buffered.
    ///
    /// # Errors
    /// As [`Sender::send`].
    pub async fn flush(&mut self) -> Result<(), LinkError> {
        SinkExt::<Frame>::flush(&mut self.sink).await?;
        Ok(())
    }
}

/// The receiving half.
pub struct Receiver<M> {
    source: FramedRead<Pin<Box<dyn AsyncRead + Send>>, FrameCodec>,
    kind: PhantomData<fn() -> M>,
}

impl<M: Message> Receiver<M> {
    /// Takes messages up to so many bytes from the next one on; 8 MiB is the most, and what a link begins with.
    pub fn limit(&mut self, body_bytes_max: usize) {
        self.source.decoder_mut().limit(body_bytes_max);
    }

    /// The next message; `None` when the peer closed between frames.
    ///
    /// # Errors
    /// [`LinkError`]: the link must be dropped.
    pub async fn receive(&mut self) -> Result<Option<M>, LinkError> {
        let Some(frame) = self.source.next().await.transpose()? else {
            return Ok(None);
        };
        if frame.kind != M::KIND {
            return Err(LinkError::Direction(frame.kind));
        }
        Ok(Some(codec::decode(&frame.body)?))
    }
}

/// Splits a stream into a link's halves: `Out` is what this side sends, `In` what it receives.
pub fn split<Out: Message, In: Message>(
    stream: impl Stream + 'static,
) -> (Sender<Out>, Receiver<In>) {
    let (read, write) = tokio::io::split(stream);
    let read: Pin<Box<dyn AsyncRead + Send>> = Box::pin(read);
    let write: Pin<Box<dyn AsyncWrite + Send>> = Box::pin(write);
    (
        Sender {
            sink: FramedWrite::new(write, FrameCodec::default()),
            kind: PhantomData,
        },
        Receiver {
            source: FramedRead::new(read, FrameCodec::default()),
            kind: PhantomData,
        },
    )
}

/// Sets the options of a link's socket: no delay, since a frame is a whole step.
///
/// # Errors
/// When the socket is already gone.
pub fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::ids::RequestId;

    #[tokio::test]
    async fn messages_cross_in_order_and_a_close_between_frames_is_the_end() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let (mut send, _): (Sender<Command>, Receiver<Report>) = split(a);
        let (_keep, mut receive): (Sender<Report>, Receiver<Command>) = split(b);
        for nonce in 0..3 {
            send.send(&Command::Ping { nonce }).await.unwrap();
        }
        for expected in 0..3 {
            assert_eq!(
                receive.receive().await.unwrap(),
                Some(Command::Ping { nonce: expected })
            );
        }
        drop((send, _keep));
    }

    #[tokio::test]
    async fn a_frame_of_the_wrong_direction_ends_the_link() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let (mut send, _r): (Sender<Command>, Receiver<Report>) = split(a);
        let (_s, mut receive): (Sender<Command>, Receiver<Report>) = split(b);
        send.send(&Command::Cancel {
            request: RequestId(1),
        })
        .await
        .unwrap();
        assert!(matches!(
            receive.receive().await,
            Err(LinkError::Direction(FrameKind::Command))
        ));
    }

    #[tokio::test]
    async fn garbage_ends_the_link_with_an_error() {
        let (mut a, b) = tokio::io::duplex(1 << 16);
        let (_s, mut receive): (Sender<Report>, Receiver<Command>) = split(b);
        a.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(matches!(
            receive.receive().await,
            Err(LinkError::Frame(FrameError::Magic(_)))
        ));
    }
}
