//! What the core reports of its work: a trace under simulation, logs on real machines.

use std::{fmt, time::Duration};
use vm_trait::{Operation, VmId, VmState};

/// Listens to the core. Called often and in the midst of things: be quick, never call back.
pub trait Observer: Send + Sync + fmt::Debug {
    /// Takes note of something that happened on a VM.
    fn record(&self, vm: VmId, occurrence: &Occurrence<'_>);
}

/// Something that happened in the core.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Occurrence<'a> {
    /// An operation was called.
    Begun {
        /// Which.
        operation: Operation,
        /// Counts the operations of a VM.
        call: u64,
        /// What it was called with, for people.
        detail: &'a str,
    },
    /// An operation ended, or was dropped.
    Ended {
        /// Which.
        operation: Operation,
        /// As in `Begun`.
        call: u64,
        /// `ok`, `dropped`, or the error's code.
        outcome: &'static str,
    },
    /// The state changed.
    State {
        /// What it was.
        from: &'a VmState,
        /// What it is.
        to: &'a VmState,
    },
    /// A frame was handed to the link, or came from it.
    Frame {
        /// Whether it was sent by the host.
        sent: bool,
        /// Its stream.
        stream: u32,
        /// Its type and what matters of it.
        frame: &'a vm_guest_protocol::Frame,
    },
    /// The link to the agent was made, after so many tries.
    LinkUp {
        /// Whether the session went on.
        resumed: bool,
        /// Dials that failed before.
        failed_dials: u32,
    },
    /// The link to the agent was lost.
    LinkDown,
    /// Something happened to a stream of the user's.
    Stream {
        /// Counts the streams of a life of the machine, from 1.
        number: u64,
        /// The port, of the guest or of the host.
        port: u32,
        /// What happened.
        change: StreamChange,
    },
    /// A time was measured: a stage of a boot, a pause inside a snapshot.
    Took {
        /// What.
        stage: &'static str,
        /// How long.
        duration: Duration,
    },
}

/// What happens to a stream of the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamChange {
    /// The host opened it.
    Connected,
    /// The guest opened it, and the host took it.
    Accepted,
    /// Its owner dropped it.
    Dropped,
}

/// Ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn record(&self, _vm: VmId, _occurrence: &Occurrence<'_>) {}
}
