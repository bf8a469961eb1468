//! Frames between a twinvm host and its guest agent; no I/O of its own.
//!
//! The host opens one byte stream to the agent and speaks first with [`Hello`]. After [`Welcome`], many streams run
//! side by side on it. The host opens each with [`Frame::Open`] under a number that it never uses again in the
//! session, and ends it with [`Frame::Close`].
//!
//! # Sessions
//!
//! A session outlives its connection. When the connection is lost, the host dials again and says `Hello` with the
//! same session number; if the agent still knows it ([`Welcome::resumed`]), every stream goes on: the host repeats
//! `Open` for streams it has not seen an answer on, which the agent does not carry out twice, and each side repeats
//! the data that the other has not consumed. `Hello` with a new session number ends the old session: its file
//! streams are dropped, its processes go on detached.
//!
//! # Flow control
//!
//! Every byte of a channel has an offset. [`Frame::Credit`] says how far the receiver has consumed a channel and how
//! many bytes beyond that it will hold. The sender keeps what is sent and not consumed, to repeat it after a loss;
//! it never has more than the window in flight. A frame that breaks this ends the connection.
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`frame`] | [`Frame`], [`Channel`] and the codec |
//! | [`message`] | what handshake, requests, replies and errors say |
#![forbid(unsafe_code)]

pub mod frame;
pub mod message;

pub use frame::{Channel, DecodeError, Decoder, Frame, StreamId, encode};
pub use message::{
    EntryKind, ExecSpec, GuestError, GuestErrorKind, Hello, ListedDir, ProcessEntry, ProcessExit,
    Refusal, Reply, Request, Started, StatEntry, TermSize, UserSpec, Welcome,
};

/// The version that this crate speaks. Both sides must speak the same.
pub const PROTOCOL_VERSION: u16 = 1;

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1024;

/// The most bytes of one [`Frame::Data`].
pub const MAX_DATA: usize = 64 << 10;

/// The most bytes of any frame's payload; large enough for an [`ExecSpec`] at Linux's limits for arguments.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// How many bytes a receiver of a channel holds when it has said nothing else.
pub const DEFAULT_WINDOW: u32 = 256 << 10;
