//! What faults may lead to, for the model.

use super::super::script::Act;
use vm_core::fault::FaultKind;

/// Says whether machines that a fault of this kind befell may die at any time from then on.
pub(super) fn may_kill(kind: FaultKind) -> bool {
    use FaultKind as K;
    matches!(
        kind,
        K::GuestPanic
            | K::VmmKilled
            | K::HostLost
            | K::TornWrite
            | K::LostSync
            | K::PauseStuck
            | K::ResumeStuck
            | K::ResumeFail
            | K::GuestOom
    )
}

/// Says whether a machine that a fault of this kind befell may stand still after a capture that was dropped.
pub(super) fn may_keep_paused(kind: FaultKind) -> bool {
    matches!(kind, FaultKind::PauseStuck | FaultKind::ResumeFail | FaultKind::ResumeStuck)
}

/// Says whether a fault of this kind befalls every machine of the host.
pub(super) fn of_host(kind: FaultKind) -> bool {
    matches!(kind, FaultKind::HostLost | FaultKind::TornWrite | FaultKind::LostSync)
}

/// Says whether programs may end otherwise than they would, or their output be other.
pub(super) fn spoils_programs(kind: FaultKind) -> bool {
    use FaultKind as K;
    matches!(
        kind,
        K::ExecHang
            | K::ExecKilled
            | K::OutputCut
            | K::SpawnFail
            | K::GuestOom
            | K::GuestIo
            | K::GuestDiskFull
            | K::SlowIo
            | K::LinkStall
            | K::LinkDisconnect
    )
}

/// Says whether a fault of this kind may be why an operation failed with this code.
pub(super) fn explains(kind: FaultKind, act: &Act, code: &str) -> bool {
    use FaultKind as K;
    let name = code.split_once(':').map_or(code, |(name, _)| name);
    let is = |codes: &[&str]| codes.contains(&name);
    let boots = matches!(act, Act::Start);
    let loads = matches!(act, Act::Restore { .. } | Act::Revive { .. });
    let captures = matches!(act, Act::Snapshot { .. } | Act::Fork { .. });
    let stored = loads || captures || act.is_of_backend();
    let guest = act.asks_guest();
    match kind {
        K::GuestPanic | K::VmmKilled | K::GuestOom => {
            is(&[
                "guest_crashed",
                "vmm_crashed",
                "disconnected",
                "interrupted",
                "hypervisor_failed",
            ]) || (is(&["boot_failed", "timeout"]) && !guest)
                || (is(&["timeout", "exec_failed", "connect_refused"]) && guest)
        }
        K::HostLost | K::TornWrite | K::LostSync => {
            is(&[
                "guest_crashed",
                "vmm_crashed",
                "disconnected",
                "interrupted",
                "hypervisor_failed",
            ]) || (is(&["boot_failed", "timeout"]))
                || (stored && is(&["host_io", "snapshot_corrupt"]))
        }
        K::BootSlow | K::BootFail | K::BootHang | K::BootPanic => {
            (boots || loads) && is(&["boot_failed", "timeout", "guest_crashed", "vmm_crashed"])
        }
        K::LinkDisconnect | K::LinkStall | K::LinkDelayedAccept | K::LinkShort => {
            is(&["disconnected", "timeout"]) || ((boots || loads) && is(&["boot_failed"]))
        }
        K::SpawnFail => guest && is(&["exec_failed", "resource_exhausted"]),
        K::GuestDiskFull | K::GuestIo => {
            guest && is(&["guest_file", "exec_failed", "resource_exhausted"])
        }
        // The agent answers nobody meanwhile, nor whoever tells it the time.
        K::SlowIo => {
            (guest || captures || matches!(act, Act::Resume)) && is(&["timeout", "disconnected"])
        }
        K::ExecHang | K::ExecKilled | K::OutputCut => {
            guest && is(&["timeout", "exec_failed", "disconnected"])
        }
        K::PauseFail | K::PauseStuck => {
            (captures || matches!(act, Act::Pause))
                && is(&["hypervisor_failed", "timeout", "vmm_crashed", "guest_crashed"])
        }
        K::ResumeFail | K::ResumeStuck => {
            (captures || loads || matches!(act, Act::Resume))
                && is(&["hypervisor_failed", "timeout", "vmm_crashed", "guest_crashed"])
        }
        K::SaveFail => captures && is(&["hypervisor_failed", "host_io"]),
        K::HostDiskFull => stored && is(&["host_io", "resource_exhausted"]),
        K::BitRot => stored && is(&["snapshot_corrupt"]),
        K::VersionSkew => stored && is(&["snapshot_incompatible"]),
        K::LoadFail => loads && is(&["hypervisor_failed"]),
        K::LoadSlow => loads && is(&["timeout"]),
        K::ForkChildFail => captures && is(&["hypervisor_failed", "resource_exhausted"]),
        K::CreateExhausted => {
            (boots || loads || captures || matches!(act, Act::Create))
                && is(&["resource_exhausted"])
        }
        _ => false,
    }
}
