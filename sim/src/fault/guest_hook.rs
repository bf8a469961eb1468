//! Faults in the guest's system calls.

use super::Vms;
use crate::{
    guest::{OsFault, OsFaults, SysCall},
    world::World,
};
use std::{sync::Arc, time::Duration};
use vm_core::fault::FaultKind;
use vm_guest_agent::os::Errno;
use vm_trait::VmId;

/// The agent, whose calls carry out what the host asks for.
const AGENT: u32 = 1;

/// Brings the faults of the scopes Exec, File and Mount into a guest's system calls. Of Exec and File, only what the
/// agent does for the host is an occasion; what programs do by themselves is not.
pub(crate) struct GuestHook {
    world: Arc<World>,
    vm: VmId,
}

impl GuestHook {
    pub(crate) fn new(world: &Arc<World>, vm: VmId) -> Self {
        Self { world: Arc::clone(world), vm }
    }

    fn strikes(&self, kind: FaultKind) -> bool {
        self.world.strike(kind, Vms::One(self.vm)).is_some()
    }
}

impl OsFaults for GuestHook {
    fn on_syscall(&mut self, call: &SysCall<'_>) -> Option<OsFault> {
        match call {
            SysCall::Spawn { pid: AGENT, .. } => {
                self.strikes(FaultKind::SpawnFail).then_some(OsFault::Fail(Errno::AGAIN))
            }
            SysCall::Started { .. } => {
                if self.strikes(FaultKind::ExecHang) {
                    return Some(OsFault::Hang);
                }
                if self.strikes(FaultKind::ExecKilled) {
                    return Some(OsFault::Kill(9));
                }
                let fired = self.world.strike(FaultKind::OutputCut, Vms::One(self.vm))?;
                Some(OsFault::CutOutput(fired.random % 64))
            }
            // The agent looks users up when it starts a program, which is no file operation of the host's.
            SysCall::Open { pid: AGENT, path: "/etc/passwd" | "/etc/group", .. } => None,
            SysCall::Open { pid: AGENT, .. } => {
                self.strikes(FaultKind::GuestIo).then_some(OsFault::Fail(Errno::IO))
            }
            SysCall::Write { pid: AGENT, .. } => {
                if self.strikes(FaultKind::GuestDiskFull) {
                    return Some(OsFault::Fail(Errno::NOSPC));
                }
                self.io()
            }
            SysCall::Read { pid: AGENT } => self.slow(FaultKind::SlowIo),
            SysCall::Sync { pid: AGENT } => self.io(),
            // On the host's disk, programs and the agent meet the same.
            SysCall::Share { write, .. } => {
                if *write && self.strikes(FaultKind::MountFull) {
                    return Some(OsFault::Fail(Errno::NOSPC));
                }
                if self.strikes(FaultKind::MountIo) {
                    return Some(OsFault::Fail(Errno::IO));
                }
                self.slow(FaultKind::MountSlow)
            }
            _ => None,
        }
    }
}

impl GuestHook {
    fn io(&self) -> Option<OsFault> {
        if self.strikes(FaultKind::GuestIo) {
            return Some(OsFault::Fail(Errno::IO));
        }
        self.slow(FaultKind::SlowIo)
    }

    fn slow(&self, kind: FaultKind) -> Option<OsFault> {
        let fired = self.world.strike(kind, Vms::One(self.vm))?;
        Some(OsFault::Slow(fired.amount(Duration::from_millis(1), Duration::from_secs(2))))
    }
}
