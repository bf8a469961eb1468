//! Frames between a twinvm host and its guest agent; no I/O of its own.
//!
//! The host opens one byte stream to the agent and speaks first with [`Hello`]. After [`Welcome`], many streams run
//! side by side on it. The host opens each with [`Frame::Open`] under a number that it never uses again in the
//! session, and ends it with [`Frame::Close`].
//!
//! # Sessions
//!
//! A session outlives its connection. When the connection is lost, the host dials again and says `Hello` with the
//! same session number and [`Hello::resume`]; if the agent still knows the session ([`Welcome::resumed`]), every
//! stream goes on. `Hello` with another session number, or without `resume`, ends the old session: its file streams
//! are dropped, its processes go on detached. Either way the agent closes the connection that served before.
//!
//! What is to happen exactly once is asked for with [`Frame::Open`]: the agent carries out each stream number once in
//! a session, and answers a repeated `Open` with what it answered, or would have answered, the first time. It keeps
//! a stream's answer until `Close`, and whether `Close` came is told by [`Hello::live`]. A session's first `Hello` may
//! say `resume` or not; `live` counts only where the session is resumed.
//!
//! # Resuming, step by step
//!
//! 1. The host says `Hello` with all streams that it still holds in [`Hello::live`]. The agent closes every other
//!    stream of the session, as by `Close`, and answers [`Welcome`] with `resumed: true`. Then, for each stream whose standard input (or file
//!    content) it still takes, it sends `Credit { Stdin, consumed, window }`. The host sends again all it has from
//!    `consumed` on, in order, and `Eof` if it had sent it. This credit may come before the stream's `Started`.
//! 2. The agent sends nothing more on a stream until the host has announced it. The host announces
//!    - a stream on which it has seen no answer (neither `Started`, `Done` nor `Failed`) with the same `Open` as
//!      before. The agent sends `Started` again where the request has one, and everything that follows it;
//!    - every other stream on which it still waits for something with `Credit { Stdout, consumed, window }` and
//!      `Credit { Stderr, consumed, window }`, both, with `consumed` no lower than it was before the loss; files
//!      have `Stdout` only. The agent goes on with each channel from there. It repeats `Eof`, and the stream's
//!      end (`Exited`, `Done`, `Failed`), even if it had sent them before; the host ignores repeats.
//! 3. Data that overlaps what was received is trimmed by both sides; data that leaves a gap breaks the protocol.
//!
//! # Flow control
//!
//! Every byte of a channel has an offset. [`Frame::Credit`] says how far the receiver has consumed a channel and how
//! many bytes beyond that it will hold. Until it is sent, the window is [`DEFAULT_WINDOW`] from the channel's first
//! offset in [`Started`]. The sender keeps what is sent and not consumed, to repeat it after a loss; it never has more
//! than the window in flight. A frame that breaks this ends the connection. `consumed` never goes back, and is never
//! above what was sent. Standard input for a program that has closed it, has ended or was started without it is
//! dropped, and credit for it goes on.
//!
//! # A process's stream
//!
//! `Started`, then `Data` as there is output, `Eof` of each of the two outputs when it ends (for a process with a
//! terminal, standard error ends at its first offset), and `Exited` last. Output that is not consumed stalls only the
//! process that writes it. The host may send standard input right after `Open`, without waiting for `Started`.
//! When another stream attaches to the process, this one fails with [`GuestErrorKind::NoSuchProcess`], and closing it
//! does not touch the process.
//!
//! # Frames for streams that do not exist
//!
//! The agent ignores them, as they may cross its own failure of the stream.
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`boot`] | what an image tells the agent that is a machine's first process |
//! | [`frame`] | [`Frame`], [`Channel`] and the codec |
//! | [`message`] | what handshake, requests, replies and errors say |
#![forbid(unsafe_code)]

pub mod boot;
mod bounded;
pub mod frame;
pub mod message;

pub use frame::{Channel, DecodeError, Decoder, Frame, StreamId, encode, encode_data, fits};
pub use message::{
    EntryKind, ExecSpec, GuestError, GuestErrorKind, Hello, ListedDir, ProcessEntry, ProcessExit,
    Refusal, Reply, Request, ResourceLimit, Started, StatEntry, TermSize, UserSpec, Welcome,
};

/// The version that this crate speaks. Both sides must speak the same.
pub const PROTOCOL_VERSION: u16 = 3;

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1024;

/// The most bytes of one [`Frame::Data`].
pub const MAX_DATA: usize = 64 << 10;

/// The most bytes of any frame's payload; large enough for an [`ExecSpec`] at Linux's limits for arguments.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// How many bytes a receiver of a channel holds when it has said nothing else.
pub const DEFAULT_WINDOW: u32 = 256 << 10;

/// The most arguments, variables, streams or processes that one frame lists.
pub const MAX_LIST: usize = 128 << 10;

/// How many resources there are to limit.
pub const MAX_LIMITS: usize = 16;

/// The most names of a [`ListedDir`].
pub const MAX_ENTRIES: usize = 1 << 20;
