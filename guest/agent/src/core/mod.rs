//! [`AgentCore`]: the agent as a state machine without I/O.
//!
//! # Bounds
//!
//! | what | at most | beyond it |
//! | --- | --- | --- |
//! | streams of a session, ended ones that were not closed too | 1,024 | `OutOfResources` |
//! | processes, ended ones that are kept too | 1,000 | `OutOfResources` |
//! | ended processes that belong to no stream | 64 | the oldest is forgotten |
//! | input or output held for a channel | [`AgentConfig::window`] | the sender waits |
//! | output held for a process without a reader | [`AgentConfig::retained_detached`] | the oldest is dropped |
//! | a directory listing | 1,048,576 names and 32 MiB | `OutOfResources` |
//! | bytes waiting on a connection | 1 MiB of data; 2 MiB and one frame in all | streams wait; the host is not heard |
//!
//! # Map of the module
//!
//! | module | what it holds |
//! | --- | --- |
//! | `link` | connections, their decoders and outgoing bytes |
//! | `serve` | what each frame of the host does |
//! | `stream` | a stream and its end |
//! | `flow` | offsets, windows and credit |
//! | `process`, `exec` | processes from their start to their end; how a program is found and started |
//! | `file`, `tree` | files read and replaced; directories |

mod error;
mod exec;
mod file;
mod flow;
mod link;
mod process;
mod serve;
mod stream;
mod tree;

use self::{flow::OUTGOING_BOUND, link::Link, process::Processes, stream::Stream};
use crate::os::{Child, GuestOs};
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};
use vm_guest_protocol::{DEFAULT_WINDOW, DecodeError, StreamId};
use vm_planted_bugs::{Bug, planted};

/// How often it is looked whether a shutdown's processes are gone.
const SHUTDOWN_POLL: Duration = Duration::from_millis(20);

const SIGKILL: u8 = 9;

/// Names a connection of the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConnId(pub u64);

/// The bounds that an agent works in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentConfig {
    /// How many bytes of a channel the agent holds, either way.
    pub window: u32,
    /// How many of the last output bytes of each channel a process without a reader keeps.
    pub retained_detached: usize,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self { window: DEFAULT_WINDOW, retained_detached: 256 << 10 }
    }
}

impl AgentConfig {
    fn window_bytes(&self) -> usize {
        usize::try_from(self.window).unwrap_or(usize::MAX).max(1)
    }
}

/// What the host did against the protocol. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Bytes that are no frame.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A frame before the handshake.
    #[error("the first frame of a connection is not a greeting")]
    NoHello,
    /// A frame that a host does not send, or not on this stream or channel.
    #[error("a frame that a host does not send here")]
    Unexpected,
    /// Credit for bytes that were not sent, or that asks for bytes that were consumed.
    #[error("credit for bytes that were not sent or are gone")]
    Credit,
    /// Data with a gap before it.
    #[error("data with a gap before it")]
    Gap,
    /// Data beyond the window.
    #[error("data beyond the window")]
    Overrun,
    /// Data after the end, or another end.
    #[error("data after the end of its channel, or another end")]
    AfterEof,
}

/// A child that the driver should watch, and what for. Its end is always of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChildInterest {
    /// The child.
    pub child: Child,
    /// Whether its standard output is to be read.
    pub stdout: bool,
    /// Whether its standard error is to be read.
    pub stderr: bool,
    /// Whether bytes wait for its standard input.
    pub stdin: bool,
}

/// The agent: connections, the session with its streams, and the processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentCore {
    config: AgentConfig,
    link: Link,
    session: Option<u128>,
    streams: BTreeMap<StreamId, Stream>,
    processes: Processes,
    /// The stream at which the connection was last full.
    cursor: StreamId,
    shutdown: Option<Shutdown>,
}

/// A shutdown under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Shutdown {
    deadline: Duration,
    next_poll: Duration,
    off: bool,
}

impl AgentCore {
    /// Makes an agent that nothing is connected to.
    #[must_use]
    pub fn new(config: AgentConfig) -> Self {
        Self {
            config,
            link: Link::default(),
            session: None,
            streams: BTreeMap::new(),
            processes: Processes::default(),
            cursor: 0,
            shutdown: None,
        }
    }

    /// Takes note of a new connection.
    pub fn connected(&mut self, conn: ConnId) {
        self.link.connected(conn);
    }

    /// Takes bytes that the host sent, in any pieces. Bytes of a connection that is not known, or that is to be closed,
    /// are dropped.
    ///
    /// # Errors
    /// When the host broke the protocol; the driver closes the connection and calls
    /// [`disconnected`](Self::disconnected).
    pub fn received(
        &mut self,
        conn: ConnId,
        bytes: &[u8],
        os: &mut dyn GuestOs,
    ) -> Result<(), Violation> {
        self.link.feed(conn, bytes);
        self.hear(conn, os)
    }

    /// Takes note that a connection is gone. The session stays for the host to resume.
    pub fn disconnected(&mut self, conn: ConnId) {
        self.link.disconnected(conn);
    }

    /// Takes note that every connection is gone, as after a restore.
    pub fn reset_connections(&mut self) {
        self.link.reset();
    }

    /// Moves output and input, and takes note of ends, timeouts and the shutdown's grace. Says whether anything
    /// changed. It is to be called when a child may have something to be moved, when
    /// [`next_deadline`](Self::next_deadline) is reached, and after outgoing bytes were sent.
    pub fn advance(&mut self, os: &mut dyn GuestOs) -> bool {
        let mut changed = self.hear_deferred(os);
        changed |= self.flush_congested(os);
        let Self { config, link, streams, processes, cursor, .. } = self;
        processes.advance(os, config, |process| {
            changed = true;
            if let Some(reader) = process.reader
                && let Some(stream) = streams.get_mut(&reader)
                && serve::flush_process(link, config, (reader, stream), process)
            {
                *cursor = reader;
            }
        });
        changed | self.advance_shutdown(os)
    }

    /// Gives the bytes that wait to be sent on a connection; the driver takes from the front what it sent, and then
    /// calls [`advance`](Self::advance).
    pub fn outgoing(&mut self, conn: ConnId) -> Option<&mut BytesMut> {
        self.link.outgoing(conn)
    }

    /// Lists the connections to be closed once their outgoing bytes are sent. Each is listed until
    /// [`disconnected`](Self::disconnected).
    #[must_use]
    pub fn to_close(&self) -> Vec<ConnId> {
        self.link.to_close()
    }

    /// Gives the earliest guest time at which [`advance`](Self::advance) must be called though nothing else happens;
    /// zero when it has something to do at once.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let relieved = self.link.congested && self.link.waiting() < OUTGOING_BOUND;
        if relieved || self.link.deferred().is_some() {
            return Some(Duration::ZERO);
        }
        let shutdown = self.shutdown.as_ref().filter(|shutdown| !shutdown.off);
        let shutdown = shutdown.map(|it| it.next_poll.min(it.deadline));
        [self.processes.next_deadline(), shutdown].into_iter().flatten().min()
    }

    /// Says whether a connection is to be read now. It is not while so much waits to be sent on it that answers to
    /// what the host may ask would pile up.
    #[must_use]
    pub fn wants_input(&self, conn: ConnId) -> bool {
        self.link.wants_input(conn)
    }

    /// Lists the children to watch, for a driver that waits on descriptors.
    #[must_use]
    pub fn interest(&self) -> Vec<ChildInterest> {
        self.processes.interest(&self.config)
    }

    /// Hears frames that had to wait until outgoing bytes were sent.
    fn hear_deferred(&mut self, os: &mut dyn GuestOs) -> bool {
        let mut changed = false;
        while let Some(conn) = self.link.deferred() {
            changed = true;
            if self.hear(conn, os).is_err() {
                self.link.cut(conn);
            }
        }
        changed
    }

    /// Lets the streams go on that were stopped by a full connection, beginning after the one that filled it.
    fn flush_congested(&mut self, os: &mut dyn GuestOs) -> bool {
        if !self.link.congested || self.link.waiting() >= OUTGOING_BOUND {
            return false;
        }
        self.link.congested = false;
        let first = self.cursor.saturating_add(1);
        let mut ids: Vec<StreamId> = self.streams.range(first..).map(|(id, _)| *id).collect();
        ids.extend(self.streams.range(..first).map(|(id, _)| *id));
        for id in ids {
            self.flush(id, os);
            if self.link.congested {
                break;
            }
        }
        true
    }

    /// Begins the machine's end as [`Request::Shutdown`](vm_guest_protocol::Request::Shutdown) does: every process gets
    /// `signal`, and when all have ended, or after `grace`, what is left is killed and the machine is turned off.
    pub fn shut_down(&mut self, signal: u8, grace: Duration, os: &mut dyn GuestOs) {
        let now = os.monotonic();
        os.signal_all(signal);
        let grace = if planted(Bug::ShutdownKillsAtOnce) { Duration::ZERO } else { grace };
        let deadline = now.saturating_add(grace);
        let earlier = self.shutdown.as_ref().map_or(deadline, |shutdown| shutdown.deadline);
        let off = self.shutdown.as_ref().is_some_and(|shutdown| shutdown.off);
        self.shutdown = Some(Shutdown { deadline: deadline.min(earlier), next_poll: now, off });
    }

    fn advance_shutdown(&mut self, os: &mut dyn GuestOs) -> bool {
        let waiting = self.link.waiting() > 0;
        let Some(shutdown) = self.shutdown.as_mut().filter(|shutdown| !shutdown.off) else {
            return false;
        };
        let now = os.monotonic();
        // What was answered is to reach the host first, while there is time.
        if now < shutdown.deadline && (waiting || os.has_processes()) {
            shutdown.next_poll = now + SHUTDOWN_POLL;
            return false;
        }
        shutdown.off = true;
        os.signal_all(SIGKILL);
        os.sync_all();
        os.power_off();
        true
    }
}
