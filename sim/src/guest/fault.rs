//! Hooks by which a fault plan reaches into the guest's system calls.

use std::{fmt, time::Duration};
use vm_guest_agent::os::Errno;

/// A system call that is about to be carried out. `pid` is 1 for the agent's own calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SysCall<'a> {
    /// A program is started.
    Spawn {
        /// Who starts it.
        pid: u32,
        /// The program's file.
        path: &'a str,
    },
    /// A process was started for the agent and is about to run for the first time. This is where
    /// [`OsFault::Hang`], [`OsFault::Kill`], [`OsFault::OomKill`] and [`OsFault::CutOutput`] apply.
    Started {
        /// The new process.
        pid: u32,
        /// The program's file.
        path: &'a str,
    },
    /// A file is opened or made.
    Open {
        /// Who opens it.
        pid: u32,
        /// The file.
        path: &'a str,
        /// Whether it is opened for writing.
        write: bool,
    },
    /// A file is read.
    Read {
        /// Who reads.
        pid: u32,
    },
    /// A file is written.
    Write {
        /// Who writes.
        pid: u32,
        /// How many bytes.
        len: usize,
    },
    /// A file or directory is made durable.
    Sync {
        /// Who asks.
        pid: u32,
    },
    /// A file in a directory of the host is opened, read, written or made durable; beside what else is asked of the call.
    Share {
        /// Who does it.
        pid: u32,
        /// Whether it is written.
        write: bool,
    },
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OsFault {
    /// The call fails. For all but `Started`.
    Fail(Errno),
    /// The call takes this long. For all but `Started`; the agent's own wait is found in
    /// [`SimOs::take_agent_delay`](super::SimOs::take_agent_delay).
    Slow(Duration),
    /// The process's outputs break after this many bytes. For `Started`.
    CutOutput(u64),
    /// The process is never scheduled again, until it is killed. For `Started`.
    Hang,
    /// The process is killed by this signal. For `Started`.
    Kill(u8),
    /// The process is killed for want of memory. For `Started`.
    OomKill,
}

/// Decides which system calls go wrong. Installed with [`SimOs::set_faults`](super::SimOs::set_faults); it is no
/// part of the guest's state and is neither cloned nor saved.
pub trait OsFaults: Send {
    /// Says whether this call goes wrong, and how. A fault that does not belong to the call is not carried out.
    fn on_syscall(&mut self, call: &SysCall<'_>) -> Option<OsFault>;

    /// Hears that a fault took effect.
    fn fired(&mut self, call: &SysCall<'_>, fault: OsFault) {
        let _ = (call, fault);
    }
}

impl OsFault {
    /// Says whether the fault means something for the call.
    #[must_use]
    pub fn applies_to(self, call: &SysCall<'_>) -> bool {
        match self {
            Self::Fail(_) | Self::Slow(_) => !matches!(call, SysCall::Started { .. }),
            Self::CutOutput(_) | Self::Hang | Self::Kill(_) | Self::OomKill => {
                matches!(call, SysCall::Started { .. })
            }
        }
    }
}

/// Where the fault hook is kept; empty in every clone.
#[derive(Default)]
pub(super) struct FaultSlot(pub(super) Option<Box<dyn OsFaults>>);

impl FaultSlot {
    /// Asks the hook about a call, and tells it when its answer is carried out.
    pub(super) fn ask(&mut self, call: &SysCall<'_>) -> Option<OsFault> {
        let faults = self.0.as_mut()?;
        let fault = faults.on_syscall(call).filter(|fault| fault.applies_to(call))?;
        faults.fired(call, fault);
        Some(fault)
    }
}

impl Clone for FaultSlot {
    fn clone(&self) -> Self {
        Self(None)
    }
}

impl fmt::Debug for FaultSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "FaultSlot(installed)" } else { "FaultSlot(none)" })
    }
}
