//! What a machine reports unasked.

use crate::{exec::ProcessId, id::SnapshotId, state::VmState};
use futures_core::stream::BoxStream;
use serde::{Deserialize, Serialize};

/// A stream of events, from the call that made it until the last handle of the machine is dropped.
///
/// A reader that falls more than 1,024 events behind loses the oldest and gets one [`VmEvent::Missed`] in their place.
pub type EventStream = BoxStream<'static, VmEvent>;

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmEvent {
    /// The state changed.
    State {
        /// What it was.
        from: VmState,
        /// What it is.
        to: VmState,
    },
    /// The connection to the agent was lost and is being made anew.
    AgentLost,
    /// The agent answers again.
    AgentBack,
    /// A program was started.
    ProcessStarted(ProcessId),
    /// A snapshot was taken.
    SnapshotTaken(SnapshotId),
    /// The reader was too slow for this many events.
    Missed(u64),
}
