//! The vocabulary of faults: what can go wrong below the core, on real machines and on simulated ones.
//!
//! A fault belongs to one operation or condition, has a name and a meaning on real hardware. How faults are planned
//! and made to happen is the backend's business; the contract asks for them by these names.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc, time::Duration};
use vm_trait::{VmId, VmInstance};

macro_rules! fault_kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal in $scope:ident,)*) => {
        /// One way in which something below the core fails.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[non_exhaustive]
        pub enum FaultKind {
            $($(#[$doc])* $name,)*
        }

        impl FaultKind {
            /// Lists every kind, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// Names the kind as plans and reports do, in snake case.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Gives what the fault belongs to; it is matched nowhere else.
            #[must_use]
            pub fn scope(self) -> FaultScope {
                match self { $(Self::$name => FaultScope::$scope,)* }
            }
        }
    };
}

fault_kinds! {
    /// The host has no room for another machine.
    CreateExhausted = "create_exhausted" in Create,
    /// The boot takes much longer than usual.
    BootSlow = "boot_slow" in Start,
    /// The hypervisor refuses to enter the kernel.
    BootFail = "boot_fail" in Start,
    /// The agent never listens.
    BootHang = "boot_hang" in Start,
    /// The kernel panics before the agent listens.
    BootPanic = "boot_panic" in Start,
    /// The guest's kernel panics.
    GuestPanic = "guest_panic" in Running,
    /// The process that runs the machine is killed.
    VmmKilled = "vmm_killed" in Running,
    /// The guest's kernel kills its largest process for want of memory.
    GuestOom = "guest_oom" in Running,
    /// The host dies with all its machines; what was not synced to its disk is lost.
    HostLost = "host_lost" in Running,
    /// The connection to the agent breaks.
    LinkDisconnect = "link_disconnect" in Link,
    /// A connection moves no bytes for a while: the agent's, or a stream to a vsock port.
    LinkStall = "link_stall" in Link,
    /// Reads and writes of a connection, the agent's or a stream to a port of the guest, move fewer bytes than they could.
    LinkShort = "link_short" in Link,
    /// The agent accepts a connection late.
    LinkDelayedAccept = "link_delayed_accept" in Link,
    /// The guest has no process or memory left to start a program.
    SpawnFail = "spawn_fail" in Exec,
    /// The program never gets on.
    ExecHang = "exec_hang" in Exec,
    /// The program is killed by a signal from outside.
    ExecKilled = "exec_killed" in Exec,
    /// The program's outputs are closed before it has written everything.
    OutputCut = "output_cut" in Exec,
    /// The guest's disk is full.
    GuestDiskFull = "guest_disk_full" in File,
    /// The guest's disk fails.
    GuestIo = "guest_io" in File,
    /// The guest's disk is slow.
    SlowIo = "slow_io" in File,
    /// The hypervisor refuses to pause.
    PauseFail = "pause_fail" in Pause,
    /// The hypervisor does not answer a pause.
    PauseStuck = "pause_stuck" in Pause,
    /// The hypervisor refuses to resume.
    ResumeFail = "resume_fail" in Resume,
    /// The hypervisor does not answer a resume.
    ResumeStuck = "resume_stuck" in Resume,
    /// The machine cannot save its state.
    SaveFail = "save_fail" in Snapshot,
    /// The host's disk is full.
    HostDiskFull = "host_disk_full" in Snapshot,
    /// The host dies during a write, which reaches the disk in part.
    TornWrite = "torn_write" in Snapshot,
    /// The host's disk says that a write is durable when it is not, and the host dies later.
    LostSync = "lost_sync" in Snapshot,
    /// A stored byte changes.
    BitRot = "bit_rot" in Restore,
    /// The machine cannot load a state.
    LoadFail = "load_fail" in Restore,
    /// Loading takes much longer than usual.
    LoadSlow = "load_slow" in Restore,
    /// The state was written by another version.
    VersionSkew = "version_skew" in Restore,
    /// A child cannot be made.
    ForkChildFail = "fork_child_fail" in Fork,
    /// The guest ignores the request to stop.
    StopIgnored = "stop_ignored" in Stop,
    /// The guest's wall clock jumps ahead.
    ClockForward = "clock_forward" in Clock,
    /// The guest's wall clock jumps back.
    ClockBack = "clock_back" in Clock,
    /// The host cannot open, read or write a file in a directory that the guest mounts.
    MountIo = "mount_io" in Mount,
    /// The host's disk is full under a directory that the guest mounts.
    MountFull = "mount_full" in Mount,
    /// The host's disk is slow under a directory that the guest mounts.
    MountSlow = "mount_slow" in Mount,
    /// The host refuses a TCP connection of the guest, or one through a mapped port, that it would else have made.
    NetRefused = "net_refused" in Network,
    /// A TCP connection between the guest and its host is reset; a part of what is under way still arrives.
    NetReset = "net_reset" in Network,
    /// A TCP connection between the guest and its host moves no bytes for a while.
    NetSlow = "net_slow" in Network,
}

/// What a fault belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum FaultScope {
    Create,
    Start,
    Running,
    Link,
    Exec,
    File,
    Mount,
    Network,
    Pause,
    Resume,
    Snapshot,
    Restore,
    Fork,
    Stop,
    Clock,
}

/// A text that names no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a fault; `vmdst doctor` lists them")]
pub struct UnknownFault(String);

impl FromStr for FaultKind {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.iter().copied().find(|kind| kind.name() == text);
        found.ok_or_else(|| UnknownFault(text.to_owned()))
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A fault that is to happen once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultOrder {
    /// Which.
    pub kind: FaultKind,
    /// On which VM only; else on any.
    pub vm: Option<VmId>,
    /// How many occasions to let pass first. A fault of the scopes Running and Clock has no occasions and happens at
    /// once, or after `amount`.
    pub skip: u32,
    /// How strong it is where that means something: how long a delay or stall lasts, how far a clock jumps.
    pub amount: Option<Duration>,
}

impl FaultOrder {
    /// Orders a fault at the next occasion, on any VM.
    #[must_use]
    pub fn next(kind: FaultKind) -> Self {
        Self { kind, vm: None, skip: 0, amount: None }
    }

    /// Limits it to one VM.
    #[must_use]
    pub fn on(mut self, vm: VmId) -> Self {
        self.vm = Some(vm);
        self
    }

    /// Lets so many occasions pass first.
    #[must_use]
    pub fn after(mut self, occasions: u32) -> Self {
        self.skip = occasions;
        self
    }

    /// Sets how strong it is.
    #[must_use]
    pub fn with_amount(mut self, amount: Duration) -> Self {
        self.amount = Some(amount);
        self
    }
}

/// The fault cannot be made to happen here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} cannot happen here: {reason}")]
pub struct FaultRefused {
    /// Which.
    pub kind: FaultKind,
    /// Why not.
    pub reason: String,
}

/// Makes faults happen on the machines of one backend.
pub trait FaultControl: Send + Sync + fmt::Debug {
    /// Says whether this kind can be made to happen at all.
    fn can(&self, kind: FaultKind) -> bool;

    /// Orders a fault.
    ///
    /// # Errors
    /// [`FaultRefused`] where it could never fire.
    fn order(&self, order: FaultOrder) -> Result<(), FaultRefused>;

    /// Takes note of a machine that was not made through the target's backend, as the child of a fork is, for faults that
    /// its guest has to be asked for. Default: nothing.
    fn meet(&self, _vm: &Arc<dyn VmInstance>) {}

    /// Counts how often each kind has happened.
    fn fired(&self) -> BTreeMap<FaultKind, u64>;

    /// Lists the orders that have not happened yet.
    fn pending(&self) -> Vec<FaultOrder>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_found_by_what_it_prints() {
        for kind in FaultKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(*kind));
        }
        let unknown = "no_such_fault".parse::<FaultKind>().unwrap_err();
        assert!(unknown.to_string().contains("no_such_fault"), "{unknown}");
    }
}
