//! What the design allows to happen, and what of it need not.

use super::{of_scope, states};
use vm_core::fault::{FaultKind as F, FaultScope as S};
use vm_sim::Cell;
use vm_trait::Operation as O;

/// Operations that are asked of the backend: no machine has a state then.
const OF_THE_BACKEND: [O; 5] =
    [O::Create, O::ImportSnapshot, O::ExportSnapshot, O::DeleteSnapshot, O::MergeSnapshot];
/// The states that a machine can be started or restored in.
const DOWN: [&str; 3] = ["created", "stopped", "crashed"];
/// The states in which a machine can be captured.
const UP: [&str; 2] = ["running", "paused"];

/// Lists everything that may happen, in a fixed order.
#[must_use]
pub fn possible() -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut add = |operations: &[Option<O>], states: &[&'static str], faults: &[Option<F>]| {
        for operation in operations {
            for state in states {
                for fault in faults {
                    cells.push(Cell { operation: *operation, state, fault: *fault });
                }
            }
        }
    };
    let all: Vec<_> =
        O::ALL.iter().filter(|it| !OF_THE_BACKEND.contains(it)).map(|it| Some(*it)).collect();
    add(&all, &states(), &[None]);
    let of = |scope| of_scope(scope).map(Some).collect::<Vec<_>>();
    let guest: Vec<_> = all.iter().copied().filter(|it| it.is_some_and(O::needs_guest)).collect();
    let some = |operation: O| [Some(operation)];

    add(&some(O::Start), &DOWN, &of(S::Create));
    add(&some(O::Start), &DOWN, &of(S::Start));
    add(&some(O::Restore), &DOWN, &of(S::Create));
    add(&some(O::Restore), &DOWN, &of(S::Restore));
    add(&guest, &["running"], &of(S::Running));
    let capture = [O::Snapshot, O::Fork].map(Some);
    add(&capture, &["running"], &of(S::Running));
    add(&[O::Wait, O::Stop].map(Some), &["running"], &of(S::Running));
    // Nothing in the guest goes wrong while it stands still.
    let from_outside = [Some(F::VmmKilled), Some(F::HostLost)];
    add(&capture, &["paused"], &from_outside);
    add(&some(O::Wait), &["paused"], &from_outside);
    add(&[None], &["running"], &of(S::Running));
    add(&[None], &["paused"], &from_outside);
    add(&guest, &["running"], &of(S::Link));
    add(&some(O::Start), &DOWN, &of(S::Link));
    add(&some(O::Resume), &["paused"], &of(S::Link));
    add(&[O::Exec, O::Spawn].map(Some), &["running"], &of(S::Exec));
    // A disk fails, fills or is slow with contents, not with names.
    add(&[O::ReadFile, O::WriteFile].map(Some), &["running"], &[Some(F::GuestIo), Some(F::SlowIo)]);
    add(&some(O::WriteFile), &["running"], &[Some(F::GuestDiskFull)]);
    let of_mounts = [Some(F::MountIo), Some(F::MountSlow)];
    add(&[O::ReadFile, O::WriteFile].map(Some), &["running"], &of_mounts);
    add(&some(O::WriteFile), &["running"], &[Some(F::MountFull)]);
    // Connections through the network are nobody's operation.
    add(&[None], &["running"], &of(S::Network));
    add(&some(O::Pause), &["running"], &of(S::Pause));
    add(&capture, &["running"], &of(S::Pause));
    add(&some(O::Resume), &["paused"], &of(S::Resume));
    add(&capture, &["running"], &of(S::Resume));
    add(&some(O::Snapshot), &UP, &of(S::Snapshot));
    add(&some(O::Fork), &UP, &of(S::Fork));
    add(&some(O::Stop), &["running"], &of(S::Stop));
    add(&[None], &["running"], &of(S::Clock));
    cells
}

/// Says why something need not happen in a long run, if there is a reason.
#[must_use]
pub fn excuse(cell: &Cell) -> Option<&'static str> {
    EXCUSES.iter().find(|(excused, _)| excused == cell).map(|(_, why)| *why)
}

/// Cells that need not happen, each with the reason.
const EXCUSES: &[(Cell, &str)] = &[];
