//! Counters of a machine.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What a backend can count. `None` where it cannot, never a made-up zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct VmMetrics {
    /// Time since the handshake of this life, pauses included.
    pub uptime: Option<Duration>,
    /// Time spent paused in this life.
    pub paused: Option<Duration>,
    /// CPU time used by the machine.
    pub cpu_time: Option<Duration>,
    /// Memory that the guest uses, in bytes.
    pub memory_used_bytes: Option<u64>,
    /// Exits from the guest to the VMM.
    pub vm_exits: Option<u64>,
    /// Processes that the agent started in this life and that still run.
    pub processes: Option<u64>,
    /// Bytes sent to the agent.
    pub agent_bytes_sent: Option<u64>,
    /// Bytes received from the agent.
    pub agent_bytes_received: Option<u64>,
    /// How often the connection to the agent was made anew after a loss.
    pub agent_reconnects: Option<u64>,
    /// How long the stages of the last boot or restore took.
    pub boot: Option<BootTimes>,
}

/// How long the stages of a boot or restore took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BootTimes {
    /// From the request until the machine exists.
    pub machine: Duration,
    /// Until the kernel was entered, or the state was loaded.
    pub kernel: Duration,
    /// Until the handshake was complete.
    pub handshake: Duration,
}

impl BootTimes {
    /// Puts times together; for backends.
    #[must_use]
    pub fn new(machine: Duration, kernel: Duration, handshake: Duration) -> Self {
        Self { machine, kernel, handshake }
    }

    /// Adds the stages up.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.machine + self.kernel + self.handshake
    }
}
