//! [`AgentCore`]: the agent as a state machine without I/O.

use crate::os::{Child, GuestOs};
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vm_guest_protocol::DecodeError;

/// Names a connection of the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConnId(pub u64);

/// The bounds that an agent works in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentConfig {
    /// How many bytes of a channel's input the agent holds.
    pub window: u32,
    /// How many of the last output bytes of each channel a process without a reader keeps.
    pub retained_detached: usize,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self { window: vm_guest_protocol::DEFAULT_WINDOW, retained_detached: 256 << 10 }
    }
}

/// What the host did against the protocol. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// Bytes that are no frame.
    #[error(transparent)]
    Decode(#[from] DecodeError),
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

/// The agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentCore {
    config: AgentConfig,
}

impl AgentCore {
    /// Makes an agent that nothing is connected to.
    #[must_use]
    pub fn new(config: AgentConfig) -> Self {
        Self { config }
    }

    /// Takes note of a new connection.
    pub fn connected(&mut self, conn: ConnId) {
        let _ = conn;
    }

    /// Takes bytes that the host sent.
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
        let _ = (conn, bytes, os);
        Ok(())
    }

    /// Takes note that a connection is gone.
    pub fn disconnected(&mut self, conn: ConnId) {
        let _ = conn;
    }

    /// Takes note that every connection is gone, as after a restore.
    pub fn reset_connections(&mut self) {}

    /// Moves output and input, and takes note of ends, timeouts and the shutdown's grace. Says whether anything
    /// changed.
    pub fn advance(&mut self, os: &mut dyn GuestOs) -> bool {
        let _ = os;
        false
    }

    /// Gives the bytes that wait to be sent on a connection; the driver takes from the front what it sent.
    pub fn outgoing(&mut self, conn: ConnId) -> Option<&mut BytesMut> {
        let _ = conn;
        None
    }

    /// Lists the connections to be closed once their outgoing bytes are sent.
    #[must_use]
    pub fn to_close(&self) -> Vec<ConnId> {
        Vec::new()
    }

    /// Gives the earliest guest time at which [`advance`](Self::advance) must be called though nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        None
    }

    /// Says whether a connection is to be read; else the host waits until what it asked for has been sent.
    #[must_use]
    pub fn wants_input(&self, conn: ConnId) -> bool {
        let _ = conn;
        true
    }

    /// Lists the children to watch, for a driver that waits on descriptors.
    #[must_use]
    pub fn interest(&self) -> Vec<ChildInterest> {
        let _ = &self.config;
        Vec::new()
    }
}
