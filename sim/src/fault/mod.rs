//! Faults: what is planned, and when it happens.

mod engine;
mod guest_hook;
mod plan;

pub(crate) use engine::{Engine, Fired, Vms};
pub(crate) use guest_hook::GuestHook;
pub use plan::{FaultPlan, FaultRule, FaultTrigger, PlanError};

use vm_core::fault::{FaultKind, FaultScope};

/// Says whether the simulator can make this kind of fault happen.
#[must_use]
pub fn can(kind: FaultKind) -> bool {
    use FaultKind as K;
    matches!(
        kind,
        K::CreateExhausted
            | K::BootSlow
            | K::BootFail
            | K::BootHang
            | K::BootPanic
            | K::GuestPanic
            | K::VmmKilled
            | K::GuestOom
            | K::HostLost
            | K::LinkDisconnect
            | K::LinkStall
            | K::LinkShort
            | K::LinkDelayedAccept
            | K::SpawnFail
            | K::ExecHang
            | K::ExecKilled
            | K::OutputCut
            | K::GuestDiskFull
            | K::GuestIo
            | K::SlowIo
            | K::MountIo
            | K::MountFull
            | K::MountSlow
            | K::NetRefused
            | K::NetReset
            | K::NetSlow
            | K::PauseFail
            | K::PauseStuck
            | K::ResumeFail
            | K::ResumeStuck
            | K::SaveFail
            | K::HostDiskFull
            | K::TornWrite
            | K::LostSync
            | K::BitRot
            | K::LoadFail
            | K::LoadSlow
            | K::VersionSkew
            | K::ForkChildFail
            | K::StopIgnored
            | K::ClockForward
            | K::ClockBack
    )
}

/// Says whether a kind befalls a running machine by itself, with no operation to be matched at.
pub(crate) fn is_spontaneous(kind: FaultKind) -> bool {
    matches!(kind.scope(), FaultScope::Running | FaultScope::Clock)
}
