//! Frames and their codec.
//!
//! A frame on the wire, all numbers little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 4 | length of the payload |
//! | 4 | stream id, 0 for the handshake |
//! | 1 | type |
//! | n | payload: raw for `Data`, `Eof` and `Credit`, nothing for `Close`, postcard for the rest |

use crate::{
    MAX_DATA, MAX_LIST, MAX_PAYLOAD, PROTOCOL_VERSION,
    message::{GuestError, Hello, ProcessExit, Refusal, Reply, Request, Started, Welcome},
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vm_planted_bugs::{Bug, planted};

/// Names a stream within a session. 0 is the handshake's.
pub type StreamId = u32;

/// One of a stream's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Channel {
    /// Host to guest: standard input, or a file's new content.
    Stdin = 0,
    /// Guest to host: standard output, or a file's content.
    Stdout = 1,
    /// Guest to host: standard error.
    Stderr = 2,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Host: opens the connection.
    Hello(Hello),
    /// Agent: accepts it.
    Welcome(Welcome),
    /// Agent: refuses it.
    Refused(Refusal),
    /// Host: opens a stream.
    Open(Request),
    /// Agent: the request is under way.
    Started(Started),
    /// Either: bytes of a channel.
    Data {
        /// The channel.
        channel: Channel,
        /// Offset of the first byte.
        offset: u64,
        /// 1 to [`MAX_DATA`] bytes.
        bytes: Bytes,
    },
    /// Either: the channel ends here.
    Eof {
        /// The channel.
        channel: Channel,
        /// How many bytes it had in all.
        offset: u64,
    },
    /// Either: how far the receiver is, and how many bytes beyond it will hold.
    Credit {
        /// The channel.
        channel: Channel,
        /// Bytes consumed; the sender need not keep them.
        consumed: u64,
        /// Bytes beyond `consumed` that may be sent.
        window: u32,
    },
    /// Agent: the request has ended well.
    Done(Reply),
    /// Agent: the request has failed.
    Failed(GuestError),
    /// Agent: the process has ended and all its output was sent.
    Exited(ProcessExit),
    /// Host: the stream is not needed any more. A process that was not detached is killed.
    Close,
}

/// Bytes that are no frame. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The length is above [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes, at most {MAX_PAYLOAD} are allowed")]
    TooLong(u32),
    /// No such type.
    #[error("unknown frame type {0}")]
    UnknownType(u8),
    /// The payload is not what its type says.
    #[error("malformed payload of frame type {0}")]
    Malformed(u8),
}

const HEADER: usize = 9;
/// Channel and offset, which begin the payload of `Data`, `Eof` and `Credit`.
const RAW: usize = 9;

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const REFUSED: u8 = 3;
    pub(super) const OPEN: u8 = 4;
    pub(super) const STARTED: u8 = 5;
    pub(super) const DATA: u8 = 6;
    pub(super) const EOF: u8 = 7;
    pub(super) const CREDIT: u8 = 8;
    pub(super) const DONE: u8 = 9;
    pub(super) const FAILED: u8 = 10;
    pub(super) const EXITED: u8 = 11;
    pub(super) const CLOSE: u8 = 12;
}

/// Appends a frame to `out`.
///
/// # Panics
/// When the frame's payload is above [`MAX_PAYLOAD`], or data is empty or above [`MAX_DATA`]; callers bound requests
/// with [`fits`] first.
pub fn encode(stream: StreamId, frame: &Frame, out: &mut BytesMut) {
    let start = out.len();
    out.put_u32_le(0);
    out.put_u32_le(stream);
    out.put_u8(type_of(frame));
    match frame {
        Frame::Hello(it) => put(it, out),
        Frame::Welcome(it) => put(it, out),
        Frame::Refused(it) => put(it, out),
        Frame::Open(it) => put(it, out),
        Frame::Started(it) => put(it, out),
        Frame::Done(it) => put(it, out),
        Frame::Failed(it) => put(it, out),
        Frame::Exited(it) => put(it, out),
        Frame::Data { channel, offset, bytes } => put_data(*channel, *offset, bytes, out),
        Frame::Eof { channel, offset } => {
            out.put_u8(*channel as u8);
            out.put_u64_le(*offset);
        }
        Frame::Credit { channel, consumed, window } => {
            out.put_u8(*channel as u8);
            out.put_u64_le(*consumed);
            out.put_u32_le(*window);
        }
        Frame::Close => {}
    }
    finish(start, out);
}

/// Appends a [`Frame::Data`] to `out` without a [`Bytes`] being made of it first.
///
/// # Panics
/// When there are no bytes, or more than [`MAX_DATA`].
pub fn encode_data(
    stream: StreamId,
    channel: Channel,
    offset: u64,
    bytes: &[u8],
    out: &mut BytesMut,
) {
    let start = out.len();
    out.reserve(HEADER + RAW + bytes.len());
    out.put_u32_le(0);
    out.put_u32_le(stream);
    out.put_u8(kind::DATA);
    put_data(channel, offset, bytes, out);
    finish(start, out);
}

/// Says whether a request is small enough to be sent.
#[must_use]
pub fn fits(request: &Request) -> bool {
    if let Request::Exec(spec) = request
        && spec.args.len().max(spec.env.len()) > MAX_LIST
    {
        return false;
    }
    postcard::experimental::serialized_size(request).is_ok_and(|size| size <= MAX_PAYLOAD)
}

/// Takes frames out of bytes as they arrive, in pieces of any size.
///
/// It holds what was fed and not yet taken out: feed pieces of bounded size, and take all frames out between them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Adds bytes that have arrived.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Gives the buffer to read into.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Gives how many bytes were fed and not yet taken out as frames.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Takes the next whole frame out, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// When the bytes are no frame; every later call fails too.
    pub fn next_frame(&mut self) -> Result<Option<(StreamId, Frame)>, DecodeError> {
        let Some(header) = self.buffer.get(..HEADER) else {
            return Ok(None);
        };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (length, stream, kind) = (word(0), word(4), header[8]);
        let payload = usize::try_from(length).unwrap_or(usize::MAX);
        if payload > MAX_PAYLOAD {
            return Err(DecodeError::TooLong(length));
        }
        if !(kind::HELLO..=kind::CLOSE).contains(&kind) {
            return Err(DecodeError::UnknownType(kind));
        }
        if self.buffer.len() < HEADER + payload {
            return Ok(None);
        }
        let frame = decode(kind, &self.buffer[HEADER..HEADER + payload])?;
        if planted(Bug::FramesTogetherAreLost) {
            self.buffer.clear();
        } else {
            self.buffer.advance(HEADER + payload);
        }
        Ok(Some((stream, frame)))
    }
}

fn type_of(frame: &Frame) -> u8 {
    match frame {
        Frame::Hello(_) => kind::HELLO,
        Frame::Welcome(_) => kind::WELCOME,
        Frame::Refused(_) => kind::REFUSED,
        Frame::Open(_) => kind::OPEN,
        Frame::Started(_) => kind::STARTED,
        Frame::Data { .. } => kind::DATA,
        Frame::Eof { .. } => kind::EOF,
        Frame::Credit { .. } => kind::CREDIT,
        Frame::Done(_) => kind::DONE,
        Frame::Failed(_) => kind::FAILED,
        Frame::Exited(_) => kind::EXITED,
        Frame::Close => kind::CLOSE,
    }
}

fn put_data(channel: Channel, offset: u64, bytes: &[u8], out: &mut BytesMut) {
    assert!((1..=MAX_DATA).contains(&bytes.len()), "data of {} bytes", bytes.len());
    out.put_u8(channel as u8);
    out.put_u64_le(if planted(Bug::OffsetsWrap) { offset & 0xffff } else { offset });
    out.put_slice(bytes);
}

/// Writes the payload's length into the frame that begins at `start`.
fn finish(start: usize, out: &mut BytesMut) {
    let length = out.len() - start - HEADER;
    assert!(length <= MAX_PAYLOAD, "frame of {length} bytes");
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

fn put<T: Serialize>(value: &T, out: &mut BytesMut) {
    struct Sink<'a>(&'a mut BytesMut);
    impl postcard::ser_flavors::Flavor for Sink<'_> {
        type Output = ();
        fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
            self.0.put_u8(byte);
            Ok(())
        }
        fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
            self.0.put_slice(bytes);
            Ok(())
        }
        fn finalize(self) -> postcard::Result<()> {
            Ok(())
        }
    }
    let written = postcard::serialize_with_flavor(value, Sink(out));
    debug_assert!(written.is_ok(), "the messages have no shape that postcard refuses");
}

fn decode(kind: u8, payload: &[u8]) -> Result<Frame, DecodeError> {
    fn all<T: DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<T, DecodeError> {
        match postcard::take_from_bytes(payload) {
            Ok((value, [])) => Ok(value),
            _ => Err(DecodeError::Malformed(kind)),
        }
    }
    Ok(match kind {
        kind::HELLO => Frame::Hello(match postcard::take_from_bytes::<u16>(payload) {
            // Another version may say more in its greeting; it must still be told which version is spoken here.
            Ok((version, _)) if version != PROTOCOL_VERSION => {
                Hello { version, session: 0, resume: false, live: Vec::new() }
            }
            _ => all(kind, payload)?,
        }),
        kind::WELCOME => Frame::Welcome(all(kind, payload)?),
        kind::REFUSED => Frame::Refused(all(kind, payload)?),
        kind::OPEN => Frame::Open(all(kind, payload)?),
        kind::STARTED => Frame::Started(all(kind, payload)?),
        kind::DONE => Frame::Done(all(kind, payload)?),
        kind::FAILED => Frame::Failed(all(kind, payload)?),
        kind::EXITED => Frame::Exited(all(kind, payload)?),
        kind::CLOSE if payload.is_empty() => Frame::Close,
        kind::DATA | kind::EOF | kind::CREDIT => decode_raw(kind, payload)?,
        _ => return Err(DecodeError::Malformed(kind)),
    })
}

fn decode_raw(kind: u8, mut payload: &[u8]) -> Result<Frame, DecodeError> {
    let malformed = DecodeError::Malformed(kind);
    if payload.len() < RAW {
        return Err(malformed);
    }
    let channel = match payload.get_u8() {
        0 => Channel::Stdin,
        1 => Channel::Stdout,
        2 => Channel::Stderr,
        _ => return Err(malformed),
    };
    let channel = match channel {
        Channel::Stdout if planted(Bug::OutputsAreSwapped) => Channel::Stderr,
        Channel::Stderr if planted(Bug::OutputsAreSwapped) => Channel::Stdout,
        channel => channel,
    };
    let offset = payload.get_u64_le();
    match (kind, payload.len()) {
        (kind::DATA, 1..=MAX_DATA) if offset.checked_add(MAX_DATA as u64).is_some() => {
            Ok(Frame::Data { channel, offset, bytes: Bytes::copy_from_slice(payload) })
        }
        (kind::EOF, 0) => Ok(Frame::Eof { channel, offset }),
        (kind::CREDIT, 4) => {
            Ok(Frame::Credit { channel, consumed: offset, window: payload.get_u32_le() })
        }
        _ => Err(malformed),
    }
}

#[cfg(test)]
mod tests;
